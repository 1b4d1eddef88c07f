"""Weights between Hugging Face directories and checkpoints, to the bit, in one process without a GPU.

    python tools/convert_checkpoint.py from-hf HF_DIR CKPT_DIR [--tp N --pp N] [--verify] [--dry-run]
    python tools/convert_checkpoint.py to-hf CKPT_DIR HF_DIR [--master] [--verify] [--dry-run]

from-hf writes a checkpoint of weights that `model.init=CKPT_DIR` starts from. to-hf takes a checkpoint, or the newest
of a run, whatever layout wrote it, and writes it under the names, shards, dtypes and side files of the directory that
the model once came from; of one that came from none, as Hugging Face would. Both fail without leaving anything half
written.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prism_mcore.console import progress, say
from prism_mcore.program import begin


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    begin(resumes=False)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        say(f"convert_checkpoint: {error}", stderr=True)
        return 1
    return 0


def from_hf(options: argparse.Namespace) -> None:
    from prism_mcore.checkpoint.durable import MANIFEST, damage
    from prism_mcore.checkpoint.folder import step_name
    from prism_mcore.convert.manifest import verify
    from prism_mcore.convert.offline import import_hf, plan_import

    if options.verify and (options.hf_dir / MANIFEST).is_file():
        _refuse(verify(options.hf_dir))
    plan = plan_import(options.hf_dir)
    summary = (
        f"{plan.spec.family}, {len(plan.spec.pattern)} sub-layers: {len(plan.tensors)} tensors in"
        f" {len(plan.source.shards)} files, {_gb(plan.size)}; layout of the files: tp {options.tp}, pp {options.pp}"
    )
    if options.dry_run:
        say(f"would write {options.ckpt_dir}: {summary}", stderr=True)
        return
    started = time.monotonic()
    with _progress("importing", plan.size) as advance:
        import_hf(plan, options.ckpt_dir, tp=options.tp, pp=options.pp, on_bytes=advance)
    if options.verify:
        _refuse(damage(options.ckpt_dir / step_name(0)))
    _report(options, summary, plan.size, time.monotonic() - started)
    say(f"start a run from it with model.init={options.ckpt_dir}", stderr=True)


def to_hf(options: argparse.Namespace) -> None:
    from prism_mcore.convert.manifest import verify
    from prism_mcore.convert.offline import export_checkpoint, plan_export
    from prism_mcore.convert.write import rounding

    plan = plan_export(options.ckpt_dir, master=options.master, config=options.config, tokenizer=options.tokenizer)
    weights = "fp32 masters" if plan.master else "weights"
    summary = (
        f"{weights} of {plan.checkpoint.name}, {plan.spec.family}: {len(plan.source.names)} tensors in"
        f" {len(plan.source.shards)} files, {_gb(plan.size)}; {len(plan.source.side_files)} side files"
    )
    if plan.rounded:
        say(f"note: {rounding(plan.rounded, options.hf_dir)}; --master writes every tensor in fp32", stderr=True)
    if options.dry_run:
        say(f"would write {options.hf_dir}: {summary}", stderr=True)
        for file, shard in plan.source.shards.items():
            say(f"  {file}  {_gb(shard.size)}  {len(shard.entries)} tensors", stderr=True)
        for path in plan.source.side_files:
            say(f"  {path.name}", stderr=True)
        return
    started = time.monotonic()
    with _progress("exporting", plan.size) as advance:
        export_checkpoint(plan, options.hf_dir, advance)
    if options.verify:
        _refuse(verify(options.hf_dir))
    _report(options, summary, plan.size, time.monotonic() - started)


def _report(options: argparse.Namespace, summary: str, size: int, seconds: float) -> None:
    checked = "; read back, every SHA-256 agrees" if options.verify else ""
    out = options.ckpt_dir if options.run is from_hf else options.hf_dir
    speed = size / 1e6 / max(seconds, 1e-9)
    say(f"{out}: {summary}; {seconds:.1f} s, {speed:.0f} MB/s{checked}", stderr=True)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress(*columns) as shows:
        bar = shows.add_task(what, total=total)
        yield lambda size: shows.advance(bar, size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="from-hf|to-hf")

    command = commands.add_parser("from-hf", help="a Hugging Face directory to a checkpoint of weights")
    command.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="config.json and safetensors files")
    command.add_argument("ckpt_dir", type=Path, metavar="CKPT_DIR", help="is made; must not exist")
    layout = "a run of any layout can load every checkpoint; in this one each rank opens little more than its own files"
    command.add_argument("--tp", type=_positive, default=1, help=f"cut the tensors for so many ranks; {layout}")
    command.add_argument("--pp", type=_positive, default=1, help="spread them over the files of so many stages")
    _shared(command)
    command.set_defaults(run=from_hf)

    command = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face directory")
    command.add_argument("ckpt_dir", type=Path, metavar="CKPT_DIR", help="a checkpoint, a run, or what from-hf wrote")
    command.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="is made; must not exist")
    command.add_argument(
        "--master",
        action="store_true",
        help="write the optimizer's fp32 weights, as fp32 (config.json stays as it was and may name another dtype)",
    )
    command.add_argument("--config", type=Path, help="config.json of a model whose run has kept none")
    command.add_argument("--tokenizer", type=Path, help="folder whose files are put beside the weights")
    _shared(command)
    command.set_defaults(run=to_hf)
    return parser


def _shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--verify", action="store_true", help="read back what was written and compare every SHA-256")
    command.add_argument("--dry-run", action="store_true", help="check the input, say what would be written, stop")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
