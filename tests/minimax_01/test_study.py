"""The trainer of many tiny decoders, against one plain update after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import optim
from research.core.optim import OptimConfig
from research.lm.config import DecoderConfig, MoEConfig
from research.lm.decoder import Decoder
from research.lm.moe import aux_loss
from research.minimax_01 import retrieval, study
from research.minimax_01.retrieval import Language, Mixture, Recall
from research.minimax_01.study import Member, Study

MODEL = DecoderConfig(
    vocab_size=8, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4,
    mlp_size=16, mixers=("lightning", "softmax"), scan_layers=False, init_std=0.2,
)  # fmt: skip
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, aux_coef=0.1))
TASK = Recall(pairs=2, queries=4, keys=4, values=4)
MEMBERS = [Member(0, 1e-2), Member(7, 3e-2)]


def plan(**changes):
    settings = {"optim": OptimConfig(weight_decay=0.1, warmup_steps=3), "steps": 4, "batch": 4}
    return Study(**{"model": MODEL, "task": TASK, "points": 2} | settings | changes)


def one_by_one(p, member):
    """The same, as a plain loop: parameters, and the loss and gradient norm of every step."""
    model = Decoder(p.model)
    params = model.init(jax.random.key(member.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    optimizer = optim.make(dataclasses.replace(p.optim, lr=member.lr), p.steps)
    moments, losses, norms = optimizer.init(params), [], []

    def loss(params, data):
        logits, kept = model.apply({"params": params}, data.tokens, mutable=["router"])
        logprobs = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logprobs, data.targets[..., None], -1)[..., 0]
        nll = jnp.sum(nll * data.weights) / jnp.sum(data.weights)
        if p.model.moe is None:
            return nll, nll
        balance = aux_loss(kept["router"]["stats"][0], 2, "switch")
        return nll + 0.1 * jnp.mean(balance), nll

    @jax.jit
    def update(params, moments, data):
        (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(params, data)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, nll, optax.tree.norm(grads)

    for t in range(p.steps):
        key = jax.random.fold_in(retrieval.stream("train", member.seed), t)
        params, moments, nll, norm = update(params, moments, retrieval.batch(p.task, key, p.batch))
        losses.append(float(nll))
        norms.append(float(norm))
    return params, losses, norms


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_members_train_as_if_alone(model):
    """Every member, with its seed and its rate, is what a loop of its own makes of it."""
    p = plan(model=model)
    result = study.train(p, MEMBERS)
    assert result.curves["loss"].shape == (2, 2)
    for i, member in enumerate(MEMBERS):
        params, losses, norms = one_by_one(p, member)
        for key, values in (("loss", losses), ("grad_norm", norms)):
            expected = np.reshape(values, (2, 2)).mean(axis=1)
            np.testing.assert_allclose(result.curves[key][i], expected, rtol=2e-4)
        own = study.choose(result, i)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[0], b, rtol=2e-3, atol=2e-5), own, params
        )


def test_a_rate_of_zero_changes_nothing():
    start = study.train(plan(steps=2, points=1), [Member(3, 0.0), Member(3, 1e-2)])
    fresh = Decoder(MODEL).init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]
    moved = []
    for index in range(2):
        own = study.choose(start, index)
        gaps = jax.tree.map(lambda a, b: float(np.abs(a[0] - b).max()), own, fresh)
        moved.append(max(jax.tree.leaves(gaps)))
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


def test_evaluation():
    """Figures against logits: loss, accuracy, whole examples, and the parts of a mixture."""
    longer = Recall(pairs=3, queries=5, keys=4, values=4)
    mixture = Mixture((TASK, longer))
    p = plan(task=mixture, steps=40, points=1)
    result = study.train(p, [Member(0, 1e-2), Member(1, 1e-2)])
    logits_of = jax.jit(lambda params, tokens: Decoder(MODEL).apply({"params": params}, tokens))
    found = study.evaluate(p, result.params, split="test", batches=3, size=8)
    for i in range(2):
        params = jax.tree.map(lambda x: x[0], study.choose(result, i))
        losses, right, answers, exact = [], [], [], []
        for index in range(3):
            key = jax.random.fold_in(retrieval.stream("test"), index)
            data = jax.tree.map(np.asarray, retrieval.batch(mixture, key, 8))
            logits = np.asarray(logits_of(params, data.tokens), np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nll = -np.take_along_axis(logprobs, data.targets[..., None], -1)[..., 0]
            losses.append((nll * data.weights).sum())
            hits = (logits.argmax(-1) == data.targets) * data.weights
            right.append(hits.sum(1))
            answers.append(data.weights.sum(1))
            exact.append((hits == data.weights).all(1))
        right, answers = np.sum(right, axis=0), np.sum(answers, axis=0)
        assert found["loss"][i] == pytest.approx(np.sum(losses) / answers.sum(), rel=1e-4)
        assert found["accuracy"][i] == pytest.approx(right.sum() / answers.sum())
        assert found["exact"][i] == pytest.approx(np.mean(exact))
        parts = [right[h].sum() / answers[h].sum() for h in (slice(4), slice(4, 8))]
        np.testing.assert_allclose(found["by_task"][i], parts)
    other = study.evaluate(p, result.params, split="validation", batches=3, size=8)
    assert (other["loss"] != found["loss"]).all()


def test_it_learns():
    """A task whose answer is in sight is solved, by every member."""
    task = Recall(pairs=1, queries=2, keys=2, values=4)
    p = plan(task=task, steps=150, points=3, batch=16)
    result = study.train(p, [Member(0, 1e-2), Member(1, 1e-2)])
    assert (result.curves["loss"][:, -1] < 0.3).all()
    assert (study.evaluate(p, result.params, split="test")["accuracy"] > 0.95).all()


def test_a_language_is_not_foretold_better_than_its_entropy():
    language = Language(length=32, vocab=8, classes=2, zipf=1.5, block=16, repeat=0.0)
    p = plan(task=language, steps=150, points=3, batch=16)
    result = study.train(p, [Member(0, 2e-2)])
    loss = study.evaluate(p, result.params, split="test", batches=8)["loss"][0]
    assert language.entropy - 0.02 < loss < np.log(8) - 0.2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": Recall()}, "the task has 48 tokens, the model 8"),
        ({"points": 3}, "4 steps do not make 3 points"),
        ({"points": 0}, "4 steps do not make 0 points"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
