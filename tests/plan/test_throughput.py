"""Peaks of GPUs by torch's names of them."""

from prism_mcore.plan.throughput import peak_flops


def test_the_longer_device_name_wins():
    assert (peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA H100 80GB HBM3")) == (756e12, 989e12)
    assert peak_flops("Some CPU") is None
