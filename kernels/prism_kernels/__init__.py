"""Ops of prism_mcore's models, each with several backends: table.py names them, backends.py selects one for a device.

A folder holds a group of ops, a file of it a backend:

- `reference.py`, plain torch, exact and fast on a CPU. Activations are packed token-major ([t, ...]); statistics and
  sums are taken in fp32 for bf16 and fp16 inputs, in the input's own dtype for fp32 and fp64.
- `triton.py`, our kernels for Hopper, some of them in files beside it.
- `peers.py`, other libraries' kernels behind our ops' signatures.
- `exact.py`, for `rl.parity=exact`: a token's result has the same bits in training and in decoding, in any batch, so
  that its log-probability is one number, whichever path computes it. What such an op may use on a CPU:
  - arithmetic that IEEE rounds once (+, -, *, /, sqrt), each as an operation of its own: whether a fused multiply-add
    is one rounding or two depends on whether an element falls into a vector or into the rest after the last one;
  - torch.exp, log, log1p, cos and sin, which compute the rest as a vector, too; exp2, silu, sigmoid and softplus do
    not;
  - sums over a whole last dimension, and over blocks of a fixed size that are added in order;
  - products of `linear.exact.mm`, and batched ones of at least eight rows, over sums of a fixed length.

  Sums start anew at each document. Gradients are the reference's: nothing compares them with decoding.
"""
