"""Recipes and overrides become settings, mistakes are named, and what cannot work is refused with what would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prism_mcore.config import Settings, SettingsError, dump, help_text, load, resolve_spec, validate, walk_fields
from prism_mcore.model.spec import read_config, spec_from_config

SOURCE = "data: {sources: [{path: a, weight: 0.5}, {path: b, weight: 0.5}], seq_len: 256}"


def recipe(folder: Path, text: str = "", name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_nearer_recipe_wins_and_what_it_leaves_out_stays(tmp_path):
    recipe(tmp_path, "train: {steps: 5, global_batch: 4}\ndata: {sources: [{path: a}]}", "one.yaml")
    recipe(tmp_path, "train: {steps: 6}\ndata: {sources: [{path: b}, {path: c}]}", "two.yaml")
    settings = load(recipe(tmp_path, "base: [one.yaml, two.yaml]\noptimizer: {lr: 5e-5}"), ["optimizer.eps=1e-10"])
    assert (settings.train.steps, settings.train.global_batch) == (6, 4)
    assert [source.path for source in settings.data.sources] == ["b", "c"]  # lists are replaced
    assert (settings.optimizer.lr, settings.optimizer.eps) == (5e-5, 1e-10)  # YAML 1.1 would read text
    assert settings.run.name == "run"  # of the file


def test_overrides_reach_into_lists_and_take_yaml(tmp_path):
    file = recipe(tmp_path, SOURCE)
    settings = load(file, ["data.sources.1.path=z", "train.recompute=[mamba, mlp]", "kernels.scan=reference"])
    assert [source.path for source in settings.data.sources] == ["a", "z"]
    assert settings.train.recompute == ["mamba", "mlp"]
    assert settings.kernels == {"scan": "reference"}


def test_dumped_settings_load_back_equal(tmp_path):
    settings = load(recipe(tmp_path, SOURCE), ["optimizer.eps=1e-10", "parallel.split=[1, 2]", "precision.fp8=off"])
    assert load(recipe(tmp_path, dump(settings), "resolved.yaml")) == settings


def test_bases_in_a_circle_are_an_error_but_a_shared_base_is_not(tmp_path):
    recipe(tmp_path, "base: b.yaml", "a.yaml")
    recipe(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(SettingsError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load(tmp_path / "a.yaml")
    recipe(tmp_path, "train: {steps: 3}", "root.yaml")
    recipe(tmp_path, "base: root.yaml", "left.yaml")
    recipe(tmp_path, "base: root.yaml", "right.yaml")
    assert load(recipe(tmp_path, "base: [left.yaml, right.yaml]")).train.steps == 3


MISTAKES = {
    "train.step=3": "no setting train.step; nearest: train.steps",
    "train.lr=3": "nearest: optimizer.lr",  # the right name in the wrong section
    "optimiser.lr=3": "nearest: optimizer.lr",
    "data.sources.0.pth=3": "nearest: data.sources.<n>.path",
    "train.steps=abc": "train.steps='abc': input should be a valid integer",
    "train.steps=0": "train.steps=0: input should be greater than or equal to 1",
    "optimizer.schedule=cos": "'cosine', 'linear'",
    "train=3": "train=3: input should be a valid dictionary",
    "parallel.split=even": "parallel.split='even'",
    "data.sources.2.path=c": "the list has 2 elements",
    "train.steps": "is no override",
    "train.recompute=[mamba": "not YAML",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named(tmp_path, override):
    with pytest.raises(SettingsError) as error:
        load(recipe(tmp_path, SOURCE), [override])
    assert MISTAKES[override] in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "run.yaml: there is no setting trian.steps; nearest: train.steps"),
        ("train: {steps: 3}\ntrain: {steps: 4}", "'train' is given twice"),
        ("- 1", "holds a list"),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
        ("base: {a: b}", "needed: a recipe's path"),
        ("data: {sources: [{weight: 1}]}", "data.sources.0.path is not set"),
        ("run:\ntrain:", "run=None: input should be a valid dictionary"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, message):
    with pytest.raises(SettingsError) as error:
        load(recipe(tmp_path, text))
    assert message in str(error.value)


def test_help_documents_every_setting_without_importing_torch():
    text = help_text()
    for name, field in walk_fields():
        assert f"  {name} (" in text
        assert field.description and field.description in text
    code = "import prism_mcore.config as c, sys; c.help_text(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- validate ---------------------------------------------------------------------------------------------------------


def check(*overrides: str, spec: str = "demo-hybrid", ranks: int = 1, tmp_path: Path, **config) -> list[str]:
    settings = load(recipe(tmp_path, SOURCE), overrides)
    return validate(settings, spec_from_config(read_config(spec) | config), ranks)


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
    "context parallelism": ((["parallel.cp=2"], {"ranks": 2}), "context parallelism is not supported yet"),
    "fp8": ((["precision.fp8=tensorwise"], {}), "precision.fp8=tensorwise is not supported yet"),
    "sources": ((["data.sources=[]"], {}), "data.sources is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_work_is_refused_with_one_that_can(tmp_path, case):
    (overrides, context), message = REFUSED[case]
    with pytest.raises(SettingsError) as error:
        check(*overrides, tmp_path=tmp_path, **context)
    assert message in str(error.value)


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(SettingsError) as error:
        check("parallel.tp=3", "precision.fp8=x", "parallel.vpp=2", ranks=3, tmp_path=tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == len(set(lines)) == 6  # query and key heads, Mamba heads, SSM groups, FP8, interleaving


def test_one_ssm_group_takes_any_tp_that_divides_its_heads(tmp_path):
    assert check("parallel.tp=2", ranks=2, n_groups=1, tmp_path=tmp_path) == []


def test_notes_say_what_is_unusual_but_works(tmp_path):
    notes = check(
        "parallel.tp=2",
        "data.seq_len=8192",
        "train.steps=5",
        "optimizer.warmup_steps=9",
        "data.sources.0.weight=1",
        ranks=2,
        vocab_size=1023,
        tmp_path=tmp_path,
    )
    for part in ("padded by 1 rows", "no position embedding", "lr is never reached", "normalised"):
        assert sum(part in note for note in notes) == 1, notes
    assert "no such sub-layer" in check("train.recompute=[mamba]", spec="demo-dense", tmp_path=tmp_path)[0]


def test_a_shape_that_is_not_that_of_the_weights_is_noted(tmp_path):
    shape = read_config("demo-dense")
    (tmp_path / "config.json").write_text(json.dumps(shape | {"rope_theta": 123.0, "initializer_range": 0.5}))
    (note,) = check("model.spec=demo-dense", f"model.init={tmp_path}", spec="demo-dense", tmp_path=tmp_path)
    assert f"rope_theta={shape['rope_theta']} (there 123.0)" in note and "initializer_range" not in note
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert check("model.spec=demo-dense", f"model.init={tmp_path}", spec="demo-dense", tmp_path=tmp_path) == []


def test_the_shape_comes_from_the_spec_or_the_hugging_face_directory(tmp_path):
    (tmp_path / "config.json").write_text(
        Path(__file__).parent.parent.joinpath("prism_mcore/model/configs/demo-dense.json").read_text()
    )
    assert resolve_spec(Settings.model_validate({"model": {"init": str(tmp_path)}})).family == "llama"
    assert resolve_spec(Settings.model_validate({"model": {"spec": "demo-hybrid"}})).family == "nemotron_h"
    with pytest.raises(SettingsError, match=r"set model\.spec"):
        resolve_spec(Settings())
    with pytest.raises(SettingsError, match=r"model.spec: .*shipped shape"):
        resolve_spec(Settings.model_validate({"model": {"spec": "gpt-5"}}))
