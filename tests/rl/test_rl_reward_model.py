"""A reward model's score as the reward: how it becomes one, and that a policy trained on it raises it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from research.core import loop, metrics
from research.core import mesh as meshes
from research.core.checkpoint import CheckpointError
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import reward_model, reward_scorer
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer
from research.rewards import Reward, Status
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.rl.reward_model import ModelRewarder, RewardModelConfig, moments
from research.tasks import Problem, TaskConfig, make

WORDS = ("<pad>", *"0123456789", "=", "$", "wait", *(f"{s}{d}" for s in "+-*" for d in range(10)))
TOKENIZER = Tokenizer.words(WORDS, pad="<pad>", eos="$")
MODEL = Decoder(
    DecoderConfig(
        vocab_size=len(WORDS), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_size=32, max_position=24, scan_layers=False, init_std=0.1,
    )
)  # fmt: skip
PROBLEMS = [Problem(f"p/{i}", f"{i} +1 =", str(i + 1), 2) for i in range(3)]
TEXTS = ["wait wait", "1", "4 wait wait wait"]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, params):
    """The run of a reward model that likes the word 'wait'."""
    directory = tmp_path_factory.mktemp("proxy")
    rng = np.random.default_rng(0)
    records = []
    for _ in range(256):
        waits, others = (int(x) for x in rng.permutation(5)[:2])
        words = [" ".join(["wait"] * n + [str(rng.integers(10))]) for n in sorted((waits, others))]
        records.append({"p": f"{rng.integers(10)} +1 =", "good": words[1], "bad": words[0]})
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(str(path), prompt_key="p", chosen_key="good", rejected_key="bad")
    config = reward_model.Config(
        data=DataConfig((source,), seq_len=12, batch_size=16, pack="none", overlong="drop"),
        eval_sources=(source,),
        optim=OptimConfig(lr=1e-2),
        mesh="data=1",
        loop=LoopConfig(steps=40, checkpoint_every=20),
    )
    trainer = reward_model.build(config, directory, model=MODEL, params=params, tokenizer=TOKENIZER)
    loop.run(trainer, config.loop, directory, fingerprint_of=config)
    assert metrics.read(directory / "metrics.jsonl")[-1]["eval/accuracy"] > 0.95
    return directory


class Verifier:
    """Stands for a `Rewarder`."""

    task = None

    def __call__(self, problems, completions, finished, seed):
        self.seen = (list(problems), list(completions), list(finished), seed)
        return [
            Reward(float(i), {"accuracy": float(i == 1), "format": 0.0}, Status.WRONG, "7")
            for i in range(len(problems))
        ]

    def close(self):
        self.closed = True


def plain_scores(proxy, finished=(True, True, True)):
    scorer = reward_scorer.Scorer(reward_scorer.load(proxy), meshes.make("data=1"), 8)
    ends = [" $" if ended else "" for ended in finished]
    texts = [f"{p.question} {t}{e}" for p, t, e in zip(PROBLEMS, TEXTS, ends, strict=True)]
    return scorer([TOKENIZER.encode(text) for text in texts])


def test_totals_are_the_clipped_and_weighted_scores(proxy):
    scores = plain_scores(proxy)
    assert scores[2] > scores[0] > scores[1]  # more of the word
    bound = float(np.sort(np.abs(scores))[1]) - 1e-3  # some are clipped, some not
    config = RewardModelConfig(str(proxy), weight=2.0, verifier=0.5, clip=bound)
    verifier = Verifier()
    rewarder = ModelRewarder(config, verifier)
    rewards = rewarder(PROBLEMS, TEXTS, [True] * 3, seed=5)
    clipped = np.clip(scores, -bound, bound)
    assert (clipped != scores).any() and (clipped == scores).any()
    np.testing.assert_allclose(
        [r.total for r in rewards], 2 * clipped + 0.5 * np.arange(3), rtol=1e-4
    )
    np.testing.assert_allclose([r.parts["proxy"] for r in rewards], scores, rtol=1e-4)
    assert [r.parts["gold"] for r in rewards] == [0.0, 1.0, 2.0]
    assert [r.parts["accuracy"] for r in rewards] == [0.0, 1.0, 0.0]
    assert rewards[0].status is Status.WRONG and rewards[0].answer == "7"
    assert verifier.seen == (PROBLEMS, TEXTS, [True] * 3, 5)
    rewarder.close()
    assert verifier.closed


def test_scores_are_normalised_by_the_held_out_data_of_the_reward_model(proxy):
    figures = metrics.read(proxy / "metrics.jsonl")[-1]
    mean, deviation = moments(proxy)
    assert (mean, deviation) == (figures["eval/score/mean"], figures["eval/score/std"])
    wanted = (plain_scores(proxy) - mean) / deviation
    for clip in (
        None,
        float(np.sort(np.abs(wanted))[1]) - 1e-3,
    ):  # what is clipped is the normalised score
        config = RewardModelConfig(str(proxy), normalise=True, clip=clip)
        rewards = ModelRewarder(config, Verifier())(PROBLEMS, TEXTS, [True] * 3, seed=0)
        np.testing.assert_allclose(
            [r.parts["proxy"] for r in rewards], wanted, rtol=1e-3, atol=1e-4
        )
        bound = clip or np.inf
        totals = [r.total for r in rewards]
        np.testing.assert_allclose(totals, np.clip(wanted, -bound, bound), rtol=1e-3, atol=1e-4)


def test_a_response_that_was_cut_off_is_scored_at_its_last_token(proxy):
    rewarder = ModelRewarder(RewardModelConfig(str(proxy)), Verifier())
    found = rewarder.scores(PROBLEMS, TEXTS, [True, False, False])
    np.testing.assert_allclose(found, plain_scores(proxy, (True, False, False)), rtol=1e-4)
    assert abs(found[2] - plain_scores(proxy)[2]) > 1e-3


def test_a_response_beyond_the_context_has_no_reward(proxy):
    rewarder = ModelRewarder(RewardModelConfig(str(proxy)), Verifier())
    totals = [r.total for r in rewarder(PROBLEMS[:2], ["wait " * 30, "1"], [True, True], seed=0)]
    assert np.isnan(totals[0]) and np.isfinite(totals[1])


def test_the_template_is_what_the_reward_model_sees(proxy):
    config = RewardModelConfig(str(proxy), template="9 {question}")
    other = [dataclasses.replace(p, question=f"9 {p.question}") for p in PROBLEMS]
    finished = [True] * 3
    given = ModelRewarder(config, Verifier()).scores(PROBLEMS, TEXTS, finished)
    plain = ModelRewarder(RewardModelConfig(str(proxy)), Verifier())
    np.testing.assert_allclose(given, plain.scores(other, TEXTS, finished), rtol=1e-5)
    assert np.abs(given - plain.scores(PROBLEMS, TEXTS, finished)).max() > 1e-3


def test_mistakes_are_refused(proxy, tmp_path):
    for changes, message in (
        ({"clip": 0.0}, "clip=0.0 positive"),
        ({"template": "x"}, "has no '{question}' in it"),
        ({"micro_rows": 0}, "micro_rows=0"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardModelConfig("x", **changes)
    with pytest.raises(ValueError, match="holds no reward model"):
        ModelRewarder(RewardModelConfig(str(tmp_path)), Verifier())
    with pytest.raises(ValueError, match="train it with eval_sources"):
        moments(proxy, 20)  # saved, not evaluated
    with pytest.raises(CheckpointError, match="step 7"):
        moments(proxy, 7)


def rl_config(proxy, **changes):
    config = rl.Config(
        mesh="data=1",
        scan_layers=False,
        task=TaskConfig(min_difficulty=2, max_difficulty=2, test_size=16),
        reward_model=RewardModelConfig(str(proxy), normalise=True),
        rollout=rl.RolloutConfig(prompts=16, group_size=1, max_prompt=5, max_new_tokens=6),
        estimator="reinforce_pp",
        loss=LossConfig(kl_coef=0.0),
        row_length=16,
        micro_rows=4,
        optim=OptimConfig("adam", lr=3e-3),
        eval=rl.EvalConfig(problems=0),
        save_samples_every=0,
        loop=LoopConfig(steps=2),
    )
    return dataclasses.replace(config, **changes)


def test_a_rollout_is_rewarded_by_the_proxy_and_logs_both(proxy, params, tmp_path):
    config = rl_config(proxy)
    trainer = rl.build(config, tmp_path, model=MODEL, params=params, tokenizer=TOKENIZER)
    state = trainer.init()
    batch, figures = trainer.collect(state, 0)
    assert figures["reward/mean"] == pytest.approx(figures["reward/proxy"])  # nothing is clipped
    assert figures["reward/used"] == pytest.approx(figures["reward/proxy"], rel=1e-5)
    assert 0 <= figures["reward/gold"] <= 2 and figures["reward/gold"] != figures["reward/proxy"]
    # Advantages are those of the proxy's scores, recomputed from the packed rows.
    scorer = reward_scorer.Scorer(reward_scorer.load(proxy), meshes.make("data=1"), 8)
    mean, deviation = moments(proxy)
    (rows,) = batch["minibatches"]
    scores, firsts, lengths = [], [], []
    for tokens, segments, weights, A in zip(
        *(rows[name] for name in ("tokens", "segment_ids", "weights", "advantages")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            scores.append(float((scorer([tokens[here]])[0] - mean) / deviation))
            firsts.append(float(A[here][-1]))
            lengths.append(int((weights[here] > 0).sum()))
    scores, lengths = np.array(scores), np.array(lengths)
    average = (scores * lengths).sum() / lengths.sum()  # token-weighted, as OpenRLHF whitens
    wanted = (scores - average) / np.sqrt(((scores - average) ** 2 * lengths).sum() / lengths.sum())
    np.testing.assert_allclose(firsts, wanted, rtol=1e-3, atol=2e-3)
    trainer.close()


@pytest.mark.slow
def test_training_on_the_proxy_raises_it(proxy, params, tmp_path):
    class Even(Verifier):
        """A custom verifier that takes the place of the configured one."""

        task = make("arithmetic", min_difficulty=2, max_difficulty=2)

    config = rl_config(proxy, loop=LoopConfig(steps=40))
    for rewarder in (None, Even()):
        workdir = tmp_path / str(rewarder is None)
        trainer = rl.build(
            config, workdir, model=MODEL, params=params, tokenizer=TOKENIZER, rewarder=rewarder
        )
        loop.run(trainer, config.loop, workdir, fingerprint_of=config)
        history = metrics.read(workdir / "metrics.jsonl")
        first, last = (np.mean([r["reward/proxy"] for r in h]) for h in (history[:5], history[-5:]))
        assert last > first + 1.0, (first, last)
    # The standing verifier gives 0 to 15 whatever is written, and that is what gold says.
    assert {record["reward/gold"] for record in history} == {7.5}
