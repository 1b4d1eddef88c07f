"""Products of FP8 matrices: what is under every large linear layer where `precision.fp8` says so."""
