"""A tokenizer and prompt files for the tiny models: `from tiny.prompt_files import write_prompts`."""

import json
from pathlib import Path

# As many words as the tiny models of models.py have tokens.
VOCABULARY = ["<eos>", "<unk>", "User:", "Assistant:", *(f"({c})" for c in "ABCDEFGHIJ"), *(f"w{i}" for i in range(47))]


def write_prompts(folder: Path) -> Path:
    """Into the folder: a tokenizer of 61 words, some of them choices, and prompts.jsonl and held-out.jsonl."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    for name, count in (("prompts", 7), ("held-out", 4)):
        lines = [
            {"prompt": f"w{i} w{i + 9} w{3 * i}", "answer": "ABCDEFGHIJ"[i % 2], "reward": "choice"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
