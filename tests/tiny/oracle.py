"""transformers as the oracle: a random model of a test config, and its weights under our names."""

import torch
import transformers
from torch import Tensor

from prism_mcore.batch import PackedBatch
from prism_mcore.model.spec import ModelSpec


def hf_model(config: dict, seed: int = 0) -> transformers.PreTrainedModel:
    """A random fp32 model of transformers for a raw config.json."""
    torch.manual_seed(seed)
    hf_config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # transformers leaves norms, biases and A at round numbers
            if tensor.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                tensor.add_(torch.rand_like(tensor) - 0.5)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # transformers 5.23 clamps Nemotron-H's dt at time_step_min, which no file asks for and decode does not do.
            module.time_step_limit = (0.0, float("inf"))
    return model.eval()


def our_weights(model: transformers.PreTrainedModel, spec: ModelSpec) -> dict[str, Tensor]:
    """transformers' weights, or with `.grad` in their place its gradients, as whole tensors under our names."""
    return rename(dict(model.named_parameters()), spec)


def rename(theirs: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Any dict keyed by transformers' parameter names of one model -> the same numbers keyed by ours."""
    rest = dict(theirs)
    ours = {"embedding.weight": take(rest, "model.embed_tokens.weight", "model.embeddings.weight")}
    ours["final_norm.weight"] = take(rest, "model.norm.weight", "model.norm_f.weight")
    if not spec.tied_embeddings:
        ours["output.weight"] = take(rest, "lm_head.weight")
    for index, (kind, prefix) in enumerate(layer_prefixes(spec)):
        for name, tensor in MIXERS[kind](rest, prefix, spec).items():
            ours[f"layers.{index}.{name}"] = tensor
    assert not rest, f"not copied: {sorted(rest)}"
    return ours


def take(rest: dict[str, Tensor], *names: str) -> Tensor:
    return next(rest.pop(name) for name in names if name in rest)


def layer_prefixes(spec: ModelSpec) -> list[tuple[str, str]]:
    """transformers' layer of each sub-layer: two sub-layers to a layer, but one in Nemotron-H."""
    per_layer = 1 if spec.family == "nemotron_h" else 2
    return [(kind, f"model.layers.{i // per_layer}.") for i, kind in enumerate(spec.pattern)]


def attention(rest: dict[str, Tensor], prefix: str, spec: ModelSpec) -> dict[str, Tensor]:
    norm = take(rest, prefix + "input_layernorm.weight", prefix + "norm.weight")
    mixer = prefix + ("mixer." if spec.family == "nemotron_h" else "self_attn.")
    q, k, v = (take(rest, f"{mixer}{n}_proj.weight") for n in "qkv")
    heads = [x.reshape(spec.num_kv_heads, -1, spec.hidden_size) for x in (q, k, v)]
    peculiar = {}
    if mixer + "q_proj.bias" in rest:
        biases = [take(rest, f"{mixer}{n}_proj.bias").reshape(spec.num_kv_heads, -1) for n in "qkv"]
        peculiar["mixer.qkv.bias"] = torch.cat(biases, dim=1).flatten()
    if mixer + "q_norm.weight" in rest:
        peculiar |= {f"mixer.{n}_norm.weight": take(rest, f"{mixer}{n}_norm.weight") for n in "qk"}
    return {
        **peculiar,
        "norm.weight": norm,
        "mixer.qkv.weight": torch.cat(heads, dim=1).flatten(0, 1),
        "mixer.out_proj.weight": take(rest, mixer + "o_proj.weight"),
    }


def mlp(rest: dict[str, Tensor], prefix: str, spec: ModelSpec) -> dict[str, Tensor]:
    if spec.family == "nemotron_h":
        return {
            "norm.weight": take(rest, prefix + "norm.weight"),
            "mixer.up.weight": take(rest, prefix + "mixer.up_proj.weight"),
            "mixer.down.weight": take(rest, prefix + "mixer.down_proj.weight"),
        }
    norm = take(rest, prefix + "post_attention_layernorm.weight")
    if prefix + "mlp.gate_proj.weight" in rest:
        gate_up = torch.cat([take(rest, f"{prefix}mlp.{n}_proj.weight") for n in ("gate", "up")])
        down = take(rest, prefix + "mlp.down_proj.weight")
    else:
        gate_up = take(rest, prefix + "shared_mlp.input_linear.weight")
        down = take(rest, prefix + "shared_mlp.output_linear.weight")
    return {"norm.weight": norm, "mixer.gate_up.weight": gate_up, "mixer.down.weight": down}


def mamba(rest: dict[str, Tensor], prefix: str, spec: ModelSpec) -> dict[str, Tensor]:
    norm = take(rest, prefix + "input_layernorm.weight", prefix + "norm.weight")
    mixer = prefix + ("mixer." if spec.family == "nemotron_h" else "mamba.")
    inner, state, heads = spec.mamba_inner_size, spec.ssm_groups * spec.ssm_state_size, spec.mamba_num_heads
    z, x, bc, dt = take(rest, mixer + "in_proj.weight").split([inner, inner, 2 * state, heads])
    conv_x, conv_bc = take(rest, mixer + "conv1d.weight").squeeze(1).split([inner, 2 * state])
    bias_x, bias_bc = take(rest, mixer + "conv1d.bias").split([inner, 2 * state])
    return {
        "norm.weight": norm,
        "mixer.in_proj.weight": torch.cat([z, dt, x]),
        "mixer.in_proj_bc.weight": bc,
        "mixer.conv_x.weight": conv_x,
        "mixer.conv_bc.weight": conv_bc,
        "mixer.conv_x.bias": bias_x,
        "mixer.conv_bc.bias": bias_bc,
        "mixer.norm.weight": take(rest, mixer + "norm.weight"),
        "mixer.out_proj.weight": take(rest, mixer + "out_proj.weight"),
        **{f"mixer.{n}": take(rest, mixer + n) for n in ("A_log", "D", "dt_bias")},
    }


MIXERS = {"*": attention, "-": mlp, "M": mamba}


def hf_loss(model: transformers.PreTrainedModel, batches: list[PackedBatch]) -> Tensor:
    """Mean loss over the tokens that count, in nats; each row is one document (`document_mask=false`)."""
    nats, tokens = 0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        nats = nats + (losses * batch.loss_mask.flatten()).sum()
        tokens += batch.num_tokens
    return nats / tokens
