"""Invariant 2: the logits and gradients of transformers, for every family, in every layout."""

import json
import shutil

import pytest
import torch
import transformers
from ranks import run_ranks
from tiny import oracle
from tiny.gradients import close, whole_gradients
from tiny.hf_models import FAMILIES, SEQ_LEN, save_hf
from tiny.models import PUBLISHED, packed_batch

from prism_mcore.convert.online import load_hf
from prism_mcore.evaluate.scoring import score
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.rope import RopeSettings, extended, write_positions
from prism_mcore.model.spec import SHIPPED, read_spec
from prism_mcore.model.split import split_layers
from prism_mcore.train.optimizer import wrap
from prism_mcore.train.step import forward_backward

LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2+sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "tp2 x pp2": (4, {"tp": 2, "pp": 2}),
    "dp2": (2, {}),
}
SEQUENCES = 3  # does not divide by two ranks or micro-batches of two


def random_tokens(spec):
    return torch.randint(spec.vocab_size, (SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def batches_of(tokens):
    """One micro-batch per sequence, which is one document."""
    return [packed_batch([row], SEQ_LEN) for row in tokens]


def load(groups, folder, sequence_parallel):
    spec = read_spec(folder)
    chunks = build_chunks(
        spec,
        split_layers(spec, groups.pp_size, groups.vpp, SEQ_LEN),
        groups,
        Ops({}, torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        sequence_parallel=sequence_parallel,
    )
    load_hf(folder, chunks, groups)
    return spec, chunks


def our_scores(groups, folder, sequence_parallel):
    """{sequence: (log-probs, logits)} of those that this rank reports."""
    spec, chunks = load(groups, folder, sequence_parallel)
    scores = {}

    def keep(indices, logprobs, logits):
        scores.update(zip(indices, zip(logprobs, logits, strict=True), strict=True))

    score(chunks, random_tokens(spec), groups, keep, micro_batch=2, logits=True)
    return scores


def our_gradients(groups, folder, sequence_parallel):
    spec, chunks = load(groups, folder, sequence_parallel)
    wrapped = wrap(chunks, groups)
    forward_backward(wrapped, batches_of(random_tokens(spec)), groups, num_sources=1)
    return whole_gradients(chunks, wrapped, groups)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (its directory in one of the two key styles, the model of transformers, its logits and gradients)."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = save_hf(family, folder, older_keys=list(FAMILIES).index(family) % 2 == 0, max_shard_size="60KB")
            spec = read_spec(folder)
            with torch.no_grad():
                logits = model(input_ids=random_tokens(spec), use_cache=False).logits
            oracle.hf_loss(model, batches_of(random_tokens(spec))).backward()
            gradients = oracle.rename({name: p.grad for name, p in model.named_parameters()}, spec)
            made[family] = folder, logits, gradients
        return made[family]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(saved, family, layout):
    folder, want, _ = saved(family)
    world_size, degrees = LAYOUTS[layout]
    scores = {}
    for part in run_ranks(world_size, our_scores, folder, degrees.get("sequence_parallel", False), **degrees):
        assert not scores.keys() & part.keys()  # each sequence is reported once
        scores |= part
    assert sorted(scores) == list(range(SEQUENCES))
    logprobs, logits = (torch.stack([scores[i][part] for i in range(SEQUENCES)]) for part in (0, 1))
    assert close(logits, want)
    tokens = random_tokens(read_spec(folder))
    expected = want.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert close(logprobs, expected)


@pytest.mark.parametrize("layout", ["1", "tp2+sp", "pp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(saved, family, layout):
    folder, _, want = saved(family)
    world_size, degrees = LAYOUTS[layout]
    for got in run_ranks(world_size, our_gradients, folder, degrees.get("sequence_parallel", False), **degrees):
        assert got.keys() == want.keys()
        assert [name for name in got if not close(got[name], want[name], 1e-4)] == []


def test_strong_decays_keep_their_digits(tmp_path):
    """32 heads, whose fastest forgets within a token: over a chunk the log decays sum to thousands."""
    model = save_hf("granite-4.0-h-micro", tmp_path, mamba_n_heads=32, mamba_d_head=3, mamba_chunk_size=64)
    with torch.no_grad():
        want = model(input_ids=random_tokens(read_spec(tmp_path)), use_cache=False).logits
    scores = run_ranks(1, our_scores, tmp_path, False)[0]
    assert close(torch.stack([scores[i][1] for i in range(SEQUENCES)]), want)


# What a reader of config.json could drop without an error: each must change the logits of its tiny model.
BITES = [
    ("llama-3.1", {"rope_scaling": None}),
    ("mistral-v0.1", {"sliding_window": 8}),
    ("mistral-v0.1", {"sliding_window": None}),
    ("granite-3.3", {"attention_multiplier": 0.25}),  # head_dim ** -0.5
    ("granite-3.3", {"embedding_multiplier": 1.0}),
    ("granite-3.3", {"residual_multiplier": 1.0}),
    ("granite-3.3", {"logits_scaling": 1.0}),
    ("granite-4.0-micro", {"position_embedding_type": "nope"}),
    ("granite-4.0-h-micro", {"position_embedding_type": "rope"}),
    ("nemotron-h", {"time_step_limit": [0.001, 10.0]}),
    ("qwen3", {"use_sliding_window": False}),
]


@pytest.mark.parametrize(("family", "change"), BITES, ids=str)
def test_every_peculiarity_shows_in_the_logits(saved, tmp_path, family, change):
    folder, want, _ = saved(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    scores = run_ranks(1, our_scores, tmp_path, False)[0]
    assert not close(
        torch.stack([scores[i][1] for i in range(SEQUENCES)]), want, 3e-5
    )  # three times what parity allows


FURTHER = {
    "theta": RopeSettings(positions=256, theta=5e6),
    "llama3": RopeSettings(positions=256, scaling="llama3", original=16),
    "yarn": RopeSettings(positions=256, scaling="yarn", original=16),
    "none": RopeSettings(scaling="none"),
}


@pytest.mark.parametrize("keys", ["rope_scaling", "rope_parameters"])  # transformers 4, 5
@pytest.mark.parametrize("rope", FURTHER)
def test_further_positions_are_written_as_transformers_reads_them(saved, tmp_path, rope, keys):
    folder = saved("llama-3.1")[0]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    nested = raw.get("rope_parameters") or {"rope_theta": raw["rope_theta"]} | (raw["rope_scaling"] or {})
    others = {
        name: value for name, value in raw.items() if name not in ("rope_theta", *{"rope_scaling", "rope_parameters"})
    }
    flat = {"rope_theta": nested["rope_theta"], "rope_scaling": {n: v for n, v in nested.items() if n != "rope_theta"}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(others | ({"rope_parameters": nested} if keys == "rope_parameters" else flat)))
    spec = extended(read_spec(tmp_path), FURTHER[rope])
    write_positions(file, spec)
    assert read_spec(tmp_path) == spec == extended(spec, FURTHER[rope]) and spec != read_spec(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = model(input_ids=random_tokens(spec), use_cache=False).logits
    scores = run_ranks(1, our_scores, tmp_path, False)[0]
    assert close(torch.stack([scores[i][1] for i in range(SEQUENCES)]), want)


def count_parameters(groups, name):
    spec = read_spec(name)
    chunks = build_chunks(
        spec,
        split_layers(spec, 1, 1, 4096),
        groups,
        Ops({}, torch.device("cpu")),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    assert all(parameter.is_meta for parameter in chunks[0].parameters())
    return sum(parameter.numel() for parameter in chunks[0].parameters())


def test_full_size_shapes_have_the_published_parameters():
    assert {path.stem for path in SHIPPED.glob("*.json") if not path.stem.startswith("demo")} == PUBLISHED.keys()
    assert {name: run_ranks(1, count_parameters, name)[0] for name in PUBLISHED} == PUBLISHED
