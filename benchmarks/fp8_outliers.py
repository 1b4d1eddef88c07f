"""Where FP8 fails: one channel much larger than the others, and what each recipe makes of it, on a CPU.

    python benchmarks/fp8_outliers.py [--model runs/fp8/dense-off-0] [--corpus runs/demo/corpus]

A channel of the MLP is multiplied by a power of two and the column of the next weight divided by it: the same function
to the last bit of bf16, for any power. In FP8 a scale must span the outlier, so that what shares it loses its bits, and
what lies 2**15 below it and more becomes zero. Tensorwise everything shares it; in blocks 128 numbers of each token do.
First a product of random matrices, then the held-out loss of a trained model (one that fp8_convergence.py left).
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prism_kernels.fp8 import E4M3, Recipe
from prism_kernels.fp8_linear.reference import fp8_linear
from prism_kernels.quantize.reference import fp8_quantize, fp8_quantize_weight
from prism_mcore import platform
from prism_mcore.batch import PackedBatch
from prism_mcore.checkpoint.folder import checkpoint_in
from prism_mcore.checkpoint.load import load_weights
from prism_mcore.data.token_file import TokenFile
from prism_mcore.evaluate.scoring import one_document_each
from prism_mcore.model.build import build_chunks
from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_spec
from prism_mcore.parallel import ParallelSettings, init_groups

POWERS = list(range(0, 25, 2))
RECIPES: tuple[Recipe, ...] = ("tensorwise", "blockwise")
DOMAINS = ("general", "code", "math", "science", "sums")
ROWS, LENGTH = 8, 128  # of each domain


def product_errors(t: int = 512, k: int = 1024, n: int = 512) -> dict[str, list[float]]:
    """|y - exact| / |exact| of x [t, k] times w [n, k], by the outlier's power of two."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(t, k, generator=generator), torch.randn(n, k, generator=generator)
    exact = x.double() @ w.double().t()
    errors: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for power in POWERS:
        large, small = x.clone(), w.clone()
        large[:, 7] *= 2.0**power
        small[:, 7] /= 2.0**power
        for recipe in RECIPES:
            operands = fp8_quantize(large, recipe, E4M3, columns=False)[0], fp8_quantize_weight(small, recipe, E4M3)
            y = fp8_linear(*operands, torch.float32).double()
            errors[recipe].append(float((y - exact).norm() / exact.norm()))
    return errors


def batches_of(corpus: Path) -> list[PackedBatch]:
    """The last rows of each domain, each row a document of its own: held out, as training held out the last 5%."""
    batches = []
    for domain in DOMAINS:
        file = TokenFile(corpus / domain)
        tokens = np.empty(ROWS * LENGTH, file.dtype)
        file.read(file.num_tokens - len(tokens), tokens)
        batches.append(one_document_each(torch.from_numpy(tokens.astype(np.int64)).view(ROWS, LENGTH)))
    return batches


def model_losses(run: Path, corpus: Path) -> dict[str, list[float]]:
    """Nats per token of the run's model in bf16 and with each recipe, by the outlier's power of two."""
    device = platform.start()
    groups, spec = init_groups(ParallelSettings()), read_spec(run.parent / "dense.json")
    ops = Ops({"fp8_linear": "reference"}, device)
    layers, batches = [list(range(len(spec.pattern)))], batches_of(corpus)
    losses: dict[str, list[float]] = {}
    kinds: dict[str, Fp8 | None] = {"off": None}
    kinds.update({recipe: Fp8(recipe, ops, groups.tp) for recipe in RECIPES})
    for name, fp8 in kinds.items():
        (model,) = build_chunks(spec, layers, groups, ops, dtype=torch.bfloat16, device=device, fp8=fp8)
        load_weights(checkpoint_in(run), [model], groups)
        mixer, before = model.layers["3"].mixer, 0
        losses[name] = []
        for power in POWERS:
            with torch.no_grad():
                mixer.gate_up.weight[spec.ffn_size + 7] *= 2.0 ** (power - before)
                mixer.down.weight[:, 7] /= 2.0 ** (power - before)
                sums = [model(batch)[0] for batch in batches]
            losses[name].append(float(sum(sums)) / sum(batch.num_tokens for batch in batches))
            before = power
    platform.shutdown()
    return losses


def draw(errors: dict[str, list[float]], losses: dict[str, list[float]], picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for recipe, colour in (("tensorwise", "C1"), ("blockwise", "C2")):
        left.plot(POWERS, errors[recipe], "o-", color=colour, label=f"FP8 {recipe}")
        right.plot(POWERS, losses[recipe], "o-", color=colour, label=f"FP8 {recipe}")
    right.plot(POWERS, losses["off"], "o-", color="C0", label="bf16")
    left.set(title="one product, 1,024 channels", ylabel="relative error", yscale="log")
    right.set(title="a trained dense model, one of 384 MLP channels", ylabel="held-out loss (nats per token)")
    for axes in (left, right):
        axes.set_xlabel("outlier: one channel times 2 to the power of")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/fp8/dense-off-0"), help="a run of fp8_convergence.py")
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo/corpus"), help="the demo's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fp8_outliers.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/fp8-outliers.png"))
    arguments = parser.parse_args()
    errors, losses = product_errors(), model_losses(arguments.model, arguments.corpus)
    result = {"device": "cpu", "powers": POWERS, "product_relative_error": errors, "model_held_out_loss": losses}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(errors, losses, arguments.picture)
    print("power  product: tensorwise, blockwise   model: bf16, tensorwise, blockwise")
    for i, power in enumerate(POWERS):
        shown = [f"{errors[recipe][i]:.3f}" for recipe in RECIPES]
        shown += [f"{losses[recipe][i]:.4f}" for recipe in ("off", *RECIPES)]
        print(f"{power:>5}  {'  '.join(shown)}")


if __name__ == "__main__":
    main()
