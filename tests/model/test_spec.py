"""ModelSpec reads the models exactly, in both key styles, and refuses what the engine does not compute."""

import json
import math

import pytest
from tiny.models import PUBLISHED

from prism_mcore.model.spec import RopeScaling, UnsupportedModel, read_config, read_spec, spec_from_config
from prism_mcore.plan.memory import num_parameters


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, count):
    assert num_parameters(read_spec(name)) == count


def test_each_family_keeps_what_sets_it_apart():
    assert read_spec("mistral-7b-v0.1").sliding_window == 4096
    assert read_spec("mistral-small-24b-2501").sliding_window is None
    assert read_spec("mistral-small-24b-2501").head_dim == 128  # not 5120 / 32
    assert read_spec("llama-3.1-8b").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    micro, hybrid = read_spec("granite-4.0-micro"), read_spec("granite-4.0-h-micro")
    assert (micro.position, micro.rope_theta, micro.logits_divisor, set(micro.pattern)) == (
        "rope",
        1e7,
        10.0,
        {"*", "-"},
    )
    assert (hybrid.position, hybrid.ssm_groups, hybrid.chunk_len) == ("none", 1, 256)
    assert [i // 2 for i, kind in enumerate(hybrid.pattern) if kind == "*"] == [5, 15, 25, 35]
    assert read_spec("granite-3.3-8b").attention_scale == 1 / 128  # not 128 ** -0.5
    assert (read_spec("qwen2.5-7b").qkv_bias, read_spec("qwen2.5-7b").sliding_window) == (True, None)  # a window unused
    assert (read_spec("qwen3-8b").qk_norm, read_spec("qwen3-8b").qkv_bias) == (True, False)
    nemotron = read_spec("nemotron-h-8b")
    assert (nemotron.activation, nemotron.gated_norm_groups, nemotron.dt_limit) == ("squared_relu", 8, (0.0, math.inf))


def modern(raw: dict) -> dict:
    """The same model in transformers 5's keys."""
    raw = dict(raw)
    theta, scaling = raw.pop("rope_theta", None), raw.pop("rope_scaling", None)
    if theta is not None:
        raw["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    if "layer_types" in raw:
        raw["layer_types"] = [names[kind] for kind in raw["layer_types"]]
    if "hybrid_override_pattern" in raw:
        kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
        raw["layers_block_type"] = [kinds[kind] for kind in raw.pop("hybrid_override_pattern")]
        raw["head_dim"] = raw.pop("attention_head_dim")
        raw["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
        # unused defaults that transformers 5 writes into models without experts
        raw |= {"n_routed_experts": 8, "moe_latent_size": None, "num_nextn_predict_layers": 0, "sliding_window": None}
    return raw


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_key_styles_give_the_same_spec(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(modern(read_config(name))))
    assert read_spec(tmp_path) == read_spec(name)


REFUSED = {
    "another architecture": ("llama-3.1-8b", {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
    "class and type disagree": ("llama-3.1-8b", {"model_type": "mistral"}, 'model_type="mistral"'),
    "attention bias": ("llama-3.1-8b", {"attention_bias": True}, "attention_bias=true"),
    "MLP bias": ("nemotron-h-8b", {"mlp_bias": True}, "mlp_bias=true"),
    "another activation": ("granite-3.3-8b", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    "another rope": ("llama-3.1-8b", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 'rope_type="dynamic"'),
    "half a rope": ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
    "partial rope": ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "experts, Granite": ("granite-4.0-h-micro", {"num_local_experts": 62}, "num_local_experts=62"),
    "experts, Nemotron": ("nemotron-h-8b", {"hybrid_override_pattern": "MEM*", "num_hidden_layers": 4}, "experts"),
    "depth and pattern": ("nemotron-h-8b", {"num_hidden_layers": 50}, "num_hidden_layers=50"),
    "quantised weights": ("llama-3.1-8b", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "an unknown key": ("llama-3.1-8b", {"qk_norm": True}, "qk_norm=true"),
    "a missing multiplier": ("granite-3.3-8b", {"residual_multiplier": None}, "residual_multiplier"),
    "a missing window": ("mistral-7b-v0.1", {"sliding_window": ...}, "no sliding_window"),
    "dropout": ("granite-3.3-8b", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "text for a number": ("llama-3.1-8b", {"hidden_size": "4096"}, 'hidden_size="4096"'),
    "heads that do not group": ("llama-3.1-8b", {"num_key_value_heads": 5}, "num_key_value_heads=5"),
    "windows in some layers": (
        "qwen2.5-7b",
        {"use_sliding_window": True, "max_window_layers": 14},
        "max_window_layers=14",
    ),
    "windows in some layers, listed": (
        "qwen3-8b",
        {"layer_types": ["full_attention", "sliding_attention"] * 18},
        "layer_types=",
    ),
    "bias with the norms": ("qwen3-8b", {"attention_bias": True}, "attention_bias=true"),
    "no head size": ("qwen3-8b", {"head_dim": ...}, "no head_dim"),
    "two head sizes": ("nemotron-h-8b", {"head_dim": 64}, "attention_head_dim=128"),
    "Mamba heads that miss the width": ("granite-4.0-h-micro", {"mamba_d_head": 32}, "mamba_d_head=32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
    name, change, message = REFUSED[case]
    raw = {key: value for key, value in (read_config(name) | change).items() if value is not ...}
    with pytest.raises(UnsupportedModel) as error:
        spec_from_config(raw)
    assert message in str(error.value)


NONSENSE = [True, 0, -1, 2.5, math.nan, math.inf, 10**30, "x", "", [], [1], [[1]], [{}], {}, {"rope_type": []}]


@pytest.mark.parametrize("name", ["qwen3-8b", "granite-4.0-h-micro", "nemotron-h-8b"])
def test_nonsense_is_refused_and_never_a_traceback(name):
    """Whatever stands under a key, the reader takes it or names it."""
    raw = read_config(name)
    for key in [*raw, "layers_block_type", "layer_types", "rope_parameters", "time_step_limit", "sliding_window"]:
        for value in NONSENSE:
            try:
                spec = spec_from_config(raw | {key: value})
            except UnsupportedModel as error:
                assert str(error)
            else:
                assert 0 < spec.norm_eps < math.inf and spec.hidden_size > 0


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[1]", b"{", b'{"a": {"__float__": "x"}}', b"[" * 200_000])
def test_a_file_that_is_no_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=str(tmp_path / "config.json")):
        read_spec(tmp_path)


def test_a_path_without_a_config_names_the_shipped_shapes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llama-3\.1-8b"):
        read_spec(tmp_path)
