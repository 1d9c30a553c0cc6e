"""Input pipelines on Grain: from files of records to batches of packed rows of tokens.

    sources → tokenize → mix → [worker processes] → split or truncate → best-fit pack → batch

The order of examples is a pure function of the configuration: sources are shuffled anew in each
epoch, mixed by weight and dealt to processes round robin, so it does not depend on the number of
workers, and an iterator's `get_state` and `set_state` resume it exactly (with the same number of
workers). Everything that could change the order, splitting and packing, happens after the
workers. What a record's tokens are is the caller's business: see `Tokenize`.

Scripts that use workers need the usual `if __name__ == "__main__":`, because workers are spawned.
"""

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

# An example: 'tokens' int32 [n], 'loss_mask' [n], 1 where the token is one to learn to predict.
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
    return _pipeline(config, [examples], endless)


def batches(config: DataConfig, examples: grain.IterDataset, rows: int) -> grain.IterDataset:
    """Fits, packs and batches a stream of examples; endless or not, as the stream is."""
    fitted = grain.experimental.FlatMapIterDataset(examples, _Fit(config.seq_len, config.overlong))
    if config.pack == "none":
        packed = fitted.map(functools.partial(_pad, seq_len=config.seq_len))
    else:
        bins = max(rows, min(_BINS, 2**22 // config.seq_len))
        packed = grain.experimental.BestFitPackIterDataset(
            fitted,
            length_struct={"tokens": config.seq_len, "loss_mask": config.seq_len},
            num_packing_bins=bins,
            seed=_seeds(config.seed, 1, salt=1)[0],
            shuffle_bins=config.shuffle,  # else long examples come first
        ).map(_rename)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=rows)
    return packed.batch(rows, batch_fn=fill)


def _pipeline(config: DataConfig, sources: Sequence[Any], endless: bool) -> grain.IterDataset:
    if config.seq_len < 2 or config.batch_size < 1 or config.workers < 0:
        raise ValueError("data: seq_len must be at least 2, batch_size 1 and workers 0")
    processes = jax.process_count()
    if config.batch_size % processes:
        raise ValueError(
            f"data.batch_size {config.batch_size} does not divide over {processes} processes"
        )
    mixed = _mix(config, sources, endless)
    if endless:
        mixed = mixed[jax.process_index() :: processes]
    stream = mixed.to_iter_dataset(_SEQUENTIAL)
    if config.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags, which notebooks do not parse
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=16)
        )
    share = config.batch_size // processes
    if endless or processes == 1:
        return batches(config, stream, share)
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return batches(config, stream, config.batch_size).map(
        lambda batch: {name: x[mine] for name, x in batch.items()}
    )


def _mix(config: DataConfig, sources: Sequence[Any], endless: bool) -> grain.MapDataset:
    parts = [grain.MapDataset.source(source) for source in sources]
    if not endless:
        return grain.MapDataset.concatenate(parts)
    seeds = _seeds(config.seed, len(parts))
    if config.shuffle:
        parts = [part.shuffle(seed=seed) for part, seed in zip(parts, seeds, strict=True)]
    parts = [part.repeat() for part in parts]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [source.weight for source in config.sources])


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
            {"tokens": tokens[i : i + self._length], "loss_mask": mask[i : i + self._length]}
            for i in starts
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
    pad = (0, seq_len - length)
    return {
        "tokens": np.pad(example["tokens"], pad),
        "segment_ids": np.pad(np.ones(length, np.int32), pad),
        "positions": np.pad(np.arange(length, dtype=np.int32), pad),
        "loss_mask": np.pad(_predicted(example["loss_mask"], np.arange(length)), pad),
    }


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
