"""RMSNorm, alone, after a residual sum, and gated."""
