"""The table of ops: names are checked before anything is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import prism_kernels
from prism_kernels.table import BACKENDS, OPS, check_choices

NAMES_A_TYPO = """
import sys
from prism_kernels.table import check_choices
try:
    check_choices({"rms_nrm": "triton"})
except ValueError as error:
    print(error)
print({"torch", "triton", "numpy"} & set(sys.modules))
"""


def test_a_typo_is_found_without_torch():
    done = subprocess.run([sys.executable, "-c", NAMES_A_TYPO], capture_output=True, text=True, check=True)
    error, imported = done.stdout.splitlines()
    assert "kernels.rms_nrm: no such op (did you mean kernels.rms_norm?)" in error and imported == "set()"


@pytest.mark.parametrize(
    ("op", "backend", "said"),
    [
        ("attn", "triton", r"kernels.attn: no such op \(did you mean kernels.attention\?\); ops are linear, "),
        ("scan_ssd", "exact", r"kernels.scan_ssd: no such op"),
        (
            "rope",
            "tritn",
            r"kernels.rope=tritn: rope has no such backend \(did you mean triton\?\); it has auto, triton",
        ),
        ("rope", "flash_attn", r"rope has no such backend; it has auto, triton, reference, exact"),
        ("adamw", "exact", r"adamw has no such backend.*; it has auto, te, apex, triton, torch, reference"),
        ("rope", "", r"kernels.rope=: rope has no such backend"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(op, backend, said):
    with pytest.raises(ValueError, match=said):
        check_choices({op: backend})


def test_every_folder_holds_the_ops_of_the_table_and_is_a_package():
    folders = {path.name for path in Path(prism_kernels.__file__).parent.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {op.folder for op in OPS.values()}
    assert all((Path(prism_kernels.__file__).parent / folder / "__init__.py").exists() for folder in folders)


def test_every_backend_of_the_table_and_auto_may_be_asked_for():
    for name, op in OPS.items():
        assert set(op.backends) <= set(BACKENDS)
        for backend in ("auto", *op.backends):
            check_choices({name: backend})
    check_choices({})
