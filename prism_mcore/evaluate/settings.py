"""Settings of the programs that measure a model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prism_mcore.config import ProgramSettings, Section
from prism_mcore.generate.settings import EngineSettings
from prism_mcore.model.settings import KernelSettings, PrecisionSettings
from prism_mcore.parallel import ParallelSettings


class ScoreSettings(ProgramSettings):
    """All settings of launch/score.py."""

    program: ClassVar[str] = "launch/score.py"

    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)


class EvaluationSettings(Section):
    """What is asked, and how."""

    problems: str = Field(
        default="problems", description="Folder with <task>.jsonl, as tools/import_benchmark.py writes them"
    )
    partial: bool = Field(default=False, description="Take a file with fewer questions than were published")
    limit: int | None = Field(default=None, ge=1, description="Ask the first so many questions only; null asks all")
    prompt: Literal["auto", "template", "turns", "plain"] = Field(
        default="auto",
        description="The tokenizer's chat template; `User: ... Assistant:`, as PRISM mid-trains; or the question alone."
        " auto takes the template where there is one, else turns",
    )


class TaskSampling(Section):
    """How samples are drawn; null is the task's own value."""

    samples: int | None = Field(default=None, ge=1, description="Samples of each question")
    temperature: float | None = Field(default=None, ge=0, description="Divides the logits; 0 takes the likeliest token")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the likeliest tokens that reach this probability together"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Longest response, in tokens")
    seed: int = Field(default=0, ge=0, lt=2**64, description="Seed of the samples and of the order of options")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="Texts that end a response, after its reasoning only; in turns the next turn always does",
    )


class GpqaSettings(Section):
    """Multiple choice."""

    options: Literal["shuffled", "given", "evalchemy"] = Field(
        default="shuffled",
        description="Their order: by seed, question and sample; as in the file; or as Evalchemy's GPQADiamond has it,"
        " where the right one is D in every question: a score is then the model's share of D",
    )


class GradingSettings(Section):
    """How responses are graded."""

    extractor: Literal["lenient", "strict", "whole"] = Field(
        default="lenient",
        description="What counts: any answer after the reasoning that the reward finds; one in the form that was asked"
        " for; or any in the whole response, reasoning included, as harnesses do that do not tell them apart",
    )
    workers: int = Field(default=2, ge=1, description="Processes that grade; for programs at most the free cores")
    timeout_s: float = Field(default=30.0, gt=0.0, description="Longest that grading a response may take")
    test_s: float = Field(default=6.0, gt=0.0, description="Longest a program may take for a test")
    program_s: float = Field(default=60.0, gt=0.0, description="Longest a program may take for all its tests")
    memory_mb: int = Field(default=1024, ge=64, description="MiB of address space that a program may take")
    seed: int = Field(default=0, ge=0, description="Seed of the bootstrap")


class ContaminationSettings(Section):
    """Which questions are in the training data?"""

    tokens: list[str] = Field(
        default=[], description="Token files to look for the questions in, of the model's tokenizer; none asks nothing"
    )
    ngram: int = Field(default=13, ge=2, description="Tokens of the n-grams that are looked for")
    share: float = Field(
        default=0.5, gt=0, le=1, description="A question is a hit where this share of its n-grams is found"
    )


class HarnessSettings(Section):
    """lm_eval's tasks (--lm-eval)."""

    include: str | None = Field(default=None, description="Folder with more task files (YAML)")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before each question; null: the task's own"
    )
    limit: int | None = Field(default=None, ge=1, description="Ask the first so many questions of each task only")
    chat_template: bool = Field(default=False, description="Ask through the tokenizer's chat template")
    after_think: bool = Field(
        default=False,
        description="Stop texts and what is graded are of what follows </think>; lm_eval's own: all of it",
    )


class EvaluateSettings(ProgramSettings):
    """All settings of launch/evaluate.py."""

    program: ClassVar[str] = "launch/evaluate.py"

    evaluate: EvaluationSettings = EvaluationSettings()
    sampling: TaskSampling = TaskSampling()
    gpqa: GpqaSettings = GpqaSettings()
    grading: GradingSettings = GradingSettings()
    contamination: ContaminationSettings = ContaminationSettings()
    harness: HarnessSettings = HarnessSettings()
    generate: EngineSettings = EngineSettings()
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)
