"""Mid-train a model: `torchrun [...] launch/midtrain.py --recipe launch/recipes/demo.yaml [section.name=value ...]`.

Exit codes are those of prism_mcore/exit_codes.py. torchrun hides its workers' codes, so that of the run is also written
to the file that EXIT_CODE_FILE names, for the script that decides about starting again (launch/slurm/train.sbatch).
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import (
    complain,
    leave,
    print_notes,
    rank,
    read_recipe,
    recipe_parser,
    refuse,
)
from prism_mcore.train.checks import check
from prism_mcore.train.settings import MidtrainSettings


def main() -> int:
    arguments = recipe_parser(
        MidtrainSettings, "Mid-train a model. Resuming the run of the same name is the default."
    ).parse_intermixed_args()
    try:
        run = read_recipe(MidtrainSettings, arguments, check)
    except SettingsError as error:
        return refuse(arguments.recipe, error)
    if arguments.dry_run:
        from prism_mcore.plan.report import print_plan
        from prism_mcore.train.plan import plan

        print_plan(run.settings, run.notes, plan(run.settings, run.spec, run.world_size))
        return DONE
    print_notes(run.notes)
    return _train(run.settings)


def _train(settings: MidtrainSettings) -> int:
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
