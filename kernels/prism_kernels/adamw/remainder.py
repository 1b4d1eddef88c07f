"""AdamW whose fp32 masters are the model's bf16 weights and 16 bits more: nothing is lost, 2 bytes a parameter saved.

A master's bits are those of its weight, 16 zeros behind them, plus a signed remainder. Rounding to nearest even gives
an even weight 65,537 masters, the two furthest of which lie half-way to a neighbour: the upper one is told from the
lower by the sign of the second moment, which is otherwise never negative.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

HALF = 0x8000  # a remainder of half a unit of the weight, which 16 signed bits hold as -HALF


def split(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight bf16, remainder int16, is the remainder HALF and not -HALF?) of a finite fp32 master."""
    weight = master.bfloat16()
    rest = master.view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
    return weight, rest.to(torch.int16), rest == HALF


def join(weight: Tensor, remainder: Tensor, upper: Tensor) -> Tensor:
    """The fp32 master that `split` took apart."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder
    return (bits + (upper.to(torch.int32) << 16)).view(torch.float32)


class RemainderAdamW(torch.optim.AdamW):
    """torch.optim.AdamW over bf16 parameters, their remainders in its state, and over fp32 ones.

    backend: "torch" (fused), "reference" or "triton", each to the bit what it makes of fp32 masters; "triton" in one
    pass, the others with one parameter's master in fp32 at a time. Gradients are fp32. A parameter's `grad_dtype` is
    cleared: torch would not give a bf16 one an fp32 gradient.
    """

    def __init__(self, param_groups: list[dict[str, Any]], backend: str):
        super().__init__([torch.empty(0)], foreach=False, fused=False)
        self.backend = backend
        for group in param_groups:
            group.update({name: value for name, value in self.defaults.items() if name not in group})
            for param in group["params"]:
                self._begin(param, backend == "torch")
        self.param_groups = param_groups  # of shards of buffers: a constructor refuses such views

    def _begin(self, param: Tensor, fused: bool) -> None:
        moments = {name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        step = torch.zeros((), dtype=torch.float32, device=param.device if fused else None)
        self.state[param] = {"step": step, **moments}
        if param.dtype == torch.bfloat16:
            param.grad_dtype = None
            self.state[param]["remainder"] = torch.zeros_like(param, dtype=torch.int16)

    def unpacked(self, param: Tensor) -> dict[str, Tensor]:
        """{"param": master, "exp_avg": ..., "exp_avg_sq": ...} of a bf16 parameter, fp32: first and last are new."""
        state = self.state[param]
        second = state["exp_avg_sq"]
        master = join(param.detach(), state["remainder"], second.signbit())
        return {"param": master, "exp_avg": state["exp_avg"], "exp_avg_sq": second.abs()}

    def pack(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Take what `unpacked` gave, changed."""
        weight, remainder, upper = split(state["param"])
        param.detach().copy_(weight)
        self.state[param]["remainder"].copy_(remainder)
        sign = torch.where(upper, -1.0, 1.0)
        self.state[param]["exp_avg_sq"].copy_(state["exp_avg_sq"].copysign(sign))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if self.backend == "triton":
                self._in_one_pass(group, params)
            else:
                for param in params:
                    self._alone(group, param)

    def _alone(self, group: dict[str, Any], param: Tensor) -> None:
        halved = param.dtype == torch.bfloat16
        state = self.unpacked(param) if halved else {"param": param, **self.state[param]}
        torch_adamw(
            [state["param"]],
            [param.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [self.state[param]["step"]],
            foreach=False,
            fused=self.backend == "torch",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if halved:
            self.pack(param, state)

    def _in_one_pass(self, group: dict[str, Any], params: list[Tensor]) -> None:
        from prism_kernels.adamw.triton import adamw

        members = defaultdict(list)
        for param in params:
            self.state[param]["step"] += 1
            members[int(self.state[param]["step"]), param.dtype].append(param)
        for (step, dtype), those in members.items():
            states, halved = [self.state[param] for param in those], dtype == torch.bfloat16
            adamw(
                [state["remainder"] for state in states] if halved else those,
                [param.grad for param in those],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                those if halved else [None] * len(those),
                step=step,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
