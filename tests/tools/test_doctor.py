"""The doctor runs anywhere, tells the truth about every op, and refuses what cannot be obeyed."""

import sys
from pathlib import Path

import pytest
import torch

from prism_kernels.table import OPS

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import doctor


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells of each row of rich's tables."""
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    return {first: others for first, *others in cells}


def test_every_op_is_shown_with_its_backend_and_the_reason(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    table = rows(capsys.readouterr().out)
    assert {op: table[op][0] for op in ("ssd_scan", "linear", "adamw")} == {
        "ssd_scan": "reference",
        "linear": "megatron",
        "adamw": "torch",
    }
    assert set(OPS) <= set(table)
    assert table["torch"][0] == torch.__version__ or "yes" in table["torch"]
    assert "needs a GPU" in table["te"][0] or "not installed" in table["te"][0]


def test_a_recipes_choice_is_tried_and_a_bad_one_refused(capsys):
    assert doctor.main(["--device", "cpu", "kernels.ssd_scan=exact"]) == 0
    shown = rows(capsys.readouterr().out)["ssd_scan"]
    assert shown[:2] == ["exact", "asked for by kernels.ssd_scan"] and shown[3] == "yes"
    for bad, said in (
        ("kernels.ssd_scan=flash_attn", "ssd_scan has no such backend"),
        ("ssd_scan", "kernels.OP=BACKEND"),
    ):
        assert doctor.main(["--device", "cpu", bad]) == 2
        assert said in capsys.readouterr().err


def test_a_missing_requirement_is_named(capsys, monkeypatch):
    monkeypatch.setitem(doctor.REQUIRED, "no-such-package", "nothing")
    assert doctor.main(["--device", "cpu"]) == 1
    assert "missing no-such-package" in capsys.readouterr().err


def test_a_package_that_only_has_the_name_is_not_what_is_called(capsys, monkeypatch, tmp_path):
    """PyPI's apex"""
    (tmp_path / "apex" / "forms").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (tmp_path / "apex-0.9.10.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "0.9.10, without apex.optimizers.fused_adam" in out
    assert "apex.optimizers.fused_adam is not installed: see github.com/NVIDIA/apex" in out
    assert doctor.main(["--device", "cpu", "kernels.adamw=apex"]) == 2


@pytest.mark.parametrize(("version", "said"), [("2.11.0", "2.11.0"), ("2.20.2", "outside the range megatron-core")])
def test_a_transformer_engine_that_megatron_core_was_not_written_for_is_told(
    capsys, monkeypatch, tmp_path, version, said
):
    for module in ("pytorch", "transformer_engine_torch"):
        (tmp_path / "transformer_engine" / module).mkdir(parents=True)
        (tmp_path / "transformer_engine" / module / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine-0.dist-info").mkdir()
    written = f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n"
    (tmp_path / "transformer_engine-0.dist-info" / "METADATA").write_text(written)
    monkeypatch.syspath_prepend(tmp_path)
    assert said in str(doctor._optional_version("transformer-engine"))
    assert ("outside" in said) == ("<2.12" in str(doctor._optional_version("transformer-engine")))
    assert doctor.main(["--device", "cpu"]) == 0
    assert version in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        doctor.main(["--help"])
    assert "--device" in capsys.readouterr().out


def test_the_sandbox_is_tried_and_what_does_not_hold_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("prism_mcore.rewards.sandbox.host.shutil.which", lambda *_, **__: None)  # no bubblewrap
    assert doctor.main(["--device", "cpu"]) == 0
    table = rows(capsys.readouterr().out)
    assert "no sandbox holds on this machine; install bubblewrap" in " ".join(table["bubblewrap"])
    assert table["landlock"] == ["holds"] or "install bubblewrap" in " ".join(table["landlock"])
