"""A model and its tokenizer in one call, for notebooks and scripts: `prism_mcore.load_model("DIR")`."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from prism_mcore import platform
from prism_mcore.checkpoint.folder import checkpoint_in
from prism_mcore.checkpoint.load import load_weights
from prism_mcore.convert.offline import source_of
from prism_mcore.convert.online import load_hf
from prism_mcore.generate.prompts import tokenizer_of
from prism_mcore.model.build import DTYPES, build_chunks
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_spec
from prism_mcore.parallel import Groups, ParallelSettings, init_groups
from prism_mcore.text import Tokenizer


def load_model(
    folder: str | Path,
    *,
    weights: str | Path | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str | torch.device | None = None,
    groups: Groups | None = None,
    kernels: Mapping[str, str] | None = None,
) -> tuple[HybridModel, Tokenizer | None]:
    """The whole model of a Hugging Face directory, or of a run, an import or a checkpoint of ours, and its tokenizer.

        model, tokenizer = prism_mcore.load_model("models/Llama-3.1-8B")
        Engine(model, tokenizer).generate(["2 + 2 ="], max_tokens=8)

    weights: where they are if not in the folder, which then gives shape and tokenizer alone: a directory, run or
    checkpoint, or "random". device: this process's GPU or, without one, the CPU; another one is refused. groups: of
    `parallel.init_groups`, all ranks call this then; by default every rank of torchrun, or the one process without it,
    has a model of its own. kernels: as the settings `kernels.<op>`. The tokenizer is None where there is no
    tokenizer.json. Raises ValueError, or CheckpointError, that says what is wrong with which file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; needed: {' or '.join(DTYPES)}")
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{place}: no such folder; give a Hugging Face directory, a run or a checkpoint")
    described = place if _is_hf(place) else source_of(checkpoint_in(place))
    spec = read_spec(described)
    tokenizer = tokenizer_of(described, spec)

    here = platform.start()
    if device is not None and torch.device(device).type != here.type:
        hide = "; hide the GPUs with CUDA_VISIBLE_DEVICES= before Python starts" if here.type == "cuda" else ""
        raise ValueError(f"device is {device}, but this process computes on {here.type}{hide}")
    groups = groups or _every_rank_alone(dist.group.WORLD)
    if groups.pp_size > 1:
        raise ValueError(f"groups have {groups.pp_size} pipeline stages; needed: pp=1, a whole model on each rank")
    whole = [list(range(len(spec.pattern)))]
    ops = Ops(kernels or {}, here)
    (model,) = build_chunks(spec, whole, groups, ops, dtype=DTYPES[dtype], device=here)
    _fill(model, place if weights is None else weights, groups)
    return model, tokenizer


def _is_hf(place: Path) -> bool:
    return (place / "config.json").is_file()


def _fill(model: HybridModel, weights: str | Path, groups: Groups) -> None:
    if weights == "random":
        model.initialise(seed=0)
    elif _is_hf(Path(weights)):
        load_hf(weights, [model], groups)
    else:
        load_weights(checkpoint_in(Path(weights)), [model], groups)


@lru_cache(maxsize=1)
def _every_rank_alone(world: dist.ProcessGroup) -> Groups:
    """Made once in a process: megatron-core has one set of groups."""
    try:
        return init_groups(ParallelSettings())
    except AssertionError as error:  # megatron-core's: it has another set
        raise ValueError("this process has groups already; give them as groups=") from error
