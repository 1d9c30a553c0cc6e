"""Pipelines: every token once per epoch, deterministic order, exact resume, workers, processes."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from research.core import data
from research.core.data import DataConfig, SourceConfig


def tokenize(record):
    """A record is 'id length': that many tokens, id * 1000 + place. Pairs have two such parts."""
    if "text" in record:
        index, length = map(int, record["text"].split())
        tokens = index * 1000 + np.arange(length, dtype=np.int32)
        return {"tokens": tokens, "loss_mask": np.ones_like(tokens)}
    parts = [tokenize({"text": record[key]})["tokens"] for key in ("prompt", "response")]
    mask = np.repeat([0, 1], [len(part) for part in parts])
    return {"tokens": np.concatenate(parts), "loss_mask": mask}


def documents(path, ids, length=lambda i: 3 + i % 5):
    path.write_text("".join(json.dumps({"text": f"{i} {length(i)}"}) + "\n" for i in ids))
    return SourceConfig(str(path), text_key="text")


def examples_of(batch):
    """The packed examples of a batch as (tokens, loss_mask) tuples; checks segments, positions."""
    found = []
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        assert set(ids) - {0} == set(range(1, ids.max() + 1))
        assert (np.diff(ids[ids > 0]) >= 0).all()
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert batch["positions"][row][here].tolist() == list(range(here.sum()))
            entry = (batch["tokens"][row][here], batch["loss_mask"][row][here])
            found.append(tuple(tuple(x.tolist()) for x in entry))
        for name in ("tokens", "positions", "loss_mask"):
            assert not batch[name][row][ids == 0].any(), name
    return found


def ids_of(batch):
    return [tokens[0] // 1000 for tokens, _ in examples_of(batch)]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("pack", ["best_fit", "none"])
def test_a_pass_holds_every_example_once(tmp_path, pack):
    config = DataConfig((documents(tmp_path / "a", range(1, 48)),), 16, 4, pack=pack)
    batches = list(data.pipeline(config, tokenize, endless=False))
    for batch in batches:  # the last one is filled up
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == dict.fromkeys(
            ("tokens", "segment_ids", "positions", "loss_mask"), ((4, 16), "int32")
        )
    found = [tokens for batch in batches for tokens, _ in examples_of(batch)]
    wanted = [tuple(range(i * 1000, i * 1000 + 3 + i % 5)) for i in range(1, 48)]
    assert sorted(found) == wanted
    masks = [mask for batch in batches for _, mask in examples_of(batch)]
    assert all(mask == (0,) + (1,) * (len(mask) - 1) for mask in masks)
    if pack == "none":
        assert found == wanted  # in the order of the file


def test_packing_leaves_little_empty(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.8, 3000), 5, 256).astype(int)
    examples = [{"tokens": np.ones(n, int), "loss_mask": np.ones(n, int)} for n in lengths]
    batches = data.from_examples(DataConfig((), 256, 8), examples, endless=False)
    used = np.concatenate([batch["segment_ids"] for batch in batches]) > 0
    assert used.sum() == lengths.sum()
    assert used.mean() > 0.97  # the last rows of the pass included


def test_epochs_are_complete_and_differ(tmp_path):
    config = DataConfig((documents(tmp_path / "a", range(1, 24)),), 16, 1, seed=3, pack="none")
    it = iter(data.pipeline(config, tokenize))
    epochs = [[ids_of(batch)[0] for batch in take(it, 23)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(1, 24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = iter(data.pipeline(config, tokenize))
    assert [ids_of(batch)[0] for batch in take(again, 23)] == epochs[0]
    # Grain shuffles epoch e with seed + e: without mixing, seed 4 would begin with epoch 1 of 3.
    other = DataConfig(config.sources, 16, 1, seed=4, pack="none")
    assert [ids_of(batch)[0] for batch in take(iter(data.pipeline(other, tokenize)), 23)] not in (
        epochs
    )
    still = DataConfig(config.sources, 16, 1, shuffle=False, pack="none")
    order = [ids_of(batch)[0] for batch in take(iter(data.pipeline(still, tokenize)), 30)]
    assert order == [*range(1, 24), *range(1, 8)]


def test_mixtures_follow_their_weights_and_each_source_its_epochs(tmp_path):
    a, b = documents(tmp_path / "a", range(1, 11)), documents(tmp_path / "b", range(101, 131))
    sources = (SourceConfig(a.path, text_key="text", weight=3.0), b)
    it = iter(data.pipeline(DataConfig(sources, 16, 1, pack="none"), tokenize))
    ids = [ids_of(batch)[0] for batch in take(it, 120)]
    counts = collections.Counter(ids)
    assert sum(counts[i] for i in range(1, 11)) == 90
    assert all(counts[i] == 9 for i in range(1, 11))  # nine epochs of the one
    assert all(counts[i] == 1 for i in range(101, 131))  # one of the other
    assert len({i > 100 for i in ids[:4]}) == 2  # mixed throughout, not in blocks


def scheduled(tmp_path, **options):
    """Short documents, and long ones that take over between 400 and 1200 tokens (rows 25 and 75)."""
    short, long, late = (
        documents(tmp_path / name, range(first, first + count), length=length)
        for name, first, count, length in (
            ("short", 1, 40, lambda i: 2 + i % 5),
            ("long", 101, 30, lambda i: 9 + i % 8),
            ("late", 201, 5, lambda i: 16),
        )
    )
    sources = (
        dataclasses.replace(short, weights=((400, 3.0), (1200, 0.0))),
        dataclasses.replace(long, weights=((400, 1.0), (1200, 4.0))),
        dataclasses.replace(late, weights=((1200, 0.0), (1360, 1.0))),
    )
    return DataConfig(sources, 16, 4, seed=5, **options)


def test_weights_that_change_are_followed_row_by_row(tmp_path):
    it = iter(data.pipeline(scheduled(tmp_path), tokenize))
    batches = take(it, 30)
    rows = []  # the source of each row; a row's examples are all of one
    for tokens, ids in ((b["tokens"][r], b["segment_ids"][r]) for b in batches for r in range(4)):
        (source,) = set(tokens[ids > 0] // 100_000)
        rows.append(source)
    drawn = np.cumsum(np.equal.outer(np.arange(3), rows), axis=1)

    at = np.arange(120) * 16
    weights = np.stack([
        np.interp(at, [400, 1200], [3, 0]),
        np.interp(at, [400, 1200], [1, 4]),
        np.interp(at, [1200, 1360], [0, 1]),
    ])  # fmt: skip
    wanted = np.cumsum(weights / weights.sum(0), axis=1)
    assert np.abs(drawn - wanted).max() < 1.5
    assert drawn[:, 24].tolist() == [19, 6, 0] and drawn[2, 75] == 0 and drawn[2, -1] > 5
    assert (np.diff(drawn[0, 75:]) == 0).all()  # nothing of a source whose weight is 0
    assert (np.concatenate([b["segment_ids"] for b in batches]) > 0).mean() > 0.8


def test_a_source_whose_weight_is_zero_gives_nothing(tmp_path):
    """Not even the row that it is behind: the second of these is drawn first."""
    weights = (((0, 0.4), (16, 0.0)), ((0, 0.5), (16, 0.9)), ((0, 0.1),))
    sources = tuple(
        dataclasses.replace(
            documents(tmp_path / str(i), range(100 * i + 1, 100 * i + 9)), weights=knots
        )
        for i, knots in enumerate(weights)
    )
    it = iter(data.pipeline(DataConfig(sources, 16, 1), tokenize))
    drawn = [batch["tokens"].max() // 100_000 for batch in take(it, 40)]
    assert [drawn.count(i) for i in range(3)] == [0, 36, 4]


@pytest.mark.parametrize("position", [0, 3, 7, 19, 24])
def test_weights_that_change_resume_exactly(tmp_path, position):
    config = scheduled(tmp_path)
    it = iter(data.pipeline(config, tokenize))
    take(it, position)
    state = json.loads(json.dumps(it.get_state()))
    rest = take(it, 10)
    fresh = iter(data.pipeline(config, tokenize))
    fresh.set_state(state)
    assert_same(take(fresh, 10), rest)
    it.set_state(state)
    assert_same(take(it, 10), rest)


def test_workers_and_batch_sizes_do_not_change_rows_mixed_over_time(tmp_path):
    config = scheduled(tmp_path)
    alone = take(iter(data.pipeline(config, tokenize)), 24)
    single = iter(data.pipeline(dataclasses.replace(config, batch_size=1), tokenize))
    for batch in alone:
        joined = {k: np.concatenate([row[k] for row in rows]) for rows in [take(single, 4)]
                  for k in rows[0]}  # fmt: skip
        assert_same([joined], [batch])
    it = iter(data.pipeline(dataclasses.replace(config, workers=1), tokenize))
    try:
        assert_same(take(it, 3), alone[:3])
        state = json.loads(json.dumps(it.get_state()))
        assert_same(take(it, 3), alone[3:6])
        it.set_state(state)
        assert_same(take(it, 3), alone[3:6])
    finally:
        it.close()


def test_processes_share_rows_mixed_over_time(tmp_path, monkeypatch):
    """Each gives its half of a batch; the shares of both follow the tokens that both have seen."""
    config, batches = scheduled(tmp_path), {}
    for process in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        batches[process] = take(iter(data.pipeline(config, tokenize)), 25)
    ids = [[i for b in batches[p] for i in ids_of(b)] for p in range(2)]
    assert batches[0][0]["tokens"].shape == (2, 16)
    assert ids[0] != ids[1]
    late = [sum(b["tokens"][:, 0].max() > 200_000 for b in batches[p][19:]) for p in range(2)]
    before = [sum(b["tokens"][:, 0].max() > 200_000 for b in batches[p][:19]) for p in range(2)]
    assert min(late) >= 1 and max(before) == 0  # 19 batches are 1216 tokens


def test_sequences_of_one_example_stay_apart():
    example = {
        "tokens": np.asarray([0, 1, 2, 0, 0, 3, 4, 5, 6]),
        "loss_mask": np.asarray([0, 1, 1, 0, 0, 0, 1, 1, 1]),
        "segment_ids": np.asarray([1, 1, 1, 0, 0, 2, 2, 2, 2]),
    }  # fmt: skip
    config = DataConfig((), 12, 1, pack="none", overlong="drop")
    (batch,) = data.from_examples(config, [example], endless=False)
    assert examples_of(batch) == [((0, 1, 2), (0, 1, 1)), ((3, 4, 5, 6), (0, 1, 1, 1))]


@pytest.mark.parametrize("pack", ["best_fit", "none"])
@pytest.mark.parametrize("position", [0, 1, 5, 12, 13, 30])
def test_resume_is_exact_wherever_it_stopped(tmp_path, pack, position):
    """Long documents, splits and the ends of epochs included (an epoch is about 12 batches)."""
    source = documents(tmp_path / "a", range(1, 30), length=lambda i: 2 + 11 * (i % 7))
    config = DataConfig((source,), 24, 4, seed=1, pack=pack)
    it = iter(data.pipeline(config, tokenize))
    take(it, position)
    state = json.loads(json.dumps(it.get_state()))  # as a checkpoint keeps it
    rest = take(it, 15)
    fresh = iter(data.pipeline(config, tokenize))
    fresh.set_state(state)
    assert_same(take(fresh, 15), rest)
    it.set_state(state)  # and on the used iterator
    assert_same(take(it, 15), rest)


def test_workers_do_not_change_the_order_and_resume(tmp_path):
    sources = (
        documents(tmp_path / "a", range(1, 60), length=lambda i: 1 + 7 * (i % 9)),
        documents(tmp_path / "b", range(101, 150)),
    )
    alone = take(iter(data.pipeline(DataConfig(sources, 24, 4), tokenize)), 12)
    config = DataConfig(sources, 24, 4, workers=2)
    it = iter(data.pipeline(config, tokenize))
    try:
        assert_same(take(it, 6), alone[:6])
        state = json.loads(json.dumps(it.get_state()))
        assert_same(take(it, 6), alone[6:])
        it.set_state(state)
        assert_same(take(it, 6), alone[6:])
    finally:
        it.close()


def test_processes_share_the_stream(tmp_path, monkeypatch):
    config = DataConfig((documents(tmp_path / "a", range(1, 41)),), 16, 4, pack="none")

    def ids(process, endless=True, count=10):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        batches = take(iter(data.pipeline(config, tokenize, endless=endless)), count)
        assert all(batch["tokens"].shape == (2, 16) for batch in batches)
        return [i for batch in batches for i in ids_of(batch)]

    first, second = ids(0), ids(1)
    assert sorted(first + second) == list(range(1, 41))  # an epoch: nothing twice, nothing lost
    first, second = ids(0, endless=False), ids(1, endless=False)
    assert first[:4] == [1, 2, 5, 6] and second[:4] == [3, 4, 7, 8]


def lone(length, **options):
    config = DataConfig((), 8, 1, pack="none", **options)
    example = {"tokens": np.arange(length), "loss_mask": np.r_[0, 0, np.ones(length - 2, int)]}
    filler = {"tokens": np.full(3, 99), "loss_mask": np.ones(3, int)}
    batches = data.from_examples(config, [example, filler], endless=False)
    return [e for batch in batches for e in examples_of(batch) if e[0][0] != 99]


def test_long_examples_are_split_truncated_or_dropped():
    pieces = lone(20)
    assert [tokens for tokens, _ in pieces] == [
        tuple(range(8)), tuple(range(7, 15)), tuple(range(14, 20))
    ]  # fmt: skip
    learned = [t for tokens, mask in pieces for t, m in zip(tokens, mask, strict=True) if m]
    assert learned == list(range(2, 20))  # every token once
    assert [tokens for tokens, _ in lone(15)] == [tuple(range(8)), tuple(range(7, 15))]
    assert [tokens for tokens, _ in lone(8)] == [tuple(range(8))]
    assert [tokens for tokens, _ in lone(20, overlong="truncate")] == [tuple(range(8))]
    assert lone(20, overlong="drop") == []


def test_overlong_examples_leave_a_warning_in_the_log(caplog):
    lone(20, overlong="truncate")
    assert "20 tokens" in caplog.text and "data.seq_len=8" in caplog.text


def test_pairs_are_learned_on_the_response_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"p": "1 4", "r": "2 3"}) + "\n")
    source = SourceConfig(str(path), prompt_key="p", response_key="r")
    (batch,) = data.pipeline(DataConfig((source,), 8, 1), tokenize, endless=False)
    assert examples_of(batch) == [((1000, 1001, 1002, 1003, 2000, 2001, 2002),
                                   (0, 0, 0, 0, 1, 1, 1))]  # fmt: skip


def test_data_without_anything_to_learn_is_an_error_not_a_hang():
    example = {"tokens": np.arange(5), "loss_mask": np.zeros(5, int)}
    with pytest.raises(data.DataError, match="nothing to learn"):
        next(iter(data.from_examples(DataConfig((), 8, 1), [example])))


def test_tokenizing_errors_name_the_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1 3"}\n{"text": "many"}\n')
    config = DataConfig((SourceConfig(str(path), text_key="text"),), 8, 1)
    with pytest.raises(data.DataError, match="a.jsonl, line 2: "):
        list(data.pipeline(config, tokenize, endless=False))


def test_mistakes_are_refused_before_anything_is_read(tmp_path):
    good = documents(tmp_path / "a", range(3))
    with pytest.raises(ValueError, match="data.sources is empty"):
        data.pipeline(DataConfig(()), tokenize)
    with pytest.raises(ValueError, match="weight"):
        data.pipeline(DataConfig((SourceConfig(good.path, weight=0.0),)), tokenize)
    for weights, message in (
        (((5, 1.0), (5, 2.0)), "increasing numbers of tokens"),
        (((0, -1.0),), "not negative"),
        (((0, 1.0), (7, 0.0)), "all sources are 0 when 7 tokens"),
    ):
        source = SourceConfig(good.path, text_key="text", weights=weights)
        with pytest.raises(ValueError, match=message):
            data.pipeline(DataConfig((source,)), tokenize)
    with pytest.raises(ValueError, match="seq_len"):
        data.pipeline(DataConfig((good,), seq_len=1), tokenize)
    with pytest.raises(FileNotFoundError):
        data.pipeline(DataConfig((SourceConfig("nowhere", text_key="t"), good)), tokenize)
    with pytest.raises(ValueError, match="no examples"):
        data.from_examples(DataConfig(()), [])
