"""Reward models: their equations, that they learn an order, and that a score depends on its response alone."""

import collections
import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.reinforce_pp import reward_model as reward_model_config
from research.core import config as configs
from research.core import loop
from research.core import mesh as meshes
from research.core.data import DataConfig, DataError, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, reward_scorer, value_head
from research.lm import reward_model as rm
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer

TINY = DecoderConfig(
    vocab_size=260, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
    mlp_size=64, max_position=96, tie_embeddings=True, scan_layers=False, init_std=0.1,
)  # fmt: skip
MODEL = Decoder(TINY)
TOKENIZER = Tokenizer.byte()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def trained(params):
    """A reward model with a head that is not zero, never trained."""
    params = value_head.init(params, 32)
    params["value"] = {"kernel": RNG.normal(size=32).astype(np.float32), "bias": np.float32(0.3)}
    return reward_scorer.RewardModel(MODEL, params, TOKENIZER, "bradley_terry", False)


def write(path, count, seed):
    """Letters are worth their place in the alphabet: the response with the larger mean is chosen; labels are means."""
    rng = np.random.default_rng(seed)
    records = []
    while len(records) < count:
        words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 5))) for _ in range(2)]
        worth = [np.mean([ord(c) - ord("a") for c in word]) / 7 for word in words]
        if worth[0] == worth[1]:
            continue
        bad, good = np.array(words)[np.argsort(worth)].tolist()
        records.append({"q": "?", "good": good, "bad": bad, "one": words[0], "label": worth[0]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def source(path, loss):
    if loss == "bradley_terry":
        return SourceConfig(str(path), prompt_key="q", chosen_key="good", rejected_key="bad")
    return SourceConfig(str(path), prompt_key="q", response_key="one", label_key="label")


def make_config(tmp_path, loss="bradley_terry", **changes):
    train = write(tmp_path / "train.jsonl", 320, 0)
    config = rm.Config(
        mesh="data=2",
        loss=loss,
        data=DataConfig((source(train, loss),), seq_len=8, batch_size=16, pack="none", overlong="drop"),
        micro_rows=4,
        optim=OptimConfig(lr=3e-3),
        loop=LoopConfig(steps=6),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def build(config, workdir, params):
    return rm.build(config, workdir, model=MODEL, params=params, tokenizer=TOKENIZER)


def history(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skip = lambda name: name.startswith("time/") or name == "compiles"  # noqa: E731
    return [{k: v for k, v in line.items() if not skip(k)} for line in lines]


# Equations.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slope(function, x, step=1e-6):
    """Central differences of a sum, in float64."""
    moves = step * np.eye(x.size).reshape(x.size, *x.shape)
    return np.reshape([(function(x + m) - function(x - m)).sum() for m in moves], x.shape) / (
        2 * step
    )


@pytest.mark.parametrize("margin, center", [(0.0, 0.0), (0.7, 0.05)])
def test_the_pair_loss_and_its_gradient_equal_the_equations(margin, center):
    scores = np.random.default_rng(1).normal(0, 3, (6, 2))

    def wanted(s):
        gap = s[:, 0] - s[:, 1] - margin
        return -np.log(sigmoid(gap)) + center * (s[:, 0] + s[:, 1]) ** 2

    given = jnp.asarray(scores, jnp.float32)
    np.testing.assert_allclose(rm.pair_loss(given, margin, center), wanted(scores), rtol=1e-5)
    gradient = jax.grad(lambda s: rm.pair_loss(s, margin, center).sum())(given)
    np.testing.assert_allclose(gradient, slope(wanted, scores), rtol=1e-4, atol=1e-5)
    assert np.isfinite(rm.pair_loss(jnp.asarray([[-1e4, 1e4]]), margin, center)).all()


@pytest.mark.parametrize("loss", ["binary", "regression"])
def test_the_point_losses_and_their_gradients_equal_the_equations(loss):
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(0, 3, 8), rng.random(8)

    def wanted(s):
        if loss == "regression":
            return (s - labels) ** 2
        return -labels * np.log(sigmoid(s)) - (1 - labels) * np.log(1 - sigmoid(s))

    given = jnp.asarray(scores, jnp.float32), jnp.asarray(labels, jnp.float32), loss
    np.testing.assert_allclose(rm.point_loss(*given), wanted(scores), rtol=1e-5)
    gradient = jax.grad(lambda s: rm.point_loss(s, *given[1:]).sum())(given[0])
    np.testing.assert_allclose(gradient, slope(wanted, scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trls():
    torch = pytest.importorskip("torch")
    from trl import RewardTrainer

    scores = np.random.default_rng(5).normal(0, 2, (5, 2)).astype(np.float32)
    margins = torch.full((5,), 0.5)
    logits = torch.tensor(scores.T.reshape(-1, 1))  # chosen ones first
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.1),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics={"eval": collections.defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros(10, 3),
        "attention_mask": torch.ones(10, 3),
        "margin": margins,
    }
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    np.testing.assert_allclose(
        rm.pair_loss(jnp.asarray(scores), 0.5, 0.1).mean(), theirs.item(), rtol=1e-5
    )


def test_calibration_of_known_cases():
    right = np.array([1, 1, 1, 0, 1, 0, 0, 1.0])
    assert rm.calibration_error(np.full(8, 5 / 8), right) == pytest.approx(0)
    assert rm.calibration_error(np.ones(8), right) == pytest.approx(3 / 8)
    # Two bins: 0.9 with 3 of 4 right, 0.6 with 2 of 4.
    assert rm.calibration_error(np.repeat([0.91, 0.61], 4), right) == pytest.approx(
        (0.16 + 0.11) / 2
    )
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 200_000)
    flipped = rng.random(len(margins)) > sigmoid(margins)  # the model is right about its own odds
    scores = np.stack([np.where(flipped, -margins, margins), np.zeros(len(margins))], axis=1)
    report = rm.pair_report(scores)
    assert report["calibration"] < 0.01
    assert report["accuracy"] == pytest.approx(np.mean(scores[:, 0] > 0))
    assert rm.pair_report(3 * scores)["calibration"] > 0.1  # overconfident
    assert rm.pair_report(np.zeros((4, 2)))["accuracy"] == 0.5


def test_reports_of_graded_responses():
    scores, labels = np.array([-2.0, 0.5, 3.0, -0.1]), np.array([0.0, 1.0, 1.0, 1.0])
    report = rm.point_report(scores, labels, "binary")
    assert report["accuracy"] == 0.75
    nll = -np.log(np.where(labels > 0, sigmoid(scores), 1 - sigmoid(scores)))
    assert report["loss"] == pytest.approx(nll.mean())
    assert report["score/mean"] == pytest.approx(sigmoid(scores).mean())
    report = rm.point_report(scores, labels, "regression")
    assert report["loss"] == pytest.approx(np.mean((scores - labels) ** 2))
    assert report["correlation"] == pytest.approx(np.corrcoef(scores, labels)[0, 1])
    assert report["score/std"] == pytest.approx(scores.std())


# Scores.


def test_a_score_is_the_heads_number_at_the_last_token(trained):
    sequences = [RNG.integers(1, 250, n).astype(np.int32) for n in (5, 12, 3)]
    scores = reward_scorer.Scorer(trained, meshes.make("data=1", jax.devices()[:1]), 2)(sequences)
    head, unused = trained.params["value"], jnp.zeros((32, 260))
    full = {"params": {"head": {"kernel": unused}, **trained.params["decoder"]}}
    apply = jax.jit(functools.partial(MODEL.apply, return_hidden=True))
    for sequence, score in zip(sequences, scores, strict=True):
        padded = np.pad(sequence, (0, 12 - len(sequence)), constant_values=7)
        hidden = apply(full, padded[None])[0, len(sequence) - 1]
        assert score == pytest.approx(float(hidden @ head["kernel"] + head["bias"]), abs=1e-5)


def test_a_score_depends_on_its_sequence_alone(trained):
    """Not on what is scored with it, on padding, on rows at a time, or on the number of devices."""
    rng = np.random.default_rng(7)
    sequences = [rng.integers(1, 250, n).astype(np.int32) for n in (4, 30, 9, 64, 1, 17, 96, 33, 8)]
    one = meshes.make("data=1", jax.devices()[:1])
    scorer = reward_scorer.Scorer(trained, one, 1)
    alone = np.concatenate([scorer([sequence]) for sequence in sequences])
    assert np.ptp(alone) > 0.1
    for devices, micro_rows in ((1, 4), (2, 1), (8, 1)):
        grid = meshes.make(f"data={devices}", jax.devices()[:devices])
        together = reward_scorer.Scorer(trained, grid, micro_rows)(sequences)
        np.testing.assert_allclose(together, alone, atol=2e-5)
    np.testing.assert_allclose(scorer(sequences[::-1])[::-1], alone, atol=2e-5)
    odd = scorer([sequences[0], np.zeros(0, np.int32), np.ones(97, np.int32)])
    assert odd[0] == pytest.approx(alone[0], abs=2e-5) and np.isnan(odd[1:]).all()
    assert np.isnan(scorer([np.zeros(0, np.int32)])).all()


def test_a_binary_model_scores_the_probability(trained):
    one = meshes.make("data=1", jax.devices()[:1])
    sequences = [np.arange(1, 6, dtype=np.int32)]
    plain = reward_scorer.Scorer(trained, one, 1)(sequences)
    binary = reward_scorer.Scorer(trained._replace(loss="binary"), one, 1)(sequences)
    np.testing.assert_allclose(binary, sigmoid(plain), rtol=1e-5)


# Training.


def test_it_learns_an_order_and_comes_back_from_its_directory(tmp_path, params):
    held_out = source(
        write(tmp_path / "held_out.jsonl", 51, 1), "bradley_terry"
    )  # not a multiple of the batch
    config = make_config(
        tmp_path, eval_sources=(held_out,), loop=LoopConfig(steps=120), center=0.01
    )
    run = tmp_path / "run"
    built = build(config, run, params)
    before = built.evaluate(built.init())
    assert before["accuracy"] == 0.5 and before["loss"] == pytest.approx(np.log(2))
    loop.run(built, config.loop, run, fingerprint_of=config)
    last = history(run)[-1]
    assert last["eval/pairs"] == 51
    assert last["eval/accuracy"] > 0.9 and last["eval/loss"] < 0.4 and last["accuracy"] > 0.9

    loaded = reward_scorer.load(run)
    assert loaded.loss == "bradley_terry" and loaded.model.config == TINY
    text = lambda t: np.concatenate([TOKENIZER.encode("?" + t), [TOKENIZER.eos_id]])  # noqa: E731
    tokens = [text(word) for word in ("a", "bb", "ch", "hhhh")]
    scorer = reward_scorer.Scorer(loaded, meshes.make("data=2"), 2)
    scores = scorer(tokens)
    assert list(np.argsort(scores)) == [0, 1, 2, 3]
    # Held-out figures again, from the texts and the loaded model.
    records = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    pairs = np.stack([scorer([text(r[k]) for r in records]) for k in ("good", "bad")], axis=1)
    for name, value in rm.pair_report(pairs).items():
        assert last[f"eval/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    with pytest.raises(ValueError, match="is a reward model, which predicts no tokens"):
        checkpoints.load(run)
    with pytest.raises(ValueError, match="holds no reward model"):
        reward_scorer.load(tmp_path)

    # It goes on from where it was.
    again = rm.build(dataclasses.replace(config, init_from=str(run)), tmp_path / "y").init()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), loaded.params)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["binary", "regression"])
def test_it_learns_labels(tmp_path, params, loss):
    held_out = source(write(tmp_path / "held_out.jsonl", 40, 1), loss)
    config = make_config(tmp_path, loss, eval_sources=(held_out,), loop=LoopConfig(steps=60))
    built = build(config, tmp_path / "x", params)
    before = built.evaluate(built.init())
    loop.run(build(config, tmp_path, params), config.loop, tmp_path, fingerprint_of=config)
    last = history(tmp_path)[-1]
    assert last["eval/responses"] == 40
    if loss == "binary":
        assert before["loss"] == pytest.approx(np.log(2)) and last["eval/loss"] < 0.66
        assert last["eval/accuracy"] > 0.75
    else:
        assert last["eval/correlation"] > 0.8 and last["eval/loss"] < before["loss"] / 4


def test_an_interrupted_run_goes_on_exactly(tmp_path, params):
    config = make_config(tmp_path, loop=LoopConfig(steps=4))
    loop.run(
        build(config, tmp_path / "whole", params),
        config.loop,
        tmp_path / "whole",
        fingerprint_of=config,
    )
    for steps in (2, 4):
        part = dataclasses.replace(config, loop=LoopConfig(steps=steps))
        workdir = tmp_path / "halves"
        loop.run(build(part, workdir, params), part.loop, workdir, fingerprint_of=part)
    assert history(tmp_path / "halves") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 4


SPLITS = (("data=1", 0), ("data=2", 4), ("data=8", 1), ("fsdp=2", 2))


@pytest.mark.parametrize(
    "loss, splits",
    [
        ("bradley_terry", SPLITS[:2]),
        pytest.param("bradley_terry", SPLITS, marks=pytest.mark.slow),
        pytest.param("binary", SPLITS[:3], marks=pytest.mark.slow),
    ],
)
def test_every_mesh_and_every_split_trains_alike(tmp_path, params, loss, splits):
    runs = []
    for mesh, micro_rows in splits:
        config = make_config(
            tmp_path, loss, mesh=mesh, micro_rows=micro_rows, optim=OptimConfig("sgd", lr=1.0)
        )
        built = build(config, tmp_path, params)
        state, run = built.init(), []
        for at in range(2):
            state, metrics = built.step(state, built.collect(state, at)[0])
            run.append(
                [
                    float(metrics["loss"]),
                    float(metrics["grad_norm"]),
                    float(metrics["accuracy"].compute()),
                ]
            )
        runs.append(run)
    assert runs[0][1][0] < runs[0][0][0]
    for run in runs[1:]:
        np.testing.assert_allclose(runs[0], run, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"margin": -1.0}, "margin=-1.0"),
        (
            {
                "loss": "binary",
                "eval_sources": (SourceConfig("a.jsonl", prompt_key="q", response_key="r"),),
            },
            "'a.jsonl' is not what loss=binary learns from: set prompt_key, response_key and label_key",
        ),
        ({"loss": "binary", "center": 0.1}, "those of bradley_terry"),
        ({"data": DataConfig()}, "data.pack='none' and data.overlong='drop'"),
        ({"max_position": 4}, "context of 4"),
        ({"micro_rows": 3}, "multiple of 2 devices x micro_rows=3"),
    ],
)
def test_mistakes_are_refused_before_training(tmp_path, params, changes, message):
    with pytest.raises(ValueError, match=message):
        build(make_config(tmp_path, **changes), tmp_path, params)


@pytest.mark.parametrize(
    "label, message", [(1.5, "not within 0 to 1"), ("good", "not a finite number")]
)
def test_labels_that_are_none_are_named(tmp_path, params, label, message):
    config = make_config(tmp_path, "binary")
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"q": "?", "one": "a", "label": label}) + "\n")
    data = dataclasses.replace(config.data, sources=(source(path, "binary"),))
    with pytest.raises(DataError, match=message) as caught:
        built = build(dataclasses.replace(config, data=data), tmp_path, params)
        built.collect(None, 0)
    assert "odd.jsonl, line 1" in str(caught.value)


def test_the_config_survives_its_file(tmp_path):
    config = make_config(tmp_path)
    configs.save(tmp_path / "config.json", config)
    assert configs.load(tmp_path / "config.json", rm.Config) == config


def test_the_config_file_has_its_variants():
    for loss in ("", "binary", "regression"):
        config = configs.from_config_dict(rm.Config, reward_model_config.get_config(loss))
        assert config.loss == (loss or "bradley_terry") and config.eval_sources
    with pytest.raises(ValueError, match="no variant 'huge'"):
        reward_model_config.get_config("huge")
