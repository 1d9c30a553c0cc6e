"""Training with experts: the balancing loss beside the likelihood, jitter, and evaluation without both."""

import dataclasses

import jax
import numpy as np
import pytest
from test_lm_trainer import TINY, examples, history, init, make_config, nll_by_hand

from research.core import data, loop, step
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import trainer
from research.lm.config import MoEConfig
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs

EXPERTS = MoEConfig(num_experts=4, top_k=2, aux_coef=0.3)
MOE = dataclasses.replace(TINY, mlp_size=16, moe=EXPERTS, scan_layers=True)


def with_moe(**changes):
    return dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, **changes))


def aux_by_hand(router):
    """Σ_layers E Σ_i f_i m_i, in float64."""
    total = 0.0
    for load, probs, tokens in zip(router.load_E, router.probs_E, router.tokens, strict=True):
        load, probs = np.asarray(load, np.float64), np.asarray(probs, np.float64)
        total += 4 * ((load / float(tokens)) * (probs / float(tokens))).sum()
    return total


def test_the_loss_is_likelihood_and_balance_by_shares():
    model, params = Decoder(MOE), init(Decoder(MOE))
    config = DataConfig((), seq_len=16, batch_size=24, pack="none")
    (rows,) = data.from_examples(config, examples(), endless=False)
    batch, _ = trainer.to_batch(rows)
    loss = lambda p, b: trainer.loss_fn(model, p, b)  # noqa: E731
    gradients = jax.jit(lambda p, b: step.accumulate(loss, p, b, 8))
    _, value, metrics = gradients(params, batch)
    total, count = nll_by_hand(model, params, [(e["tokens"], e["loss_mask"]) for e in examples()])
    nll, aux = (float(metrics[name].compute()) for name in ("nll", "aux"))
    assert nll == pytest.approx(total / count, rel=1e-5)
    assert float(value) == pytest.approx(nll + 0.3 * aux, rel=1e-5)
    score = jax.jit(
        lambda b: token_logprobs(model, params, b["tokens"], b["positions"], b["segment_ids"]).router
    )
    wanted = 0.0  # each micro-batch's own balance, by its share of the learned tokens
    for start in (0, 8, 16):
        part = {name: x[start : start + 8] for name, x in batch.items()}
        wanted += aux_by_hand(score(part)) * part["weights"].sum()
    assert aux == pytest.approx(wanted, rel=1e-5)
    assert aux > 4.0  # two layers, each 2 when balanced
    assert float(metrics["router/dropped"].compute()) == 0


def test_evaluation_reports_the_likelihood_of_the_dropless_model(tmp_path):
    shape = dataclasses.replace(with_moe(capacity_factor=0.5), num_layers=1)
    config = make_config(tmp_path, model=shape, eval_sources=(), micro_rows=0)
    held_out = examples(9)
    built = trainer.build(config, tmp_path, examples=examples(), eval_examples=held_out)
    state = built.init()
    report = built.evaluate(state)
    dropless = Decoder(dataclasses.replace(MOE, num_layers=1))
    total, count = nll_by_hand(
        dropless, state.params, [(e["tokens"], e["loss_mask"]) for e in held_out]
    )
    assert report["loss"] == pytest.approx(total / count, rel=1e-5)
    _, metrics = built.step(state, built.collect(state, 0)[0])
    assert float(metrics["router/dropped"].compute()) > 0.1


def test_jitter_belongs_to_a_step_and_not_to_what_came_before(tmp_path):
    """So a resumed run has what it would have had."""
    model = dataclasses.replace(with_moe(jitter=0.4), num_layers=1)
    config = make_config(tmp_path, model=model, eval_sources=())
    built, resumed = (trainer.build(config, tmp_path) for _ in range(2))
    first, second = (built.collect(None, at)[0] for at in range(2))
    np.testing.assert_array_equal(resumed.collect(None, 1)[0]["noise"], second["noise"])
    assert len(set(first["noise"]) | set(second["noise"])) == 32
    assert "noise" not in trainer.build(make_config(tmp_path), tmp_path).collect(None, 0)[0]
    params = init(Decoder(model))
    losses = jax.jit(lambda batch: trainer.loss_fn(Decoder(model), params, batch)[0])
    a, again = losses(first), losses(first)
    assert a == again
    assert a != losses(first | {"noise": second["noise"]})


def test_it_learns_with_experts_and_stays_balanced(tmp_path):
    model = dataclasses.replace(with_moe(aux_coef=0.05), num_layers=1)
    config = make_config(
        tmp_path, model=model, mesh="data=1", micro_rows=0, eval_sources=(),
        optim=OptimConfig(lr=1e-2), loop=LoopConfig(steps=50),
    )  # fmt: skip
    loop.run(trainer.build(config, tmp_path), config.loop, tmp_path, fingerprint_of=config)
    lines = history(tmp_path)
    assert lines[-1]["nll"] < 0.4 < lines[0]["nll"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["nll"] + 0.05 * lines[-1]["aux"], rel=1e-5)
    assert lines[-1]["router/max_load"] < 1.6
