"""Samples of another generation are not taken over, however much its model looks like this one."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

from prism_mcore.generate import unfinished
from prism_mcore.generate.requests import Completion
from prism_mcore.generate.settings import GenerateSettings


def test_a_model_that_differs_in_one_number_is_another(tmp_path):
    save_hf("llama-3.1", tmp_path / "hf", dtype=torch.bfloat16)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    out, settings = tmp_path / "out.jsonl", GenerateSettings()
    case = unfinished.case_of(tmp_path / "hf", tmp_path / "prompts.jsonl", settings)
    with unfinished.Writer(out, 0, case) as writer:
        writer.add(1, 0, Completion(1, 0, (5, 6), np.zeros(2, np.float32), "length", None))
    copy = shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    assert len(unfinished.read(out, unfinished.case_of(copy, tmp_path / "prompts.jsonl", settings))) == 1

    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[7] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another model"):
        unfinished.check(out, unfinished.case_of(copy, tmp_path / "prompts.jsonl", settings))
