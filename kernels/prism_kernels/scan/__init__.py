"""The Mamba-2 scan."""
