"""Draw a run's curves: `python tools/plot_run.py runs/demo [more runs ...]` writes curves.png into each folder."""

import argparse
from pathlib import Path

from prism_mcore.rl.curves import is_rl_run, plot_rl_run
from prism_mcore.train.curves import plot_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the curves of runs: losses of mid-training, answers, lengths and log-prob gaps of RL."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    for run in parser.parse_args().runs:
        try:
            print(plot_rl_run(run) if is_rl_run(run) else plot_run(run))
        except FileNotFoundError as error:
            parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
