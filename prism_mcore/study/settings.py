"""What a study consists of."""

from typing import ClassVar, Literal

from pydantic import Field

from prism_mcore.config import ProgramSettings, Section

MODEL = "model"  # in `from` and `of`: the model as it is given, before any training here


class StudySettings(Section):
    """The study's name, place and use of this machine."""

    name: str = Field(default="", description="Name of the study; empty takes the recipe's file name")
    dir: str = Field(default="runs", description="Folder of studies; this one lives in <dir>/<name>/")
    workers: int = Field(default=2, ge=1, description="Nodes that run at the same time on this machine")
    tokenizer: str = Field(
        default="",
        description="Folder with the tokenizer of models that start from random weights; their exports get it",
    )
    gpus: bool = Field(default=True, description="Ask Slurm for a GPU for each rank")
    gpus_per_node: int = Field(default=8, ge=1, description="Ranks that a Slurm node takes")
    sbatch: list[str] = Field(default=[], description="Further options of sbatch, such as --account=x")
    partition: str = Field(default="", description="Slurm's partition; empty is its default")
    time: str = Field(default="24:00:00", description="Time limit of a Slurm job; it is queued again where it ends")
    response_tokens: int = Field(
        default=2000, ge=1, description="Mean length of a response that the plan of RL's hours assumes"
    )


class Ingredient(Section):
    """Recipes that are joined, later ones win, and settings on top of them."""

    recipe: str | list[str] = Field(default=[], description="Recipes, relative to the study's file")
    settings: list[str] = Field(default=[], description="Settings as section.name=value")


class Ranks(Section):
    """Processes of a node, by what it does."""

    midtrain: int = Field(default=1, ge=1, description="Mid-training, merging and exporting")
    rl: int = Field(default=1, ge=1, description="RL")
    evaluate: int = Field(default=1, ge=1, description="Evaluation")


class ModelEntry(Section):
    """A model: what all mid-training of it has in common, and all RL, and on how many ranks they run."""

    midtrain: Ingredient = Field(default=Ingredient(), description="Of mid-training; its model.init is `model`")
    rl: Ingredient = Field(default=Ingredient(), description="Of RL")
    ranks: Ranks = Field(default=Ranks(), description="Processes of a node")


class Preparation(Section):
    """A command that brings what the runs read; each runs after those above it."""

    command: list[str] = Field(
        min_length=1, description="Program and arguments; `python` is the one that runs the study"
    )
    outputs: list[str] = Field(min_length=1, description="Files and folders it makes")


class Arm(Section):
    """A run of every model and seed."""

    program: Literal["midtrain", "rl", "merge"] = Field(description="What it runs")
    start: str = Field(default=MODEL, alias="from", description="Arm whose weights it starts from, or `model`")
    mixture: str = Field(default="", description="Of mid-training: one of `mixtures`")
    rl_mix: str = Field(default="", description="Of RL: one of `rl_mixes`")
    merge: dict[str, float] = Field(default={}, description="Of merging: arms and their weights")
    recipe: str | list[str] = Field(default=[], description="Recipes on top of the model's and the mixture's")
    settings: list[str] = Field(default=[], description="Settings on top of all recipes")
    models: list[str] = Field(default=[], description="Models it is run of; empty is all")
    ranks: int | None = Field(default=None, ge=1, description="Processes; null is the model's")
    seeds: list[int] = Field(default=[], description="Seeds it is run with; empty is all")


class Evaluation(Section):
    """Tasks that arms are evaluated on."""

    tasks: list[str] = Field(min_length=1, description="Names of benchmarks, or files of questions (.jsonl)")
    settings: list[str] = Field(default=[], description="Settings of launch/evaluate.py")
    of: list[str] = Field(default=[], description="Arms, or `model`; empty is all arms")


class Analysis(Section):
    """A comparison of arms by launch/analyze.py."""

    what: str = Field(description="Its command: weights, similarity, landscape or behaviour")
    of: list[str] = Field(min_length=1, description="Arms in the order the command takes them, or `model`")
    arguments: list[str] = Field(default=[], description="Further arguments")


class Claims(Section):
    """Which arms and tasks the report's verdicts are about; what is empty is not measured."""

    base: str = Field(default="", description="Arm that is not mid-trained")
    general: str = Field(default="", description="Control: mid-trained on general text alone")
    general_domain: str = Field(default="general", description="Domain whose loss is to be kept")
    midtrained: list[str] = Field(default=[], description="Mid-trained arms")
    task: str = Field(default="", description="What RL trains for, as evaluations name it")
    rl: dict[str, str] = Field(default={}, description="Arm -> the same after RL; the base among them")
    science_task: str = Field(default="", description="What a mixture adds, as evaluations name it")
    with_science: str = Field(default="", description="Arm with science at mid-training and in RL")
    without_science: str = Field(default="", description="The same RL, no science at mid-training")
    with_science_rl: str = Field(default="", description="Science at mid-training, none in RL")
    changes: dict[Literal["midtraining", "rl", "control"], str] = Field(
        default={}, description="Analyses of weights: of mid-training, of RL, and of the control with RL's schedule"
    )


class StudyProgram(ProgramSettings):
    """All of a study."""

    program: ClassVar[str] = "launch/study.py"
    takes_recipe_name: ClassVar[str] = "study.name"

    study: StudySettings = StudySettings()
    prepare: dict[str, Preparation] = Field(default={}, description="Commands that come first, by name")
    models: dict[str, ModelEntry] = Field(default={}, description="Models by name")
    mixtures: dict[str, Ingredient] = Field(default={}, description="Mixtures of mid-training by name")
    rl_mixes: dict[str, Ingredient] = Field(default={}, description="Prompt mixtures of RL by name")
    seeds: list[int] = Field(default=[0], description="Seeds; each is a run of every arm")
    arms: dict[str, Arm] = Field(default={}, description="Runs by name")
    evaluate: dict[str, Evaluation] = Field(default={}, description="Evaluations by name")
    analyze: dict[str, Analysis] = Field(default={}, description="Analyses by name")
    claims: Claims | None = Field(default=None, description="What the report is to judge; null judges nothing")
