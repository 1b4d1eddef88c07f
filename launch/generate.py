"""Text from a model: `torchrun [...] launch/generate.py --hf DIR --prompts FILE --out FILE [sampling.name=value ...]`.

The prompts are JSONL: objects with `prompt` (text) or `tokens` (ids). The output has the same objects with `response`,
`response_tokens`, `logprobs` and `finish_reason` ("stop", "length" or "context"), one line per sample, in the order of
the prompts. The layout is set by parallel.tp=2 and the like; ranks that are left over share out the prompts. What is
drawn depends on sampling.seed, the prompt's place in the file and the sample's number alone. Samples are written to
OUT.samples as they finish: the same command, in any layout, goes on from there.
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.generate.checks import check
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.launching import Launch, complain, hf_parser, leave, print_notes, rank, read_hf

if TYPE_CHECKING:
    from prism_mcore.generate.prompts import PromptLine
    from prism_mcore.text import Tokenizer


def main() -> int:
    parser = hf_parser(GenerateSettings, "--prompts FILE", __doc__)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL: `prompt` or `tokens`")
    arguments = parser.parse_intermixed_args()
    try:
        run = read_hf(GenerateSettings, arguments)
        notes = run.notes + check(run.settings, run.spec, run.world_size)
        tokenizer, lines = _read(arguments, run, notes)
        if arguments.dry_run:
            _print_plan(arguments, run, notes, [len(line.tokens) for line in lines])
            return DONE
        _check_memory(arguments, run, [len(line.tokens) for line in lines])
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    print_notes(notes)
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.generate.run import run as generate  # torch and megatron-core take seconds
    from prism_mcore.meeting import LostRank

    try:
        generate(arguments.hf, arguments.prompts, arguments.out, run.settings, tokenizer, lines)
    except (ExchangeError, ValueError, FloatingPointError) as error:
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _read(
    arguments: argparse.Namespace, run: Launch[GenerateSettings], notes: list[str]
) -> tuple["Tokenizer | None", list["PromptLine"]]:
    """Tokenizer and prompts, checked against the model and what lies beside --out."""
    from prism_mcore.generate import unfinished
    from prism_mcore.generate.prompts import read_prompts, tokenizer_of
    from prism_mcore.text import read_eos

    tokenizer = tokenizer_of(arguments.hf, run.spec)
    read_eos(arguments.hf)  # a broken file ends it here, not after the model is loaded
    if run.settings.sampling.stop and tokenizer is None:
        raise SettingsError(f"sampling.stop needs a tokenizer.json in {arguments.hf}; use sampling.stop_ids")
    lines, blank = read_prompts(arguments.prompts, tokenizer, run.spec)
    if blank:
        notes.append(f"{blank:,} blank lines of {arguments.prompts} were skipped")
    if rank() == 0 and unfinished.files(arguments.out):  # the weights may all have to be read for it
        unfinished.check(arguments.out, unfinished.case_of(arguments.hf, arguments.prompts, run.settings))
    return tokenizer, lines


def _check_memory(arguments: argparse.Namespace, run: Launch[GenerateSettings], lengths: list[int]) -> None:
    from prism_mcore.generate.plan import memory_of
    from prism_mcore.plan.host import check_rank_fits

    check_rank_fits(
        memory_of(run.settings, run.spec, lengths),
        run.world_size,
        f"generating with {arguments.hf}",
        "free memory, set sampling.max_tokens lower, take precision.dtype=bf16, or more GPUs (parallel.tp)",
    )


def _print_plan(
    arguments: argparse.Namespace, run: Launch[GenerateSettings], notes: list[str], lengths: list[int]
) -> None:
    from prism_mcore.generate import unfinished
    from prism_mcore.generate.plan import plan
    from prism_mcore.plan.report import print_plan

    done = 0
    if unfinished.files(arguments.out):
        done = len(unfinished.read(arguments.out, unfinished.case_of(arguments.hf, arguments.prompts, run.settings)))
    print_plan(run.settings, notes, plan(run.settings, run.spec, lengths, done))


if __name__ == "__main__":
    leave(main())
