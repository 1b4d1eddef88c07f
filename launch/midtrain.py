"""Mid-train a model: `torchrun [...] launch/midtrain.py --recipe launch/recipes/demo.yaml [section.name=value ...]`.

Exit codes are those of prism_mcore/exit_codes.py. torchrun hides its workers' codes, so that of the run is also written
to the file that EXIT_CODE_FILE names, for the script that decides about starting again (launch/slurm/midtrain.sbatch).
"""

import argparse
import os
import sys
from pathlib import Path

from prism_mcore.config import Settings, SettingsError, help_text, load, resolve_spec, validate
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    try:
        settings = load(arguments.recipe, arguments.overrides)
        spec = resolve_spec(settings)
        world_size = _world_size(settings, arguments.dry_run, arguments.gpus)
        notes = validate(settings, spec, world_size)
    except SettingsError as error:
        if _rank() == 0:
            print(f"{arguments.recipe}: the settings do not work:\n{error}", file=sys.stderr)
        return BAD_SETTINGS
    if arguments.dry_run:
        from rich.console import Console

        from prism_mcore.plan.report import print_plan

        print_plan(settings, spec, world_size, notes, Console())
        return DONE
    if _rank() == 0:
        for note in notes:
            print(f"note: {note}")
    return _train(settings)


def _train(settings: Settings) -> int:
    from prism_mcore.data.token_file import TokenFileError
    from prism_mcore.train.checkpoint import CheckpointError
    from prism_mcore.train.loop import run  # imports torch: not before the settings are known to work

    try:
        code = run(settings)
    except (SettingsError, TokenFileError) as error:
        code = _complain(error, BAD_SETTINGS)
    except CheckpointError as error:
        code = _complain(error, FAILED)
    if "EXIT_CODE_FILE" in os.environ:
        _record(code, Path(os.environ["EXIT_CODE_FILE"]))
    return code


def _complain(error: Exception, code: int) -> int:
    """Say once what every rank found, without the tracebacks of all of them."""
    if _rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    return code


def _record(code: int, file: Path) -> None:
    """Write the exit code, whole or not at all. Every rank does: torchrun kills the others when the first has ended."""
    part = file.with_name(f"{file.name}.{_rank()}")
    part.write_text(f"{code}\n")
    part.replace(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="torchrun [...] launch/midtrain.py --recipe FILE [--dry-run [--gpus N]] [section.name=value ...]",
        description="Mid-train a model. Resuming the run of the same name is the default.",
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


def _world_size(settings: Settings, dry_run: bool, gpus: int | None) -> int:
    """Ranks torchrun started; for a dry run --gpus first, and outside torchrun the fewest that the layout can have."""
    parallel = settings.parallel
    fewest = parallel.tp * parallel.pp * parallel.cp * parallel.optimizer_instances
    started = int(os.environ.get("WORLD_SIZE", fewest if dry_run else 1))
    return gpus if dry_run and gpus else started


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
