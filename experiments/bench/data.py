"""What feeds training beside its public rivals: tokenising, packing, and the way from a JSONL file to packed rows.

    python -m experiments.bench.data [--rounds=5] [--json=data.json]

Texts are made up of words with Zipf's frequencies. Both sides read the same tokenizer.json (a byte-level BPE) and use
the same library, so there the goal is to lose nothing to it. Packing is best-fit decreasing of a whole corpus against
TRL's `pack_dataset(strategy="bfd")`, kept in memory; ours also lays out segment ids and positions. The pipeline is one
pass over a file: read, tokenise, pack, batch; the rival is `datasets` with a fast tokenizer and `pack_dataset`, each in
batches and without files between the stages.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from experiments.bench import measure
from research.core import data
from research.core.sources import SourceConfig
from research.lm.examples import Tokenize
from research.lm.packing import pack_sequences
from research.lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Setting:
    """documents of words_each words (geometric mean length), in rows of row_length tokens."""

    documents: int = 8000
    words_each: int = 120
    vocab_size: int = 4096
    row_length: int = 2048
    batch_rows: int = 8


def rows(setting: Setting = Setting(), rounds: int = 5) -> list[measure.Row]:
    documents = texts(setting)
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        tokenizer = Tokenizer.train_bpe(documents[:1000], setting.vocab_size)
        tokenizer.save(directory / "tokenizer")
        path = directory / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return [
            tokenising(documents, tokenizer, directory / "tokenizer", rounds),
            packing(tokenizer.encode_batch(documents), setting.row_length, rounds),
            pipeline(path, tokenizer, directory, setting, rounds),
        ]


def texts(setting: Setting) -> list[str]:
    """The corpus: made-up words, the commoner the shorter, with punctuation."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    chances = 1 / np.arange(1, len(letters) + 1)
    words = [
        "".join(
            rng.choice(
                letters, 2 + i.bit_length() // 2 + rng.integers(3), p=chances / chances.sum()
            )
        )
        for i in range(5000)
    ]
    often = 1 / np.arange(1, len(words) + 1)
    lengths = np.clip(rng.lognormal(np.log(setting.words_each), 0.6, setting.documents), 4, 400)
    return [
        " ".join(words[i] for i in rng.choice(len(words), int(n), p=often / often.sum())).capitalize() + "."
        for n in lengths
    ]  # fmt: skip


def tokenising(
    documents: list[str], tokenizer: Tokenizer, directory: pathlib.Path, rounds: int
) -> measure.Row:
    rival_name, theirs = measure.missing("transformers"), None
    done: dict[str, Any] = {}
    if not rival_name:
        import transformers

        fast = transformers.AutoTokenizer.from_pretrained(directory)
        rival_name = f"transformers {transformers.__version__}"

        def theirs():
            done["theirs"] = fast(documents, add_special_tokens=False)["input_ids"]

    def ours():
        done["ours"] = tokenizer.encode_batch(documents)

    seconds, rival = measure.alternate([ours, theirs], rounds)
    work = {side: _tokens(ids) for side, ids in done.items()}
    return measure.row(
        f"tokenising {len(documents):,} texts",
        seconds,
        rival,
        our_work=work["ours"],
        rival_work=work.get("theirs"),
        rival_name=rival_name,
        amount=work["ours"]["tokens"],
        unit="tok/s",
        goal=0.9,
        bound="both spend the time in the same tokenizers library",
    )


def packing(sequences: list[np.ndarray], row_length: int, rounds: int) -> measure.Row:
    rival_name, theirs = measure.missing("trl", "datasets"), None
    done: dict[str, measure.Work] = {}
    if not rival_name:
        import datasets
        import trl

        rival_name = f"TRL {trl.__version__}"
        datasets.disable_progress_bars()
        datasets.disable_caching()  # else only the first round would pack
        table = datasets.Dataset.from_dict({"input_ids": [ids.tolist() for ids in sequences]})

        def theirs():
            packed = trl.pack_dataset(
                table,
                row_length,
                strategy="bfd",
                map_kwargs={"batch_size": len(sequences), "keep_in_memory": True},
            )
            done["theirs"] = packed

    examples = [{"tokens": ids} for ids in sequences]

    def ours():
        done["ours"] = pack_sequences(examples, row_length)

    seconds, rival = measure.alternate([ours, theirs], rounds)
    work = {"ours": _packed(done["ours"]["segment_ids"])}
    if theirs:
        work["theirs"] = _packed_lists(done["theirs"])
    return measure.row(
        f"packing {len(sequences):,} sequences",
        seconds,
        rival,
        our_work=work["ours"],
        rival_work=work.get("theirs"),
        rival_name=rival_name,
        amount=work["ours"]["tokens"],
        unit="tok/s",
        goal=1.0,
        bound="one Python loop over the sequences",
    )


def pipeline(
    path: pathlib.Path, tokenizer: Tokenizer, directory: pathlib.Path, setting: Setting, rounds: int
) -> measure.Row:
    config = data.DataConfig(
        sources=(SourceConfig(path=str(path), format="jsonl", text_key="text"),),
        seq_len=setting.row_length,
        batch_size=setting.batch_rows,
        shuffle=False,
    )
    done: dict[str, measure.Work] = {}

    def ours():
        batches = data.pipeline(config, Tokenize(tokenizer), endless=False)
        tokens = sequences = 0
        for batch in batches:
            tokens += int((batch["segment_ids"] > 0).sum())
            sequences += int(batch["segment_ids"].max(axis=1).sum())
        done["ours"] = {"sequences": sequences, "tokens": tokens}

    rival_name, theirs = measure.missing("trl", "datasets", "transformers"), None
    if not rival_name:
        import datasets
        import transformers
        import trl

        rival_name = f"datasets {datasets.__version__}, TRL {trl.__version__}"
        fast = transformers.AutoTokenizer.from_pretrained(directory / "tokenizer")
        kept = {"keep_in_memory": True}

        def tokenize(batch):
            ids = fast(batch["text"], add_special_tokens=False)["input_ids"]
            return {"input_ids": [row + [fast.eos_token_id] for row in ids]}

        def theirs():
            with tempfile.TemporaryDirectory() as cache:
                table = datasets.load_dataset(
                    "json", data_files=str(path), split="train", cache_dir=cache, **kept
                )
                table = table.map(tokenize, batched=True, remove_columns=["text"], **kept)
                packed = trl.pack_dataset(table, setting.row_length, map_kwargs=kept)
                tokens = sequences = 0
                for batch in packed.iter(setting.batch_rows):
                    tokens += sum(map(len, batch["input_ids"]))
                    sequences += sum(map(len, batch["seq_lengths"]))
            done["theirs"] = {"sequences": sequences, "tokens": tokens}

    seconds, rival = measure.alternate([ours, theirs], rounds)
    return measure.row(
        "JSONL file to packed rows",
        seconds,
        rival,
        our_work=done["ours"],
        rival_work=done.get("theirs"),
        rival_name=rival_name,
        amount=done["ours"]["tokens"],
        unit="tok/s",
        goal=1.0,
        bound="texts are tokenised one at a time, on one core (data.workers adds more)",
    )


def _tokens(sequences) -> measure.Work:
    flat = np.concatenate([np.asarray(ids, np.int32) for ids in sequences])
    digest = hashlib.sha256(flat.tobytes()).hexdigest()[:12]
    return {"sequences": len(sequences), "tokens": len(flat), "ids": digest}


def _packed(segment_ids: np.ndarray) -> measure.Work:
    return {
        "rows": len(segment_ids),
        "sequences": int(segment_ids.max(axis=1).sum()),
        "tokens": int((segment_ids > 0).sum()),
    }


def _packed_lists(packed) -> measure.Work:
    return {
        "rows": len(packed),
        "sequences": sum(map(len, packed["seq_lengths"])),
        "tokens": sum(map(len, packed["input_ids"])),
    }


def main() -> None:
    measure.command(rows, __doc__)


if __name__ == "__main__":
    main()
