"""Improve a model by RL on verifiable rewards: `torchrun [...] launch/rl.py --recipe FILE [section.name=value ...]`.

Rollouts are generated in the same process, on the weights that are trained. Exit codes as in launch/midtrain.py.
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

import os
from pathlib import Path

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import complain, leave, print_notes, read_recipe, recipe_parser, refuse
from prism_mcore.model.spec import ModelSpec
from prism_mcore.rl.checks import check
from prism_mcore.rl.settings import RLSettings


def main() -> int:
    arguments = recipe_parser(
        RLSettings, "Improve a model by RL on verifiable rewards. Resuming the run of the same name is the default."
    ).parse_intermixed_args()
    try:
        run = read_recipe(RLSettings, arguments, check)
        notes = run.notes + (_prompt_notes(run.settings, run.spec) if arguments.dry_run else [])
    except SettingsError as error:
        return refuse(arguments.recipe, error)
    if arguments.dry_run:
        from prism_mcore.plan.report import print_plan
        from prism_mcore.rl.plan import plan

        print_plan(run.settings, notes, plan(run.settings, run.spec, run.world_size))
        return DONE
    print_notes(notes)
    return _train(run.settings, run.spec)


def _prompt_notes(settings: RLSettings, spec: ModelSpec) -> list[str]:
    """What a dry run says of the prompts, once it has read them; a plan can be made where they are not, too."""
    rl = settings.rl
    files = [Path(source.path) for source in (*rl.prompts, *rl.held_out)]
    needed = [Path(rl.tokenizer or settings.model.init) / "tokenizer.json", *files]
    missing = [file for file in needed if not file.is_file()]
    if missing:
        return [f"the prompts are not checked: {missing[0]} is not here"]
    from prism_mcore.rl.prompts import PromptError, open_prompts

    try:
        prompts = open_prompts(settings, spec)
    except PromptError as error:
        raise SettingsError(str(error)) from error
    held_out = f" and {len(prompts.held_out):,} held out" if prompts.held_out else ""
    rewards = ", ".join(sorted(prompts.training.rewards))
    blank = prompts.training.blank + (prompts.held_out.blank if prompts.held_out else 0)
    skipped = f"; {blank:,} blank lines were skipped" if blank else ""
    return [f"{len(prompts.training):,} prompts{held_out} were read and are in order; rewards: {rewards}{skipped}"]


def _train(settings: RLSettings, spec: ModelSpec) -> int:
    from prism_mcore.checkpoint.folder import CheckpointError
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.meeting import LostRank
    from prism_mcore.rl.loop import run
    from prism_mcore.rl.prompts import PromptError, open_prompts

    try:
        return run(settings, open_prompts(settings, spec))  # prompts before any process group or GPU
    except PromptError as error:  # of this node's files, perhaps
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"error: {error}", stderr=True)
        return BAD_SETTINGS
    except (SettingsError, ExchangeError) as error:  # these are the same on every rank
        return complain(error, BAD_SETTINGS)
    except CheckpointError as error:
        return complain(error, FAILED)
    except LostRank as error:  # rank 0, perhaps
        say(f"error: {error}", stderr=True)
        return FAILED


if __name__ == "__main__":
    leave(main())
