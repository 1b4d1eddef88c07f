"""From settings to this rank's model chunks."""

from collections.abc import Collection

import torch

from prism_mcore.config import SettingsError
from prism_mcore.model.context import ModelContext, transformer_config
from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.ops import Ops
from prism_mcore.model.settings import BuildSettings
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec
from prism_mcore.model.split import split_layers
from prism_mcore.parallel import Groups

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def chunks_of(
    settings: BuildSettings,
    spec: ModelSpec,
    groups: Groups,
    device: torch.device,
    *,
    seq_len: int,
    recompute: Collection[str] = (),
) -> list[HybridModel]:
    """This rank's pipeline chunks as the settings split the model, weights not yet set.

    seq_len: tokens of a sequence, for which `parallel.split=auto` evens the stages. recompute: as train.recompute.
    Raises SettingsError for a choice of `kernels` that cannot be had here.
    """
    parallel = settings.parallel
    try:
        ops = Ops(settings.kernels, device)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return build_chunks(
        spec,
        split_layers(spec, parallel.pp, parallel.vpp, seq_len, parallel.split),
        groups,
        ops,
        dtype=DTYPES[settings.precision.dtype],
        device=device,
        sequence_parallel=parallel.sequence_parallel,
        recompute=frozenset(kind for kind, name in LAYER_NAMES.items() if name in recompute),
        fp8=fp8_of(settings, groups, ops, device),
    )


def fp8_of(settings: BuildSettings, groups: Groups, ops: Ops, device: torch.device) -> Fp8 | None:
    """What `precision.fp8` asks for; a SettingsError where the device has no FP8 and no emulation was asked for."""
    precision, asked = settings.precision, settings.kernels.get("fp8_linear", "auto")
    if precision.fp8 == "off":
        return None
    if asked == "auto" and not has_fp8(device):
        raise SettingsError(
            f"precision.fp8={precision.fp8}: {device.type} has no FP8 products (compute capability 8.9 and later have);"
            " use precision.fp8=off, or kernels.fp8_linear=reference to emulate them, slower than without"
        )
    backend = ops.backends["fp8_linear"].name
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if precision.fp8 == "blockwise" and device.type == "cuda" and backend in ("te", "torch") and cuda < (12, 9):
        raise SettingsError(
            f"precision.fp8=blockwise: products of blocks need CUDA 12.9 or later, torch was built with"
            f" {torch.version.cuda}; use precision.fp8=tensorwise, or kernels.fp8_linear=triton"
        )
    return Fp8(precision.fp8, ops, groups.tp, precision.fp8_bf16_ends)


def has_fp8(device: torch.device) -> bool:
    """Does this device multiply FP8 numbers itself?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def build_chunks(
    spec: ModelSpec,
    split: list[list[int]],
    groups: Groups,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: frozenset[str] = frozenset(),
    fp8: Fp8 | None = None,
) -> list[HybridModel]:
    """This rank's pipeline chunks, weights not yet set; on the `meta` device nothing is allocated.

    split: the sub-layers of every chunk of the whole model in its order; chunk k is on stage k % pp. recompute: the
    kinds of sub-layer ("M", "*", "-") whose activations are computed again in the backward pass.
    """
    config = transformer_config(spec, groups, dtype, sequence_parallel, device)
    context = ModelContext(spec, config, groups, ops, fp8)
    mine = split[groups.pp_rank :: groups.pp_size]
    with torch.device(device):
        return [HybridModel(context, layers, recompute=recompute, vp_stage=i) for i, layers in enumerate(mine)]
