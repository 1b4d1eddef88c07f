"""Mid-train a model: `torchrun [...] launch/midtrain.py --recipe launch/recipes/demo.yaml [section.name=value ...]`.

Exit codes are those of prism_mcore/exit_codes.py. torchrun hides its workers' codes, so that of the run is also written
to the file that EXIT_CODE_FILE names, for the script that decides about starting again (launch/slurm/midtrain.sbatch).
"""

from prism_mcore.config import Settings, SettingsError, load, resolve_spec, validate
from prism_mcore.console import console, say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import complain, leave, planned_ranks, rank, recipe_parser, record_exit_code


def main() -> int:
    arguments = recipe_parser(
        "launch/midtrain.py", "Mid-train a model. Resuming the run of the same name is the default."
    ).parse_intermixed_args()
    try:
        settings = load(arguments.recipe, arguments.overrides)
        spec = resolve_spec(settings)
        world_size = planned_ranks(settings, arguments.dry_run, arguments.gpus)
        notes = validate(settings, spec, world_size)
    except SettingsError as error:
        if rank() == 0:
            say(f"{arguments.recipe}: the settings do not work:\n{error}", stderr=True)
        record_exit_code(BAD_SETTINGS)
        return BAD_SETTINGS
    if arguments.dry_run:
        from prism_mcore.plan.report import print_plan

        print_plan(settings, spec, world_size, notes, console())
        return DONE
    if rank() == 0:
        for note in notes:
            say(f"note: {note}")
    code = _train(settings)
    record_exit_code(code)
    return code


def _train(settings: Settings) -> int:
    from prism_mcore.checkpoint.folder import CheckpointError
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.data.token_file import TokenFileError
    from prism_mcore.train.loop import run  # imports torch: not before the settings are known to work

    try:
        return run(settings)
    except (SettingsError, ExchangeError) as error:  # these are the same on every rank
        return complain(error, BAD_SETTINGS)
    except TokenFileError as error:  # in the middle of a source: only the ranks that read it there know
        say(f"error: rank {rank()}: {error}", stderr=True)
        return BAD_SETTINGS
    except CheckpointError as error:
        return complain(error, FAILED)


if __name__ == "__main__":
    leave(main())
