"""Input pipelines on Grain: from files of records to batches of packed rows of tokens.

    sources → tokenize → mix → [worker processes] → split or truncate → best-fit pack → batch

The order of examples is a pure function of the configuration: sources are shuffled anew in each
epoch, mixed by weight and dealt to processes round robin, so it does not depend on the number of
workers, and an iterator's `get_state` and `set_state` resume it exactly (with the same number of
workers). Everything that could change the order, splitting and packing, happens after the
workers. Where a source has `weights`, which change over time, every source is packed by itself
(with `workers` processes of its own) and rows are mixed, not examples. What a record's tokens are
is the caller's business: see `Tokenize`.

Scripts that use workers need the usual `if __name__ == "__main__":`, because workers are spawned.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grain
import jax
import numpy as np
from absl import flags

from research.core.sources import DataError, Record, SourceConfig, Tokenized, open_source

__all__ = ["DataConfig", "DataError", "SourceConfig", "batches", "from_examples", "pipeline"]

# An example: 'tokens' int32 [n], 'loss_mask' [n], 1 where the token is one to learn to predict. It may
# bring 'segment_ids' [n] (1, 2, … and 0 for padding) and 'labels' float32 [n], if it is not packed, split or truncated.
Example = Mapping[str, np.ndarray]
Tokenize = Callable[[Record], Example]  # deterministic; picklable if there are workers

_BINS = 128  # rows open for packing: leaves 1 to 2 % empty for usual lengths
_MOST_DROPPED = 10_000
_SEQUENTIAL = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class DataConfig:
    """What to read and the shape of batches: `batch_size` rows of `seq_len` tokens."""

    sources: tuple[SourceConfig, ...] = ()
    seq_len: int = 512
    batch_size: int = 8  # rows of the global batch, over all processes
    seed: int = 0
    shuffle: bool = True
    workers: int = 0  # processes that read and tokenize; 0 = in this one
    pack: Literal["best_fit", "none"] = "best_fit"  # none: one example per row
    # What becomes of an example longer than a row: 'split' makes pieces that overlap by one token
    # (each of its tokens but the first is predicted once), which suits documents.
    overlong: Literal["split", "truncate", "drop"] = "split"


def pipeline(config: DataConfig, tokenize: Tokenize, *, endless: bool = True) -> grain.IterDataset:
    """Batches of the configured sources: dicts of int32 [rows, seq_len] per process.

    'tokens'; 'segment_ids', 1, 2, … for the examples of a row and 0 for padding; 'positions' within
    the example; 'loss_mask', which is 0 at each example's first token and at padding. `rows` is
    this process's share of `batch_size`.

    Opening the sources reads them through once and raises DataError or FileNotFoundError for what
    is wrong in them. With `endless` each source repeats for ever, with a new order in each epoch.
    Otherwise it is one pass in the order of the files, with weights ignored and the last batch
    filled up with padding; several processes then read everything and take their rows of each batch.
    """
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one file to read")
    bad = [source.path for source in config.sources if not source.weight > 0]
    if bad:
        raise ValueError(f"the weight of the source {bad[0]!r} must be positive; or remove it")
    _check_schedules(config.sources)
    sources = [Tokenized(open_source(source), tokenize) for source in config.sources]
    return _pipeline(config, sources, endless)


def from_examples(
    config: DataConfig, examples: Sequence[Example], *, endless: bool = True
) -> grain.IterDataset:
    """The pipeline without files: batches of examples in memory, or of a sequence that makes them.

    `examples` needs only `len` and indexing; `config.sources` is not used. With shuffle=False the
    examples are taken in order, over and over.
    """
    if not len(examples):
        raise ValueError("there are no examples to train on")
    return _pipeline(dataclasses.replace(config, sources=()), [examples], endless)


def batches(config: DataConfig, examples: grain.IterDataset, rows: int) -> grain.IterDataset:
    """Fits, packs and batches a stream of examples; endless or not, as the stream is."""
    return _batched(_rows(config, examples, rows), rows)


def _rows(
    config: DataConfig, examples: grain.IterDataset, rows: int, stream: int = 0
) -> grain.IterDataset:
    """A stream of examples → one of rows; `rows` are those of a batch."""
    fitted = grain.experimental.FlatMapIterDataset(examples, _Fit(config.seq_len, config.overlong))
    if config.pack == "none":
        return fitted.map(functools.partial(_pad, seq_len=config.seq_len))
    bins = max(rows, min(_BINS, 2**22 // config.seq_len))
    return grain.experimental.BestFitPackIterDataset(
        fitted,
        length_struct={"tokens": config.seq_len, "loss_mask": config.seq_len},
        num_packing_bins=bins,
        seed=_seeds(config.seed, stream + 1, salt=1)[stream],
        shuffle_bins=config.shuffle,  # else long examples come first
    ).map(_rename)


def _batched(stream: grain.IterDataset, rows: int) -> grain.IterDataset:
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=rows)
    return stream.batch(rows, batch_fn=fill)


def _pipeline(config: DataConfig, sources: Sequence[Any], endless: bool) -> grain.IterDataset:
    if config.seq_len < 2 or config.batch_size < 1 or config.workers < 0:
        raise ValueError("data: seq_len must be at least 2, batch_size 1 and workers 0")
    processes = jax.process_count()
    if config.batch_size % processes:
        raise ValueError(
            f"data.batch_size {config.batch_size} does not divide over {processes} processes"
        )
    share = config.batch_size // processes
    if not endless:
        stream = _stream(config, grain.MapDataset.concatenate(_map_datasets(sources)))
        if processes == 1:
            return batches(config, stream, share)
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return batches(config, stream, config.batch_size).map(
            lambda batch: {name: x[mine] for name, x in batch.items()}
        )
    shuffled = _repeated(config, sources)
    if not any(source.weights for source in config.sources):
        return batches(config, _stream(config, _mixed(config, shuffled), True), share)
    rows = [
        _rows(config, _stream(config, source, True), share, stream)
        for stream, source in enumerate(shuffled)
    ]
    return _batched(_MixedRows(rows, config.sources, processes * config.seq_len), share)


def _map_datasets(sources: Sequence[Any]) -> list[grain.MapDataset]:
    return [grain.MapDataset.source(source) for source in sources]


def _stream(
    config: DataConfig, examples: grain.MapDataset, dealt: bool = False
) -> grain.IterDataset:
    """Examples one after another, made by workers if there are any; `dealt`: this process's own."""
    if dealt:
        examples = examples[jax.process_index() :: jax.process_count()]
    stream = examples.to_iter_dataset(_SEQUENTIAL)
    if not config.workers:
        return stream
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which notebooks do not parse
    return stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=16)
    )


def _repeated(config: DataConfig, sources: Sequence[Any]) -> list[grain.MapDataset]:
    """The sources, each over and over in a new order."""
    parts = _map_datasets(sources)
    if config.shuffle:
        seeds = _seeds(config.seed, len(parts))
        parts = [part.shuffle(seed=seed) for part, seed in zip(parts, seeds, strict=True)]
    return [part.repeat() for part in parts]


def _mixed(config: DataConfig, parts: list[grain.MapDataset]) -> grain.MapDataset:
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [source.weight for source in config.sources])


class _MixedRows(grain.IterDataset):
    """Rows of several endless streams in the shares that the sources' `weights` say."""

    def __init__(
        self, parents: list[grain.IterDataset], sources: Sequence[SourceConfig], row_tokens: int
    ):
        super().__init__(parents)
        self._knots = [_knots(source) for source in sources]
        self._row_tokens = row_tokens

    def __iter__(self) -> "_MixedRowsIterator":
        return _MixedRowsIterator([iter(p) for p in self.parents], self._knots, self._row_tokens)


class _MixedRowsIterator(grain.DatasetIterator):
    """Each row is of the stream that is furthest behind the sum of its shares so far.

    So after any number of rows a stream has given, to within a few rows, the sum of its shares.
    """

    def __init__(
        self,
        parents: list[grain.DatasetIterator],
        knots: list[tuple[np.ndarray, np.ndarray]],
        row_tokens: int,
    ):
        super().__init__(parents)
        self._knots, self._row_tokens = knots, row_tokens
        self._rows = 0
        self._behind = [0.0] * len(knots)

    def __next__(self) -> dict[str, np.ndarray]:
        at = self._rows * self._row_tokens
        weights = [float(np.interp(at, tokens, values)) for tokens, values in self._knots]
        total = sum(weights)
        self._behind = [b + w / total for b, w in zip(self._behind, weights, strict=True)]
        present = [i for i, weight in enumerate(weights) if weight > 0]
        chosen = max(present, key=self._behind.__getitem__)
        self._behind[chosen] -= 1
        self._rows += 1
        return next(self._parents[chosen])

    def get_state(self) -> dict[str, Any]:
        return {
            "parents": [parent.get_state() for parent in self._parents],
            "rows": self._rows,
            "behind": list(self._behind),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, at in zip(self._parents, state["parents"], strict=True):
            parent.set_state(at)
        self._rows, self._behind = state["rows"], list(state["behind"])


def _knots(source: SourceConfig) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, weights) between which a source's weight is interpolated."""
    tokens, weights = zip(*(source.weights or ((0, source.weight),)), strict=True)
    return np.asarray(tokens, np.float64), np.asarray(weights, np.float64)


def _check_schedules(sources: Sequence[SourceConfig]) -> None:
    """Raises ValueError for `weights` that are no shares."""
    knots = [_knots(source) for source in sources]
    for source, (tokens, weights) in zip(sources, knots, strict=True):
        if (np.diff(tokens) <= 0).any() or not (weights >= 0).all():
            raise ValueError(
                f"the weights of the source {source.path!r} must be at increasing numbers of tokens, "
                f"and not negative: {source.weights}"
            )
    for at in np.unique(np.concatenate([tokens for tokens, _ in knots])):
        if not sum(np.interp(at, *pair) for pair in knots) > 0:
            raise ValueError(f"the weights of all sources are 0 when {at:.0f} tokens are seen")


def _seeds(seed: int, count: int, salt: int = 0) -> list[int]:
    """Unrelated seeds: Grain adds the epoch to a shuffle's seed, so neighbours would repeat."""
    words = np.random.SeedSequence([seed % 2**63, salt]).generate_state(count)
    return [int(word) for word in words]


class _Fit(grain.experimental.FlatMapTransform):
    """An example → its pieces of at most `seq_len` tokens, in which there is something to learn."""

    max_fan_out = 2**31

    def __init__(self, seq_len: int, overlong: str):
        self._length, self._overlong = seq_len, overlong
        self._warned = False
        self._dropped = 0

    def flat_map(self, example: Example) -> list[dict[str, np.ndarray]]:
        tokens = np.asarray(example["tokens"], np.int32)
        mask = np.asarray(example["loss_mask"], np.int32)
        if tokens.ndim != 1 or tokens.shape != mask.shape:
            raise DataError(
                f"an example's tokens {tokens.shape} and loss_mask {mask.shape} must be vectors of "
                "one length"
            )
        arrays = {"tokens": tokens, "loss_mask": mask}
        for name, dtype in (("segment_ids", np.int32), ("labels", np.float32)):
            if name in example:
                arrays[name] = np.asarray(example[name], dtype)
        if len(tokens) <= self._length:
            starts = [0]
        elif self._overlong == "split":
            starts = range(0, len(tokens) - 1, self._length - 1)
        else:
            starts = [0] if self._overlong == "truncate" else []
            if not self._warned:
                self._warned = True
                logging.getLogger(__name__).warning(
                    "an example has %d tokens, more than data.seq_len=%d; it and others like it "
                    "are handled by data.overlong=%r",
                    len(tokens), self._length, self._overlong,
                )  # fmt: skip
        pieces = [
            {name: x[i : i + self._length] for name, x in arrays.items()} for i in starts
        ]
        pieces = [piece for piece in pieces if piece["loss_mask"][1:].any()]
        self._dropped = 0 if pieces else self._dropped + 1
        if self._dropped >= _MOST_DROPPED:
            raise DataError(
                f"the last {_MOST_DROPPED} examples had nothing to learn: they were longer than "
                f"data.seq_len={self._length} (data.overlong={self._overlong!r}), shorter than two "
                "tokens or without response"
            )
        return pieces


def _pad(example: Example, seq_len: int) -> dict[str, np.ndarray]:
    length = len(example["tokens"])
    time = np.arange(length, dtype=np.int32)
    segment_ids = example.get("segment_ids", np.ones(length, np.int32))
    begins = np.diff(segment_ids, prepend=0) != 0
    positions = time - np.maximum.accumulate(np.where(begins, time, 0))
    positions[segment_ids == 0] = 0
    row = {
        "tokens": example["tokens"],
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": _predicted(example["loss_mask"], positions),
    }
    if "labels" in example:
        row["labels"] = example["labels"]
    return {name: np.pad(x, (0, seq_len - length)) for name, x in row.items()}


def _rename(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    positions = row["tokens_positions"]
    return {
        "tokens": row["tokens"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": positions,
        "loss_mask": _predicted(row["loss_mask"], positions),
    }


def _predicted(loss_mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.where(positions > 0, loss_mask, 0).astype(np.int32)
