"""Comparing two models' weights beside reading both files: bytes per second, and memory at the peak.

    python benchmarks/analyze.py [--gb 4] [--rounds 3] [--out FILE]

Two made directories of a Llama's shapes, bf16, one a little changed; sides take turns, and what is read is not in the
page cache. Reading is what `launch/analyze.py weights` reads with, as many threads, into buffers that are thrown away.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from prism_mcore.analyze.sources import Weights
from prism_mcore.analyze.weights import READ, compare

HIDDEN, FFN, HEADS, VOCAB = 4096, 14336, 32, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="of each directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = (make(Path(folder) / name, options.gb, changed) for name, changed in (("old", False), ("new", True)))
        with Weights(old) as before, Weights(new) as after:
            sides: dict[str, Callable[[], object]] = {
                "reading": lambda: read(before, after),
                "comparing": lambda: list(compare(before, [after])),
            }
            largest = max(entry.end - entry.start for entry in before.entries.values())
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            cpu: dict[str, list[float]] = {name: [] for name in sides}
            peaks = dict.fromkeys(sides, 0)
            for number in range(options.rounds):
                for name, side in sides.items():
                    forget(old, new)
                    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
                    begun, busy, resident = time.perf_counter(), time.process_time(), psutil.Process().memory_info().rss
                    side()
                    seconds[name].append(time.perf_counter() - begun)
                    cpu[name].append(time.process_time() - busy)
                    peaks[name] = max(peaks[name], high_water() - resident)
                    print(number, name, f"{seconds[name][-1]:.2f} s, {cpu[name][-1]:.2f} s of CPU", flush=True)
            size = before.bytes + after.bytes
    best = {name: min(times) for name, times in seconds.items()}
    result = {
        "gb": size / 1e9,
        "gb_per_s": {name: size / 1e9 / time for name, time in best.items()},
        "comparing_of_reading": best["reading"] / best["comparing"],
        "cpu_s": {name: min(times) for name, times in cpu.items()},
        "largest_tensor_gb": largest / 1e9,
        "peak_gb": {name: peak / 1e9 for name, peak in peaks.items()},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def make(folder: Path, gb: float, changed: bool) -> Path:
    """A directory of so many layers that it has about these bytes."""
    folder.mkdir()
    layers = max(1, round((gb * 1e9 / 2 - 2 * VOCAB * HIDDEN) / (2.5 * HIDDEN**2 + 3 * HIDDEN * FFN)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "head_dim": HIDDEN // HEADS,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    files = {
        f"layer-{i}.safetensors": {f"model.layers.{i}.{name}.weight": s for name, s in shapes.items()}
        for i in range(layers)
    }
    ends = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    files["ends.safetensors"] = ends
    places: dict[str, str] = {}
    pattern = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).bfloat16()
    nudge = 1 + 0.01 * torch.randn(2**22, generator=torch.Generator().manual_seed(1))
    values = (pattern * nudge).bfloat16() if changed else pattern
    for file, tensors in files.items():
        made = {name: tiled(values, shape) for name, shape in tensors.items()}
        save_file(made, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def tiled(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(torch.Size(shape).numel())
    return values.repeat(-(-count // len(values)))[:count].view(shape)


def read(*models: Weights) -> None:
    """Every row of every tensor, with as many threads as `compare` has."""
    parts = [
        (model, name, start, min(start + rows, entry.shape[0]))
        for model in models
        for name, entry in model.entries.items()
        for rows in [max(1, READ // max(1, int(torch.Size(entry.shape[1:]).numel())))]
        for start in range(0, entry.shape[0], rows)
    ]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for _ in pool.map(lambda part: part[0].rows(*part[1:]) is None, parts):
            pass


def forget(*folders: Path) -> None:
    """Out of the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def high_water() -> int:
    """Most resident bytes since the mark was reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
