"""What training did to the weights: every number by its definition, streamed as in memory, from either kind of file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

from prism_mcore.analyze import weights
from prism_mcore.analyze.sources import Weights
from prism_mcore.analyze.weights import COLUMNS, THRESHOLDS, by_class, compare, cosines, layer_of, module_class
from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.offline import import_hf, plan_import


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved("granite-4.0-h-micro", tmp_path_factory.mktemp("base"))


def saved(family, folder):
    save_hf(family, folder)
    return folder


def changed(source: Path, folder: Path, change):
    """A copy of a directory in which `change(name, tensor)` gives each tensor."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(path).items()}
            save_file(tensors, folder / path.name, {"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rows_of(*paths):
    with Weights(paths[0]) as old, Weights(paths[1]) as first:
        if len(paths) == 2:
            return list(compare(old, [first]))
        with Weights(paths[2]) as second:
            return list(compare(old, [first, second]))


def noise(scale):
    def change(name, tensor):
        generator = torch.Generator().manual_seed(len(name))
        return tensor + (scale * torch.randn(tensor.shape, generator=generator) * tensor.float()).to(tensor.dtype)

    return change


def directly(old, new):
    """The columns of weights.csv by their definitions, in numpy and fp64."""
    a, b = (x.double().numpy().ravel() for x in (old, new))
    size, rms = np.abs(b - a), math.sqrt((a**2).mean())
    return [
        np.linalg.norm(b - a) / np.linalg.norm(a),
        *((size > p * np.abs(a)).mean() for p in THRESHOLDS),
        (size > 0.01 * rms).mean(),
        (old.bfloat16() == new.bfloat16()).double().mean().item(),
    ]


@pytest.mark.parametrize(("read", "block"), [(2**22, 2**17), (96, 7)])
def test_every_column_is_its_definition(base, tmp_path, monkeypatch, read, block):
    """In one piece, and streamed in pieces of which none fits."""
    monkeypatch.setattr(weights, "READ", read)
    monkeypatch.setattr(weights, "BLOCK", block)
    new = changed(base, tmp_path / "new", noise(0.02))
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (base, new))
    found = rows_of(base, new)
    assert [tensor.name for tensor in found] and {tensor.name for tensor in found} == set(before)
    for tensor in found:
        row = tensor.row()
        assert list(row) == list(COLUMNS) and row["numel"] == before[tensor.name].numel()
        want = directly(before[tensor.name], after[tensor.name])
        # A number exactly at a threshold falls by the last bit of fp32.
        assert list(row.values())[4:] == pytest.approx(want, rel=2e-6, abs=1.01 / row["numel"])


def test_a_model_is_itself(base):
    for tensor in rows_of(base, base):
        assert list(tensor.row().values())[4:] == [0.0] * 8 + [1.0]


def test_one_tensor_scaled_by_two_percent_is_all_that_changed(base, tmp_path):
    name = "model.layers.0.shared_mlp.output_linear.weight"
    new = changed(base, tmp_path / "new", lambda n, x: x * 1.02 if n == name else x)
    for tensor in rows_of(base, new):
        row = tensor.row()
        assert row["relative_l2"] == pytest.approx(0.02 if tensor.name == name else 0.0, rel=1e-5)
        assert row["changed_1pct"] == float(tensor.name == name) and row["changed_5pct"] == 0.0
    total = by_class(rows_of(base, new))[0]
    assert total["level"] == "total"
    share = load_file(next(base.glob("*.safetensors")))[name].numel() / total["numel"]
    assert total["pooled_changed_1pct"] == pytest.approx(share)
    assert total["mean_changed_1pct"] == pytest.approx(1 / total["tensors"])


def test_zeros_that_stay_are_unchanged_and_those_that_move_are_changed():
    old, new = torch.tensor([0.0, 0.0, -0.0, 1.0]), torch.tensor([0.0, 1e-30, 0.0, 1.0])
    change = weights.Change()
    weights._measure(change, old, old, new, rms=0.5)
    assert change.changed == [1] * len(THRESHOLDS) and change.changed_rms == 0
    assert change.identical == 3 and change.numel == 4
    nothing = weights.Change()
    weights._measure(nothing, torch.zeros(2), torch.zeros(2), torch.ones(2), rms=0.0)
    assert nothing.relative_l2 == math.inf


def test_neighbours_in_bf16_are_one_step_apart_on_both_sides_of_zero():
    bits = ([0x3F80, 0xBF80, 0x3F7F, 0x0001], [0x3F81, 0xBF81, 0x3F81, 0x0001])  # 1, 1, 2 and 0 apart
    one, two = (torch.tensor(row, dtype=torch.int32).to(torch.int16).view(torch.bfloat16) for row in bits)
    change = weights.Change()
    weights._measure(change, one, one.float(), two, rms=1.0)
    assert (change.identical, change.one_step) == (1, 2)
    change, (a, b) = weights.Change(), (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.001, 1.0078125, 1.1]))
    weights._measure(change, a, a, b, rms=1.0)
    assert (change.identical, change.one_step) == (1, 1)  # as bf16 numbers, fp32 ones are rounded


def test_cosines_of_two_updates(base, tmp_path):
    step = noise(0.1)
    first = changed(base, tmp_path / "first", step)
    back = changed(base, tmp_path / "back", lambda n, x: x - (step(n, x) - x))
    ((cosine),) = cosines(rows_of(base, first, back))
    assert cosine["pooled"] == pytest.approx(-1.0, abs=1e-4) and cosine["mean"] == pytest.approx(-1.0, abs=1e-4)
    ((cosine),) = cosines(rows_of(base, first, first))
    assert cosine["pooled"] == pytest.approx(1.0, abs=1e-6)
    ((cosine),) = cosines(rows_of(base, base, base))
    assert math.isnan(cosine["pooled"]) and math.isnan(cosine["mean"])


def test_classes_and_layers():
    assert module_class("model.layers.3.self_attn.q_proj.weight") == "q_proj"
    assert module_class("model.layers.3.self_attn.q_proj.bias") == "q_proj"
    assert module_class("backbone.layers.11.mixer.A_log") == "A_log"
    assert {module_class(n) for n in ("model.norm.weight", "model.layers.0.input_layernorm.weight")} == {"norm"}
    assert (layer_of("backbone.layers.11.mixer.A_log"), layer_of("lm_head.weight")) == (11, None)


def test_models_of_different_shapes_are_refused(base, tmp_path):
    other = saved("llama-3.1", tmp_path / "other")
    with pytest.raises(ExchangeError, match="are different models"):
        rows_of(base, other)
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "granitemoehybrid"


@pytest.mark.parametrize("family", ["llama-3.1", "nemotron-h"])
def test_a_checkpoint_is_the_directory_it_was_made_of(tmp_path, family):
    source = saved(family, tmp_path / "hf")
    import_hf(plan_import(source), tmp_path / "checkpoint")
    new = changed(source, tmp_path / "new", noise(0.02))
    want = [tensor.row() for tensor in rows_of(source, new)]
    assert [tensor.row() for tensor in rows_of(tmp_path / "checkpoint", new)] == want
