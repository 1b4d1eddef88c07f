"""What hidden states of every layer and their CKA cost over the forward passes that they come from.

    python benchmarks/similarity.py [--layers 4 --width 768 --prompts 80 --rounds 4]

A dense model of random fp32 weights in Llama-3.1-8B's proportions, and random prompts of 16 to 128 tokens; passes
alone and passes with hidden states, products and CKA (200 draws) take turns in one process, on one thread, by CPU
seconds, which other work on the machine disturbs least; the best of each counts. Writes results/similarity.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from prism_mcore import platform
from prism_mcore.analyze.cka import gram, similarities
from prism_mcore.analyze.hidden_states import packed, passes, pooled_states
from prism_mcore.model.build import build_chunks
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_config, spec_from_config
from prism_mcore.parallel import ParallelSettings, init_groups

RESULTS = Path(__file__).parent / "results" / "similarity.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = platform.start()
    changed = {"num_hidden_layers": options.layers, "hidden_size": options.width, "vocab_size": 4096}
    changed |= {"num_attention_heads": options.width // 128, "num_key_value_heads": options.width // 512}
    changed |= {"intermediate_size": options.width * 7 // 2, "head_dim": 128}
    spec = spec_from_config(read_config("llama-3.1-8b") | changed)
    groups = init_groups(ParallelSettings())
    layers = [list(range(len(spec.pattern)))]
    (model,) = build_chunks(spec, layers, groups, Ops({}, device), dtype=torch.float32, device=device)
    model.initialise(0)
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (options.prompts,), generator=random).tolist()
    prompts = [torch.randint(spec.vocab_size, (n,), generator=random).tolist() for n in lengths]
    sides: dict[str, Callable[[], object]] = {
        "passes": lambda: run_passes(model, prompts),
        "passes and hidden states": lambda: pooled_states(model, prompts),
        "products and CKA": lambda: compare(states),
    }
    states = pooled_states(model, prompts)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, run in sides.items():
            start = time.process_time()
            run()
            seconds[side].append(time.process_time() - start)
    best = {side: min(found) for side, found in seconds.items()}
    # Products are of each model; CKA is of two models, so that half of it is each one's.
    extra = best["passes and hidden states"] + best["products and CKA"] - best["passes"]
    results = {
        "tokens": sum(lengths),
        "layers": options.layers,
        "width": options.width,
        "overhead": extra / best["passes"],
    }
    results |= {"cpu_s": {side: [round(one, 3) for one in found] for side, found in seconds.items()}}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    platform.shutdown()


@torch.inference_mode()
def run_passes(model: HybridModel, prompts: list[list[int]]) -> None:
    """The same passes, nothing taken from them but the end."""
    for places in passes(prompts, 4096):
        batch = packed([prompts[place] for place in places])
        model.hidden(batch, torch.arange(batch.position_ids.shape[1]))


def compare(states: torch.Tensor) -> None:
    """Two models' products, and one pair's CKA, with its interval."""
    first, second = gram(states), gram(states + 0.1)
    similarities(first, second, draws=200, seed=0)


if __name__ == "__main__":
    main()
