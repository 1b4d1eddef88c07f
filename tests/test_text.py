"""Text and tokens: tokenizer.json says what it says whatever lies beside it, and every end token is known."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prism_mcore.text import Tokenizer, check_text, end_tokens, load_tokenizer, read_eos, render_chat

SPECIAL = ["<s>", "</s>", "<pad>"]
TEXT = "Counted 650841823 of (them), isn't it?\n\n  return x_17 = 日本"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def byte_level(post_processor=None) -> tokenizers.Tokenizer:
    """Each byte a token, numbers in groups of three: what GPT-2's own pre-tokenizer would do otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *alphabet, "12", "123", "65", "650"])}
    merges = [("1", "2"), ("12", "3"), ("6", "5"), ("65", "0")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def save(folder, tokenizer=None, **config):
    """A tokenizer directory; a config of None leaves tokenizer_config.json out."""
    folder.mkdir(exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return folder


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
        {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 5},
    ],
)
def test_tokens_are_those_of_tokenizer_json_whatever_lies_beside_it(tmp_path, beside):
    folder = save(tmp_path / "t", **beside)
    (folder / "config.json").write_text(json.dumps({"model_type": "granite"}))
    want = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    ours = load_tokenizer(folder)
    assert ours.encode(TEXT) == want and ours.encode_batch([TEXT, "a"])[0] == want
    assert ours.decode(want) == TEXT


def test_a_tokenizer_that_truncates_and_pads_does_not(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    ours = load_tokenizer(save(tmp_path / "t", tokenizer))
    assert ours.encode("x" * 100) == byte_level().encode("x" * 100).ids


def test_the_beginning_is_added_where_the_file_says_so_and_the_end_never(tmp_path):
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    ours = load_tokenizer(save(tmp_path / "t", byte_level(both)))
    assert ours.encode("a") == [0, *byte_level().encode("a").ids]
    assert ours.eos_id == 1


def test_special_tokens_are_left_out_of_a_text_unless_asked_for(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "<end>": 2, "b": 3}, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<end>"])
    folder = save(tmp_path / "t", tokenizer, eos_token="<eos>", bos_token=None)  # tokenizer.json does not mark <eos>
    ours = load_tokenizer(folder)
    assert ours.decode([1, 2, 3, 0]) == "a b" and ours.decode([1, 2, 3, 0], special=True) == "a <end> b <eos>"
    assert ours.decode([1, 2, 3, 0]) == AutoTokenizer.from_pretrained(folder).decode([1, 2, 3, 0], True)


def test_a_vocabulary_with_gaps_is_measured_by_its_largest_id(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "far": 70_000}, unk_token="</s>"))
    ours = load_tokenizer(save(tmp_path / "t", tokenizer, bos_token=None))
    assert ours.size == 70_001
    with pytest.raises(
        ValueError, match=r"t: the tokenizer has 3 tokens with ids up to 70,000, .* 1,024: .*; use ours"
    ):
        ours.check_fits(1024, "use ours")


def test_a_tokenizer_of_transformers_can_be_given(tmp_path):
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    ours = Tokenizer.of(theirs)
    assert ours.encode(TEXT) == theirs(TEXT).input_ids and ours.eos_id == theirs.eos_token_id
    assert Tokenizer.of(ours) is ours
    with pytest.raises(ValueError, match="a tokenizer is a str; needed"):
        Tokenizer.of("gpt2")


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("place", ["config", "named", "file"])
def test_a_chat_is_rendered_as_transformers_does(tmp_path, place, generation):
    held = {"config": TEMPLATE, "named": [{"name": "default", "template": TEMPLATE}], "file": "overridden"}[place]
    folder = save(tmp_path / "t", chat_template=held)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generation)
    assert text == ours.render(MESSAGES, add_generation_prompt=generation) and text.startswith("<s>[user] 1 + 1?</s>")
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=generation)["input_ids"]
    assert ours.encode_chat(MESSAGES, add_generation_prompt=generation) == list(ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only users') }}", "its chat template: only users"),
        ("{% for %}", "its chat template: "),
        ("{{ 1 / 0 }}", "its chat template: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "its chat template: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "its chat template: "),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error(tmp_path, template, message):
    tokenizer = load_tokenizer(save(tmp_path / "t", chat_template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.render(MESSAGES)


def test_the_papers_chats():
    chat = render_chat([{"role": "system", "content": "Be brief."}, *MESSAGES])
    assert chat.text == "Be brief.\nUser: 1 + 1?\nAssistant: 2"
    assert [chat.text[first:stop] for first, stop in chat.answers] == ["2"]
    for wrong in (
        "hello",
        [{"role": ["user"], "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
    ):
        with pytest.raises(ValueError, match="needs a"):
            render_chat(wrong)


# --- end tokens -------------------------------------------------------------------------------------------------------


def test_generation_config_overrides_config(tmp_path):
    assert read_eos(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert read_eos(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_eos(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_eos(tmp_path) == (7, 8)


def test_a_tokenizer_in_another_folder_does_not_hide_the_models_end_tokens(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path / "t"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": [40, 41]}')
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    assert end_tokens([tmp_path / "t", tmp_path / "model"], tokenizer) == (1, 2, 40, 41)
    assert end_tokens([tmp_path / "t", "random"], tokenizer) == (1,)


def test_an_end_that_only_the_config_names_is_the_tokenizers(tmp_path):
    folder = save(tmp_path / "t", eos_token=None)
    assert load_tokenizer(folder).eos_id is None
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(folder).eos_id == 2
    (folder / "config.json").write_text('{"eos_token_id": [1, 2]}')
    assert load_tokenizer(folder).eos_id is None


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "1"}', "eos_token_id is '1'; needed: a token id"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id is \[1, True\]"),
        ('{"eos_token_id": -1}', "eos_token_id is -1"),
        ('{"eos_token_id": 1.0}', "eos_token_id is 1.0"),
        ('{"eos_token_id": ', "is no JSON"),
        ("[1]", "holds a JSON list; needed: an object"),
        (b"\xff\xfe{", "is no JSON"),
    ],
)
def test_side_files_that_name_no_token_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{name}:? {message}"):
        read_eos(tmp_path)


# --- broken folders ---------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_tokenizer_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="absent: no such tokenizer directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no tokenizer.json .*; give the directory of the model's tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(ValueError, match=r"it has tokenizer.model, which is another format: write tokenizer.json once"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json is no tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "model": {}}', "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is no JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3; needed: the token's text"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|end|>"}',
            r"eos_token is '<\|end\|>', which tokenizer.json does not",
        ),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int; needed: a text"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json holds a JSON list"),
        ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x'"),
    ],
)
def test_a_broken_file_of_a_tokenizer_is_named(tmp_path, name, text, message):
    (save(tmp_path / "t") / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "t")


def test_half_a_character_is_named_with_its_place():
    assert check_text("whole 😀") == "whole 😀"
    with pytest.raises(ValueError, match=r"lone surrogate \\ud83d, at character 9 of 'scraped \\ud83d half an emoji'"):
        check_text("scraped \ud83d half an emoji")
