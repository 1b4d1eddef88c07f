"""Blocks of 128 for Transformer Engine's linears, by the references of its own tests.

Its packages have none: they are in its repository, `tests/pytorch/references`; TE_SOURCE names a copy of that.
"""

import torch
from tests.pytorch.references import blockwise_fp8_gemm_reference as products
from tests.pytorch.references.blockwise_quantizer_reference import BlockwiseQuantizerReference
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

REFERENCE = BlockwiseQuantizerReference()
# Theirs is a Triton kernel, for the one rounding of a fused product and sum. Times a power of two there is no other.
products.fused_fma = lambda y, x, scale: y.add_(x * scale)


class BlockQuantizer(CurrentScalingQuantizerRef):
    """The plumbing of the quantiser of whole tensors, with blocks of `tile` rows and columns."""

    def __init__(self, tile: tuple[int, int]):
        super().__init__(dtype=torch.float8_e4m3fn, pow_2_scales=True)
        self.tile = tile

    def _quantize(self, tensor):
        made = REFERENCE.quantize(
            tensor, self.dtype, return_transpose=self.columnwise_usage, pow_2_scales=True, quant_tile_shape=self.tile
        )
        rows = (made.data, made.scale) if self.rowwise_usage else (None, None)
        return *rows, made.data_t, made.scale_t

    def qgemm(self, qx, qw, m_params, out_dtype, sx, sw, bias=None, *, qresult_x, qresult_w, **others):
        tiles = [one._quantizer.tile for one in (qresult_x, qresult_w)]
        scales = [
            REFERENCE.scale_munger.demunge_scale_shape_from_backend(q.shape, scale, tile)
            for q, scale, tile in zip((qx, qw), (sx, sw), tiles, strict=True)
        ]
        gemm = products.CuBLASRefBlockwiseGemm()
        return gemm.qgemm(qx, qw, out_dtype, *scales, *tiles, bias=bias, use_split_accumulator=True)


def blockwise(role) -> BlockQuantizer:
    return BlockQuantizer((128, 128) if role is not None and role.tensor_type == "weight" else (1, 128))
