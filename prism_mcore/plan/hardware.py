"""GPUs and the links between them: peaks of data sheets, and the rates that published runs and kernels reach."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in nodes of eight. Rates are what kernels reach, not peaks; FLOP/s, bytes/s and bytes.

    Priors, set once from published kernels and not fitted to published runs: products of H100 training recipes, FA3 and
    cuDNN attention at head_dim 128, memory-bound kernels at 80% of the data sheet, NCCL inside and between nodes.
    """

    name: str
    bf16: float  # large products
    fp8: float
    attention: tuple[float, float]  # forward and backward
    scan: float  # the SSD scan's products; no published kernel for Hopper says, half of attention's forward is assumed
    bandwidth: float
    memory: float
    nvlink: float = 300e9  # of one GPU's collectives inside a node
    network: float = 45e9  # of one GPU's collectives between nodes
    per_node: int = 8


H100 = Gpu("H100 SXM", 680e12, 1150e12, (580e12, 480e12), 290e12, 2.7e12, 80e9)
# The same chip with faster memory: products as on the H100, memory-bound kernels by the data sheets' 4.8 to 3.35.
H200 = replace(H100, name="H200", bandwidth=H100.bandwidth * 4.8 / 3.35, memory=141e9)
# torchtitan's 500 W part with HBM2e; its rates are guesses for that part, and no row checks them.
H100_500W = replace(
    H100,
    name="H100 500 W, HBM2e",
    bf16=520e12,
    fp8=880e12,
    attention=(350e12, 300e12),
    scan=175e12,
    bandwidth=1.9e12,
    memory=96e9,
)
GPUS = {"h100": H100, "h200": H200, "h100-500w": H100_500W}
