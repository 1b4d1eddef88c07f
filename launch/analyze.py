"""What changed between models: `python launch/analyze.py weights OLD NEW [NEW ...] --out DIR`.

    python launch/analyze.py behaviour ANSWERS [...] --out DIR
    torchrun [...] launch/analyze.py similarity MODEL MODEL [...] --prompts FILE --out DIR [parallel.tp=2 ...]

Tables are CSV and parquet, pictures PNG. COMMAND --help says what each takes.
"""

from prism_mcore import program

program.begin(resumes=False)  # before the seconds of imports

import argparse
from pathlib import Path

from prism_mcore.analyze.settings import AnalyzeSettings
from prism_mcore.config import help_text, load
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import PROGRAMS, choose_cuda_queues, complain, leave, planned_ranks, print_notes


def main() -> int:
    options, rest = _parser().parse_known_args()
    options.overrides = rest
    try:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is a file; needed: a folder, which need not exist")
        return int(options.run(options))
    except (ValueError, OSError) as error:  # ExchangeError and SettingsError are ValueErrors
        return complain(error, BAD_SETTINGS)


def weights(options: argparse.Namespace) -> int:
    """How far, how many, in which direction."""
    if options.overrides:
        raise ValueError(f"{options.overrides[0]} is nothing that weights takes; --help")
    from prism_mcore.analyze.change import analyze_weights, shown

    written = analyze_weights(options.old, options.new, options.out, control=options.control, master=options.master)
    shown(written)
    say(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return DONE


def similarity(options: argparse.Namespace) -> int:
    """How alike models see the same prompts, layer by layer (CKA)."""
    if strange := [word for word in options.overrides if word.startswith("-") or "=" not in word]:
        raise ValueError(f"{strange[0]} is neither an option nor section.name=value; --help")
    settings = load(AnalyzeSettings, None, options.overrides, others=PROGRAMS)
    choose_cuda_queues(settings.parallel)
    from prism_mcore.analyze.similarity import analyze_similarity, ask  # torch and megatron-core take seconds
    from prism_mcore.meeting import LostRank

    world_size = planned_ranks(settings.parallel, dry_run=False)
    asked, notes = ask(options.models, options.floor, options.prompts, settings, world_size)
    print_notes(notes)
    try:
        analyze_similarity(asked, options.out, settings)
    except LostRank as error:
        return complain(error, FAILED)
    return DONE


def behaviour(options: argparse.Namespace) -> int:
    """How models answer: pass rate, length, and how sure they are, of right and wrong answers."""
    if options.overrides:
        raise ValueError(f"{options.overrides[0]} is nothing that behaviour takes; --help")
    from rich.table import Table

    from prism_mcore.analyze.behaviour import analyze_behaviour
    from prism_mcore.analyze.change import labels
    from prism_mcore.console import plain, show

    lines = analyze_behaviour(options.answers, labels(options.answers), options.out)
    table = Table(*lines[0])
    for line in lines:
        table.add_row(*("" if x is None else f"{x:.4g}" if isinstance(x, float) else plain(x) for x in line.values()))
    show(table)
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
    command = commands.add_parser(
        "similarity",
        help=similarity.__doc__,
        usage="torchrun [...] launch/analyze.py similarity MODEL MODEL [...] --prompts FILE [--prompts FILE ...]"
        " [--floor MODEL MODEL] --out DIR [section.name=value ...]",
        description=SIMILARITY,
        epilog=f"settings, as section.name=value with YAML values, after --out:\n\n{help_text(AnalyzeSettings)}",
    )
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="Hugging Face directories; every pair")
    command.add_argument(
        "--prompts", type=Path, action="append", required=True, metavar="FILE", help="JSONL: `prompt` or `tokens`"
    )
    command.add_argument(
        "--floor", type=Path, nargs=2, default=[], metavar="MODEL", help="two that differ in their seed alone"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tables and the picture")
    command.set_defaults(run=similarity)
    command = commands.add_parser("behaviour", help=behaviour.__doc__, description=BEHAVIOUR)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS", help="of a model each")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the tables and the picture")
    command.set_defaults(run=behaviour)
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

SIMILARITY = """How alike models see the same prompts, layer by layer: linear CKA of hidden states, mean over a prompt.

  similarity.csv   a line for each pair, prompt file and layer: cka, its 95% interval over prompts (low, high),
                   mean_of_halves (over draws of half of the prompts, as PRISM reports it), and noise_floor, whether the
                   pair is that of --floor; layer 0 is the embedding, the last is after the final norm. Of models of
                   other depths each layer of the first meets the one at the same share of the second's (second_layer)
  similarity.parquet  .png, .json (what was compared), .yaml (the settings)
"""

BEHAVIOUR = """How models answer. ANSWERS is an evaluation's folder (launch/evaluate.py --out), a run's folder or its
rollouts of a step, or responses of launch/generate.py that tools/grade.py graded.

  behaviour.csv    a line for each model and task: answers, pass_rate, cut (share that had no more room), length_mean,
                   _median, _right, _wrong (tokens), nll, nll_right, nll_wrong: mean over answers of the mean negative
                   log-probability of their tokens at sampling, nats
  behaviour.parquet  .png
"""


if __name__ == "__main__":
    leave(main())
