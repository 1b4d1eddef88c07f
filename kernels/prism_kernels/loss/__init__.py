"""Cross entropy fused with the output projection, and the logits of a decode step."""

# Of triton.py, on a GPU; here, because planning has to know them without torch and Triton.
CHUNK_BYTES = 2**30  # of logits: 4,096 tokens at 128k, two chunks of a training step's 8,192
# Sums over more chunks than this are fp32. Rounding partial sums to bf16 adds little to what rounded logits and their
# gradients already cost: over 8 chunks the error is 1.07x that of fp32 sums (24 wide, 64 tokens, against fp64).
MOST_ROUNDED_SUMS = 8
