"""The benchmarks by name: what each asks, how it is sampled and graded. One more is a row of TASKS."""

from dataclasses import dataclass, replace
from pathlib import Path

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nReason step by step, and put the letter of the right option within \\boxed{}."
PROGRAM = (
    "\n\nSolve the problem in Python 3. Give the whole program last, in one block between ```python and ```. It reads"
    " standard input and writes standard output, unless the problem gives code to start from: then complete that code."
)
FUNCTION = "\n\nComplete this Python function. Give the whole of it last, in one block between ```python and ```."
OWN = Path(__file__).parent / "problems"  # written for this repository: for tests, the demo, and a first look


@dataclass(frozen=True)
class Task:
    """One benchmark. `rows`: questions as published, 0 for files without such a number."""

    name: str
    title: str
    reward: str  # of rewards/, where a question names none
    rows: int = 0
    instruction: str = ""  # after the question
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 32_768
    source: str = ""  # of these settings

    @property
    def shuffles(self) -> bool:
        """Are the options of a question in an order of their own for every sample?"""
        return self.reward == "choice"


_MATH = Task(
    "", "", "math", instruction=BOXED, samples=64, temperature=0.6, top_p=0.95,
    source="PRISM, appendix B: Qwen's evaluation, 32k tokens, T 0.6, top-p 0.95, 64 samples; instruction inferred",
)  # fmt: skip
_CODE = Task(
    "", "", "code", instruction=PROGRAM, samples=3, temperature=0.7,
    source="PRISM, appendix B: Evalchemy, 32k tokens, T 0.7, 3 samples; instruction ours",
)  # fmt: skip
_GREEDY = Task("", "", "", max_tokens=2048, source="ours: greedy, 2,048 tokens")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        replace(_MATH, name="aime24", title="AIME 2024", rows=30),
        replace(_MATH, name="aime25", title="AIME 2025", rows=30),
        replace(_MATH, name="math500", title="MATH500", rows=500),
        replace(_CODE, name="livecodebench", title="LiveCodeBench v5", rows=279),
        replace(_CODE, name="codeforces", title="Codeforces", rows=453),
        Task(
            "gpqa", "GPQA-Diamond", "choice", 198, LETTER, 3, 0.7,
            source="inferred: the paper's scores lie on a grid of 198 x 3, and Evalchemy's T is 0.7; instruction ours",
        ),
        replace(_GREEDY, name="humaneval", title="HumanEval", reward="code", rows=164, instruction=FUNCTION),
        replace(_GREEDY, name="gsm8k", title="GSM8K", reward="math", rows=1319, instruction=BOXED),
        replace(_GREEDY, name="hellaswag", title="HellaSwag", reward="choice", rows=10_042, instruction=LETTER),
        replace(_GREEDY, name="truthfulqa", title="TruthfulQA MC1", reward="choice", rows=817, instruction=LETTER),
        replace(_GREEDY, name="own-math", title="Our own: math", reward="math", instruction=BOXED),
        replace(_GREEDY, name="own-choice", title="Our own: choices", reward="choice", instruction=LETTER),
        replace(_GREEDY, name="own-code", title="Our own: programs", reward="code", instruction=PROGRAM),
    )
}  # fmt: skip


def task_of(name: str) -> Task:
    """A row of TASKS, or a task of its own for a file of problems or of RL prompts (`my/file.jsonl`).

    Raises ValueError for a name that is neither.
    """
    if name.endswith(".jsonl"):
        return Task(
            Path(name).stem, Path(name).stem, "", max_tokens=2048, source="the defaults of a file: greedy, 2,048 tokens"
        )
    if name not in TASKS:
        raise ValueError(f"--tasks {name}: no such task; known are {', '.join(TASKS)}, or give a file, my/file.jsonl")
    return TASKS[name]


def file_of(name: str, folder: Path) -> Path:
    """Where the problems of a task are."""
    if name.endswith(".jsonl"):
        return Path(name)
    return (OWN if name.startswith("own-") else folder) / f"{name}.jsonl"
