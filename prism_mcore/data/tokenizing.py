"""From documents to token files: a byte-level BPE where none is given, and a parallel, atomic tokenizer."""

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prism_mcore import program
from prism_mcore.data.corpus import Chunk, documents, expand, read_chunks
from prism_mcore.data.order import key_of, shuffled_range
from prism_mcore.data.token_file import TokenFile, TokenFileError, TokenFileWriter, narrowed, prefix_of, token_dtype
from prism_mcore.text import Tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

_CACHED_WORDS = 1 << 17  # of each process: some 15 MB
_COPY_DOCUMENTS = 1 << 14  # documents gathered at once while the shuffled file is written


def train_bpe(
    inputs: Sequence[str | os.PathLike[str]],
    vocab_size: int,
    folder: str | os.PathLike[str],
    *,
    text_key: str = "text",
    single_digits: bool = True,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> int:
    """Train a byte-level BPE on the inputs and save it as an HF tokenizer directory. Returns its size in tokens.

    single_digits: a number is split into its digits, which helps arithmetic. The size is below vocab_size where the
    inputs hold too few different words. `on_bytes` hears the bytes of input used so far.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chunks = _all_chunks(expand(inputs), text_key, on_bytes)
    texts = (document.text for chunk in chunks for document in documents(chunk, text_key))
    tokenizer.train_from_iterator(texts, trainer)
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in [
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("special_tokens_map.json", json.dumps(named, indent=1)),
        ("tokenizer_config.json", json.dumps(config, indent=1)),
    ]:
        _write_text(Path(folder) / name, text)
    return tokenizer.get_vocab_size()


def tokenize_files(
    inputs: Sequence[str | os.PathLike[str]],
    prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    domain: str = "all",
    text_key: str = "text",
    mask_prompts: bool = False,
    seed: int = 0,
    workers: int | None = None,
    resume: bool = False,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the documents of all inputs to PREFIX.bin/.idx, each ended by the end-of-text token, shuffled.

    Empty documents and blank lines are left out and counted; `seed` draws the order. mask_prompts also writes
    PREFIX.mask: 1 for the assistant's words and the end of text after them (and for everything in documents that are no
    chats), else 0. resume: where PREFIX already holds what is asked for, it is left as it is.

    Returns the manifest, which is PREFIX.json: what was asked (`asked` below), the counts, and of the content
    `content_sha256` (of all tokens in their order), `max_token_id` and `max_token_document`, the first document that
    has it. The result depends neither on `workers` (processes; default: as many as are worth it) nor on time. It is
    there whole or not at all. Raises CorpusError for what cannot be read as documents, ValueError where nothing is
    left.
    """
    if tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.source}: names no eos_token, which ends every document")
    paths = expand(inputs)
    dtype = token_dtype(max(tokenizer.size, tokenizer.eos_id + 1))
    asked = {
        "domain": domain,
        "dtype": np.dtype(dtype).name,
        "vocab_size": tokenizer.size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "seed": seed,
        "mask_prompts": mask_prompts,
        "text_key": text_key,
        "inputs": [os.path.basename(path) for path in paths],
        "inputs_sha256": [_file_sha256(path) for path in paths],
    }
    if resume and (done := _already_there(prefix, asked)) is not None:
        return done
    folder = Path(prefix_of(prefix)).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    # In file order first, beside the target (the same disk), then copied in the shuffled order.
    with tempfile.TemporaryDirectory(prefix=".tokenize-", dir=folder) as scratch:
        spool = Path(scratch) / "tokens"
        mask_spool = Path(scratch) / "mask"
        lengths_parts, empty, blank = [np.empty(0, np.int32)], 0, 0
        worker = _Worker(tokenizer.json, tokenizer.eos_id, dtype, text_key, mask_prompts)
        with open(spool, "wb") as tokens_out, open(mask_spool, "wb") as mask_out:
            for part in _in_processes(
                _all_chunks(paths, text_key, on_bytes), worker, workers or _useful_workers(paths)
            ):
                tokens_out.write(part.tokens.data)
                if part.mask is not None:
                    mask_out.write(part.mask.data)
                lengths_parts.append(part.lengths)
                empty, blank = empty + part.empty, blank + part.blank
        lengths = np.concatenate(lengths_parts)
        if not lengths.size:
            left_out = f"{empty} empty ones" + f", {blank} blank lines" * (blank > 0)
            raise ValueError(f"{', '.join(paths)}: no documents ({left_out}); nothing to write to {prefix}")
        with TokenFileWriter(prefix, dtype, with_mask=mask_prompts) as writer:
            content = _copy_shuffled(spool, mask_spool if mask_prompts else None, lengths, seed, writer)
            counts = {"skipped_empty_documents": empty, "skipped_blank_lines": blank}
            writer.manifest = {**asked, **counts, **content}
    return {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), **writer.manifest}


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _already_there(prefix: str | os.PathLike[str], asked: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a whole token file that was made of the same inputs in the same way."""
    try:
        file = TokenFile(prefix)
    except TokenFileError:  # none, or a broken one, which is to be replaced
        return None
    file.close()
    manifest = file.manifest or {}
    same = all(manifest.get(name) == value for name, value in asked.items())
    return manifest if same and file.has_mask == asked["mask_prompts"] else None


@dataclass(frozen=True)
class _Tokenized:
    tokens: np.ndarray  # [t], the file's dtype
    lengths: np.ndarray  # int32 [documents]
    mask: np.ndarray | None  # uint8 [t]
    empty: int  # documents
    blank: int  # lines


class _Worker:
    """What tokenizes a chunk; it is sent to each process once, as text."""

    def __init__(self, tokenizer_json: str, eos_id: int, dtype: type[np.integer], text_key: str, mask_prompts: bool):
        self.tokenizer_json, self.eos_id, self.dtype = tokenizer_json, eos_id, dtype
        self.text_key, self.mask_prompts = text_key, mask_prompts

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is ours
        backend = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        if hasattr(backend.model, "_resize_cache"):  # the default, 10,000 words, is soon full: a quarter of the time
            backend.model._resize_cache(_CACHED_WORDS)
        backend.encode_special_tokens = True  # words like "<|eos|>" inside a text are text, not the end of a document
        return backend

    def tokenize(self, chunk: Chunk) -> _Tokenized:
        found = list(documents(chunk, self.text_key))
        kept = [document for document in found if document.text.strip()]
        # Offsets cost time, and only the mask reads them.
        encode = self.backend.encode_batch if self.mask_prompts else self.backend.encode_batch_fast
        encodings = encode([document.text for document in kept], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        for document in ids:
            document.append(self.eos_id)
        lengths = np.array([len(document) for document in ids], dtype=np.int32)
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum(dtype=np.int64)))
        mask = None
        if self.mask_prompts:
            masks = [
                _answer_mask(encoding.offsets, document.answers, len(document.text))
                for encoding, document in zip(encodings, kept, strict=True)
            ]
            mask = np.concatenate([np.empty(0, np.uint8), *masks])
        return _Tokenized(narrowed(tokens, self.dtype), lengths, mask, len(found) - len(kept), chunk.num_blank)


_worker: _Worker  # of this process


def _start_process(parent: int, worker: _Worker) -> None:
    global _worker
    program.end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    _worker = worker


def _tokenize(chunk: Chunk) -> _Tokenized:
    return _worker.tokenize(chunk)


def _answer_mask(offsets: list[tuple[int, int]], answers: list[tuple[int, int]], text_length: int) -> np.ndarray:
    """1 for tokens that reach into an answer, and for the end of text where the text ends with one: uint8 [tokens +
    1].
    """
    starts, ends = np.array([*offsets, (text_length, text_length)], dtype=np.int64).T
    mask = np.zeros(len(starts), dtype=np.uint8)
    for first, stop in answers:
        mask |= ((ends > first) & (starts < stop)).astype(np.uint8)
    mask[-1] = bool(answers) and answers[-1][1] == text_length
    return mask


def _useful_workers(paths: list[str]) -> int:
    """Processes that are worth starting: each takes half a second to start, and tokenizes about 4 MB in a second."""
    return max(1, min(len(os.sched_getaffinity(0)), sum(map(os.path.getsize, paths)) >> 22))


def _in_processes(chunks: Iterable[Chunk], worker: _Worker, workers: int) -> Iterator[_Tokenized]:
    """Chunks tokenized by `workers` processes, in order, few at a time."""
    if workers == 1:
        yield from map(worker.tokenize, chunks)
        return
    # spawn: a fork of a process with threads (torch's, tokenizers') may hang.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[_Tokenized]] = deque()
    with ProcessPoolExecutor(workers, context, _start_process, (os.getpid(), worker)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_tokenize, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError("a process that tokenizes was killed, perhaps for its memory; use fewer workers") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_shuffled(
    spool: Path, mask_spool: Path | None, lengths: np.ndarray, seed: int, writer: TokenFileWriter
) -> dict[str, Any]:
    """Write the spooled documents in shuffled order. Returns what the manifest says of the content."""
    dtype = writer.dtype
    tokens = np.memmap(spool, dtype=dtype, mode="r") if lengths.size else np.empty(0, dtype)
    mask = np.memmap(mask_spool, dtype=np.uint8, mode="r") if mask_spool and lengths.size else None
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    order = shuffled_range(len(lengths), key_of(seed))
    digest = hashlib.sha256()
    largest, largest_document = -1, -1
    for first in range(0, len(order), _COPY_DOCUMENTS):
        chosen = order[first : first + _COPY_DOCUMENTS]
        slices = [slice(begin, begin + size) for begin, size in zip(starts[chosen], lengths[chosen], strict=True)]
        block = np.concatenate([tokens[part] for part in slices])
        if int(block.max()) > largest:
            largest = int(block.max())
            ends = np.cumsum(lengths[chosen])
            largest_document = first + int(np.searchsorted(ends, int(block.argmax()), side="right"))
        digest.update(block.data)
        chosen_mask = np.concatenate([mask[part] for part in slices]) if mask is not None else None
        writer.add(block, lengths[chosen], chosen_mask)
    return {"max_token_id": largest, "max_token_document": largest_document, "content_sha256": digest.hexdigest()}


def _all_chunks(paths: list[str], text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Chunk]:
    done = 0

    def on_position(position: int) -> None:
        on_bytes(done + position)

    for path in paths:
        yield from read_chunks(path, text_key, on_position)
        done += os.path.getsize(path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
