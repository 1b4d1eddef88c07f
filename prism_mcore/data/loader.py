"""Packed batches for one data-parallel rank, from any step on, with nothing to restore but the step number."""

# b sequences in a micro-batch, s tokens in a sequence, k spans (runs of one document inside one row)

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_mcore.batch import PackedBatch, context_chunks
from prism_mcore.data.history import History
from prism_mcore.data.mixture import Mixture
from prism_mcore.data.packing import BestFit, Concat, Spans, split_documents
from prism_mcore.data.settings import DataSettings, SourceSettings, normalised_shares
from prism_mcore.data.token_file import TokenFile, TokenFileError

PACKINGS: dict[str, type[Concat] | type[BestFit]] = {"concat": Concat, "best_fit": BestFit}

_PLAN_ROWS = (
    64  # rows planned together: their searches share numpy calls; more would map more of a large .idx at the start
)


@dataclass(frozen=True)
class Source:
    """One open token file, split into a training and a validation part."""

    name: str  # data.sources[i].path
    domain: str
    share: float  # of training samples, normalised
    file: TokenFile
    train: Concat | BestFit
    validation: Concat | BestFit | None  # None where data.validation_fraction is 0


class DataLoader:
    """Reads the mixture for one rank.

    Step n consists of samples n * global_batch ... (n + 1) * global_batch - 1 of the run's global order, whatever the
    layout; micro-batch m of rank r holds the `micro_batch` consecutive ones from (m * dp_size + r) * micro_batch of
    them.

    needs_tokens, needs_labels: false on pipeline stages that embed nothing, compute no loss. With both false only the
    .idx files are read. cp_rank, cp_size: a context-parallel rank reads the tokens of its own chunks only, for
    batches as `PackedBatch.shard` makes them. Raises TokenFileError (a ValueError) naming the file where a source is
    damaged, empty, or holds an id >= vocab_size.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        vocab_size: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        needs_tokens: bool = True,
        needs_labels: bool = True,
    ):
        if global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"train.global_batch={global_batch} is not a multiple of micro_batch*dp={micro_batch * dp_size}"
                f"; try {-(-global_batch // (micro_batch * dp_size)) * micro_batch * dp_size}"
            )
        self.settings, self.vocab_size, self.seed = settings, vocab_size, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self._needs_tokens, self._needs_labels = needs_tokens, needs_labels
        self.sources = open_sources(settings, vocab_size)
        self.keys = list(range(len(self.sources)))
        self.mixture = Mixture([source.weight for source in settings.sources])
        self._stage: dict[np.dtype, np.ndarray] = {}

    def new_history(self) -> History:
        """Of a run that starts; reads every .idx and pieces of every .bin."""
        weights = [source.weight for source in self.settings.sources]
        return History.new([s.name for s in self.sources], [s.file.identity for s in self.sources], weights)

    def follow(self, history: History) -> None:
        """Read on from where a history says that each source is."""
        self.mixture, self.keys = history.mixture, [source.key for source in history.sources]

    @property
    def domains(self) -> list[str]:
        """The domain of each source id."""
        return [source.domain for source in self.sources]

    def steps(self, start_step: int = 0) -> Generator[list[PackedBatch], None, None]:
        """This rank's micro-batches of step start_step, start_step + 1, ... without end.

        They are read ahead by a thread; its errors are raised here. Close the iterator (or drop it) to stop the thread.
        """
        steps = self._read_steps(start_step)
        return steps if self.settings.prefetch_steps == 0 else _read_ahead(steps, self.settings.prefetch_steps)

    def validation_batches(self, source: int, max_samples: int | None = None) -> Iterator[PackedBatch]:
        """This rank's micro-batches of the first `max_samples` validation rows of a source, the same at every call.

        sample_ids are row numbers. Every rank gets equally many batches: rows beyond the last are copies of row 0 with
        sample_id -1 and an empty loss mask.
        """
        packing = self.sources[source].validation
        if packing is None:
            raise ValueError("data.validation_fraction is 0: there are no validation rows to read")
        available = packing.num_rows if max_samples is None else min(packing.num_rows, max_samples)
        together = self.micro_batch * self.dp_size
        for first in range(0, available, together):
            rows = np.arange(self.micro_batch) + first + self.dp_rank * self.micro_batch
            rows[rows >= available] = -1
            spans = packing.spans(np.maximum(rows, 0))
            yield self._assemble(spans, np.full(self.micro_batch, source, dtype=np.int32), rows)

    def epochs_after(self, num_samples: int) -> list[float]:
        """How often each source's training part has been read after so many samples of the run."""
        counts = self.mixture.counts(num_samples).tolist()
        return [count / max(1, source.train.num_rows) for count, source in zip(counts, self.sources, strict=True)]

    def report(self, num_samples: int) -> list[str]:
        """One line per source: share, tokens, rows per epoch, fill, and the epochs that `num_samples` samples will
        make.
        """
        return [
            f"{source.name} ({source.domain}): share {source.share:.2%}, {source.train.num_tokens:,} training tokens, "
            f"{source.train.num_rows:,} sequences per epoch, {source.train.fill_rate:.2%} filled, "
            f"{epochs:.2f} epochs, {source.validation.num_tokens if source.validation else 0:,} validation tokens"
            for source, epochs in zip(self.sources, self.epochs_after(num_samples), strict=True)
        ]

    def _read_steps(self, start_step: int) -> Generator[list[PackedBatch], None, None]:
        b = self.micro_batch
        rows_per_step = self.global_batch // self.dp_size
        steps_per_plan = max(1, _PLAN_ROWS // rows_per_step)
        positions = np.arange(self.global_batch).reshape(-1, self.dp_size, b)[:, self.dp_rank].reshape(-1)
        for first_step in range(start_step, 1 << 62, steps_per_plan):
            steps = np.arange(first_step, first_step + steps_per_plan)
            samples = (steps[:, None] * self.global_batch + positions).reshape(-1)
            source_ids, spans = self._plan(samples)
            for first_row in range(0, len(samples), rows_per_step):
                yield [
                    self._assemble(spans.of_rows(row, row + b), source_ids[row : row + b], samples[row : row + b])
                    for row in range(first_row, first_row + rows_per_step, b)
                ]

    def _plan(self, samples: np.ndarray) -> tuple[np.ndarray, Spans]:
        """Samples of the global order [r] -> source id of each, and the spans of all, row i for sample i."""
        source_ids, ordinals = self.mixture.locate(samples)
        parts = []
        for source_id in np.unique(source_ids):
            mine = np.flatnonzero(source_ids == source_id)
            packing = self.sources[source_id].train
            spans = packing.spans(packing.shuffle(ordinals[mine], self.seed, self.keys[source_id]))
            parts.append((mine[spans.row], spans.column, spans.start, spans.length, spans.closed))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return source_ids, Spans(*(column[order] for column in columns))

    def _assemble(self, spans: Spans, source_ids: np.ndarray, sample_ids: np.ndarray) -> PackedBatch:
        b, s = len(source_ids), self.settings.seq_len
        last = np.searchsorted(spans.row, np.arange(1, b + 1)) - 1  # each row's last span
        filled = spans.column[last] + spans.length[last]  # [b] columns in front of the padding
        tokens = labels = loss_mask = None
        if self._needs_tokens or self._needs_labels:
            tokens, labels, loss_mask = map(self._own, self._read(spans, source_ids, sample_ids, last, filled))
        position_ids, seq_idx, cu_seqlens, max_seqlen = (
            _document_bounds(spans, filled, s) if self.settings.document_mask else _row_bounds(b, s)
        )
        rows = None if self.cp_size == 1 else _tensor(self._own(np.arange(b)[:, None].repeat(s, 1)))
        return PackedBatch(
            tokens=_tensor(tokens) if self._needs_tokens and tokens is not None else None,
            labels=_tensor(labels) if self._needs_labels and labels is not None else None,
            loss_mask=_tensor(loss_mask) if self._needs_labels and loss_mask is not None else None,
            position_ids=_tensor(self._own(position_ids)),
            seq_idx=_tensor(self._own(seq_idx)),
            cu_seqlens=_tensor(cu_seqlens),
            max_seqlen=max_seqlen,
            num_tokens=int(np.count_nonzero(loss_mask)) if self._needs_labels and loss_mask is not None else 0,
            source_ids=_tensor(source_ids.astype(np.int32)),
            sample_ids=_tensor(sample_ids.astype(np.int64)),
            row_ids=rows,
        )

    def _own(self, whole: np.ndarray) -> np.ndarray:
        """[b, s], or this context-parallel rank's chunks of it, [2, b * s / 2 cp]."""
        if self.cp_size == 1:
            return whole
        return np.stack([whole.reshape(-1)[chunk.start : chunk.stop] for chunk in self._chunks(whole.size)])

    def _chunks(self, num_tokens: int) -> tuple[range, range]:
        return context_chunks(num_tokens, self.cp_size, self.cp_rank)

    def _read(
        self, spans: Spans, source_ids: np.ndarray, sample_ids: np.ndarray, last: np.ndarray, filled: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens int64, labels int64 and loss mask bool, each [b, s]; other ranks' chunks have anything."""
        b, s = len(source_ids), self.settings.seq_len
        tokens, labels = np.empty((b, s), np.int64), np.empty((b, s), np.int64)
        loss_mask = np.ones((b, s), bool)
        runs = _merged(spans) if self.cp_size == 1 else _clipped(_merged(spans), s, self._chunks(b * s))
        self._read_runs(runs, source_ids, sample_ids, tokens, labels, loss_mask)
        # With isolated documents no label crosses a border; else best_fit still has nothing true to say after a row's
        # last token.
        ends = spans.row * s + spans.column + spans.length - 1
        if self.settings.document_mask:
            loss_mask.reshape(-1)[ends[spans.closed]] = False
        elif self.settings.packing == "best_fit":
            loss_mask.reshape(-1)[ends[last[spans.closed[last]]]] = False
        for row in np.flatnonzero(filled < s):
            tokens[row, filled[row] :] = labels[row, filled[row] :] = 0
            loss_mask[row, filled[row] :] = False
        loss_mask[sample_ids < 0] = False
        return tokens, labels, loss_mask

    def _read_runs(
        self,
        runs: Spans,
        source_ids: np.ndarray,
        sample_ids: np.ndarray,
        tokens: np.ndarray,
        labels: np.ndarray,
        loss_mask: np.ndarray,
    ) -> None:
        """Read each run of consecutive corpus tokens with the token after it, which is the label of its last one."""
        place = zip(runs.row.tolist(), runs.column.tolist(), runs.start.tolist(), runs.length.tolist(), strict=True)
        for row, column, start, length in place:
            source = self.sources[source_ids[row]]
            known = min(length, source.file.num_tokens - start - 1)  # labels: the file's last token has none
            read = self._stage_for(source.file.dtype)[: known + 1]
            source.file.read(start, read)
            if int(read.view(f"u{read.itemsize}").max()) >= self.vocab_size:
                raise self._bad_token(source, int(sample_ids[row]), start, read)
            stop = column + length
            tokens[row, column:stop] = read[:length]
            labels[row, column : column + known] = read[1:]
            labels[row, column + known : stop] = 0
            crosses = column > 0 and not self.settings.document_mask  # the label before is this run's first token
            if crosses:
                labels[row, column - 1] = read[0]
            if source.file.has_mask:
                counts = self._stage_for(np.dtype(np.uint8))[: known + 1]
                source.file.read_mask(start, counts)
                loss_mask[row, column : column + known] = counts[1:]
                if crosses:
                    loss_mask[row, column - 1] = counts[0]

    def _stage_for(self, dtype: np.dtype) -> np.ndarray:
        """A row's worth of reading buffer, reused: it stays in the cache."""
        if dtype not in self._stage:
            self._stage[dtype] = np.empty(self.settings.seq_len + 1, dtype)
        return self._stage[dtype]

    def _bad_token(self, source: Source, sample_id: int, start: int, read: np.ndarray) -> TokenFileError:
        place = int(np.argmax(read.view(f"u{read.itemsize}") >= self.vocab_size))
        document = source.file.documents_until(start + place) - 1
        return TokenFileError(
            f"{source.file.prefix}.bin: token id {int(read[place])} in document {document} (sample "
            f"{sample_id}) is outside the "
            f"vocabulary of {self.vocab_size}; tokenize with the model's own tokenizer"
        )


def open_sources(settings: DataSettings, vocab_size: int) -> list[Source]:
    """Open and check every source of the settings; raises TokenFileError naming the file."""
    shares, _ = normalised_shares(settings.sources)
    sources = [
        _open_source(source, share, settings, vocab_size)
        for source, share in zip(settings.sources, shares, strict=True)
    ]
    first_with: dict[str, str] = {}
    for source in sources:
        tokenizer = (source.file.manifest or {}).get("tokenizer_sha256")
        if tokenizer is not None:
            first_with.setdefault(tokenizer, source.name)
    if len(first_with) > 1:
        raise TokenFileError(
            f"data.sources: {' and '.join(first_with.values())} were made with different tokenizers; "
            "tokenize them with one"
        )
    return sources


def _open_source(source: SourceSettings, share: float, settings: DataSettings, vocab_size: int) -> Source:
    file = TokenFile(source.path)
    manifest = file.manifest or {}
    largest = manifest.get("max_token_id", -1)
    if largest >= vocab_size:
        raise TokenFileError(
            f"{file.prefix}.bin: token id {largest} in document {manifest.get('max_token_document', '?')} is outside"
            f" the vocabulary of {vocab_size}; tokenize with the model's own tokenizer"
        )
    border = split_documents(file, settings.validation_fraction)
    make = PACKINGS[settings.packing]
    train = make(file, 0, border, settings.seq_len)
    if train.num_rows == 0 and share > 0:
        raise TokenFileError(
            f"{file.prefix}.bin: {train.num_tokens} training tokens, fewer than one sequence of "
            f"data.seq_len={settings.seq_len} "
            "and its last label; lower data.seq_len or remove the source"
        )
    validation = None
    if settings.validation_fraction:
        validation = make(file, border, file.num_documents, settings.seq_len)
        if validation.num_rows == 0:
            raise TokenFileError(
                f"{file.prefix}.bin: {validation.num_tokens} validation tokens, fewer than one "
                "sequence of data.seq_len="
                f"{settings.seq_len}; raise data.validation_fraction={settings.validation_fraction} "
                "or lower data.seq_len"
            )
    return Source(source.path, source.domain, share, file, train, validation)


def _merged(spans: Spans) -> Spans:
    """Spans that follow each other in a row and in the file, joined: one read each."""
    same_row = spans.row[1:] == spans.row[:-1]
    joins = same_row & (spans.start[1:] == spans.start[:-1] + spans.length[:-1])
    heads = np.flatnonzero(np.concatenate([[True], ~joins]))
    return Spans(
        spans.row[heads],
        spans.column[heads],
        spans.start[heads],
        np.add.reduceat(spans.length, heads),
        spans.closed[heads],
    )


def _clipped(runs: Spans, s: int, chunks: tuple[range, range]) -> Spans:
    """The parts of runs in chunks of the b * s tokens, and in the token after each, the label of its last one."""
    first, parts = runs.row * s + runs.column, []
    for chunk in chunks:
        begin, end = np.maximum(first, chunk.start), np.minimum(first + runs.length, chunk.stop + 1)
        met = np.flatnonzero(begin < end)
        row, skipped = runs.row[met], (begin - first)[met]
        parts.append((row, runs.column[met] + skipped, runs.start[met] + skipped, (end - begin)[met], runs.closed[met]))
    return Spans(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _document_bounds(spans: Spans, filled: np.ndarray, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """position_ids, seq_idx, cu_seqlens [b*s + 1], max_seqlen with every document (and every padding) for itself."""
    b = len(filled)
    padding = np.flatnonzero(filled < s)
    begins = spans.row * s + spans.column
    if padding.size:
        begins = np.sort(np.concatenate([begins, padding * s + filled[padding]]))
    lengths = np.diff(begins, append=b * s)
    seq_idx = np.repeat(np.arange(len(begins), dtype=np.int32), lengths).reshape(b, s)
    position_ids = np.repeat(begins, lengths)
    np.subtract(np.arange(b * s), position_ids, out=position_ids)
    cu_seqlens = np.full(b * s + 1, b * s, dtype=np.int32)
    cu_seqlens[: len(begins)] = begins
    return position_ids.reshape(b, s), seq_idx, cu_seqlens, int(lengths.max())


def _row_bounds(b: int, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The same where every row is one document."""
    position_ids = np.empty((b, s), np.int64)
    position_ids[:] = np.arange(s)
    seq_idx = np.repeat(np.arange(b, dtype=np.int32), s).reshape(b, s)
    return position_ids, seq_idx, np.arange(0, b * s + 1, s, dtype=np.int32), s


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _read_ahead(steps: Iterable[list[PackedBatch]], depth: int) -> Generator[list[PackedBatch], None, None]:
    """The same steps, made by a thread that stays at most `depth` ahead."""
    ready: queue.Queue[list[PackedBatch] | BaseException] = queue.Queue(maxsize=depth)
    stopping = threading.Event()

    def put(item: list[PackedBatch] | BaseException) -> None:
        while not stopping.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in steps:
                put(step)
                if stopping.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopping.set()
        thread.join()
