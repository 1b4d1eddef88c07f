"""What cannot work is refused before any process group, with what would."""

import json
from pathlib import Path

import pytest

from prism_mcore.config import SettingsError, load
from prism_mcore.model.settings import ModelSettings, resolve_spec
from prism_mcore.model.spec import read_config, spec_from_config
from prism_mcore.train import checks
from prism_mcore.train.settings import MidtrainSettings

SOURCE = "data.sources=[{path: a, weight: 0.5}, {path: b, weight: 0.5}]"


def check(*overrides: str, spec: str = "demo-hybrid", ranks: int = 1, **config) -> list[str]:
    settings = load(MidtrainSettings, None, ["run.name=run", SOURCE, "data.seq_len=256", *overrides])
    return checks.check(settings, spec_from_config(read_config(spec) | config), ranks)


REFUSED = {
    "batch": (
        (["train.global_batch=100", "train.micro_batch=4"], {"ranks": 2}),
        "train.global_batch=100 is not a multiple of micro_batch*dp=8; try 96 or 104",
    ),
    "batch smaller than one step": ((["train.global_batch=3"], {"ranks": 8}), "micro_batch*dp=8; try 8"),
    "ranks": (
        (["parallel.tp=2", "parallel.pp=2"], {"ranks": 6}),
        "6 ranks are not a multiple of tp*pp*cp=4; try 4 or 8",
    ),
    "optimizer instances": (
        (["parallel.optimizer_instances=3"], {"ranks": 8}),
        "the 8 data-parallel ranks; try 2 or 4",
    ),
    "attention heads": ((["parallel.tp=8"], {"ranks": 8}), "8 does not divide the model's 4 attention heads; try 4"),
    "kv heads": ((["parallel.tp=4"], {"ranks": 4}), "does not divide the model's 2 key/value heads; try 2"),
    "SSM groups": ((["parallel.tp=4"], {"ranks": 4, "num_key_value_heads": 4}), "the model's 2 SSM groups; try 2"),
    "MLP": ((["parallel.tp=2"], {"ranks": 2, "intermediate_size": 385}), "385 MLP columns; try 1 or 5"),
    "interleaving alone": ((["parallel.vpp=2"], {}), "parallel.vpp=2 needs a pipeline"),
    "too many chunks": (
        (["parallel.pp=3", "parallel.vpp=3"], {"ranks": 3}),
        "pp*vpp=9 chunks are more than the model's 8",
    ),
    "interleaved batches": (
        (["parallel.pp=2", "parallel.vpp=2", "train.global_batch=5"], {"ranks": 2}),
        "a multiple of pp=2 micro-batches per step, got 5; for train.global_batch, try 4 or 6",
    ),
    "split length": ((["parallel.pp=2", "parallel.split=[8]"], {"ranks": 2}), "has 1 numbers; needed: pp*vpp=2"),
    "split sum": ((["parallel.pp=2", "parallel.split=[4, 5]"], {"ranks": 2}), "sums to 9; needed: the model's 8"),
    "split of nothing": ((["parallel.pp=2", "parallel.split=[8, 0]"], {"ranks": 2}), "leaves a chunk empty"),
    "sequence parallel alone": ((["parallel.sequence_parallel=true"], {}), "needs parallel.tp > 1"),
    "sequence and tp": (
        (["parallel.tp=2", "parallel.sequence_parallel=true", "data.seq_len=255"], {"ranks": 2}),
        "data.seq_len=255 is not a multiple of tp=2, which sequence_parallel needs; try 254 or 256",
    ),
    "positions": ((["data.seq_len=8192"], {"spec": "demo-dense"}), "longer than the model's 4096 positions"),
    "context parallelism": (
        (["parallel.cp=2", "data.seq_len=254"], {"ranks": 2}),
        "data.seq_len * train.micro_batch is 254 tokens; parallel.cp=2 needs a multiple of 2*cp = 4; try 252 or 256",
    ),
    "context and sequence parallelism": (
        (["parallel.cp=3", "parallel.tp=2", "parallel.sequence_parallel=true", "data.seq_len=32"], {"ranks": 6}),
        "needs a multiple of 2*cp = 6; try 30 or 36",
    ),
    "context parallelism in exact mode": (
        (["parallel.cp=2", "kernels.attention=exact"], {"ranks": 2}),
        "kernels.attention=exact has whole documents on every rank; use parallel.cp=1",
    ),
    "fp8 tokens under context parallelism": (
        (["precision.fp8=tensorwise", "parallel.cp=4", "data.seq_len=96"], {"ranks": 4}),
        "is 96 tokens; precision.fp8=tensorwise needs a multiple of 64; try 64 or 128",
    ),
    "fp8 with state": (
        (["precision.fp8=delayed"], {}),
        "delayed is not offered: its scales are those of earlier steps",
    ),
    "fp8 of others": (
        (["precision.fp8=mxfp8"], {}),
        "mxfp8 is not offered: its blocks of 32 need compute capability 10",
    ),
    "fp8 rows": (
        (["precision.fp8=blockwise", "parallel.tp=8"], {"spec": "granite-4.0-h-micro", "ranks": 8}),
        "at parallel.tp=8 a rank has 1288 rows of mamba's in_proj; use parallel.tp=4, or precision.fp8=off",
    ),
    "fp8 tokens": (
        (["precision.fp8=tensorwise", "data.seq_len=250"], {"spec": "demo-dense"}),
        "train.micro_batch is 250 tokens; precision.fp8=tensorwise needs a multiple of 16; try 240 or 256",
    ),
    "fp8 tokens of ranks": (
        (
            ["precision.fp8=blockwise", "data.seq_len=272", "parallel.tp=2", "parallel.sequence_parallel=true"],
            {"spec": "demo-dense", "ranks": 2},
        ),
        "is 272 tokens; precision.fp8=blockwise needs a multiple of 32; try 256 or 288",
    ),
    "fp8 nowhere": (
        (["precision.fp8=blockwise", "precision.fp8_bf16_ends=4"], {"spec": "demo-dense"}),
        "leaves none of the 8 sub-layers in FP8; use at most 3",
    ),
    "bf16 reduction of replicas": (
        (["optimizer.grad_reduce=bf16", "parallel.optimizer_instances=2"], {"ranks": 4}),
        "optimizer.grad_reduce=bf16 needs parallel.optimizer_instances=1, got 2",
    ),
    "remainders of fp32": (
        (["optimizer.masters=remainder", "precision.dtype=fp32"], {}),
        "optimizer.masters=remainder needs precision.dtype=bf16, got fp32",
    ),
    "remainders by another": (
        (["optimizer.masters=remainder", "kernels.adamw=apex"], {}),
        "optimizer.masters=remainder is our own AdamW's, got kernels.adamw=apex",
    ),
    "an op": ((["kernels.ssd_scann=triton"], {}), "kernels.ssd_scann: no such op (did you mean kernels.ssd_scan?)"),
    "a backend": (
        (["kernels.ssd_scan=tritn"], {}),
        "kernels.ssd_scan=tritn: ssd_scan has no such backend (did you mean",
    ),
    "nothing to train": (
        (["train.only=[attenton]"], {}),
        "train.only: the model has no parameter attenton; there are attention, mamba, mlp, and names such as",
    ),
    "no name": ((["run.name=''"], {}), "run.name is empty; give run.name=NAME, or a recipe"),
    "sources": ((["data.sources=[]"], {}), "data.sources is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_work_is_refused_with_one_that_can(case):
    (overrides, context), message = REFUSED[case]
    with pytest.raises(SettingsError) as error:
        check(*overrides, **context)
    assert message in str(error.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(SettingsError) as error:
        check("parallel.tp=3", "precision.fp8=tensorwise", "parallel.vpp=2", ranks=3)
    lines = str(error.value).splitlines()
    assert len(lines) == len(set(lines)) == 6  # query and key heads, Mamba heads, SSM groups, FP8, interleaving


def test_one_ssm_group_takes_any_tp_that_divides_its_heads():
    assert check("parallel.tp=2", ranks=2, n_groups=1) == []


def test_notes_say_what_is_unusual_but_works():
    notes = check(
        "parallel.tp=2",
        "data.seq_len=8192",
        "train.steps=5",
        "optimizer.warmup_steps=9",
        "data.sources.0.weight=1",
        ranks=2,
        vocab_size=1023,
    )
    for part in ("padded by 1 rows", "no position embedding", "lr is never reached", "normalised"):
        assert sum(part in note for note in notes) == 1, notes
    assert "no such sub-layer" in check("train.recompute=[mamba]", spec="demo-dense")[0]


def test_a_shape_that_is_not_that_of_the_weights_is_noted(tmp_path):
    shape = read_config("demo-dense")
    (tmp_path / "config.json").write_text(json.dumps(shape | {"rope_theta": 123.0, "initializer_range": 0.5}))
    (note,) = check("model.spec=demo-dense", f"model.init={tmp_path}", spec="demo-dense")
    assert f"rope_theta={shape['rope_theta']} (there 123.0)" in note and "initializer_range" not in note
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert check("model.spec=demo-dense", f"model.init={tmp_path}", spec="demo-dense") == []


def test_the_shape_comes_from_the_spec_or_the_hugging_face_directory(tmp_path):
    shipped = Path(checks.__file__).parents[1] / "model" / "configs" / "demo-dense.json"
    (tmp_path / "config.json").write_text(shipped.read_text())
    assert resolve_spec(ModelSettings(init=str(tmp_path))).family == "llama"
    assert resolve_spec(ModelSettings(spec="demo-hybrid")).family == "nemotron_h"
    with pytest.raises(SettingsError, match=r"set model\.spec"):
        resolve_spec(ModelSettings())
    with pytest.raises(SettingsError, match=r"model.spec: .*shipped shape"):
        resolve_spec(ModelSettings(spec="gpt-5"))
