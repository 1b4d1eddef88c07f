"""A study as one command: `python launch/study.py --recipe launch/recipes/study-mini.yaml [section.name=value ...]`.

A YAML names models, mixtures, RL mixes, controls, seeds and ablations; it becomes a graph of runs: mid-training, RL,
evaluation, analysis and a report. What is done is skipped, what was stopped resumes, and where an output is lost its
node alone is done again. --dry-run prints the plan with tokens and GPU hours; `status` what is done; `why NODE` why
that node would run. --slurm queues everything at once and ends. docs/study.md.
"""

from prism_mcore import program

program.end_with_parent()  # a node's process ends with the driver

import argparse
import sys
from pathlib import Path

from prism_mcore.config import SettingsError, help_text, load
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE
from prism_mcore.study.checks import check
from prism_mcore.study.settings import StudyProgram

ACTIONS = {"start": 0, "status": 0, "why": 1, "run": 1, "report": 0}  # and how many nodes each names


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    try:
        action, name, overrides = _words(arguments.words)
        study = load(StudyProgram, arguments.recipe, overrides)
        check(study)
        from prism_mcore.study import folder, graph, slurm

        nodes = graph.build(study, arguments.recipe)
        if name and name not in nodes:
            raise SettingsError(f"{name} is no node of this study; `status` lists them")
        if arguments.dry_run:
            from prism_mcore.study.plan import print_plan

            print_plan(study, nodes)
            return DONE
        place = folder.claim(study, arguments.recipe, make=action in ("start", "run"))
        if action in ("start", "run"):
            graph.write_recipes(study, arguments.recipe, nodes)
        if action == "status":
            folder.print_status(nodes, slurm.queued(study))
            return DONE
        if action == "why":
            folder.print_why(nodes, name)
            return DONE
        if action == "report":
            from prism_mcore.study.report import write_report

            write_report(study, nodes)
            return DONE
        from prism_mcore.study.local import run_all, run_node

        if action == "run":
            return run_node(nodes[name], nodes, slurm.job_argv if arguments.slurm else graph.full_argv)
        with folder.alone(place):
            if arguments.slurm:
                count = slurm.submit(study, nodes, ["--recipe", str(arguments.recipe), *overrides])
                say(f"{count} jobs queued; `status` says what became of them" if count else "all of it is done")
                return DONE
            slurm.refuse_queued(study)
            return run_all(nodes, arguments.recipe, overrides, study.study.workers, place)
    except (SettingsError, ValueError, OSError, RuntimeError) as error:
        say(f"{arguments.recipe}: the study does not work:\n{error}", stderr=True)
        return BAD_SETTINGS


def _words(words: list[str]) -> tuple[str, str, list[str]]:
    """Action, node and settings from what follows the options."""
    plain = [word for word in words if "=" not in word]
    action, *names = plain or ["start"]
    if action not in ACTIONS or len(names) != ACTIONS[action]:
        raise SettingsError(f"{' '.join(plain)}: no action; needed: nothing, status, why NODE, run NODE or report")
    return action, names[0] if names else "", [word for word in words if "=" in word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings, as section.name=value with YAML values:\n\n{help_text(StudyProgram)}",
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="YAML file of the study")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, no more")
    parser.add_argument("--slurm", action="store_true", help="queue every node that is not done, and end")
    parser.add_argument("words", nargs="*", metavar="status | why NODE | run NODE | section.name=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
