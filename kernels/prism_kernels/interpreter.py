"""Makes Triton's interpreter (TRITON_INTERPRET=1, on a CPU) right for bf16; does nothing elsewhere.

The interpreter keeps bf16 as raw uint16 bits. Loads, stores and casts to fp32 are right; `tl.dot` multiplies the bits
as integers, silent garbage (Triton 3.6 to 3.9), and so does elementwise arithmetic, which is refused here. Casts from
fp32 cut the low bits off where a GPU rounds to nearest even. Casts from fp32 to FP8 are wrong for subnormal numbers:
here they are torch's, which rounds as a GPU does.
Goes when upstream decodes bf16 itself: tests/kernels/test_interpreter.py then still passes without `install`.
"""

import functools
import os
from typing import Any

import numpy as np
import torch


def active() -> bool:
    """Will Triton kernels run in the interpreter? Decided by the environment before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _decode(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encode(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _to_bytes(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.uint8).numpy()


def _from_bytes(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(numbers)).view(dtype).float().numpy()


@functools.cache
def install() -> None:
    """Patch the interpreter once; a call costs nothing afterwards."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    dot, cast, binary = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    to_fp = InterpreterBuilder.create_fp_to_fp

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar in fp8:
                return TensorHandle(_from_bytes(x.data, fp8[x.dtype.scalar]), tl.float32)
            return TensorHandle(_decode(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return dot(self, wide(a), wide(b), d, *options)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_encode(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar != tl.bfloat16:
            src = TensorHandle(_decode(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar in fp8:
            return TensorHandle(_to_bytes(src.data, fp8[dst_type.scalar]), dst_type.scalar)
        if src.dtype.scalar in fp8 and dst_type.scalar == tl.float32:
            return TensorHandle(_from_bytes(src.data, fp8[src.dtype.scalar]), tl.float32)
        return to_fp(self, src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError(f"{op.__name__} of bf16 in the interpreter would work on raw bits; cast to fp32 on load")
        return binary(self, lhs, rhs, op)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
