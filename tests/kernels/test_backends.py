"""Selecting backends, and the records of boundaries."""

import importlib
from inspect import signature

import pytest
import torch
from tiny.accuracy import documents

from prism_kernels.attention import reference as attention
from prism_kernels.backends import function, select, why_not
from prism_kernels.boundaries import Boundaries
from prism_kernels.conv import reference as conv
from prism_kernels.scan import reference as scan
from prism_kernels.scan.inputs import ScanInputs
from prism_kernels.table import BACKENDS, OPS, place

LIBRARIES = {
    "te": ("transformer_engine.pytorch", "transformer_engine.wheel_lib.transformer_engine_torch"),
    "apex": ("apex.optimizers.fused_adam", "amp_C"),
    "flash_attn": ("flash_attn.flash_attn_interface", "flash_attn_2_cuda"),
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "selective_scan_cuda"),
    "causal_conv1d": ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_cuda"),
}
GPU = torch.device("cuda")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("flash_attn.flash_attn_interface")` makes a package of files that must not be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def files(*modules: str) -> None:
        for module in modules:
            folder = tmp_path
            *packages, name = module.split(".")
            for package in packages:
                folder = folder / package
                folder.mkdir(exist_ok=True)
                (folder / "__init__.py").write_text("raise RuntimeError('selecting a backend imports nothing')")
            (folder / f"{name}.py").write_text("raise RuntimeError('selecting a backend imports nothing')")
        importlib.invalidate_caches()

    return files


def names(selected):
    return {op: backend.name for op, backend in selected.items()}


def test_every_op_has_a_backend_and_a_reason():
    selected = select({"ssd_scan": "reference", "rope": "auto"}, "cpu")
    assert set(selected) == set(OPS)
    assert selected["ssd_scan"].reason == "asked for by kernels.ssd_scan"
    assert set(names(selected).values()) == {"reference", "megatron", "torch"}


def test_transformer_engine_is_taken_on_a_gpu_where_it_is_installed(install):
    install(*LIBRARIES["te"])
    on_gpu, on_cpu = names(select({}, "cuda")), names(select({}, "cpu"))
    assert {op for op, backend in on_gpu.items() if backend == "te"} == {
        "linear",
        "fp8_linear",
        "rms_norm",
        "attention",
        "adamw",
    }
    assert "te" not in on_cpu.values()
    assert select({"attention": "reference"}, "cuda")["attention"].name == "reference"


def test_other_libraries_kernels_are_second_to_ours_on_a_gpu_and_attention_of_flash_attn_is_first(install):
    install(*LIBRARIES["flash_attn"], *LIBRARIES["mamba_ssm"], *LIBRARIES["causal_conv1d"])
    selected = names(select({}, "cuda"))
    assert selected["attention"] == "flash_attn" and selected["linear"] == "megatron"
    assert {selected[op] for op in ("ssd_scan", "causal_conv1d", "adamw", "rms_norm", "linear_cross_entropy")} == {
        "triton"
    }
    asked = {"ssd_scan": "mamba_ssm", "causal_conv1d": "causal_conv1d", "adamw": "torch"}
    assert {op: select(asked, "cuda")[op].name for op in asked} == asked
    with pytest.raises(ValueError, match=r"kernels.adamw=apex: .*optimizers.fused_adam is not installed: see github"):
        select({"adamw": "apex"}, "cuda")


@pytest.mark.parametrize(
    ("backend", "files", "missing"),
    [
        ("apex", ["apex.models", "apex.forms"], "apex.optimizers.fused_adam"),  # PyPI's
        ("apex", ["apex.optimizers"], "apex.optimizers.fused_adam"),
        ("apex", ["apex.optimizers.fused_adam"], "amp_C"),  # NVIDIA's, built without its CUDA extensions
        ("flash_attn", ["flash_attn.cute.interface"], "flash_attn.flash_attn_interface"),  # flash-attn-4
        ("flash_attn", ["flash_attn.flash_attn_interface"], "flash_attn_2_cuda"),
        ("te", ["transformer_engine.pytorch", "transformer_engine.common"], "transformer_engine_torch"),
        ("mamba_ssm", ["mamba_ssm.models"], "mamba_ssm.ops.triton.ssd_combined"),
        ("mamba_ssm", ["mamba_ssm.ops.triton.ssd_combined"], "selective_scan_cuda"),  # built without CUDA
        ("causal_conv1d", ["causal_conv1d"], "causal_conv1d.causal_conv1d_interface"),
    ],
)
def test_a_package_of_the_same_name_is_not_the_one_that_is_called(install, backend, files, missing):
    install(*files)
    assert why_not(backend, GPU) == f"{missing} is not installed: {BACKENDS[backend].install}"
    assert backend not in names(select({}, "cuda")).values()
    install(*LIBRARIES[backend])
    if backend != "causal_conv1d":  # its file of that name hides the folder
        assert why_not(backend, GPU) is None


def test_flash_attn_4_in_a_namespace_without_an_init_is_not_flash_attn_2(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash_attn.flash_attn_interface is not installed" in str(why_not("flash_attn", GPU))
    assert select({}, "cuda")["attention"].name == "triton"


def test_a_module_in_a_folder_without_an_init_is_found(install, tmp_path):
    """where the wheel of Transformer Engine's torch extension puts it"""
    install(*LIBRARIES["te"])
    (tmp_path / "transformer_engine" / "wheel_lib" / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert why_not("te", GPU) is None


def test_every_function_in_the_table_exists_and_takes_what_its_reference_takes():
    """kernels of packages that are not here are imported when they are called"""
    for name, op in OPS.items():
        reference = signature(function(name, "reference")) if "reference" in op.backends else None
        for backend in op.backends:
            if backend == "exact":
                assert callable(function(name, backend))
            elif place(name, backend):
                assert signature(function(name, backend)) == reference, f"{name} by {backend}"


def test_a_class_of_a_library_has_no_function_and_says_so():
    with pytest.raises(LookupError, match="linear of te is no function but a class"):
        function("linear", "te")


def test_what_other_libraries_do_not_cover_goes_to_the_reference(caplog):
    boundaries, q = documents(5, 3), torch.randn(8, 2, 8)
    attend = function("attention", "flash_attn")  # fp32
    assert torch.equal(attend(q, q, q, boundaries, 0.3), attention.attention(q, q, q, boundaries, 0.3))
    x, weight = torch.randn(8, 16), torch.randn(16, 4)
    convolve = function("causal_conv1d", "causal_conv1d")
    expected = conv.causal_conv1d(x, weight, None, boundaries, return_final_state=True)
    for a, b in zip(convolve(x, weight, None, boundaries, return_final_state=True), expected, strict=True):
        assert torch.equal(a, b)
    inputs = ScanInputs(q, torch.randn(8, 2), torch.randn(2), q, q, None, torch.randn(2))
    scanned = function("ssd_scan", "mamba_ssm")
    assert torch.equal(scanned(inputs, boundaries, 24), scan.ssd_scan(inputs, boundaries, 24))
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "attention: flash-attn has no torch.float32: needs bf16 or fp16",
        "causal_conv1d: causal-conv1d takes no states together with packed documents",
        "ssd_scan: chunk_len 24: mamba-ssm needs a power of two, at least 16",
    ]


def test_only_what_is_shown_to_be_is_called_independent_of_the_batch():
    exact = {name: "exact" for name, op in OPS.items() if "exact" in op.backends}
    assert all(backend.batch_invariant for op, backend in select(exact, "cpu").items() if op in exact)
    selected = select({"swiglu": "triton", "linear_cross_entropy": "triton"}, "cpu")
    assert selected["swiglu"].batch_invariant and not selected["linear_cross_entropy"].batch_invariant
    assert not selected["linear"].batch_invariant and not selected["attention"].batch_invariant


def test_lengths_known_on_the_cpu_are_not_asked_of_the_device():
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
    boundaries = Boundaries.on(torch.device("meta"), lengths)
    assert boundaries.cu_seqlens.is_meta and boundaries.documents == [(0, 0, 3), (1, 3, 8)]
    assert boundaries.chunks(2).slot.is_meta and boundaries.history_slots(3)[0].is_meta


def test_a_backend_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"kernels.rope=flash_attn: rope has no such backend; it has auto, triton"):
        select({"rope": "flash_attn"}, "cpu")
    with pytest.raises(ValueError, match=r"kernels.attention=flash_attn: .*pip install flash-attn|needs a GPU"):
        select({"attention": "flash_attn"}, "cpu")
    with pytest.raises(ValueError, match=r"kernels.attn: no such op .*; ops are linear, fp8_linear"):
        select({"attn": "reference"}, "cpu")


@pytest.mark.parametrize("lengths", [[8, 8], [7, 7], [5, 0, 9, 1]])
def test_a_chunk_grid_restarts_at_each_document_and_loses_nothing(lengths):
    boundaries = documents(*lengths)
    grid = boundaries.chunks(4)
    tokens = torch.arange(1, boundaries.num_tokens + 1)[:, None]
    filled = grid.fill(tokens)
    assert torch.equal(grid.flatten(filled), tokens)
    document = torch.bucketize(tokens[:, 0] - 1, boundaries.cu_seqlens[1:], right=True)
    for chunk in filled[..., 0]:
        assert len(document[chunk[chunk > 0] - 1].unique()) == 1
    assert torch.equal(filled[grid.first, 0, 0] - 1, torch.tensor([start for _, start, _ in boundaries.documents]))
    assert grid.num_chunks == sum(-(-n // 4) for n in lengths)
    assert boundaries.chunks(4) is grid


def test_equal_documents_that_fill_their_chunks_are_not_copied():
    x = torch.randn(16, 3)
    assert documents(8, 8).chunks(4).fill(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("bad", [[1, 4], [0, 5, 3], [0], [[0, 4]], [0, 0]])
def test_bad_boundaries_are_refused(bad):
    with pytest.raises(ValueError, match="non-decreasing list from 0"):
        _ = Boundaries(torch.tensor(bad, dtype=torch.int32)).num_tokens
