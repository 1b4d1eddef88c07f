"""What an evaluation is to do: each task's questions, prompts and sampling, and which samples are there already."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_mcore.evaluate import samples as kept
from prism_mcore.evaluate.problems import Asked, Problem, ask, prompt_text, read_problems, stops_of
from prism_mcore.evaluate.samples import Place, Sample, prompt_hash
from prism_mcore.evaluate.settings import EvaluateSettings
from prism_mcore.evaluate.tasks import Task, file_of, task_of
from prism_mcore.generate.prompts import prompt_problem
from prism_mcore.generate.requests import Key, Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.model.spec import ModelSpec
from prism_mcore.text import Tokenizer, check_text, in_reasoning


@dataclass(frozen=True)
class Prompt:
    """A question as a model reads it."""

    text: str
    tokens: tuple[int, ...]
    hash: str


@dataclass
class Job:
    """One task of an evaluation. `name`: as it was asked for; `out`: OUT/<task>, beside which its samples lie."""

    name: str
    task: Task
    problems: list[Problem]
    settings: EvaluateSettings
    out: Path
    tokenizer: Tokenizer | None = None  # none is needed to grade
    _prompts: dict[Place, Prompt] = field(default_factory=dict)

    @property
    def sampling(self) -> Sampling:
        """The task's own values where the settings give none."""
        given, task = self.settings.sampling, self.task
        return Sampling(
            samples=task.samples if given.samples is None else given.samples,
            temperature=task.temperature if given.temperature is None else given.temperature,
            top_p=task.top_p if given.top_p is None else given.top_p,
            max_tokens=task.max_tokens if given.max_tokens is None else given.max_tokens,
            seed=given.seed,
            stop=[*given.stop, *(stops_of(self.tokenizer, self.settings.evaluate.prompt) if self.tokenizer else [])],
            stop_in_think=False,
        )

    @property
    def places(self) -> list[Place]:
        """Every sample that is asked for."""
        return [(problem.key, sample) for problem in self.problems for sample in range(self.sampling.samples)]

    def case(self, model: str) -> dict[str, Any]:
        """What the samples of a task have in common: not their number, nor layout, batch or slots."""
        sampling = self.sampling.model_dump(mode="json", exclude={"samples", "stop_in_think"})
        used = self.settings.model_dump(mode="json", include={"precision", "kernels"})
        return {
            "task": self.task.name,
            "model": model,
            "instruction": self.task.instruction,
            "evaluate.prompt": self.settings.evaluate.prompt,
            **{f"sampling.{name}": value for name, value in sampling.items()},
            **({"gpqa.options": self.settings.gpqa.options} if self.task.reward == "choice" else {}),
            **{f"{section}.{name}": value for section, values in used.items() for name, value in values.items()},
        }

    def asked(self, problem: Problem, sample: int) -> Asked:
        return ask(problem, self.task, sample, seed=self.sampling.seed, options=self.settings.gpqa.options)

    def prompt(self, problem: Problem, sample: int) -> Prompt:
        assert self.tokenizer is not None, "grading asks for no prompts"
        place = (problem.key, sample if self.task.shuffles else 0)
        if place not in self._prompts:
            text, whole = prompt_text(
                self.asked(problem, sample).messages, self.tokenizer, self.settings.evaluate.prompt
            )
            check_text(text)
            tokens = self.tokenizer.encode_plain(text) if whole else self.tokenizer.encode(text)
            self._prompts[place] = Prompt(text, tuple(tokens), prompt_hash(tokens))
        return self._prompts[place]

    def requests(self, done: Collection[Place], replica: int, replicas: int) -> tuple[list[Request], list[list[Place]]]:
        """This replica's share of the samples that are missing: requests, and whose each of their keys is."""
        requests: list[Request] = []
        places: list[list[Place]] = []
        for number, problem in enumerate(self.problems):
            missing = [sample for sample in range(self.sampling.samples) if (problem.key, sample) not in done]
            if number % replicas != replica or not missing:
                continue
            for group in [[sample] for sample in missing] if self.task.shuffles else [missing]:
                keys = tuple(self._key(problem, sample) for sample in group)
                requests.append(Request(self.prompt(problem, group[0]).tokens, keys))
                places.append([(problem.key, sample) for sample in group])
        return requests, places

    def _key(self, problem: Problem, sample: int) -> Key:
        return self.sampling.seed, task_number(self.task.name), int(problem.key, 16), sample

    def earlier(self, case: dict[str, Any]) -> dict[Place, Sample]:
        """Samples that are there and were asked as they would be today. Raises ValueError for those of another case."""
        found = kept.read(self.out, case)
        asked = {problem.key: problem for problem in self.problems}
        return {
            place: sample
            for place, sample in found.items()
            if place[0] not in asked or self.prompt(asked[place[0]], place[1]).hash == sample.prompt
        }

    def in_think(self, problem: Problem, sample: int) -> bool:
        """Does the prompt end inside <think>?"""
        return in_reasoning(self.prompt(problem, sample).text[-32:])


def task_number(name: str) -> int:
    """What stands for a task in the keys of its samples."""
    return int(prompt_hash([ord(sign) for sign in name]), 16)


def read_jobs(
    names: Sequence[str], out: Path, settings: EvaluateSettings, tokenizer: Tokenizer | None, spec: ModelSpec | None
) -> list[Job]:
    """The jobs of so many tasks, read and checked; tokenizer, spec: of the model, where one is to answer.

    Raises ValueError that names what is wrong.
    """
    jobs = []
    for name in names:
        task = task_of(name)
        problems = read_problems(
            file_of(name, Path(settings.evaluate.problems)), task, partial=settings.evaluate.partial
        )
        jobs.append(Job(name, task, problems[: settings.evaluate.limit], settings, out / task.name, tokenizer))
    if not jobs or len({job.task.name for job in jobs}) < len(jobs):
        raise ValueError(f"--tasks {','.join(names)}: needed: at least one task, each once")
    for job in jobs:
        for problem in job.problems if spec is not None else []:
            assert spec is not None
            if wrong := prompt_problem(job.prompt(problem, 0).tokens, spec.vocab_size, spec.max_positions):
                raise ValueError(f"{job.task.name}, question {problem.id}: the prompt {wrong}")
    return jobs
