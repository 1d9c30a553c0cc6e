"""Long-context extension: the stages' mixtures and lengths, and a tiny model taken through them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import stages as runner
from experiments.stages import Config, Stage
from research.core import loop, metrics
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints
from research.lm import trainer as lm
from research.lm.config import DecoderConfig
from research.minimax_01 import long_context
from research.minimax_01.recipe import Extension

NAMED = long_context.Sources(
    *(SourceConfig(name, text_key="t") for name in ("short", "medium", "long")),
    SourceConfig("qa", prompt_key="q", response_key="a"),
)


def shares(config, part):
    """Of short, medium, long and question answering, when `part` of a stage is done."""
    total = config.loop.steps * config.data.batch_size * config.data.seq_len
    return [
        np.interp(part * total, *zip(*source.weights, strict=True))
        for source in config.data.sources
    ]


def test_the_paper_s_stages():
    made = long_context.stages(lm.Config(), NAMED, batch_tokens=2**24)
    assert [name for name, _ in made] == ["128k", "512k", "1m"]
    configs = [config for _, config in made]
    assert [c.data.seq_len for c in configs] == [131072, 524288, 1048576]
    assert [c.max_position for c in configs] == [131072, 524288, 1048576]
    assert [c.rope_theta for c in configs] == [5e6, 1e7, 1e7]
    assert {c.data.seq_len * c.data.batch_size for c in configs} == {2**24}
    tokens = [c.loop.steps * 2**24 for c in configs]
    np.testing.assert_allclose(tokens, [300e9, 32e9, 26e9], rtol=1e-3)
    own = [[0.3, 0.7, 0, 0], [0.35, 0.35, 0.3, 0], [0.3, 0.3, 0.4, 0]]
    last = [[0.27, 0.63, 0, 0.1], [0.315, 0.315, 0.27, 0.1], [0.27, 0.27, 0.36, 0.1]]
    before = [[1, 0, 0, 0], *last]
    for i, config in enumerate(configs):
        np.testing.assert_allclose(shares(config, 0.0), before[i], atol=1e-6)
        middle = (np.asarray(before[i]) + own[i]) / 2
        np.testing.assert_allclose(shares(config, 0.05), middle, atol=1e-4)
        for part in (0.1, 0.4, 0.7):
            np.testing.assert_allclose(shares(config, part), own[i], atol=1e-4)
        for part in (0.8, 0.9, 1.0):
            np.testing.assert_allclose(shares(config, part), last[i], atol=1e-4)
        for part in np.linspace(0, 1, 41):
            assert sum(shares(config, part)) == pytest.approx(1)


def test_stages_scale_with_the_context_and_the_budget():
    table = long_context.scaled(512, 358e6)
    assert [stage.length for stage in table] == [512 * 16, 512 * 64, 512 * 128]
    np.testing.assert_allclose([stage.tokens for stage in table], [300e6, 32e6, 26e6])
    assert [stage.rope_theta for stage in table] == [5e6, 1e7, 1e7]


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no row of the stage '512k'"):
        long_context.stages(lm.Config(), NAMED, batch_tokens=2**18)
    with pytest.raises(ValueError, match="transition=0.4"):
        long_context.stages(lm.Config(), NAMED, batch_tokens=2**20, transition=0.4)


TINY = DecoderConfig(
    vocab_size=260, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_size=16, rotary_dim=4, max_position=16, init_std=0.1, scan_layers=False,
)  # fmt: skip
TABLE = (
    Extension("twice", 32, 5e4, 1280, 0.3, 0.7, 0.0),
    Extension("four", 64, 1e5, 1280, 0.35, 0.35, 0.3),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Documents of 9, 30 and 60 bytes, told apart by their letters, and questions in capitals."""
    place = tmp_path_factory.mktemp("documents")
    sources = []
    for name, letter, size in (("short", "s", 9), ("medium", "m", 30), ("long", "l", 60)):
        text = "".join(json.dumps({"t": letter * (size - i % 5)}) + "\n" for i in range(20))
        (place / name).write_text(text)
        sources.append(SourceConfig(str(place / name), text_key="t"))
    questions = [{"q": "Q" * 20, "a": "A" * (1 + i % 6)} for i in range(9)]
    (place / "qa").write_text("".join(json.dumps(x) + "\n" for x in questions))
    sources.append(SourceConfig(str(place / "qa"), prompt_key="q", response_key="a"))
    base = lm.Config(
        mesh="data=1",
        model=TINY,
        tokenizer="byte",
        data=DataConfig((sources[0],), seq_len=16, batch_size=8),
        optim=OptimConfig(lr=3e-3),
        loop=LoopConfig(steps=2, checkpoint_every=5),
    )
    made = long_context.stages(
        base, long_context.Sources(*sources), TABLE, batch_tokens=128, transition=0.2
    )
    return Config((Stage("short", lm=base), *(Stage(name, lm=run) for name, run in made)))


def test_a_tiny_model_goes_through_the_stages_and_a_kill_changes_nothing(
    config, tmp_path, monkeypatch
):
    seen = []  # (length, letters of each row) of every batch
    build = lm.build

    def mortal(run, directory):
        """Dies once, in the last stage."""
        trainer = build(run, directory)

        def collect(state, at):
            if (run.data.seq_len, at) == (64, 5) and len(seen) == 2 + 10 + 5:
                seen.append(None)
                raise KeyboardInterrupt
            batch, values = trainer.collect(state, at)
            rows = [chr(np.bincount(row[row > 0])[:128].argmax()) for row in batch["tokens"]]
            seen.append((batch["tokens"].shape[1], rows))
            return batch, values

        return dataclasses.replace(trainer, collect=collect)

    monkeypatch.setattr(lm, "build", mortal)
    with pytest.raises(KeyboardInterrupt):
        runner.main(config, tmp_path / "run")
    runner.main(config, tmp_path / "run")
    seen.remove(None)
    assert [length for length, _ in seen] == [16] * 2 + [32] * 10 + [64] * 10
    of = lambda length, first, last: [  # noqa: E731
        x for rows in [r for n, r in seen if n == length][first:last] for x in rows
    ]
    assert of(32, 0, 1).count("s") >= 3  # what it was pre-trained on
    assert set(of(32, 2, 6)) == {"s", "m"} and 10 <= of(32, 2, 6).count("m") <= 12  # of 16
    assert "Q" not in of(32, 0, 6) and 0 < of(32, 6, 10).count("Q") <= 2
    assert {"s", "m", "l"} <= set(of(64, 2, 6))
    model, params, _ = checkpoints.load(tmp_path / "run" / "four")
    assert model.config == dataclasses.replace(TINY, rope_theta=1e5, max_position=64)
    assert jax.eval_shape(model.apply, {"params": params}, np.ones((1, 64), int)).shape[1] == 64

    last = runner.resolved(config, tmp_path / "run")["four"]  # once more, without a stop
    state = loop.run(build(last, tmp_path / "again"), last.loop, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, state.params))
    histories = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("run/four", "again")]
    assert [line["loss"] for line in histories[0]] == [line["loss"] for line in histories[1]]
