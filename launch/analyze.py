"""What changed between models: `python launch/analyze.py weights OLD NEW [NEW ...] --out DIR`.

Models are Hugging Face directories, checkpoints or runs of one architecture. Tables are CSV and parquet, pictures PNG.
"""

from prism_mcore import program

program.begin(resumes=False)  # before the seconds of imports

import argparse
from pathlib import Path

from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE
from prism_mcore.launching import complain, leave


def main() -> int:
    options = _parser().parse_args()
    try:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is a file; needed: a folder, which need not exist")
        return int(options.run(options))
    except (ValueError, OSError) as error:  # ExchangeError and SettingsError are ValueErrors
        return complain(error, BAD_SETTINGS)


def weights(options: argparse.Namespace) -> int:
    """How far, how many, in which direction."""
    from prism_mcore.analyze.change import analyze_weights, shown

    written = analyze_weights(options.old, options.new, options.out, control=options.control, master=options.master)
    shown(written)
    say(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("weights", help=weights.__doc__, description=WEIGHTS)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("old", type=Path, metavar="OLD", help="the model before")
    command.add_argument(
        "new", type=Path, nargs="+", metavar="NEW", help="models after; several give cosines and a trajectory"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tables and pictures")
    command.add_argument(
        "--control",
        type=Path,
        metavar="DIR",
        help="OLD after training of another kind, with as many steps and as large",
    )
    command.add_argument("--master", action="store_true", help="of checkpoints, the optimizer's fp32 weights")
    command.set_defaults(run=weights)
    return parser


WEIGHTS = """How far, how many, in which direction: what training did to the weights, tensor by tensor.

  weights.csv      a line per tensor of the first NEW: relative_l2 = ||new - old|| / ||old||; changed_Ppct, the share of
                   weights with |new - old| above P percent of |old|; changed_rms_1pct, above 1% of the tensor's root
                   mean square; identical_bf16, the share that is the same bf16 number
  weights.parquet  the same of every NEW and of the control, and one_step_bf16: the share that is the next bf16 number
  modules.csv      sums by module class, module, layer and in total: `pooled` over numbers, `mean` over tensors
  cosines.csv      of the updates to each pair of models
  weights.json     what was compared, and each run's summed learning rate where it is known
  modules.png  thresholds.png  layers.png
"""


if __name__ == "__main__":
    leave(main())
