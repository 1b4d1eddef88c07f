"""Every number of every model has one place in Hugging Face's files and one in ours."""

import math
from collections import defaultdict

import pytest
import torch
from tiny.hf_models import FAMILIES, save_hf
from tiny.models import PUBLISHED

from prism_mcore.convert.names import RowRange, hf_tensors, keys
from prism_mcore.convert.read import read_directory
from prism_mcore.convert.rows import Places, held_columns, held_rows, runs_within
from prism_mcore.model.parameters import parameters
from prism_mcore.model.spec import read_spec
from prism_mcore.model.tensors import shard


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_of_ours_is_in_one_place_of_theirs(name):
    spec = read_spec(name)
    runs = defaultdict(list)
    for tensor in hf_tensors(spec).values():
        assert sum(run.rows for run in tensor.runs) == tensor.shape[0]
        for run in tensor.runs if not tensor.optional else ():
            runs[run.key].append((run.start, run.start + run.rows))
    assert runs.keys() == keys(spec).keys()
    for key, shape in keys(spec).items():
        starts, ends = zip(*sorted(runs[key]), strict=True)
        assert (*starts, shape[0]) == (0, *ends), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_parameter_counts(name):
    tensors = [tensor for tensor in hf_tensors(read_spec(name)).values() if not tensor.optional]
    assert sum(math.prod(tensor.shape) for tensor in tensors) == PUBLISHED[name]


def test_names_of_the_published_files():
    """A few of each, from the models' own files."""
    nemotron, granite = hf_tensors(read_spec("nemotron-h-8b")), hf_tensors(read_spec("granite-4.0-h-micro"))
    assert nemotron["backbone.layers.0.mixer.in_proj.weight"].shape == (18560, 4096)
    assert nemotron["backbone.layers.0.mixer.conv1d.weight"].shape == (10240, 1, 4)
    assert nemotron["backbone.layers.7.mixer.k_proj.weight"].shape == (1024, 4096)
    assert granite["model.layers.0.mamba.in_proj.weight"].shape == (8512, 2048)
    assert granite["model.layers.5.shared_mlp.input_linear.weight"].shape == (16384, 2048)
    assert granite["lm_head.weight"].optional
    assert hf_tensors(read_spec("mistral-small-24b-2501"))["model.layers.39.self_attn.q_proj.weight"].shape == (
        4096,
        5120,
    )


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_name_what_transformers_writes(tmp_path, family, original):
    """In its files' own names, and in those that transformers 5 has in memory."""
    save_hf(family, tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path, save_original_format=original)
    source = read_directory(tmp_path)
    found = source.tensors(source.spec())  # refuses what is missing, too many or of another shape
    assert found.keys() == source.names


@pytest.mark.parametrize("family", ["llama-3.1", "granite-4.0-h-micro", "nemotron-h"])
def test_what_a_rank_holds_is_what_shard_gives_it(tmp_path, family):
    """The rows and columns named for each rank, cut from the whole tensor, are `parameters.shard`'s slice."""
    save_hf(family, tmp_path)
    spec, tp = read_spec(tmp_path), 2
    for name, parameter in parameters(spec, tp).items():
        whole = torch.arange(math.prod(parameter.shape)).view(parameter.shape)
        starts = dict.fromkeys(parameter.names, 0)
        offset = 0
        for part, size in zip(parameter.names, parameter.parts, strict=True):
            starts[part], offset = offset, offset + size
        for rank in range(tp):
            want = shard(whole, parameter, rank, tp)
            got = torch.zeros_like(want)  # padding of the vocabulary is zeros
            for run, row in held_rows(name, parameter, rank, tp):
                start = starts.get(run.key.removeprefix(f"{name}."), 0) + run.start
                rows = whole[start : start + run.rows]
                columns = held_columns(parameter, rank, tp)
                got[row : row + run.rows] = rows if columns == slice(None) else rows[:, columns]
            assert torch.equal(got, want), (name, rank)


def test_rows_within_a_tensor_and_their_places_are_inverse():
    tensors = hf_tensors(read_spec("nemotron-h-8b"))
    places = Places(tensors)
    name = "backbone.layers.0.mixer.in_proj.weight"  # z, x, B, C, dt
    found = [
        (copy.hf_row, copy.rows, row + copy.row)
        for run, row in runs_within(tensors[name], 8000, 18500)
        for copy in places.find(RowRange(run.key, run.start, run.rows))
    ]
    assert [hf_row - 8000 for hf_row, _, _ in found] == [row for _, _, row in found]
    assert sum(rows for _, rows, _ in found) == 10500
