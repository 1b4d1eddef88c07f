"""How the kernels that work row by row see their tensors, and how many programs they start."""

import functools

import torch
import triton
from torch import Tensor

from prism_kernels.backends import Uncovered

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Compiled for a GPU that is not there (meta tensors): an H100's or H200's. In the interpreter, fewer are faster.
MULTIPROCESSORS = {"meta": 132, "cpu": 2}


def as_rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d] with a contiguous last dimension: a view wherever the strides allow it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def check_dtypes(**tensors: Tensor) -> None:
    """Every tensor is bf16, fp16 or fp32, or `Uncovered` names the one that is not."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise Uncovered(f"{name} is {str(x.dtype).removeprefix('torch.')}: needs bf16, fp16 or fp32")


def multiple(*strides: int) -> int:
    """The largest of 16, 8, 4, 2, 1 that divides all strides: a kernel says `stride = stride // MULTIPLE * MULTIPLE`.

    Triton specialises on multiples of 16 alone. 8 elements are what a 16-byte access to bf16 needs, and a row of
    Granite-4-H's projection at TP 8 has 1288.
    """
    return next(n for n in (16, 8, 4, 2, 1) if all(stride % n == 0 for stride in strides))


def tile(width: int, elements_per_thread: int, most_warps: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's tile: whole rows, at least 2048 elements, so many of them per thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return rows, block, min(most_warps, max(4, rows * block // (32 * elements_per_thread)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a persistent kernel can fill."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS[device.type]
