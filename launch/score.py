"""Log-probability of every next token: `torchrun [...] launch/score.py --hf DIR --tokens FILE --out FILE`.

The tokens are JSON, a list of equal-length lists of token ids. The output is a safetensors file with `logprobs`
[n, len - 1] fp32, log p of each next token, and with --logits `logits` [n, len, vocab] fp32. The layout is set by
parallel.tp=2 and the like, numbers by precision.dtype=fp32; ranks that are left over share out the sequences.
"""

from prism_mcore import program

program.begin(resumes=False)  # before the seconds of imports, in which torchrun may be killed

from pathlib import Path

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.evaluate.checks import check
from prism_mcore.evaluate.files import read_token_lists
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import complain, hf_parser, leave, positive, print_notes, read_hf


def main() -> int:
    parser = hf_parser(ScoreSettings, "--tokens FILE [--logits]", __doc__)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="JSON: equal-length lists of ids")
    parser.add_argument("--logits", action="store_true", help="write the logits of every position, too")
    parser.add_argument(
        "--micro-batch", type=positive, default=1, metavar="N", help="sequences in a forward pass (default: 1)"
    )
    arguments = parser.parse_intermixed_args()
    how = {"micro_batch": arguments.micro_batch, "logits": arguments.logits}
    try:
        run = read_hf(ScoreSettings, arguments)
        tokens = read_token_lists(arguments.tokens, run.spec.vocab_size)
        length = len(tokens[0])
        notes = run.notes + check(run.settings, run.spec, run.world_size, length)
        if arguments.dry_run:
            from prism_mcore.evaluate.plan import plan
            from prism_mcore.plan.report import print_plan

            print_plan(run.settings, notes, plan(run.settings, run.spec, len(tokens), length, **how))
            return DONE
        from prism_mcore.plan.host import check_rank_fits
        from prism_mcore.plan.memory import inference_bytes

        check_rank_fits(
            inference_bytes(run.settings, run.spec, arguments.micro_batch * length, logits=arguments.logits),
            run.world_size,
            f"scoring with {arguments.hf}",
            "free memory, take a smaller --micro-batch, precision.dtype=bf16, or more GPUs (parallel.tp)",
        )
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    print_notes(notes)
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.evaluate.scoring import score_file  # torch and megatron-core take seconds
    from prism_mcore.meeting import LostRank

    try:
        score_file(arguments.hf, arguments.out, run.settings, tokens, **how)
    except ExchangeError as error:  # the same on every rank
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


if __name__ == "__main__":
    leave(main())
