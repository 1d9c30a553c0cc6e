"""The recipe's numbers against the paper's, and its scaled forms against their proportions."""

import dataclasses

import numpy as np
import pytest

from research.core import optim
from research.core.data import SourceConfig
from research.lm import batch_ramp, dpo
from research.lm import trainer as lm
from research.lm.presets import PRESETS
from research.minimax_01 import recipe

PAIRS = SourceConfig("a", prompt_key="q", response_key="a")
PREFERENCES = SourceConfig("a", prompt_key="q", chosen_key="c", rejected_key="r")


def schedule_of(config):
    return batch_ramp.Schedule(config.batch_ramp, config.data.batch_size, config.data.seq_len)


def test_the_paper_s_pretraining():
    config = recipe.paper()
    schedule, rate = schedule_of(config), optim.schedule(config.optim, config.loop.steps)
    at = lambda tokens: float(rate(schedule.steps(round(tokens))))  # noqa: E731
    assert config.data.seq_len == 8192 and config.model.rope_theta == 1e4
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert config.optim.warmup_steps == 500
    np.testing.assert_allclose(float(rate(249)), 1e-4, rtol=1e-5)
    for tokens, wanted in ((1e10, 2e-4), (7.1e12, 2e-4), (7.3e12, 1.3e-4), (10.3e12, 1.3e-4)):
        np.testing.assert_allclose(at(tokens), wanted, rtol=1e-5)
    np.testing.assert_allclose(at(10.9e12), np.sqrt(1.3e-4 * 3e-5), rtol=2e-3)  # half of the decay
    np.testing.assert_allclose(at(11.4e12), 3e-5, rtol=1e-4)
    sizes = [schedule.rows(schedule.steps(round(t))) * 8192 / 2**20
             for t in (0, 68e9, 70e9, 789e9, 791e9, 4.6e12, 4.8e12, 11e12)]  # fmt: skip
    assert sizes == [16, 16, 32, 32, 64, 64, 128, 128]
    assert abs(schedule.tokens(config.loop.steps) / 11.4e12 - 1) < 1e-4


@pytest.mark.parametrize("tokens, seq_len, rows", [(2e6, 64, 16), (3e8, 512, 64), (5e6, 128, 8)])
def test_a_smaller_budget_keeps_the_proportions(tokens, seq_len, rows):
    model = PRESETS["quickstart-hybrid"]
    config = recipe.pretraining(model, tokens=tokens, seq_len=seq_len, rows=rows, lr=3e-3)
    schedule = schedule_of(config)
    batch = rows * seq_len / tokens  # the last batch, as a share of the budget
    steps, seen = config.loop.steps, lambda step: schedule.tokens(step) / tokens
    assert 1 <= seen(steps) < 1 + batch
    lower, decay = config.optim.boundaries
    assert 7.2 / 11.4 <= seen(lower) < 7.2 / 11.4 + batch
    assert 10.4 / 11.4 <= seen(decay) < 10.4 / 11.4 + batch
    assert [schedule.rows(schedule.steps(round(f * tokens))) * 8 // rows
            for f in (0, 0.03, 0.2, 0.6)] == [1, 2, 4, 8]  # fmt: skip
    rate = optim.schedule(config.optim, steps)
    np.testing.assert_allclose(float(rate(lower - 1)), 3e-3, rtol=1e-5)
    np.testing.assert_allclose(float(rate(lower)), 0.65 * 3e-3, rtol=1e-5)
    np.testing.assert_allclose(float(rate(steps)), 0.15 * 3e-3, rtol=1e-5)
    assert config.optim.warmup_steps / steps == pytest.approx(500 / 133_784, abs=1 / steps)


def test_budgets_without_room_for_the_phases_are_refused():
    model = PRESETS["quickstart-hybrid"]
    with pytest.raises(ValueError, match="multiple of 8"):
        recipe.pretraining(model, tokens=1e6, seq_len=64, rows=12)
    with pytest.raises(ValueError, match="too few for the phases"):
        recipe.pretraining(model, tokens=1e4, seq_len=64, rows=64)


def test_a_run_of_the_scaling_laws():
    config = recipe.scaling_law(PRESETS["minimax-70m-hybrid"])
    assert config.data.batch_size * config.data.seq_len == 2**22
    assert config.loop.steps * 2**22 == pytest.approx(300e9, rel=1e-4)
    rate = optim.schedule(config.optim, config.loop.steps)
    assert float(rate(0)) == float(rate(config.loop.steps)) == np.float32(3e-4)


def test_table_7():
    stages = {stage.name: stage for stage in recipe.POST_TRAINING}
    first = recipe.post_training(stages["sft_short"], (PAIRS,), 1000)
    assert isinstance(first, lm.Config) and first.rope_theta == 1e7
    assert (first.data.seq_len, first.data.batch_size, first.loop.steps) == (8192, 128, 15)
    rate = optim.schedule(first.optim, first.loop.steps)
    np.testing.assert_allclose([float(rate(0)), float(rate(15))], [1e-5, 1e-6], rtol=1e-5)
    second = recipe.post_training(stages["sft_long"], (PAIRS,), 1000)
    assert second.data.seq_len == 4032 * 256 and second.data.batch_size == 80
    assert second.optim.schedule == "constant" and second.optim.lr == 3e-6
    third = recipe.post_training(stages["dpo_short"], (PREFERENCES,), 640)
    assert isinstance(third, dpo.Config) and third.loop.steps == 10
    rate = optim.schedule(third.optim, 10)
    np.testing.assert_allclose([float(rate(0)), float(rate(10))], [5e-7, 5e-8], rtol=1e-5)
    with pytest.raises(ValueError, match="research.rl.trainer"):
        recipe.post_training(stages["rl"], (PAIRS,), 1000)
    with pytest.raises(ValueError, match="no batch of 128"):
        recipe.post_training(stages["sft_short"], (PAIRS,), 50)
    assert dataclasses.asdict(stages["rl"]) == {
        "name": "rl", "kind": "rl", "seq_len": 8192, "epochs": 1, "batch_size": 512,
        "lr": 1e-6, "final_lr": 1e-7,
    }  # fmt: skip
