"""Compare our model with transformers, layer by layer: `python tools/verify_hf.py HF_DIR [--tp N --pp N]`.

Both run on the CPU in fp32, one after the other, ours on tp x pp processes. For the output of every sub-layer and for
the logits the largest difference is printed relative to the largest number of transformers'. The exit code is 0 where
all are within the tolerance, 1 where one is not, 2 where they could not be compared.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from prism_mcore.console import console as open_console
from prism_mcore.console import say, styled
from prism_mcore.convert.read import read_directory
from prism_mcore.evaluate.checks import check
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec
from prism_mcore.parallel import Groups

LOGITS, EMBEDDING = "logits", "embedding"


@dataclass(frozen=True)
class Difference:
    """What differs most in one output.

    Difference(output="layer 3 mlp", largest=2.4e-5, relative=6.1e-7)
    """

    output: str
    largest: float  # max |ours - theirs|
    relative: float  # the same over max |theirs|; nan where either has a nan


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = open_console()
    try:
        differences = verify(options, console)
    except (ValueError, OSError) as error:
        say(f"verify_hf: {error}", stderr=True)
        return 2
    failed = [d.output for d in differences if not d.relative <= options.tolerance]
    console.print(_table(differences, options.tolerance))
    if failed:
        console.print(f"FAIL: {len(failed)} of {len(differences)} outputs differ, the first is {failed[0]}")
        return 1
    console.print(f"PASS: all {len(differences)} outputs agree within {options.tolerance:g}")
    return 0


def verify(options: argparse.Namespace, console: Console) -> list[Difference]:
    """The differences of every output, in the order of the forward pass."""
    from prism_mcore.evaluate.scoring import read_token_lists

    source = read_directory(options.hf)
    spec = source.spec()
    source.tensors(spec)  # what is missing or too much is said here, once
    tokens = (
        read_token_lists(options.tokens, spec.vocab_size) if options.tokens else random_tokens(spec, options.length)
    )
    settings = ScoreSettings.model_validate(
        {
            "parallel": {"tp": options.tp, "pp": options.pp, "sequence_parallel": options.sequence_parallel},
            "precision": {"dtype": "fp32"},
        }
    )
    check(settings, spec, options.tp * options.pp, tokens.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        with console.status("running transformers"), ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(write_reference, options.hf, spec, tokens, reference).result()
        with console.status(f"running prism_mcore, tp {options.tp} x pp {options.pp}"), gpus_hidden():
            found = {d.output: d for d in _run_ranks(options.hf, settings, tokens, reference)}
    return [found[name] for name in output_names(spec)]


@contextmanager
def gpus_hidden() -> Iterator[None]:
    """Processes started inside compute on the CPU, as transformers does here."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def random_tokens(spec: ModelSpec, length: int) -> Tensor:
    """[2, length] token ids, the same every time."""
    return torch.randint(spec.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def output_names(spec: ModelSpec) -> list[str]:
    """The residual stream after the embedding and after every sub-layer, then the logits."""
    layers = [f"sub-layer {index} {LAYER_NAMES[kind]}" for index, kind in enumerate(spec.pattern)]
    return [EMBEDDING, *layers, LOGITS]


# --- transformers -----------------------------------------------------------------------------------------------------


def write_reference(hf: Path, spec: ModelSpec, tokens: Tensor, out: Path) -> None:
    """transformers' residual stream before every norm, [b, s, d], and its logits [b, s, v], as a safetensors file."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # transformers 5 reads head_dim alone and not Nemotron-H's own attention_head_dim
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, head_dim=spec.head_dim)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # transformers 5.23 clamps Nemotron-H's time steps at time_step_min, which no file asks for
            module.time_step_limit = spec.dt_limit
    norms = _norms(model, spec)
    # What goes into the norm of a sub-layer is what came out of the one before.
    names = output_names(spec)[:-1]
    kept: dict[str, Tensor] = {}
    for name, norm in zip(names, norms, strict=True):
        norm.register_forward_pre_hook(lambda _, inputs, name=name: kept.update({name: inputs[0].clone()}))
    with torch.no_grad():
        kept[LOGITS] = model(input_ids=tokens, use_cache=False).logits.float().contiguous()
    save_file(kept, out)


def _norms(model: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """transformers' norms in the order of our sub-layers, then the final one."""
    body = model.model
    if spec.family == "nemotron_h":
        return [*(layer.norm for layer in body.layers), body.norm_f]
    pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in body.layers)
    return [*(norm for pair in pairs for norm in pair), body.norm]


# --- ours -------------------------------------------------------------------------------------------------------------


def _run_ranks(hf: Path, settings: ScoreSettings, tokens: Tensor, reference: Path) -> list[Difference]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.parallel.tp * settings.parallel.pp,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id="verify_hf",
    )
    try:
        return [d for rank in elastic_launch(config, compare)(hf, settings, tokens, reference).values() for d in rank]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ValueError(f"rank {rank}: {failure.message}") from error


@record
def compare(hf: Path, settings: ScoreSettings, tokens: Tensor, reference: Path) -> list[Difference]:
    """One rank of ours: what this rank has to say of the outputs that it computes."""
    from prism_mcore import platform
    from prism_mcore.convert.online import model_from_hf
    from prism_mcore.evaluate.scoring import score
    from prism_mcore.parallel import init_groups

    device = platform.start()
    groups = init_groups(settings.parallel)
    chunks = model_from_hf(hf, settings, groups, device, seq_len=tokens.shape[1])
    names, differences = output_names(chunks[0].spec), []

    def note(name: str, ours: Tensor, theirs: Tensor) -> None:
        differences.append(difference(name, ours, theirs))

    with safe_open(reference, "pt") as theirs:

        def see(index: int, x: Tensor) -> None:
            whole = _whole(x, settings, groups)
            if groups.tp_rank == 0:
                note(names[index], whole[: tokens.numel()].unflatten(0, tokens.shape), theirs.get_tensor(names[index]))

        for chunk in chunks:
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(lambda module, inputs, x: see(0, x))
            for index, layer in chunk.layers.items():
                layer.register_forward_hook(
                    lambda module, inputs, out, index=int(index): see(index + 1, module.total(*out))
                )
        score(
            chunks,
            tokens,
            groups,
            lambda sequences, logprobs, logits: note(LOGITS, logits, theirs.get_tensor(LOGITS)),
            micro_batch=len(tokens),
            logits=True,
        )
    platform.shutdown()
    return differences


def _whole(x: Tensor, settings: ScoreSettings, groups: Groups) -> Tensor:
    """[t, 1, d], or a sequence-parallel part of it, -> [t, d]."""
    parts = [x]
    if settings.parallel.sequence_parallel:
        parts = [torch.empty_like(x) for _ in range(groups.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=groups.tp)
    return torch.cat(parts).squeeze(1)


def difference(name: str, ours: Tensor, theirs: Tensor) -> Difference:
    """What differs between two tensors of one shape."""
    largest = float((ours - theirs).abs().max())
    return Difference(name, largest, largest / float(theirs.abs().max()))


def _table(differences: list[Difference], tolerance: float) -> Table:
    table = Table("output", "largest difference", "relative to the largest number", "")
    for d in differences:
        verdict = styled("ok", "green") if d.relative <= tolerance else styled("differs", "red")
        table.add_row(d.output, f"{d.largest:.2e}", f"{d.relative:.2e}", verdict)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf", type=Path, metavar="HF_DIR", help="Hugging Face directory with the model")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="cut activations over the tensor ranks")
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help="JSON: equal-length lists of token ids (default: random ones)"
    )
    parser.add_argument(
        "--length", type=int, default=128, metavar="N", help="tokens of each of the 2 random sequences (default: 128)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X", help="largest relative difference (default: 1e-5)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
