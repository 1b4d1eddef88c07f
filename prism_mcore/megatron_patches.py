"""Every patch to megatron-core (0.16.1), each with what upstream does and when it can go.

megatron-core names "cuda" in some 250 places. `patch_megatron()` lets all of them mean the CPU where there is no CUDA,
and does nothing where there is; all of that can go when megatron-core takes its device from its caller.
`torch.cuda.is_available()` goes on returning False, so that other libraries in the process (transformers, torch itself)
keep their own CPU paths.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from prism_kernels.matmul import mm
from prism_mcore.program import expect_warnings

CPU = torch.device("cpu")

# fmt: off
_FACTORIES = [
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor", "zeros",
    "zeros_like",
]
# fmt: on
_NEW_METHODS = ["new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"]

_patched = False  # for the CPU


def patch_megatron() -> None:
    """Make megatron-core run on a CPU; does nothing where CUDA is available or when called again."""
    global _patched
    if _patched or torch.cuda.is_available():
        return
    _patched = True
    _redirect_device_arguments()
    _make_torch_cuda_inert()
    for package in ("transformer_engine", "apex"):  # megatron-core takes them where it finds them; they need a GPU
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # not importable
    expect_warnings()
    warnings.filterwarnings("ignore", "When using async grad allreduce", module=r"megatron\.core")  # of CUDA's queues
    import megatron.core.optimizer  # noqa: F401

    _patch_rng()
    _patch_jit_fuser()
    _patch_tensor_types()
    _patch_linear_products()
    _patch_collectives_of_one_rank()


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _redirect_device_arguments() -> None:
    """Upstream: `torch.zeros(..., device="cuda")`, `tensor.to("cuda")`, `tensor.cuda()`, `module.cuda()`.

    Goes when upstream takes its device from its caller.

    Wrapping the functions that take a device gives the same numbers as a TorchFunctionMode, which taxes every operation
    by 1.4 us (6-17% of a small step).
    """

    def redirect(function: Callable) -> Callable:
        @functools.wraps(function)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = CPU
            return function(*args, **kwargs)

        return redirected

    def redirect_to(function: Callable) -> Callable:
        @functools.wraps(function)
        def redirected(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args and _is_cuda(args[0]):
                args = (CPU, *args[1:])
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = CPU
            return function(self, *args, **kwargs)

        return redirected

    # `with torch.device("meta")` looks factories up in this table, made at its first use: it must know the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, redirect(getattr(torch, name)))
    for name in _NEW_METHODS:
        setattr(torch.Tensor, name, redirect(getattr(torch.Tensor, name)))
    torch.Tensor.to = redirect_to(torch.Tensor.to)
    torch.nn.Module.to = redirect_to(torch.nn.Module.to)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class _Inert:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: work on a CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> "_Inert":
        return self

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *error: object) -> None: ...


def _make_torch_cuda_inert() -> None:
    """Upstream calls these without asking whether there is a CUDA device. Goes when it asks."""
    stream = _Inert()
    inert: dict[str, Any] = {
        "current_device": lambda: CPU,  # is only ever passed on as `device=`
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "Stream": _Inert,
        "Event": _Inert,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "set_stream": lambda stream: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for name, value in inert.items():
        setattr(torch.cuda, name, value)


def _patch_rng() -> None:
    """The CPU's default generator plays the part of the CUDA generator.

    Upstream: `tensor_parallel.random` forks torch.cuda's generator so that ranks draw different or equal numbers on
    purpose. `torch.manual_seed` calls `torch.cuda.manual_seed_all`, which therefore stays as it is.
    Goes when that module forks the generator of the device it computes on.
    """
    from megatron.core.tensor_parallel import random

    def get_state(device: object = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = "cuda") -> None:
        torch.set_rng_state(new_state)

    def seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))  # not torch.manual_seed: endless recursion

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = seed
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # `fork` warns when the CPU generator moves inside it; here that is what it is for.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))


def _patch_jit_fuser() -> None:
    """Upstream decorates small functions with torch.compile, which on a CPU wants a C++ compiler and takes seconds.

    Modules that are already imported get the plain functions back, later ones never see torch.compile. Goes when
    `jit_fuser` asks for the device.
    """
    from megatron.core import jit

    jit.disable_jit_fuser()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for attribute, value in list(vars(module).items()):
                plain = getattr(value, "_torchdynamo_orig_callable", None)
                if plain is not None:
                    setattr(module, attribute, plain)


def _patch_linear_products() -> None:
    """Upstream's linears call torch.matmul, which takes MKL for fp32 and halves the speed of an AMD processor.

    The same autograd function, its three products through `prism_kernels.matmul`; goes when torch takes oneDNN there.
    """
    from megatron.core.tensor_parallel import layers

    layers.LinearWithGradAccumulationAndAsyncCommunication = ParallelLinear


class ParallelLinear(torch.autograd.Function):
    """x [t, 1, d] (t / tp of it where sequence-parallel) times weight [rows, d]; the gradient of x summed over tp."""

    @staticmethod
    def forward(ctx, x, weight, bias, _fusion, allreduce_dgrad, sequence_parallel, _buffer, _limit, group):
        ctx.save_for_backward(x, weight)
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.group = allreduce_dgrad, sequence_parallel, group
        ctx.use_bias = bias is not None
        whole = _gathered(x, group) if sequence_parallel else x
        y = mm(whole.flatten(0, -2), weight.t())
        y = torch.ops.aten._unsafe_view(y, (*whole.shape[:-1], len(weight)))  # as matmul: callers may write into it
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        whole = _gathered(x, ctx.group) if ctx.sequence_parallel else x
        rows = grad.flatten(0, -2)
        grad_x = mm(rows, weight).view(whole.shape)
        if ctx.allreduce_dgrad:
            dist.all_reduce(grad_x, group=ctx.group)
        elif ctx.sequence_parallel:
            mine = torch.empty_like(x)
            dist.reduce_scatter_tensor(mine, grad_x, group=ctx.group)
            grad_x = mine
        grad_weight = mm(rows.t(), whole.flatten(0, -2))
        return grad_x, grad_weight, rows.sum(0) if ctx.use_bias else None, *[None] * 6


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _patch_collectives_of_one_rank() -> None:
    """Upstream reduces gradients into their own buffer, and gathers parameters in theirs, over one data-parallel rank,
    too. NCCL then does nothing; gloo copies the buffer away and back. Goes when gloo does not, or upstream asks nobody.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def unless_alone(collective: Callable) -> Callable:
        @functools.wraps(collective)
        def run(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            alone = kwargs["group"].size() == 1 and not kwargs["async_op"]
            if alone and output.data_ptr() == input.data_ptr() and output.numel() == input.numel():
                return None
            return collective(output, input, *args, **kwargs)

        return run

    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)


def _patch_tensor_types() -> None:
    """Upstream sorts parameters by `param.type()` and knows only 'torch.cuda.*Tensor'; goes when it asks for the dtype.

    `Tensor.type` says so inside the functions that ask, and nowhere else.
    """
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    for owner, name in (
        (distrib_optimizer.DistributedOptimizer, "__init__"),
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (clip_grads, "clip_grad_by_total_norm_fp32"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        setattr(owner, name, _with_cuda_types(getattr(owner, name)))


def _with_cuda_types(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_types():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _cuda_types() -> Iterator[None]:
    plain = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return plain(self, dtype, *args, **kwargs)
        return plain(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
    try:
        yield
    finally:
        torch.Tensor.type = plain


def restore_gradient_reduction() -> None:
    """Gradients are sent in fp32 but where the next wrapped model asks for bf16.

    megatron-core 0.16.1 rounds what it adds up over micro-batches where it sends bf16; here buffers stay fp32, are sent
    in bf16 and added in fp32. Its choice, once made, also lasts for the process. Goes when it keeps the two apart.
    """
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer.dist_reduce_scatter_func = dist.reduce_scatter_tensor
    param_and_grad_buffer.reduce_scatter_with_fp32_accumulation = _reduce_scatter_in_bf16


def _reduce_scatter_in_bf16(output: torch.Tensor, gradients: torch.Tensor, op: Any, group: Any, async_op: bool) -> Any:
    from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import reduce_scatter_with_fp32_accumulation

    return reduce_scatter_with_fp32_accumulation(output, gradients.bfloat16(), op, group, async_op)
