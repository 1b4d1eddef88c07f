"""Scores with intervals: `torchrun [...] launch/evaluate.py --hf DIR --tasks T,... --out DIR [section.name=value ...]`.

Tasks: aime24 aime25 math500 livecodebench codeforces gpqa humaneval gsm8k hellaswag truthfulqa, whose questions
tools/import_benchmark.py brings to the folder evaluate.problems; own-math own-choice own-code, which come along; and
files of your own (my/questions.jsonl, an RL prompt file). OUT gets <task>.samples (every generation, as it finishes),
<task>.verdicts.jsonl (one for each), results.json and settings.yaml. The same command, in any layout, goes on from what
is there; with more sampling.samples it makes those that are missing. --rescore grades what is there again, by
grading.extractor=strict for instance, without the model, and says which verdicts changed. --lm-eval T,... runs tasks of
lm_eval instead of --tasks. docs/evaluate.md.
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

import argparse
import importlib.util
from typing import TYPE_CHECKING

from prism_mcore.config import SettingsError, dump, load
from prism_mcore.console import say
from prism_mcore.evaluate.checks import check_evaluation
from prism_mcore.evaluate.settings import EvaluateSettings
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import PROGRAMS, Launch, complain, hf_parser, leave, print_notes, rank, read_hf

if TYPE_CHECKING:
    from prism_mcore.evaluate.jobs import Job

RESCORED = ("grading.", "contamination.", "evaluate.problems")  # what --rescore may change


def main() -> int:
    parser = hf_parser(EvaluateSettings, "--tasks T,...", __doc__, out="DIR", needs_hf=False)
    parser.add_argument("--tasks", default="", metavar="T,...", help="names, or files of questions (.jsonl)")
    parser.add_argument(
        "--lm-eval", default="", metavar="T,...", help="tasks of lm_eval instead, results in its format"
    )
    parser.add_argument("--rescore", action="store_true", help="grade what is in --out again, without the model")
    arguments = parser.parse_intermixed_args()
    if arguments.rescore:
        return _rescore(arguments)
    try:
        if arguments.hf is None or bool(arguments.tasks) == bool(arguments.lm_eval):
            raise SettingsError(
                "needed: --hf DIR and --tasks T,... or --lm-eval T,...; or --rescore, which needs neither"
            )
        if arguments.lm_eval and importlib.util.find_spec("lm_eval") is None:
            raise SettingsError("--lm-eval needs lm_eval: pip install 'prism_mcore[lm-eval]'")
        run = read_hf(EvaluateSettings, arguments)
        notes = run.notes + check_evaluation(run.settings, run.spec, run.world_size)
        if arguments.lm_eval:
            return _run_lm_eval(arguments, run, notes)
        jobs = _read(arguments, run)
        lengths = [len(job.prompt(problem, 0).tokens) for job in jobs for problem in job.problems]
        if arguments.dry_run:
            return _print_plan(arguments, run, notes, jobs, lengths)
        _check_memory(arguments, run, jobs, lengths)
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    print_notes(notes)
    return _evaluate(arguments, run, jobs)


def _run_lm_eval(arguments: argparse.Namespace, run: Launch[EvaluateSettings], notes: list[str]) -> int:
    from prism_mcore.generate.prompts import tokenizer_of

    if tokenizer_of(arguments.hf, run.spec) is None:
        raise ValueError(f"--hf {arguments.hf}: there is no tokenizer.json; questions are text")
    print_notes(notes)
    if arguments.dry_run:
        say(dump(run.settings))
        return DONE
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.evaluate.harness import run as run_tasks
    from prism_mcore.meeting import LostRank

    try:
        run_tasks(arguments.hf, arguments.out, run.settings, arguments.lm_eval.split(","))
    except (ExchangeError, ValueError, FloatingPointError) as error:
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _read(arguments: argparse.Namespace, run: Launch[EvaluateSettings]) -> list["Job"]:
    """The jobs, checked against the model and what lies in --out."""
    from prism_mcore.evaluate.contamination import check_files
    from prism_mcore.evaluate.jobs import read_jobs
    from prism_mcore.evaluate.result import RESULTS, earlier_tasks
    from prism_mcore.generate import unfinished
    from prism_mcore.generate.prompts import tokenizer_of
    from prism_mcore.text import read_eos

    tokenizer = tokenizer_of(arguments.hf, run.spec)
    if tokenizer is not None:
        check_files(run.settings.contamination.tokens, tokenizer)
    if tokenizer is None:
        raise ValueError(f"--hf {arguments.hf}: there is no tokenizer.json; questions are text")
    read_eos(arguments.hf)  # a broken file ends it here, not after the model is loaded
    jobs = read_jobs(arguments.tasks.split(","), arguments.out, run.settings, tokenizer, run.spec)
    there = [job for job in jobs if unfinished.files(job.out)]
    if rank() == 0 and (there or (arguments.out / RESULTS).is_file()):  # the weights may all have to be read for it
        from prism_mcore.convert.identity import identity

        model = identity(arguments.hf)
        earlier_tasks(arguments.out, {"identity": model})
        for job in there:
            unfinished.check(job.out, job.case(model))
    return jobs


def _check_memory(
    arguments: argparse.Namespace, run: Launch[EvaluateSettings], jobs: list["Job"], lengths: list[int]
) -> None:
    from prism_mcore.evaluate.plan import evaluation_bytes
    from prism_mcore.plan.host import check_rank_fits

    check_rank_fits(
        evaluation_bytes(run.settings, run.spec, jobs, lengths),
        run.world_size,
        f"evaluating {arguments.hf}",
        "free memory, set sampling.max_tokens lower, take precision.dtype=bf16, or more GPUs (parallel.tp)",
    )


def _print_plan(
    arguments: argparse.Namespace,
    run: Launch[EvaluateSettings],
    notes: list[str],
    jobs: list["Job"],
    lengths: list[int],
) -> int:
    from prism_mcore.evaluate.plan import plan_evaluation
    from prism_mcore.generate import unfinished
    from prism_mcore.plan.report import print_plan

    there = any(unfinished.files(job.out) for job in jobs)
    model = ""
    if there:
        from prism_mcore.convert.identity import identity  # torch takes seconds

        model = identity(arguments.hf)
    done = [len(set(job.places) & set(job.earlier(job.case(model)))) if there else 0 for job in jobs]
    print_plan(run.settings, notes, plan_evaluation(run.settings, run.spec, jobs, done, lengths))
    return DONE


def _evaluate(arguments: argparse.Namespace, run: Launch[EvaluateSettings], jobs: list["Job"]) -> int:
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.evaluate.result import score, show_results
    from prism_mcore.evaluate.runner import generate  # torch and megatron-core take seconds
    from prism_mcore.meeting import LostRank

    try:
        model = generate(arguments.hf, arguments.out, run.settings, jobs)
        if model:  # on the first rank; the others are done
            results = score(arguments.out, run.settings, jobs, {"hf": str(arguments.hf), "identity": model})
            show_results(results)
    except (ExchangeError, ValueError, FloatingPointError) as error:
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _rescore(arguments: argparse.Namespace) -> int:
    """Grade again: the settings are those of the evaluation, but for what the command line changes of grading."""
    from prism_mcore.evaluate.jobs import read_jobs
    from prism_mcore.evaluate.result import open_result, score, show_results

    try:
        results, recipe = open_result(arguments.out)
        if strange := [text for text in arguments.overrides if not text.startswith(RESCORED)]:
            raise SettingsError(
                f"--rescore {strange[0]}: needed: settings of grading or contamination, or {RESCORED[2]}"
            )
        settings = load(EvaluateSettings, recipe, arguments.overrides, others=PROGRAMS)
        names = arguments.tasks.split(",") if arguments.tasks else [task["file"] for task in results["tasks"].values()]
        jobs = read_jobs(names, arguments.out, settings, None, None)
        show_results(score(arguments.out, settings, jobs, results["model"]))
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    return DONE


if __name__ == "__main__":
    leave(main())
