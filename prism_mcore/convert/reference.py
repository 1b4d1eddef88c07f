"""transformers' own model on a Hugging Face directory, a decoder layer at a time: what ours is compared with.

The model is made without weights. Its forward pass runs as it is written, masks and rotary angles included; hooks fill
a decoder layer with its tensors when its turn comes and take them away afterwards. The embedding's rows are those of
the tokens, and the output layer comes in pieces of the vocabulary.
"""

# b sequences of s tokens, d hidden, v rows of a piece of the vocabulary

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.read import HFTensors, read_directory
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec

VOCABULARY_ROWS = 16384  # of a piece of the output layer
SCAN_CHUNK = 32  # tokens; transformers' scan in plain torch takes memory by its square, and is the same for any
LOGITS, EMBEDDING = "logits", "embedding"


def output_names(spec: ModelSpec) -> list[str]:
    """The residual stream after the embedding and after every sub-layer, then the logits."""
    layers = [f"sub-layer {index} {LAYER_NAMES[kind]}" for index, kind in enumerate(spec.pattern)]
    return [EMBEDDING, *layers, LOGITS]


def decoder_layers(spec: ModelSpec) -> list[list[int]]:
    """The sub-layers of each of transformers' decoder layers."""
    each = 1 if spec.family == "nemotron_h" else 2
    return [list(range(first, first + each)) for first in range(0, len(spec.pattern), each)]


def pieces(spec: ModelSpec) -> list[tuple[int, int]]:
    """Rows [start, stop) of the output layer that are computed at once."""
    starts = range(0, spec.vocab_size, VOCABULARY_ROWS)
    return [(start, min(start + VOCABULARY_ROWS, spec.vocab_size)) for start in starts]


def stream_file(folder: Path, index: int) -> Path:
    """Where `x` [b, s, d] is: the residual stream before sub-layer `index`, or before the final norm."""
    return folder / f"stream_{index:05d}.safetensors"


def logits_file(folder: Path, start: int) -> Path:
    """Where `x` [b, s, v] is: logits of a piece of the vocabulary that begins with token `start`."""
    return folder / f"logits_{start:07d}.safetensors"


@torch.no_grad()
def write_reference(hf: Path, tokens: Tensor, out: Path, on_layer: Callable[[], None] = lambda: None) -> None:
    """The residual stream of tokens [b, s] before every norm, and the logits, as fp32 safetensors files in `out`.

    on_layer is called after each decoder layer. Raises ExchangeError where the directory has not what transformers
    needs.
    """
    source = read_directory(hf)
    spec = source.spec()
    with HFTensors(source) as tensors:
        model = _without_weights(hf, spec)
        weights = _Weights(model, tensors)
        for index, norm in enumerate(_norms(model, spec)):
            norm.register_forward_pre_hook(_keeping(stream_file(out, index)))
        for layer in (*model.model.layers, _norms(model, spec)[-1]):
            layer.register_forward_pre_hook(weights.fill)
            layer.register_forward_hook(weights.drop)
            layer.register_forward_hook(lambda *_: on_layer())
        _give_rotary_angles(model)
        body = model.model(inputs_embeds=weights.embedded(tokens), use_cache=False)
        model.model = _Done(body)  # the head's own forward goes on from there, once for each piece
        for start, stop in pieces(spec):
            model.set_output_embeddings(weights.output_layer(start, stop))
            save_file(
                {"x": model(input_ids=tokens, use_cache=False).logits.float().contiguous()}, logits_file(out, start)
            )


class _Done(nn.Module):
    """A body that has run."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Weights:
    """Which tensor of the directory each parameter of transformers' model is."""

    def __init__(self, model: nn.Module, tensors: HFTensors):
        self.tensors = tensors
        self.entries = {name: entry for _, name, entry in tensors.source.entries()}
        self.modules = {module: name for name, module in model.named_modules()}
        # The body has another name in older files: backbone.layers.0..., or none.
        self.files = {_within_body(name): name for name in self.entries}
        self.embedding = self._file(f"{self.modules[model.get_input_embeddings()]}.weight")
        head = f"{self.modules[model.get_output_embeddings()]}.weight"
        self.head = head if head in self.entries else self.embedding

    def fill(self, module: nn.Module, _: Any) -> None:
        if strange := [name for name, _ in module.named_buffers()]:
            raise ExchangeError(f"transformers' {type(module).__name__} has a buffer {strange[0]}, which no file holds")
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            file = self._file(f"{self.modules[module]}.{name}")
            if self.entries[file].shape != tuple(parameter.shape):
                raise ExchangeError(
                    f"{file} has the shape {list(self.entries[file].shape)}; transformers needs {list(parameter.shape)}"
                )
            parameter.copy_(self._rows(file, 0, parameter.shape[0]))

    def drop(self, module: nn.Module, *_: Any) -> None:
        module.to("meta")

    def embedded(self, tokens: Tensor) -> Tensor:
        """The embedding's rows of tokens [b, s]: [b, s, d] fp32."""
        wanted, places = tokens.unique(return_inverse=True)
        return torch.cat([self._rows(self.embedding, token, token + 1) for token in wanted.tolist()]).float()[places]

    def output_layer(self, start: int, stop: int) -> nn.Linear:
        """Rows [start, stop) of the output layer."""
        layer = nn.Linear(self.entries[self.head].shape[1], stop - start, bias=False, device="meta")
        layer.weight = nn.Parameter(self._rows(self.head, start, stop).float())
        return layer

    def _file(self, parameter: str) -> str:
        file = self.files.get(_within_body(parameter))
        if file is None:
            raise ExchangeError(f"{self.tensors.source.folder} has no {parameter}, which transformers needs")
        return file

    def _rows(self, file: str, start: int, stop: int) -> Tensor:
        entry = self.entries[file]
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.torch_dtype)
        self.tensors.read(file, start, rows)
        return rows


def _within_body(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest if first in ("model", "backbone") else name


def _without_weights(hf: Path, spec: ModelSpec) -> Any:
    """transformers' model for the directory's config.json, in fp32, all of it on the meta device."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    # transformers 5 reads head_dim alone and not Nemotron-H's own attention_head_dim
    config = transformers.AutoConfig.from_pretrained(hf, head_dim=spec.head_dim, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # transformers 5.23 clamps Nemotron-H's time steps at time_step_min, which no file asks for
            module.time_step_limit = spec.dt_limit
        if isinstance(getattr(module, "chunk_size", None), int):
            module.chunk_size = min(module.chunk_size, SCAN_CHUNK)
    return model


def _give_rotary_angles(model: Any) -> None:
    """Rotary embeddings have no weights, but frequencies that their constructor computes."""
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(config=model.config)


def _norms(model: Any, spec: ModelSpec) -> list[nn.Module]:
    """transformers' norms in the order of our sub-layers, then the final one: what goes into one came out before it."""
    body = model.model
    if spec.family == "nemotron_h":
        return [*(layer.norm for layer in body.layers), body.norm_f]
    pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in body.layers)
    return [*(norm for pair in pairs for norm in pair), body.norm]


def _keeping(file: Path) -> Callable[[nn.Module, Any], None]:
    return lambda _, inputs: save_file({"x": inputs[0].float().contiguous()}, file)
