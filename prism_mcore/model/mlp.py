"""The MLP: SwiGLU on a fused gate/up buffer, or ungated squared ReLU."""

# t packed tokens, d hidden, f MLP width of this rank

from torch import Tensor, nn

from prism_mcore.model.context import ModelContext
from prism_mcore.model.linear import Input, column_linear, project, row_linear
from prism_mcore.model.state import PackedTokens, State


class MLP(nn.Module):
    def __init__(self, context: ModelContext):
        super().__init__()
        spec = context.spec
        self.gated = spec.activation == "swiglu"
        up = column_linear(context, spec.ffn_size * (2 if self.gated else 1), spec.hidden_size)
        setattr(self, "gate_up" if self.gated else "up", up)
        self.down = row_linear(context, spec.hidden_size, spec.ffn_size)
        self.kind, self.activation = spec.activation, context.ops[spec.activation]
        self.fp8 = context.fusing(f"{spec.activation}_quantize", spec.activation)

    def forward(self, x: Input, seq: PackedTokens, state: State | None = None) -> Tensor:
        """[t, 1, d] -> [t, 1, d]."""
        up = self.gate_up if self.gated else self.up
        hidden = project(up, x, state)
        if self.fp8 is not None and self.fp8.enabled:
            return project(self.down, self.fp8.activation(self.kind, hidden), state)
        return project(self.down, self.activation(hidden), state)
