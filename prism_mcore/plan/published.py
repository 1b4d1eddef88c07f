"""Published training rates beside what plan/throughput.py predicts for the same model, layout and GPU."""

from dataclasses import dataclass, replace
from typing import Literal

from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.plan.hardware import H100, H100_500W, Gpu
from prism_mcore.plan.throughput import TUNED, TYPICAL, Layout, step_time

Kind = Literal["tuned", "tp/pp", "untuned", "hybrid"]


@dataclass(frozen=True)
class Published:
    """One row: tokens per second and GPU that somebody measured, and whose shape is not known for sure."""

    name: str
    kind: Kind
    spec: ModelSpec
    layout: Layout
    measured: float
    gpu: Gpu = H100
    note: str = ""

    @property
    def predicted(self) -> float:
        """Tokens per second and GPU: of tuned runs 95% of the formula, of others 80%."""
        share = TYPICAL if self.kind == "untuned" else TUNED
        return share * step_time(self.spec, self.layout, self.gpu).rate

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1


def dense(
    layers: int, d: int, heads: int, kv: int, ffn: int, vocab: int, *, p: int = 128, gated: bool = True
) -> ModelSpec:
    """A shape for the formulas alone: nothing is built of it."""
    llama = read_spec("llama-3.1-8b")
    return replace(
        llama,
        pattern="*-" * layers,
        hidden_size=d,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=p,
        ffn_size=ffn,
        vocab_size=vocab,
        activation="swiglu" if gated else "squared_relu",
    )


LLAMA_8B = read_spec("llama-3.1-8b")
QWEN_8B = read_spec("qwen3-8b")
LLAMA_70B = dense(80, 8192, 64, 8, 28672, 128256)
NEMOTRON_H_56B = replace(
    read_spec("nemotron-h-8b"),
    pattern="M-" * 27 + "*-" * 10 + "M-" * 17 + "M" * 10,
    hidden_size=8192,
    ffn_size=32768,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mamba_num_heads=256,
    mamba_head_dim=64,
    ssm_state_size=256,
    ssm_groups=8,
)
MEMORY = "shape from memory, not from its config.json"
FSDP = "its FSDP is planned as data parallelism"

ROWS = [
    Published("Llama-3.1-8B BF16, 8 GPUs", "tuned", LLAMA_8B, Layout(8, 8192, 128, cp=2), 10_682),
    Published("Llama-3.1-8B BF16, 128 GPUs", "tuned", LLAMA_8B, Layout(128, 8192, 2048, cp=2), 10_630),
    Published("Llama-3-8B FP8-CS, 8 GPUs", "tuned", LLAMA_8B, Layout(8, 8192, 128, fp8=True), 14_451, note=FSDP),
    Published("Llama-3.1-8B FP8, 8 GPUs", "tuned", LLAMA_8B, Layout(8, 8192, 128, cp=2, fp8=True), 14_048),
    Published("Llama-3.1-8B FP8, 128 GPUs", "tuned", LLAMA_8B, Layout(128, 8192, 2048, cp=2, fp8=True), 13_739),
    Published("Llama-3.1-70B BF16, 64 GPUs", "tp/pp", LLAMA_70B, Layout(64, 8192, 128, tp=4, pp=4, vpp=5, cp=2), 1_118),
    Published(
        "Llama-3.1-70B FP8, 64 GPUs",
        "tp/pp",
        LLAMA_70B,
        Layout(64, 8192, 128, tp=4, pp=8, vpp=5, fp8=True),
        1_662,
        note="vpp not published: 5 assumed",
    ),
    Published(
        "Llama-3-70B SFT FP8-CS, 32 GPUs",
        "tp/pp",
        LLAMA_70B,
        Layout(32, 4096, 32, tp=4, pp=4, vpp=5, fp8=True),
        1_638,
        note="batch not published: 32 assumed",
    ),
    Published(
        "Nemotron-22B FP8, 64 GPUs",
        "untuned",
        dense(40, 6144, 48, 48, 24576, 256_000, gated=False),
        Layout(64, 4096, 256, micro_batch=2, tp=2, pp=4, vpp=10, fp8=True),
        4_256,
        note=f"{MEMORY}; of 2024; batch of 256 assumed",
    ),
    Published("Qwen3-8B BF16, 16 GPUs", "untuned", QWEN_8B, Layout(16, 4096, 1024), 10_456),
    Published(
        "Llama-2-7B FP8, 8 GPUs",
        "untuned",
        dense(32, 4096, 32, 32, 11008, 32_000),
        Layout(8, 4096, 128, fp8=True),
        16_847,
        note="of 2024",
    ),
    Published(
        "MPT-7B BF16",
        "untuned",
        dense(32, 4096, 32, 32, 16384, 50_432, gated=False),
        Layout(8, 2048, 512),
        10_643,
        note=f"{MEMORY}; {FSDP}; 8 GPUs assumed",
    ),
    Published(
        "OLMo 7B BF16",
        "untuned",
        dense(32, 4096, 32, 32, 11008, 100_278),
        Layout(8, 4096, 512),
        10_000,
        note=f"{MEMORY}; {FSDP}; 8 GPUs assumed",
    ),
    Published(
        "torchtitan Llama-3.1-8B BF16, 8 GPUs",
        "untuned",
        LLAMA_8B,
        Layout(8, 8192, 16, micro_batch=2, recompute=frozenset({"mlp"})),
        6_667,
        H100_500W,
        note="rates of its 500 W part are guesses; its selective recompute is planned as that of the MLP",
    ),
    Published(
        "torchtitan Llama-3.1-8B float8, 8 GPUs",
        "untuned",
        LLAMA_8B,
        Layout(8, 8192, 16, micro_batch=2, recompute=frozenset({"mlp"}), fp8=True),
        8_532,
        H100_500W,
        note="as above",
    ),
    Published(
        "Nemotron-H-56B FP8, 32 GPUs, 25.05",
        "hybrid",
        NEMOTRON_H_56B,
        Layout(32, 8192, 96, tp=8, fp8=True),
        1_625,
        note=MEMORY,
    ),
    Published(
        "Nemotron-H-56B FP8, 128 GPUs, 25.08, graphs",
        "hybrid",
        NEMOTRON_H_56B,
        Layout(128, 8192, 384, tp=8, fp8=True),
        2_070,
        note=MEMORY,
    ),
]
