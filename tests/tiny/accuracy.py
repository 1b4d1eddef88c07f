"""How the kernels' tests measure error: relative to fp64, beside the plain torch code in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is a GPU, the real kernels run


def documents(*lengths: int, device: str = "cpu") -> Boundaries:
    return Boundaries.on(torch.device(device), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


def kernel_documents(*lengths: int) -> Boundaries:
    """Documents whose tables are where the kernels run: a kernel cannot read a table that is on the CPU."""
    return documents(*lengths, device=DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """function(*inputs), then its gradient with respect to each of them, for the given gradient of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def assert_as_exact_as(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], factor: float = 2.0
) -> None:
    """Result and every gradient of `ours` differ from `plain` in fp64 at most `factor` times what `plain` itself does.

    inputs: in the dtype under test. `plain` is the straightforward code, run in that dtype and in fp64.
    """
    upstream = randn(*plain(*inputs).shape).to(inputs[0])
    exact = value_and_gradients(plain, [x.double() for x in inputs], upstream)
    theirs = value_and_gradients(plain, inputs, upstream)
    mine = value_and_gradients(ours, inputs, upstream)
    for i, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        assert a.shape == c.shape
        error, allowed = ((x.double() - c).norm() for x in (a, b))
        # Where plain torch happens to be exact, rounding once is still allowed.
        once = torch.finfo(inputs[0].dtype).eps * (c.norm() + upstream.double().norm())
        name = "result" if i == 0 else f"gradient {i - 1}"
        assert error <= factor * allowed + once, f"{name}: error {error:.2e}, plain torch {allowed:.2e}, {c.norm():.2e}"
