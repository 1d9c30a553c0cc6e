"""Direct preference optimisation: its equations, that it learns, and that nothing else changes it."""

import collections
import contextlib
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import config as configs
from research.core import loop
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, dpo
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer

TINY = DecoderConfig(
    vocab_size=260, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
    mlp_size=64, max_position=32, tie_embeddings=True, scan_layers=False, init_std=0.1,
)  # fmt: skip
MODEL = Decoder(TINY)
TOKENIZER = Tokenizer.byte()


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]


def write(path, count, seed):
    """Of two different words, the one in capitals is the better answer, whichever is the longer."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        word, other = ("".join(rng.choice(list("abcd"), rng.integers(1, 5))) for _ in range(2))
        records.append({"q": word + "=", "good": word.upper(), "bad": other})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceConfig(str(path), prompt_key="q", chosen_key="good", rejected_key="bad")


def make_config(tmp_path, **changes):
    config = dpo.Config(
        mesh="data=2",
        data=DataConfig(
            (write(tmp_path / "train.jsonl", 100, 0),), seq_len=12, batch_size=16, pack="none",
            overlong="drop",
        ),
        beta=0.2,
        micro_rows=4,
        optim=OptimConfig(lr=3e-3),
        loop=LoopConfig(steps=6),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def build(config, workdir, params):
    return dpo.build(config, workdir, model=MODEL, params=params, tokenizer=TOKENIZER)


def history(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skip = lambda name: name.startswith("time/") or name == "compiles"  # noqa: E731
    return [{k: v for k, v in line.items() if not skip(k)} for line in lines]


def random_logprobs(seed=0, rows=7):
    return -np.random.default_rng(seed).gamma(4.0, 5.0, size=(2, rows, 2))


def test_the_loss_and_its_gradient_equal_the_equations():
    policy, reference = random_logprobs()
    losses = jax.jit(dpo.preference_loss)
    gradients = jax.grad(lambda *given: dpo.preference_loss(*given)[0].sum())
    for beta, noise in ((0.1, 0.0), (0.5, 0.2)):
        margin = beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
        right = 1 / (1 + np.exp(-margin))  # σ(m)
        wanted = -(1 - noise) * np.log(right) - noise * np.log1p(-right)
        given = jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32), beta, noise
        loss, rewards = losses(*given)
        np.testing.assert_allclose(loss, wanted, rtol=2e-5)
        np.testing.assert_allclose(rewards, beta * (policy - reference), rtol=1e-5, atol=1e-6)
        slope = beta * (noise * right - (1 - noise) * (1 - right))
        np.testing.assert_allclose(
            gradients(*given), np.stack([slope, -slope], -1), rtol=1e-4, atol=1e-6
        )
    far = jnp.asarray([[0.0, -1e4], [-1e4, 0.0]])
    assert np.isfinite(dpo.preference_loss(far, jnp.zeros((2, 2)), 0.5)[0]).all()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_trls(monkeypatch):
    torch = pytest.importorskip("torch")
    from trl.trainer import dpo_trainer

    policy, reference = random_logprobs(1, 5)
    tokens, mask = torch.zeros((10, 2), dtype=torch.long), torch.ones((10, 2), dtype=torch.long)

    def scored(values):  # chosen ones first, then rejected ones; the whole in a sequence's one token
        logprobs = torch.tensor(values.T.reshape(-1, 1), requires_grad=True)
        other = {"entropy": logprobs * 0, "mean_logits": logprobs * 0, "is_top1": logprobs > 0}
        return SimpleNamespace(log_probs=logprobs, **{k: v.detach() for k, v in other.items()})

    outputs = scored(policy)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), ref_model=lambda **_: scored(reference),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, beta=0.3,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        use_weighting=False, label_smoothing=0.0, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    monkeypatch.setattr(
        dpo_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()
    )
    inputs = {"input_ids": tokens, "completion_mask": mask, "attention_mask": mask}
    theirs = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    theirs.backward()
    loss = lambda p: dpo.preference_loss(p, reference, 0.3)[0].mean()  # noqa: E731
    (margin,) = trainer._metrics["train"]["rewards/margins"]
    rewards = dpo.preference_loss(policy, reference, 0.3)[1]
    assert margin == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).mean()), rel=1e-5)
    ours, gradient = jax.value_and_grad(loss)(jnp.asarray(policy, jnp.float32))
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(
        gradient, outputs.log_probs.grad.numpy().reshape(2, -1).T, rtol=1e-4, atol=1e-7
    )


def test_responses_are_scored_each_on_its_own(tmp_path, params):
    """Summed over a response and its end token, given the prompt, in float64."""
    config = make_config(tmp_path)
    built = build(config, tmp_path, params)
    state = built.init()
    _, metrics = built.step(state, built.collect(state, 0)[0])
    batch, _ = build(config, tmp_path, params).collect(None, 0)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    texts = {(r["q"] + r["good"], r["q"] + r["bad"]): r for r in records}
    apply = jax.jit(MODEL.apply)
    sums = []
    for row in batch["tokens"]:
        halves = [half[: np.flatnonzero(half)[-1] + 1] for half in row.reshape(2, 12)]
        assert all(half[-1] == TOKENIZER.eos_id for half in halves)
        record = texts[tuple(TOKENIZER.decode(half[:-1]) for half in halves)]
        for half in halves:
            padded = np.pad(half, (0, 12 - len(half)))[None]
            logits = np.asarray(apply({"params": params}, padded), np.float64)[0]
            logits -= logits.max(-1, keepdims=True)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            answer = range(len(record["q"]), len(half))
            sums.append(sum(logprobs[t - 1, half[t]] for t in answer))
    chosen, rejected = np.reshape(sums, (-1, 2)).T
    np.testing.assert_allclose(metrics["logprob/chosen"].compute(), chosen.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logprob/rejected"].compute(), rejected.mean(), rtol=1e-5)
    # The policy is the reference still.
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert metrics["margin"].compute() == 0 == metrics["accuracy"].compute()


def test_it_learns_what_is_preferred(tmp_path, params):
    held_out = write(tmp_path / "held_out.jsonl", 21, 1)  # not a multiple of the batch
    config = make_config(tmp_path, eval_sources=(held_out,), loop=LoopConfig(steps=40))
    built = build(config, tmp_path, params)
    before = built.evaluate(built.init())
    assert before["accuracy"] == 0 and before["loss"] == pytest.approx(np.log(2), rel=1e-6)
    state = loop.run(
        build(config, tmp_path, params), config.loop, tmp_path, fingerprint_of=config
    )
    lines = history(tmp_path)
    assert lines[-1]["eval/pairs"] == 21
    assert lines[-1]["eval/accuracy"] > 0.95 and lines[-1]["eval/loss"] < 0.3
    assert lines[-1]["eval/margin"] == pytest.approx(
        lines[-1]["eval/reward/chosen"] - lines[-1]["eval/reward/rejected"], rel=1e-4
    )
    assert lines[-1]["margin"] > 1 and lines[-1]["accuracy"] > 0.9
    jax.tree.map(np.testing.assert_array_equal, state.extra["ref_params"], params)
    _, loaded, tokenizer = checkpoints.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, state.params))
    assert tokenizer.vocab_size == TOKENIZER.vocab_size


def test_a_run_resumes_exactly(tmp_path, params):
    config = make_config(tmp_path, mesh="data=1")
    for name, stops in (("whole", (6,)), ("halves", (2, 6))):
        for steps in stops:
            part = dataclasses.replace(config, loop=LoopConfig(steps=steps))
            workdir = tmp_path / name
            loop.run(build(part, workdir, params), part.loop, workdir, fingerprint_of=part)
    assert history(tmp_path / "halves") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 6


def test_every_mesh_and_every_split_trains_alike(tmp_path, params):
    runs = []
    for mesh, micro_rows in (("data=1", 0), ("data=2", 4), ("fsdp=2", 2)):
        config = make_config(
            tmp_path, mesh=mesh, micro_rows=micro_rows, optim=OptimConfig("sgd", lr=1.0)
        )
        built = build(config, tmp_path, params)
        state, run = built.init(), []
        for at in range(3):
            state, metrics = built.step(state, built.collect(state, at)[0])
            margin = float(metrics["margin"].compute())
            run.append([float(metrics["loss"]), float(metrics["grad_norm"]), margin])
        runs.append(run)
    assert runs[0][2][0] < runs[0][0][0]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(runs[0], runs[2], rtol=1e-4, atol=1e-6)


def test_pairs_that_do_not_fit_are_left_out_whole(tmp_path, params, caplog):
    config = make_config(tmp_path)
    path = tmp_path / "long.jsonl"
    records = [{"q": f"{i}=", "good": "x" * (5 + 8 * (i % 2)), "bad": "y"} for i in range(8)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = dataclasses.replace(config.data.sources[0], path=str(path))
    data = dataclasses.replace(config.data, sources=(source,), batch_size=8)
    built = build(dataclasses.replace(config, data=data, micro_rows=0), tmp_path, params)
    batch, _ = built.collect(None, 0)
    firsts = {TOKENIZER.decode(row[:1]) for row in batch["tokens"]}
    assert firsts == set("0246")
    assert "data.overlong='drop'" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"data": DataConfig()}, "data.pack='none' and data.overlong='drop'"),
        ({"eval_sources": (SourceConfig("a.jsonl", text_key="t"),)}, "'a.jsonl' holds no preferences"),
        ({"max_position": 8}, "context of 8"),
        ({"micro_rows": 3}, "multiple of 2 devices x micro_rows=3"),
    ],
)
def test_mistakes_are_refused_before_training(tmp_path, params, changes, message):
    with pytest.raises(ValueError, match=message):
        build(make_config(tmp_path, **changes), tmp_path, params)


def test_pairs_of_the_best_and_the_worst_sample():
    samples = [
        {"prompt": prompt, "response": response, "score": score}
        for prompt, response, score in [
            ("p", "a", 0.5), ("q", "b", 1.0), ("p", "c", 0.9), ("p", "d", 0.1), ("q", "e", 1.0),
            ("p", "f", 0.9), ("p", "g", 0.1), ("r", "h", 0.0),
        ]
    ]  # fmt: skip
    assert dpo.best_and_worst(samples) == [{"prompt": "p", "chosen": "c", "rejected": "d"}]
    with pytest.raises(ValueError, match="not finite"):
        dpo.best_and_worst([{"prompt": "p", "response": "a", "score": float("nan")}])


def test_the_config_survives_its_file(tmp_path):
    config = make_config(tmp_path)
    configs.save(tmp_path / "config.json", config)
    assert configs.load(tmp_path / "config.json", dpo.Config) == config
