"""The mechanism of settings: recipes and overrides become settings, and mistakes are named."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from prism_mcore.config import (
    Findings,
    ProgramSettings,
    Section,
    SettingsError,
    dump,
    help_text,
    load,
    walk_fields,
)


class RunSection(Section):
    """What the run is called."""

    name: str = Field(default="", description="Its name")


class Source(Section):
    """One source."""

    path: str = Field(description="Where it is")
    weight: float = Field(default=1.0, ge=0, description="Its share")


class Steps(Section):
    """Steps of both programs."""

    former_names: ClassVar[dict[str, str]] = {"iterations": "steps"}

    steps: int = Field(default=7, ge=1, description="How many")
    kinds: list[Literal["a", "b"]] = Field(default=[], description="Of what kind")


class MoreSteps(Steps):
    """Steps of the baker alone."""

    batch: int = Field(default=4, description="Loaves at once")


class Oven(Section):
    """How hot."""

    rate: float = Field(default=1e-4, description="Degrees a second")
    eps: float = Field(default=1e-8, description="A bit")
    mode: Literal["fan", "grill"] = Field(default="fan", description="How")
    shelves: Literal["auto"] | list[int] = Field(default="auto", description="Which")


class Flour(Section):
    """What is baked."""

    sources: list[Source] = Field(default=[], description="From where")
    fine: str = Field(default="off", description="Ground how")


class Baker(ProgramSettings):
    """Bakes."""

    program: ClassVar[str] = "launch/bake.py"
    takes_recipe_name: ClassVar[str] = "run.name"

    run: RunSection = RunSection()
    train: MoreSteps = MoreSteps()
    oven: Oven = Oven()
    flour: Flour = Flour()
    tools: dict[str, str] = Field(default={}, description="By name")


class Sauce(Section):
    """Poured."""

    thickness: int = Field(default=1, description="Of it")


class Cook(ProgramSettings):
    """Cooks."""

    program: ClassVar[str] = "launch/cook.py"

    train: Steps = Steps()
    sauce: Sauce = Sauce()


BOTH = (Baker, Cook)
FLOUR = "flour: {sources: [{path: a, weight: 0.5}, {path: b, weight: 0.5}]}"


def recipe(folder: Path, text: str = "", name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_nearer_recipe_wins_and_what_it_leaves_out_stays(tmp_path):
    recipe(tmp_path, "train: {steps: 5, batch: 3}\nflour: {sources: [{path: a}]}", "one.yaml")
    recipe(tmp_path, "train: {steps: 6}\nflour: {sources: [{path: b}, {path: c}]}", "two.yaml")
    settings = load(Baker, recipe(tmp_path, "base: [one.yaml, two.yaml]\noven: {rate: 5e-5}"), ["oven.eps=1e-10"])
    assert (settings.train.steps, settings.train.batch) == (6, 3)
    assert [source.path for source in settings.flour.sources] == ["b", "c"]  # lists are replaced
    assert (settings.oven.rate, settings.oven.eps) == (5e-5, 1e-10)  # YAML 1.1 would read text
    assert settings.run.name == "run"  # of the file


def test_overrides_reach_into_lists_and_take_yaml(tmp_path):
    settings = load(Baker, recipe(tmp_path, FLOUR), ["flour.sources.1.path=z", "train.kinds=[a, b]", "tools.x=y"])
    assert [source.path for source in settings.flour.sources] == ["a", "z"]
    assert settings.train.kinds == ["a", "b"]
    assert settings.tools == {"x": "y"}
    settings = load(Baker, None, ["train={steps: 2}", "train.batch=9", "train={steps: 3}"])
    assert (settings.train.steps, settings.train.batch, settings.run.name) == (3, 9, "")


def test_dumped_settings_load_back_equal(tmp_path):
    settings = load(Baker, recipe(tmp_path, FLOUR), ["oven.eps=1e-10", "oven.shelves=[1, 2]", "flour.fine=off"])
    assert load(Baker, recipe(tmp_path, dump(settings), "resolved.yaml")) == settings


def test_bases_in_a_circle_are_an_error_but_a_shared_base_is_not(tmp_path):
    recipe(tmp_path, "base: b.yaml", "a.yaml")
    recipe(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(SettingsError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load(Baker, tmp_path / "a.yaml")
    recipe(tmp_path, "train: {steps: 3}", "root.yaml")
    recipe(tmp_path, "base: root.yaml", "left.yaml")
    recipe(tmp_path, "base: root.yaml", "right.yaml")
    assert load(Baker, recipe(tmp_path, "base: [left.yaml, right.yaml]")).train.steps == 3


MISTAKES = {
    "train.step=3": "no setting train.step; nearest: train.steps",
    "train={stepz: 3}": "no setting train.stepz; nearest: train.steps",  # inside a value, too
    "train.rate=3": "nearest: oven.rate",  # the right name in the wrong section
    "ofen.rate=3": "nearest: oven.rate",
    "ofen=3": "nearest: oven",
    "flour.sources.0.pth=3": "nearest: flour.sources.<n>.path",
    "train.steps=abc": "train.steps='abc': input should be a valid integer",
    "train.steps=0": "train.steps=0: input should be greater than or equal to 1",
    "oven.mode=gril": "'fan' or 'grill'",
    "train=3": "train=3: input should be a valid dictionary",
    "oven.shelves=even": "oven.shelves='even'",
    "flour.sources.2.path=c": "the list has 2 elements",
    "train.steps": "is no override",
    "=3": "is no override",
    "train.kinds=[a": "not YAML",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named(tmp_path, override):
    with pytest.raises(SettingsError) as error:
        load(Baker, recipe(tmp_path, FLOUR), [override], others=BOTH)
    assert MISTAKES[override] in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "run.yaml: there is no setting trian.steps; nearest: train.steps"),
        ("train: {steps: 3}\ntrain: {steps: 4}", "'train' is given twice"),
        ("- 1", "holds a list"),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
        ("base: rum.yaml", "rum.yaml: No such file or directory; nearest there: run.yaml"),
        ("base: {a: b}", "needed: a recipe's path"),
        ("flour: {sources: [{weight: 1}]}", "flour.sources.0.path is not set"),
        ("run:\ntrain:", "run=None: input should be a valid dictionary"),
        ("1: 2", "there is no setting 1; nearest"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, message):
    with pytest.raises(SettingsError) as error:
        load(Baker, recipe(tmp_path, text))
    assert message in str(error.value)


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"train: \xff")
    with pytest.raises(SettingsError, match=r"run\.yaml is not YAML"):
        load(Baker, tmp_path / "run.yaml")


# --- settings of another program, and of another time -----------------------------------------------------------------

FOREIGN = {
    "sauce.thickness=2": "command line: sauce.thickness is a setting of launch/cook.py, which launch/bake.py does not",
    "sauce={thickness: 2}": "sauce.thickness is a setting of launch/cook.py",
    "sauce.thicknes=2": "no setting sauce.thicknes; nearest: sauce.thickness, a setting of launch/cook.py",
}


@pytest.mark.parametrize("override", FOREIGN)
def test_a_key_of_another_program_is_refused_with_its_name(tmp_path, override):
    with pytest.raises(SettingsError) as error:
        load(Baker, recipe(tmp_path, FLOUR), [override], others=BOTH)
    assert FOREIGN[override] in str(error.value)


def test_a_key_of_a_section_that_both_have_is_still_one_programs():
    with pytest.raises(SettingsError, match=r"train\.batch is a setting of launch/bake\.py, which launch/cook\.py"):
        load(Cook, None, ["train.batch=2"], others=BOTH)
    assert load(Cook, None, ["train.steps=2"], others=BOTH).train.steps == 2


def test_a_base_that_programs_share_is_read_without_what_is_not_ones_own(tmp_path):
    shared = recipe(tmp_path, f"train: {{steps: 3, batch: 2}}\n{FLOUR}", "shared.yaml")
    notes = []
    settings = load(Cook, recipe(tmp_path, "base: shared.yaml\nsauce: {thickness: 4}"), others=BOTH, notes=notes)
    assert (settings.train.steps, settings.sauce.thickness) == (3, 4)
    assert notes == [f"{shared}, a base: train.batch, flour left out, settings of launch/bake.py"]
    with pytest.raises(SettingsError, match=r"train\.batch is a setting of launch/bake\.py"):  # as a recipe of its own
        load(Cook, shared, others=BOTH)
    recipe(tmp_path, "flour: {fines: on}", "shared.yaml")
    with pytest.raises(SettingsError, match=r"shared\.yaml: there is no setting flour\.fines"):  # nobody's
        load(Cook, tmp_path / "run.yaml", others=BOTH)


def test_a_former_name_is_read_with_a_note(tmp_path):
    notes = []
    file = recipe(tmp_path, "train: {iterations: 3}")
    assert load(Baker, file, ["train.batch=2"], notes=notes).train.steps == 3
    assert notes == [f"{file}: train.iterations is now called train.steps"]
    assert load(Baker, file, ["train.iterations=5"]).train.steps == 5
    assert load(Baker, recipe(tmp_path, "base: run.yaml\ntrain: {steps: 4}", "new.yaml")).train.steps == 4
    with pytest.raises(SettingsError, match=r"former name of train\.steps, and both are given"):
        load(Baker, recipe(tmp_path, "train: {iterations: 3, steps: 4}"))


# --- help, findings ---------------------------------------------------------------------------------------------------


def test_help_documents_every_setting_of_the_program_and_no_other():
    text = help_text(Baker)
    for name, field in walk_fields(Baker):
        assert f"  {name} (" in text
        assert field.description and field.description in text
    assert "sauce" not in text and "batch" not in help_text(Cook)
    assert "  oven.mode (fan|grill, default fan)" in text
    assert "  flour.sources.<n>.path (str, required)" in text


def test_all_problems_are_told_at_once():
    found = Findings()
    found.notes.append("well")
    assert found.conclude() == ["well"]
    found.problems += ["one", "two"]
    with pytest.raises(SettingsError, match="one\ntwo"):
        found.conclude()
