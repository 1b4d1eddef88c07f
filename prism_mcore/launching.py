"""What the launchers share: arguments, the number of ranks, one message for all ranks, the exit code and its file."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from prism_mcore.config import Settings, help_text
from prism_mcore.console import say
from prism_mcore.exit_codes import DONE, STOPPED_BY_SIGNAL


def recipe_parser(usage: str, description: str) -> argparse.ArgumentParser:
    """--recipe, --dry-run, --gpus and settings; --help explains every setting."""
    parser = argparse.ArgumentParser(
        usage=f"torchrun [...] {usage} --recipe FILE [--dry-run [--gpus N]] [section.name=value ...]",
        description=description,
        epilog=f"settings, in a recipe or as section.name=value with YAML values:\n\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="YAML file with the settings")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print settings, memory, tokens, FLOPs; no training"
    )
    parser.add_argument(
        "--gpus", type=_positive, metavar="N", help="ranks to plan for; default WORLD_SIZE, else the fewest that work"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="settings that differ from the recipe"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; needs at least 1")
    return value


def planned_ranks(settings: Settings, dry_run: bool, gpus: int | None) -> int:
    """Ranks torchrun started; for a dry run --gpus first, and outside torchrun the fewest that the layout can have."""
    parallel = settings.parallel
    fewest = parallel.tp * parallel.pp * parallel.cp * parallel.optimizer_instances
    started = int(os.environ.get("WORLD_SIZE", fewest if dry_run else 1))
    return gpus if dry_run and gpus else started


def rank() -> int:
    """This process among those torchrun started."""
    return int(os.environ.get("RANK", "0"))


def complain(error: Exception, code: int) -> int:
    """Say once what every rank found, without the tracebacks of all of them; returns the code."""
    if rank() == 0:
        say(f"error: {error}", stderr=True)
    return code


def record_exit_code(code: int) -> None:
    """Write the code to the file that EXIT_CODE_FILE names, whole or not at all, because torchrun hides it.

    Every rank does: torchrun kills the others when the first has ended.
    """
    if "EXIT_CODE_FILE" in os.environ:
        file = Path(os.environ["EXIT_CODE_FILE"])
        part = file.with_name(f"{file.name}.{rank()}")
        part.write_text(f"{code}\n")
        part.replace(file)


def leave(code: int) -> NoReturn:
    """End this process with the code.

    After an error at once: threads of process groups that nobody could close turn an orderly end into an abort (-6).
    """
    if code not in (DONE, STOPPED_BY_SIGNAL):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
