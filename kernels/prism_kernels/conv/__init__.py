"""Mamba-2's short depthwise convolution."""
