"""metrics.jsonl: one valid object per step, also after a crash and a resume; only rank 0 writes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from prism_mcore.model.flops import head_flops, sublayer_flops
from prism_mcore.train.settings import LogSettings, TrainSettings


def fake_run(folder, rank=0, tensorboard=False):
    """As much of a run as Metrics reads."""
    from tiny.models import SPECS

    return SimpleNamespace(
        settings=SimpleNamespace(
            run_dir=folder,
            train=TrainSettings(steps=10, global_batch=4),
            data=SimpleNamespace(seq_len=16),
            log=LogSettings(every=2, tensorboard=tensorboard),
        ),
        spec=SPECS["dense"],
        groups=SimpleNamespace(rank=rank, world_size=2, dp_size=2),
        loader=SimpleNamespace(domains=["code", "math", "code"]),
    )


# Two micro-batches of rank 0: documents of 3 and 13 tokens, and one of 16, behind which nothing follows.
BATCHES = [SimpleNamespace(document_lengths=np.array(lengths, dtype=np.int32)) for lengths in ([3, 13], [16])]


def write_steps(run, start, stop, loss=2.0):
    from prism_mcore.train.metrics import Metrics
    from prism_mcore.train.step import StepStats

    with Metrics(run, start) as metrics:
        for step in range(start + 1, stop + 1):
            metrics.start_step()
            metrics.mark("data")
            stats = StepStats(loss, 0.5, (1.0, math.nan, 4.0), (20, 0, 10), [])
            metrics.log(step, BATCHES, stats, 1e-3)
            if step % 4 == 0:
                metrics.log_validation(step, {"loss/code": 2.5, "loss/math": 3.5})


def records(folder, name="metrics.jsonl"):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / name).read_text().splitlines()]


def test_a_record_per_step_with_true_names(tmp_path):
    write_steps(fake_run(tmp_path), 0, 3)
    first, _, third = records(tmp_path)
    assert third["step"] == 3
    assert third["tokens"] == 3 * 4 * 16
    assert third["loss/code"] == pytest.approx((20 * 1.0 + 10 * 4.0) / 30)  # two sources of one domain
    assert "loss/math" not in third  # it had no tokens
    assert (first["loss"], first["grad_norm"], first["lr"]) == (2.0, 0.5, 1e-3)
    assert 0 < first["time/data_s"] <= first["time/step_s"]
    assert first["throughput/tokens_per_s"] == pytest.approx(64 / first["time/step_s"])
    assert first["memory/peak_gb"] > 0


def test_flops_are_of_what_rank_0_computes(tmp_path):
    """Attention over each document's own length, not over the row that holds two of them."""
    run = fake_run(tmp_path)
    run.groups.world_size, run.groups.dp_size = 4, 2  # each replica on two devices
    write_steps(run, 0, 1)
    (record,) = records(tmp_path)
    spec = run.spec
    layers = sum(n * sublayer_flops(spec, kind, n) for kind in spec.pattern for n in (3, 13, 16))
    flops = 3 * (layers + 32 * head_flops(spec))
    assert record["throughput/tflops"] * record["time/step_s"] * 2 == pytest.approx(flops / 1e12)


def test_a_resumed_run_has_every_step_once(tmp_path):
    write_steps(fake_run(tmp_path), 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a crash in the middle of a line
    write_steps(fake_run(tmp_path), 5, 10, loss=1.0)
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(s, 2.0 if s <= 5 else 1.0) for s in range(1, 11)]
    assert records(tmp_path, "validation.jsonl") == [
        {"step": step, "validation/loss/code": 2.5, "validation/loss/math": 3.5} for step in (4, 8)
    ]


def test_lines_that_are_no_records_are_dropped_when_a_run_resumes(tmp_path, caplog):
    """What a crash or a disk leaves: bytes that are no text, half a line, other JSON."""
    from prism_mcore.train.metrics import truncate_after

    records = [json.dumps({"step": step, "text": "ä\u2028"}).encode() for step in (1, 2, 3)]
    damage = [b"\xff\xfe\x00", b"[]", b"null", b'"step"', b'{"step": "2"}', b"{}", b"[" * 100_000]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([records[0], *damage, *records[1:], records[0][:9]]))
    assert truncate_after(file, 2) == 2
    assert file.read_bytes().splitlines() == records[:2]
    assert f"{file}: dropped 8 lines" in caplog.text


def test_nan_becomes_null(tmp_path):
    write_steps(fake_run(tmp_path), 0, 1, loss=math.nan)
    assert records(tmp_path)[0]["loss"] is None


def test_without_held_out_data_there_is_no_validation(tmp_path, capsys):
    from prism_mcore.train.metrics import Metrics

    with Metrics(fake_run(tmp_path), 0) as metrics:
        metrics.log_validation(0, {})
    assert records(tmp_path, "validation.jsonl") == [] and "validation" not in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path):
    write_steps(fake_run(tmp_path, rank=1), 0, 4)
    assert list(tmp_path.iterdir()) == []


def test_the_console_has_one_line_every_so_many_steps(tmp_path, capsys):
    write_steps(fake_run(tmp_path), 0, 5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss 2.0000" in line]
    assert [line.split(" | ")[0] for line in lines] == ["step  2/10", "step  4/10"]
    assert all(part in lines[0] for part in ("lr 1.00e-03", "grad 0.500", "tok/s", "TFLOP/s", "ETA 0:00:0"))


def test_tensorboard_has_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(fake_run(tmp_path, tensorboard=True), 0, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("validation/loss/math")] == [3.5]


def ask_for_the_end(groups):
    import os
    import signal

    from prism_mcore.agree import summed
    from prism_mcore.train.signals import Signals

    def agreed(here):
        return bool(summed({"stop": torch.tensor(float(here))})["stop"])

    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        quiet = agreed(signals.received)
        if groups.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        return quiet, agreed(signals.received), signal.getsignal(signal.SIGTERM) != before


def test_a_signal_to_one_rank_is_seen_by_all_at_the_same_step():
    assert run_ranks(2, ask_for_the_end) == [(False, True, True)] * 2
