"""The language-model trainer: it learns, whatever the packing, the mesh and the interruptions."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips
from research.core import checkpoint, data, loop, mesh, optim, sharding, step
from research.core import config as configs
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.lm import checkpoints, dpo, hf, reward_model, trainer
from research.lm import sharding as decoder_sharding
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.examples import Tokenize
from research.lm.presets import PRESETS
from research.lm.tokenizer import Tokenizer
from research.rl import config as rl_config
from research.rl import trainer as rl

TINY = DecoderConfig(
    vocab_size=260, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
    mlp_size=64, max_position=64, tie_embeddings=True, scan_layers=False, init_std=0.1,
)  # fmt: skip


def make_config(tmp_path, **changes):
    """Pairs 'abc=' → 'abc' over a small alphabet: the answer repeats the question."""
    rng = np.random.default_rng(0)
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    for path, count in ((train, 400), (held_out, 10)):
        words = ["".join(rng.choice(list("abc"), rng.integers(1, 4))) for _ in range(count)]
        path.write_text("".join(json.dumps({"q": w + "=", "a": w}) + "\n" for w in words))
    source = SourceConfig(str(train), prompt_key="q", response_key="a")
    config = trainer.Config(
        mesh="data=2",
        model=TINY,
        tokenizer="byte",
        data=DataConfig((source,), seq_len=24, batch_size=16),
        micro_rows=4,
        eval_sources=(dataclasses.replace(source, path=str(held_out)),),
        optim=OptimConfig(lr=1e-2, weight_decay=0.01),
        loop=LoopConfig(steps=8),
    )
    return dataclasses.replace(config, **changes)


def history(workdir):
    """metrics.jsonl without what depends on the moment."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skip = lambda name: name.startswith("time/") or name == "compiles"  # noqa: E731
    return [{k: v for k, v in line.items() if not skip(k)} for line in lines]


def nll_by_hand(model, params, sequences):
    """(Σ -log p, count) over the learned tokens of unpacked (tokens, learned), in float64."""
    width = max(len(tokens) for tokens, _ in sequences)
    tokens, learned = (
        np.stack([np.pad(x, (0, width - len(x))) for x in parts])
        for parts in zip(*sequences, strict=True)
    )
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
    return -(picked * learned[:, 1:]).sum(), learned[:, 1:].sum()


def test_it_learns_and_reports_what_it_says(tmp_path):
    config = make_config(tmp_path, loop=LoopConfig(steps=60, eval_every=30))
    state = loop.run(trainer.build(config, tmp_path), config.loop, tmp_path, fingerprint_of=config)
    lines = history(tmp_path)
    assert abs(lines[0]["loss"] - np.log(260)) < 1.0  # nothing is known at first
    assert lines[-1]["loss"] < 0.3  # the repeated word is certain, hardly anything else is learned
    assert lines[-1]["eval/loss"] < 0.3 and lines[-1]["eval/loss"] < lines[29]["eval/loss"]
    assert lines[-1]["eval/perplexity"] == pytest.approx(np.exp(lines[-1]["eval/loss"]))
    assert all(0.8 < line["fill"] <= 1 for line in lines)

    # The held-out loss is the mean over learned tokens, each sequence on its own.
    tokenizer, model = Tokenizer.byte(), Decoder(TINY)
    sequences = []
    for line in (tmp_path / "held_out.jsonl").read_text().splitlines():
        record = json.loads(line)
        tokens = np.append(tokenizer.encode(record["q"] + record["a"]), tokenizer.eos_id)
        sequences.append((tokens, np.arange(len(tokens)) >= len(record["q"])))
    total, count = nll_by_hand(model, state.params, sequences)
    assert lines[-1]["eval/tokens"] == count
    assert lines[-1]["eval/loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_run_resumes_exactly(tmp_path):
    """Stopped after step 3, in the middle of a packing group; the files' epoch ends on the way."""
    config = make_config(tmp_path)
    small = dataclasses.replace(config.data, batch_size=8)
    config = dataclasses.replace(config, data=small, micro_rows=0, eval_sources=())
    final = {}
    for name, stops in (("whole", (8,)), ("halves", (3, 8))):
        for steps in stops:
            part = dataclasses.replace(config, loop=LoopConfig(steps=steps))
            workdir = tmp_path / name
            state = loop.run(trainer.build(part, workdir), part.loop, workdir, fingerprint_of=part)
        final[name] = state
    assert history(tmp_path / "halves") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 8
    jax.tree.map(np.testing.assert_array_equal, final["halves"].params, final["whole"].params)
    jax.tree.map(np.testing.assert_array_equal, final["halves"].opt_state, final["whole"].opt_state)


def ramped(tmp_path, **changes):
    """4 rows up to 192 tokens (2 steps), 8 up to 576 (2 more), then 16; the epoch ends on the way."""
    settings = {
        "model": dataclasses.replace(TINY, num_layers=1),
        "optim": OptimConfig("sgd", lr=0.5),
        "batch_ramp": ((0, 4), (192, 8), (576, 16)),
        "micro_rows": 2,
        "eval_sources": (),
        "loop": LoopConfig(steps=6),
    }
    return make_config(tmp_path, **(settings | changes))


def test_a_batch_ramp_takes_every_row_once_and_compiles_once(tmp_path):
    config = ramped(tmp_path)
    loop.run(trainer.build(config, tmp_path), config.loop, tmp_path, fingerprint_of=config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines] == [4, 4, 8, 8, 16, 16]
    assert lines[-1]["compiles"] == lines[0]["compiles"]

    one = trainer.build(config, tmp_path / "one")
    drawn, counts = [], []
    for at in range(5):
        batch, metrics = one.collect(None, at)
        assert (
            batch["tokens"].shape == (16, 24) and (batch["num_micro"] == [1, 1, 2, 2, 4][at]).all()
        )
        held = int(batch["num_micro"][0]) * 2  # rows of each of two devices
        mine = batch["tokens"].reshape(2, 8, 24)
        weights = batch["weights"].reshape(2, 8, 24)
        assert not weights[:, held:].any() and weights[:, :held].sum() == pytest.approx(1)
        drawn.append(mine[:, :held].reshape(-1, 24))
        counts.append(metrics["tokens"])
    single = dataclasses.replace(config.data, batch_size=1)
    straight = iter(data.pipeline(single, Tokenize(Tokenizer.byte())))
    wanted = [next(straight) for _ in range(4 + 4 + 8 + 8 + 16)]
    np.testing.assert_array_equal(
        np.concatenate(drawn), np.concatenate([w["tokens"] for w in wanted])
    )
    assert sum(counts) == sum(w["loss_mask"].sum() for w in wanted)


def test_a_batch_ramp_resumes_exactly(tmp_path):
    """Stopped where batches become larger; they do so once more after that."""
    config = ramped(tmp_path, optim=OptimConfig(lr=1e-2))
    for name, stops in (("whole", (6,)), ("halves", (2, 6))):
        for steps in stops:
            part = dataclasses.replace(config, loop=LoopConfig(steps=steps))
            workdir = tmp_path / name
            loop.run(trainer.build(part, workdir), part.loop, workdir, fingerprint_of=part)
    assert history(tmp_path / "halves") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 6


def test_a_batch_ramp_is_the_same_on_any_number_of_devices(tmp_path):
    losses = {}
    for shape, micro_rows in (("data=1", 4), ("data=2", 0)):
        config = ramped(tmp_path, mesh=shape, micro_rows=micro_rows)
        built = trainer.build(config, tmp_path)
        state, run = built.init(), []
        for at in range(5):
            state, metrics = built.step(state, built.collect(state, at)[0])
            run.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        losses[shape] = run
    a, b = losses.values()
    np.testing.assert_allclose(a, b, rtol=1e-4)


def init(model):
    return jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]


def examples(count=24, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(2, 14))
        mask = (np.arange(length) >= rng.integers(0, length)).astype(np.int32)
        made.append({"tokens": rng.integers(0, 257, length), "loss_mask": mask})
    return made


def test_packed_and_unpacked_have_the_same_loss_and_gradients():
    model = Decoder(dataclasses.replace(TINY, num_layers=1))
    params = init(model)
    loss = lambda p, b: trainer.loss_fn(model, p, b)  # noqa: E731
    gradients = jax.jit(lambda p, b: step.accumulate(loss, p, b, 8))
    results = {}
    for pack in ("best_fit", "none"):
        config = DataConfig((), seq_len=24, batch_size=24, pack=pack)
        (rows,) = data.from_examples(config, examples(), endless=False)
        assert (rows["segment_ids"].max() > 1) == (pack == "best_fit")
        batch, count = trainer.to_batch(rows)
        grads, value, metrics = gradients(params, batch)
        results[pack] = grads, value, metrics["entropy"].compute(), count
    (a, loss_a, entropy_a, count_a), (b, loss_b, entropy_b, count_b) = results.values()
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
    np.testing.assert_allclose(entropy_a, entropy_b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    # And the loss is the mean over all learned tokens, not over rows or sequences.
    total, count = nll_by_hand(model, params, [(e["tokens"], e["loss_mask"]) for e in examples()])
    assert count_a == count_b == count
    np.testing.assert_allclose(loss_a, total / count, rtol=1e-5)


def test_examples_in_memory_take_the_place_of_files(tmp_path):
    config = make_config(tmp_path, tokenizer="", eval_sources=(), loop=LoopConfig(steps=2))
    made = examples()
    built = trainer.build(config, tmp_path, examples=made, eval_examples=made[:5])
    state = loop.run(built, config.loop, tmp_path / "sequence")
    assert history(tmp_path / "sequence")[-1]["eval/tokens"] == sum(
        e["loss_mask"][1:].sum() for e in made[:5]
    )
    batches = data.from_examples(config.data, made)
    again = loop.run(
        trainer.build(config, tmp_path, examples=batches), config.loop, tmp_path / "batches"
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)


def test_given_parameters_are_the_start_and_stay_the_callers(tmp_path):
    config = make_config(tmp_path, eval_sources=(), loop=LoopConfig(steps=1))
    params = init(Decoder(TINY))
    built = trainer.build(config, tmp_path, params=params, examples=examples())
    state = built.init()
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    state, _ = built.step(state, built.collect(state, 0)[0])
    jax.block_until_ready(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_run_starts_from_another_ones_directory(tmp_path):
    config = make_config(tmp_path, eval_sources=(), loop=LoopConfig(steps=2))
    first = tmp_path / "first"
    state = loop.run(trainer.build(config, first), config.loop, first, fingerprint_of=config)
    second = dataclasses.replace(
        config, init_from=str(first), model=None, tokenizer="", dtype="bfloat16"
    )
    built = trainer.build(second, tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, built.init().params, state.params)
    jax.tree.map(np.testing.assert_array_equal, built.init().params, state.params)  # and again
    assert built.collect(None, 0)[1]["tokens"] > 0  # the tokenizer came along
    longer = dataclasses.replace(second, rope_theta=5e4, max_position=512, dtype=None)
    loop.run(trainer.build(longer, tmp_path / "third"), LoopConfig(steps=0), tmp_path / "third")
    described = configs.load(tmp_path / "third" / "model" / "decoder.json", DecoderConfig)
    assert described == dataclasses.replace(TINY, rope_theta=5e4, max_position=512)
    saved = checkpoint.load_params(first)
    jax.tree.map(np.testing.assert_array_equal, saved, jax.tree.map(np.asarray, state.params))
    model, params, _ = checkpoints.load(first, dtype="bfloat16")
    assert model.config.param_dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_published_model_is_trained_in_float32(tmp_path):
    """Most are published in bfloat16, in which the updates of a small learning rate are none."""
    config = make_config(tmp_path, eval_sources=())
    published = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(Decoder(TINY)))
    hf.save(tmp_path / "published", Decoder(TINY), published, tokenizer=Tokenizer.byte())
    assert {x.dtype.name for x in jax.tree.leaves(hf.load(tmp_path / "published")[1])} == {
        "bfloat16"
    }
    start = dataclasses.replace(
        config, init_from=str(tmp_path / "published"), model=None, tokenizer=""
    )
    state = trainer.build(start, tmp_path / "run").init()
    for leaf, before in zip(*map(jax.tree.leaves, (state.params, published)), strict=True):
        assert leaf.dtype == jnp.float32 and (leaf == before).all()


@pytest.mark.parametrize(
    "build, config",
    [
        (trainer.build, trainer.Config(init_from="x")),
        (dpo.build, dpo.Config(init_from="x")),
        (reward_model.build, reward_model.Config(init_from="x")),
        (rl.build, rl_config.Config(init_from="x")),
    ],
    ids=["lm", "dpo", "reward_model", "rl"],
)
def test_every_trainer_loads_float32(tmp_path, monkeypatch, build, config):
    def load(source, step=None, **how):
        raise ValueError(f"asked for {how}")

    monkeypatch.setattr(checkpoints, "load", load)
    with pytest.raises(ValueError, match="asked for {'dtype': 'float32'}"):
        build(config, tmp_path)


def test_a_model_that_is_split_by_rules_runs_without_pallas_kernels():
    """The compiler cannot split these: lowered for a TPU with them, a step of a sharded model is refused."""
    shape = dataclasses.replace(
        TINY, hidden_size=256, head_dim=128, num_layers=1, dtype="bfloat16", max_position=256
    )
    optimizer = optim.make(OptimConfig(), 1)
    kinds = {name: jnp.int32 for name in ("tokens", "positions", "segment_ids")}
    batch = {
        name: jax.ShapeDtypeStruct((4, 256), kind)
        for name, kind in (kinds | {"weights": jnp.float32}).items()
    }

    def lowered(model, grid):
        update = trainer.updater(partial(trainer.loss_fn, model), optimizer, grid, None)
        params = lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]  # noqa: E731
        state = jax.eval_shape(lambda: TrainState.create(params(), optimizer, jax.random.key(0)))
        traced = update._program(state).trace(state, batch)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    model, rows, split = Decoder(shape), mesh.make("data=2"), mesh.make("fsdp=2")
    with chips.target("v5p"):
        assert lowered(trainer.runnable(model, rows), rows) > 0
        assert lowered(trainer.runnable(model, split), split) == 0
        with pytest.raises(NotImplementedError, match="automatically partitioned"):
            lowered(model, split)


def test_a_split_run_says_nothing_of_kernels_to_who_loads_it(tmp_path):
    """Where it goes on, or generates, may be one device."""
    trainer.build(make_config(tmp_path, mesh="fsdp=2", eval_sources=()), tmp_path / "run").init()
    described = configs.load(tmp_path / "run" / "model" / "decoder.json", DecoderConfig)
    assert described.kernels == "auto"


def test_a_run_of_another_config_is_refused_with_its_model_left_as_it_was(tmp_path):
    config = make_config(tmp_path, eval_sources=(), loop=LoopConfig(steps=1))
    loop.run(trainer.build(config, tmp_path), config.loop, tmp_path, fingerprint_of=config)
    described = (tmp_path / "model" / "decoder.json").read_text()
    other = dataclasses.replace(config, model=dataclasses.replace(TINY, num_layers=1))
    with pytest.raises(checkpoint.ConfigMismatch, match="num_layers: 2 != 1"):
        loop.run(trainer.build(other, tmp_path), other.loop, tmp_path, fingerprint_of=other)
    assert (tmp_path / "model" / "decoder.json").read_text() == described


def test_every_mesh_trains_alike(tmp_path):
    """Parameters in shares and heads over devices, against replicas; batches that grow."""
    losses, placed = {}, {}
    for shape in ("data=2", "fsdp=2,model=2"):
        small = dataclasses.replace(TINY, num_layers=1)
        sgd = OptimConfig("sgd", lr=0.5)  # Adam would hide gradients that are too large
        ramp = ((0, 8), (8 * 24, 16))
        config = make_config(tmp_path, mesh=shape, model=small, optim=sgd, batch_ramp=ramp)
        built = trainer.build(config, tmp_path, examples=examples(60), eval_examples=examples(9))
        state, run = built.init(), []
        for t in range(3):
            state, metrics = built.step(state, built.collect(state, t)[0])
            run.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        run.append([built.evaluate(state)["loss"]] * 2)
        losses[shape] = run
        placed[shape] = state.params["layers"]["mlp"]["up"]["kernel"]
    a, b = losses.values()
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert a[2][0] < a[0][0]
    assert placed["data=2"].addressable_shards[0].data.shape == (1, 32, 64)
    assert placed["fsdp=2,model=2"].addressable_shards[0].data.shape == (1, 32 // 2, 64 // 2)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "r1-distill-qwen-1.5b", "qwen3-8b", "llama-3.1-8b"])
def test_the_sharding_table_names_every_large_parameter(name):
    grid = mesh.make("fsdp=4,model=2")
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(Decoder(PRESETS[name]).init, jax.random.key(0), tokens)["params"]
    shardings = sharding.tree_shardings(decoder_sharding.rules(grid), shapes, grid, min_size=1)
    split = jax.tree.map(lambda s, x: s.shard_shape(x.shape) != x.shape, shardings, shapes)
    whole = [
        sharding.path_name(path)
        for path, done in jax.tree_util.tree_leaves_with_path(split)
        if not done
    ]
    assert all(path.endswith("scale") for path in whole)


def test_the_config_survives_the_command_line_and_its_file(tmp_path):
    config = make_config(tmp_path)
    as_dict = configs.to_config_dict(config)
    as_dict.data.seq_len = 12
    as_dict.model.num_layers = 1
    changed = configs.from_config_dict(trainer.Config, as_dict)
    assert changed.data.seq_len == 12 and changed.model.num_layers == 1
    assert configs.from_config_dict(trainer.Config, configs.to_config_dict(config)) == config
    configs.save(tmp_path / "config.json", config)
    assert configs.load(tmp_path / "config.json", trainer.Config) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "no model"),
        ({"init_from": "somewhere"}, "leave `model` out"),
        ({"tokenizer": ""}, "no tokenizer"),
        ({"special_tokens": tuple("αβγδ")}, "tokenizer has 261 tokens, the model only 260"),
        ({"data": DataConfig((), seq_len=128)}, "context of 64"),
        (
            {"data": DataConfig((), seq_len=24, batch_size=12)},
            "multiple of 2 devices x micro_rows=4",
        ),
        (
            {"batch_ramp": ((0, 4), (9, 16))},
            "batch of batch_ramp=4 must be a multiple of 2 devices",
        ),
        ({"batch_ramp": ((0, 4), (9, 16)), "micro_rows": 2, "max_position": 20}, "context of 20"),
        ({"mesh": "data=2,expert=2"}, "mesh axes"),
        ({"mesh": "model=2"}, "'data' or 'fsdp'"),
        ({"data": DataConfig((), seq_len=24, batch_size=16)}, "data.sources is empty"),
    ],
)
def test_mistakes_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer.build(make_config(tmp_path, **changes), tmp_path)


def test_bad_data_stops_a_run_before_it_starts(tmp_path):
    config = make_config(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{'q': 'single quotes are no JSON'}\n")
    with pytest.raises(data.DataError, match="train.jsonl, line 401"):
        trainer.build(config, tmp_path)


def test_held_out_data_of_which_nothing_fits_stops_a_run_before_it_starts(tmp_path):
    config = make_config(tmp_path)
    (source,) = config.eval_sources
    with open(source.path, "w") as file:
        file.write(json.dumps({"q": "a" * 40, "a": "b"}) + "\n")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, overlong="drop"))
    with pytest.raises(ValueError, match="nothing of the held-out data .* fits in data.seq_len=24"):
        trainer.build(config, tmp_path)


def train_a_little(workdir):
    """Unpacked and unshuffled, so that a batch has the same rows for any number of processes."""
    config = trainer.Config(
        mesh="data=4",
        model=dataclasses.replace(TINY, num_layers=1),
        data=DataConfig((), seq_len=14, batch_size=8, pack="none", shuffle=False),
        batch_ramp=((0, 4), (112, 8)),
        optim=OptimConfig("sgd", lr=0.5),
        loop=LoopConfig(steps=4),
    )
    built = trainer.build(config, workdir, examples=examples(), eval_examples=examples(11, 1))
    loop.run(built, config.loop, workdir, fingerprint_of=config)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, in_two_processes):
    in_two_processes(train_a_little, tmp_path / "two")
    train_a_little(tmp_path / "one")
    two, one = history(tmp_path / "two"), history(tmp_path / "one")
    assert len(two) == len(one) == 4 and "eval/loss" in two[-1]
    assert [line["rows"] for line in two] == [4, 4, 8, 8]
    for a, b in zip(two, one, strict=True):
        a.pop("fill"), b.pop("fill")  # of the first process's rows only
        assert a == pytest.approx(b, rel=1e-5)
