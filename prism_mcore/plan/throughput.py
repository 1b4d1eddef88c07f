"""The time that FLOPs take on a GPU: data-sheet peaks, not measurements."""

# Dense bf16 tensor-core peaks of NVIDIA's data sheets, FLOP/s, by a part of torch's device name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a GPU by its name, such as "NVIDIA H100 80GB HBM3", in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def gpu_hours(flops: float, mfu: float, peak: float) -> float:
    """Hours of one GPU for so many model FLOPs at this share of its peak."""
    return flops / (mfu * peak) / 3600
