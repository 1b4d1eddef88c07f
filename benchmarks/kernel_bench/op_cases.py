"""Which ops are compiled and measured, at which shapes: one row per op, for all seven models.

`cases()` gives every distinct shape; what depends on neither the model nor the layout appears once. works.py makes a
row's inputs. `python benchmarks/compile_kernels.py --list` lists the cases.
"""

# d hidden, f MLP width, h heads, hk key heads, p head_dim, g groups, n state, c conv channels, k taps, v vocabulary

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from kernel_bench import works
from kernel_bench.works import Inputs, Shape, Work
from prism_mcore.model.spec import SHIPPED, ModelSpec, read_spec

MODELS = [path.stem for path in sorted(SHIPPED.glob("*.json")) if not path.stem.startswith(("demo", "qwen"))]
TP = (1, 2, 4, 8)
TRAIN_TOKENS = 8192
DECODE_ROWS = 64  # sequences generated side by side
DECODE_CONTEXT = 4096  # tokens of each


@dataclass(frozen=True)
class Case:
    """`Case(row, "train", {"d": 4096}, 8192, ["llama-3.1-8b TP 1, 2, 4, 8", ...])`."""

    row: "Row"
    phase: str
    shape: Shape
    tokens: int
    users: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        numbers = " ".join(f"{key} {value}" for key, value in self.shape.items() if value is not None)
        return f"{self.row.name} {self.phase}: {numbers}"

    def build(self, device: str, tokens: int | None = None) -> Work:
        inputs = Inputs(device, self.phase == "train")
        return self.row.build(inputs, self.shape, tokens or self.tokens)


@dataclass(frozen=True)
class Row:
    name: str
    op: str  # its name in prism_kernels.table
    shape: Callable[[ModelSpec, int], Shape | None]  # None: this model has no such op in this layout
    build: Callable[[Inputs, Shape, int], Work]
    phases: tuple[str, ...] = ("train",)
    memory_bound: bool = True
    # How bytes are counted in the interpreter, which is slow: at two token counts, scaled by a straight line; where
    # a fixed number of persistent programs write partial sums, for two numbers of multiprocessors, too; and at a
    # narrower shape where bytes are proportional to the width: (shape, factor).
    reduced: tuple[int, int] = (64, 128)
    persistent: bool = False
    narrow: Callable[[Shape], tuple[Shape, float]] = lambda shape: (shape, 1.0)


def _hidden(spec: ModelSpec, tp: int) -> Shape:
    return {"d": spec.hidden_size}


def _residual(spec: ModelSpec, tp: int) -> Shape:
    return {"d": spec.hidden_size, "alpha": spec.residual_multiplier}


def _optimizer(spec: ModelSpec, tp: int) -> Shape:
    return {"tensors": 4, "d": 4096}  # the same for all: elements are elements


def _mlp(activation: str) -> Callable[[ModelSpec, int], Shape | None]:
    return lambda spec, tp: {"f": spec.ffn_size // tp} if spec.activation == activation else None


def _heads(spec: ModelSpec, tp: int) -> Shape:
    return {"h": spec.num_heads // tp, "hk": spec.num_kv_heads // tp, "p": spec.head_dim}


def _rope(spec: ModelSpec, tp: int) -> Shape | None:
    return _heads(spec, tp) if spec.position == "rope" else None


def _attention(spec: ModelSpec, tp: int) -> Shape:
    return _heads(spec, tp) | {"window": spec.sliding_window}


def _attention_decode(spec: ModelSpec, tp: int) -> Shape:
    return _attention(spec, tp) | {"context": DECODE_CONTEXT}


def _scan(spec: ModelSpec, tp: int) -> Shape | None:
    if not spec.mamba_num_heads:
        return None
    h, g = spec.mamba_num_heads // tp, max(spec.ssm_groups // tp, 1)
    return {"h": h, "p": spec.mamba_head_dim, "g": g, "n": spec.ssm_state_size, "chunk": spec.chunk_len}


def _step(spec: ModelSpec, tp: int) -> Shape | None:
    shape = _scan(spec, tp)
    return shape and {key: shape[key] for key in "hpgn"}


def _conv(spec: ModelSpec, tp: int) -> Shape | None:
    scan = _scan(spec, tp)
    if scan is None:
        return None
    inner, state = scan["h"] * scan["p"], scan["g"] * scan["n"]
    return {"c": inner + 2 * state, "k": spec.conv_kernel, "other": inner + scan["h"]}


def _gated(spec: ModelSpec, tp: int) -> Shape | None:
    """Of one rank alone: where a group spans ranks, the kernels are measured without the sum over them."""
    scan = _scan(spec, tp)
    if scan is None:
        return None
    inner = scan["h"] * scan["p"]
    return {
        "i": inner,
        "g": max(spec.gated_norm_groups // tp, 1),
        "other": inner + scan["h"] + 2 * scan["g"] * scan["n"],
    }


def _loss(spec: ModelSpec, tp: int) -> Shape:
    return {"d": spec.hidden_size, "v": -(-spec.vocab_size // tp), "divisor": spec.logits_divisor}


def _fewer_channels(shape: Shape) -> tuple[Shape, float]:
    """Channels of a convolution share nothing; 256 of them fill a program."""
    return shape | {"c": 256, "other": 256}, shape["c"] / 256


def _one_group(shape: Shape) -> tuple[Shape, float]:
    """Groups of a scan share nothing; the heads of a group share B and C."""
    return shape | {"h": shape["h"] // shape["g"], "g": 1}, shape["g"]


def _one_key_head(shape: Shape) -> tuple[Shape, float]:
    return shape | {"h": shape["h"] // shape["hk"], "hk": 1}, shape["hk"]


def _narrow_products(shape: Shape) -> tuple[Shape, float]:
    """The products of the loss are torch's, counted at their real size; the kernels see only logits."""
    return shape | {"d": 64}, 1.0


ROWS = [
    Row("rms_norm", "rms_norm", _hidden, works.rms_norm, ("train", "decode"), persistent=True),
    Row("add_rms_norm", "add_rms_norm", _residual, works.add_rms_norm, ("train", "decode"), persistent=True),
    Row("gated_rms_norm", "gated_rms_norm", _gated, works.gated_rms_norm, ("train", "decode"), persistent=True),
    Row("swiglu", "swiglu", _mlp("swiglu"), works.activation(2), ("train", "decode"), reduced=(8, 16)),
    Row(
        "squared_relu", "squared_relu", _mlp("squared_relu"), works.activation(1), ("train", "decode"), reduced=(8, 16)
    ),
    Row("fp8_amax", "fp8_amax", _hidden, works.fp8_amax),
    Row("fp8_quantize tensorwise", "fp8_quantize", _hidden, works.fp8_quantize("tensorwise"), reduced=(128, 256)),
    Row("fp8_quantize blockwise", "fp8_quantize", _hidden, works.fp8_quantize("blockwise"), reduced=(128, 256)),
    Row("fp8_quantize_weight", "fp8_quantize_weight", _hidden, works.fp8_quantize_weight, reduced=(128, 256)),
    *(
        Row(
            f"fp8_linear {recipe} {gradient or 'forward'}",
            "fp8_linear",
            _hidden,
            works.fp8_linear(recipe, gradient),
            memory_bound=False,
            reduced=(128, 256),
        )
        for recipe in ("tensorwise", "blockwise")
        for gradient in ("", "x", "weight")
    ),
    *(
        Row(f"{op} {recipe}", op, shape, build(recipe), reduced=(128, 256))
        for recipe in ("tensorwise", "blockwise")
        for op, shape, build in (
            ("rms_norm_quantize", _residual, works.rms_norm_quantize),
            ("swiglu_quantize", _mlp("swiglu"), partial(works.activation_quantize, 2)),
            ("squared_relu_quantize", _mlp("squared_relu"), partial(works.activation_quantize, 1)),
        )
    ),
    Row("rope", "rope", _rope, works.rope, ("train", "decode"), reduced=(16, 32)),
    Row("adamw", "adamw", _optimizer, works.adamw, reduced=(4, 8)),
    Row("causal_conv1d", "causal_conv1d", _conv, works.causal_conv1d, reduced=(256, 512), narrow=_fewer_channels),
    Row("ssd_scan", "ssd_scan", _scan, works.ssd_scan, memory_bound=False, reduced=(256, 512), narrow=_one_group),
    Row(
        "attention",
        "attention",
        _attention,
        works.attention,
        memory_bound=False,
        reduced=(256, 512),
        narrow=_one_key_head,
    ),
    Row(
        "linear_cross_entropy",
        "linear_cross_entropy",
        _loss,
        works.linear_cross_entropy(True),
        memory_bound=False,
        reduced=(16, 32),
        narrow=_narrow_products,
    ),
    Row(
        "log-probabilities",
        "linear_cross_entropy",
        _loss,
        works.linear_cross_entropy(False),
        memory_bound=False,
        reduced=(16, 32),
        narrow=_narrow_products,
    ),
    Row("conv_step", "conv_step", _conv, works.conv_step, ("decode",), reduced=(4, 8)),
    Row("ssd_step", "ssd_step", _step, works.ssd_step, ("decode",), reduced=(4, 8)),
    Row(
        "attention_decode",
        "attention_decode",
        _attention_decode,
        works.attention_decode,
        ("decode",),
        reduced=(2, 4),
        narrow=_one_key_head,
    ),
]


@cache
def _specs() -> dict[str, ModelSpec]:
    return {path.stem: read_spec(path.stem) for path in SHIPPED.glob("*.json")}


def cases(
    rows: Sequence[str] = (), models: Sequence[str] = (), tps: Sequence[int] = TP, phases: Sequence[str] = ()
) -> list[Case]:
    """Every distinct (op, phase, shape) of these models and layouts; all of them where a list is empty."""
    found: dict[str, Case] = {}
    for row, phase, name, tp in _combinations(rows, models, tps, phases):
        spec = _specs()[name]
        shape = row.shape(spec, tp)
        if shape is None:
            continue
        case = Case(row, phase, shape, TRAIN_TOKENS if phase == "train" else DECODE_ROWS)
        case = found.setdefault(case.name, case)
        case.users.append(f"{name} TP{tp}")
    return list(found.values())


def _combinations(
    rows: Sequence[str], models: Sequence[str], tps: Sequence[int], phases: Sequence[str]
) -> Iterator[tuple[Row, str, str, int]]:
    for row in ROWS:
        if rows and row.name not in rows and row.op not in rows:
            continue
        for phase in row.phases:
            if phases and phase not in phases:
                continue
            for name in models or MODELS:
                yield from ((row, phase, name, tp) for tp in tps)
