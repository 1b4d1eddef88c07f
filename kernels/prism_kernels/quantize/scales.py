"""What Triton kernels that quantise share: magnitudes as integers, scales that are powers of two, the cast."""

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """|x| of fp32 as the integer of its bits, by which it is ordered: infinity above all numbers, nan above that."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(bits, LARGEST: tl.constexpr):
    """prism_kernels.fp8.power_of_two_scale of magnitudes given as bits."""
    amax = bits.to(tl.float32, bitcast=True)
    quotient = tl.minimum(tl.div_rn(LARGEST, tl.where(bits == 0, 1.0, amax)), 3.4028234663852886e38)
    scale = (quotient.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)


@triton.jit
def narrowed(x, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 to the nearest number of the format, the largest for what is larger, nan for nan."""
    inside = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return inside.to(FORMAT)
