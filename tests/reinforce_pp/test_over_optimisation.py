"""Gold against proxy: the gold score, the pairs, the comparison at equal KL, what noise becomes, and the tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table as reproducer
from experiments.tables.reinforce_pp import gold, noise, proxy
from research.core.loop import LoopConfig
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer
from research.reinforce_pp import over_optimisation as study
from research.rewards import Status

TASK = study.Requests(min_difficulty=4, max_difficulty=4, test_size=8)


def request(*words):
    return TASK.build(list(words), "requests/x", len(words), None)


@pytest.mark.parametrize(
    "text, gold",
    [
        ("a b c d", 1.0),
        ("d c b a", 1.0),
        ("", 0.0),
        ("a b", 0.5),
        ("a b a", 0.4),  # a repeated word is waste
        ("a b x", 0.4),  # so is one that was not asked for
        ("a b c d d d", 0.8),
        ("x x x x", -0.4),
        ("A, b. c d!", 1.0),
    ],
)
def test_the_gold_score(text, gold):
    assert TASK.gold(request("a", "b", "c", "d"), text) == pytest.approx(gold)


def test_requests_are_kept_apart_and_asked_in_words():
    task = study.Requests(test_size=40, question="use {words} please")
    tests = {task.problem("test", i).answer for i in range(40)}
    train = {task.problem("train", i).answer for i in range(400)}
    assert len(tests) == 40 and not tests & train
    problem = task.problem("train", 0)
    assert problem.question == f"use {problem.answer} please"
    assert task.verify(problem, " ".join(problem.data["words"][::-1]))
    assert 3 <= len(problem.data["words"]) == len(set(problem.data["words"])) <= 6


def test_rewards_are_graded_or_not_and_noise_is_apart():
    problems, texts = [request("a", "b", "c", "d")] * 4, ["a b", "a b c d", "a b c d", ""]
    finished = [True, True, False, True]
    graded = study.GoldRewarder(TASK)(problems, texts, finished, seed=1)
    assert [r.total for r in graded] == [0.5, 1.0, 1.0, 0.0]
    assert [r.status for r in graded] == [Status.WRONG, Status.RIGHT, Status.WRONG, Status.WRONG]
    plain = study.GoldRewarder(TASK, graded=False)(problems, texts, finished, seed=1)
    assert [r.total for r in plain] == [0.0, 1.0, 0.0, 0.0]
    noisy = study.GoldRewarder(TASK, graded=False, noise=1e-3)
    many = [noisy(problems, texts, finished, seed=s) for s in range(500)]
    extra = np.array([[r.total for r in rewards] for rewards in many]) - [0, 1, 0, 0]
    assert extra.std() == pytest.approx(1e-3, rel=0.1) and abs(extra.mean()) < 1e-4
    assert [r.parts for r in many[0]] == [r.parts for r in plain]
    again = noisy(problems, texts, finished, seed=0)
    assert [r.total for r in again] == [r.total for r in many[0]]


def test_demonstrations_are_careless_as_often_as_they_say():
    task = study.Requests(min_difficulty=5, max_difficulty=5)
    pairs = study.demonstrations(task, 600, 0, said=0.6, strayed=0.0)
    assert np.mean([len(a.split()) for _, a in pairs]) == pytest.approx(3.0, abs=0.15)
    assert all(set(a.split()) <= set(q.split()) for q, a in pairs)
    pairs = study.demonstrations(task, 600, 0, said=0.0, strayed=0.2)
    assert np.mean([len(a.split()) for _, a in pairs]) == pytest.approx(1.0, abs=0.12)


def test_pairs_are_labelled_wrongly_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = [
        {"prompt": f"p{i}", "response": f"{i}/{j}", "score": float(rng.integers(4))}
        for i in range(3000)
        for j in range(2)
    ]
    score = {s["response"]: s["score"] for s in samples}
    ties = sum(a["score"] == b["score"] for a, b in zip(samples[::2], samples[1::2], strict=True))
    for flip in (0.0, 0.25):
        pairs = study.noisy_pairs(samples, flip, 0)
        assert len(pairs) == 3000 - ties
        wrong = np.mean([score[p["chosen"]] < score[p["rejected"]] for p in pairs])
        assert wrong == pytest.approx(flip, abs=0.025)
        assert all(p["chosen"].split("/")[0] == p["prompt"][1:] for p in pairs)


def test_equal_kl_compares_over_what_both_reach():
    def run(kls, golds):
        return [{"kl": k, "gold": g} for k, g in zip(kls, golds, strict=True)]

    # gold = sqrt(kl), to sqrt(kl) = 3, and 2 - sqrt(kl), to 2: the mean of 2 x - 2 over 0 to 2 is 0.
    one, other = run([0, 1, 9], [0, 1, 3]), run([0, 4], [2, 0])
    assert study.at_equal_kl(one, other) == pytest.approx(0.0, abs=1e-9)
    assert study.at_equal_kl(run([0, 1, 9], [1, 2, 4]), other) == pytest.approx(1.0)
    # A run that comes back is compared by how it went out.
    back = run([0, 1, 9, 1], [0, 1, 3, -9])
    assert study.at_equal_kl(back, other) == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(study.at_equal_kl(run([1, 2], [0, 0]), run([3, 4], [0, 0])))


def test_the_divergence_is_that_of_whole_responses():
    """Against log-probabilities of the plain model, response by response."""
    tokenizer = Tokenizer.words(study.WORDS, pad=study.PAD, eos=study.END)
    model = Decoder(
        DecoderConfig(
            vocab_size=24, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
            mlp_size=16, max_position=32, scan_layers=False, init_std=0.3,
        )
    )  # fmt: skip
    init = jax.jit(model.init)
    policy, reference = (
        init(jax.random.key(i), jnp.zeros((1, 1), jnp.int32))["params"] for i in (0, 1)
    )
    actor = study.make_actor(
        model, tokenizer, study.GoldRewarder(TASK), slots=8, max_prompt=7, max_new_tokens=6
    )
    judge = study.Judge(model, actor, TASK, reference, None, problems=4, samples=2)
    problems = [TASK.problem("test", i) for i in range(4)]
    episodes = actor(policy, problems, jax.random.key(5), study.sampling_of(actor), 2, seed=0)
    apply = jax.jit(model.apply)

    def logprob(params, prompt, response):
        ids = np.concatenate([prompt, response])
        padded = np.pad(ids, (0, 16 - len(ids)))
        logits = np.asarray(apply({"params": params}, padded[None])[0], np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(logits[t - 1, ids[t]] for t in range(len(prompt), len(ids)))

    wanted = [
        logprob(policy, episodes.prompts[row // 2], response)
        - logprob(reference, episodes.prompts[row // 2], response)
        for row, response in enumerate(episodes.completions.sequences)
    ]
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(judge.divergence(episodes), wanted, atol=1e-4)
    assert judge(reference)["kl"] == pytest.approx(0, abs=1e-4) and judge(policy)["kl"] > 0.05


def test_noise_becomes_advantages_of_order_one_under_a_local_deviation_alone():
    rng = np.random.default_rng(0)
    group = 8
    right = np.repeat(rng.random(128) < 0.7, group).astype(float)
    right[: 16 * group] = rng.random(16 * group) < 0.5  # some groups are of both kinds
    extra = 1e-3 * rng.standard_normal(len(right))
    lengths = np.full(len(right), 5)
    found = noise.amplified(right, extra, lengths, group)
    assert found["groups"]["unanimous"] == pytest.approx(112 / 128, abs=0.01)
    # ddof 1: the sum of squares about the mean is G - 1.
    assert found["grpo"]["spread"] == pytest.approx(np.sqrt(7 / 8), rel=5e-3)
    assert found["grpo"]["spread clean"] == 0.0 == found["grpo"]["share clean"]
    deviation = (right.reshape(-1, group) - right.reshape(-1, group).mean(1, keepdims=True)).std()
    for name in ("reinforce_pp_baseline", "reinforce_pp_baseline, recenter=false"):
        assert found[name]["spread"] == pytest.approx(1e-3 * np.sqrt(7 / 8) / deviation, rel=0.1)
    assert found["dr_grpo"]["spread"] == pytest.approx(1e-3 * np.sqrt(7 / 8), rel=0.1)
    assert found["grpo"]["share"] > 0.8 > 0.1 > found["reinforce_pp_baseline"]["share"]


# The tables.


def tiny():
    policy = study.base_config(0, width=16, layers=1, steps=24)
    training = dataclasses.replace(gold.SCALES["cpu"].proxy, loop=LoopConfig(steps=12))
    base = dataclasses.replace(
        gold.SCALES["cpu"], base=policy, proxy=training, samples=16, steps=4, every=2, judged=8,
        pairs=64, rates=(1e-3, 2e-3),
    )  # fmt: skip
    return {
        proxy: base,
        noise: dataclasses.replace(
            noise.SCALES["cpu"],
            base=base,
            first=2,
            steps=2,
            prompts=4,
            group=4,
            measured=8,
            every=1,
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("module", [proxy, noise], ids=["proxy", "noise"])
def test_every_row_runs(module, tmp_path, monkeypatch):
    """One seed of a tiny size; every claim finds the figures it reads, and the figure is drawn."""
    monkeypatch.setattr(proxy, "best_rate", lambda s, arm, directory: s.rate)
    table = dataclasses.replace(module.TABLE, scales={"cpu": module.runs(tiny()[module])})
    results, origins = reproducer.collect(table, "cpu", [0], tmp_path / "runs", run=True)
    assert set(results) == {run.name for run in table.scales["cpu"]}
    verdicts = {c.number: reproducer.judge(c, results) for c in table.claims}
    assert {v.status for v in verdicts.values()} == {"not resolved"}, verdicts
    path = reproducer.write(table, "cpu", results, verdicts, origins, tmp_path / "out")
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_best_rate_ends_with_the_highest_gold_on_another_seed(tmp_path, monkeypatch):
    late = {3e-4: [0.9, 0.2, 0.2, 0.2], 1e-3: [0.1, 0.3, 0.6, 0.6], 3e-3: [0.1, 0.1, 0.1, 0.9]}
    seeds = []

    def train(s, arm, rate, seed, directory, prepared):
        seeds.append(seed)
        return {"curve": [{"gold": gold} for gold in late[rate]]}

    def prepare(s, seed, directory, results):
        directory.mkdir(parents=True)
        return {}

    monkeypatch.setattr(proxy, "train", train)
    monkeypatch.setattr(proxy, "prepare", prepare)
    for _ in range(2):  # the second time it is known
        assert proxy.best_rate(gold.SCALES["cpu"], "rpp", tmp_path) == 1e-3
    assert seeds == [proxy.TUNING_SEED] * 3


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_scale_can_be_configured(scale, tmp_path):
    """Samples are equal for all arms, and every one is a configuration that is accepted."""
    settings = gold.SCALES[scale]
    for arm, (_, group, greedy) in proxy.ARMS.items():
        config = proxy.config_of(settings, arm, 1e-4, 0, tmp_path, settings.steps).resolved()
        assert config.rollout.prompts * (group + greedy) == settings.samples
        assert config.rollout.group_size == group and config.loss.kl_coef == settings.beta
    for name in (noise.LOCAL, noise.GLOBAL):
        noise.config_of(noise.SCALES[scale], name, 0, 8).resolved()


def curve(golds, kls, lengths, proxies):
    rows = zip(golds, kls, lengths, proxies, strict=True)
    names = ("gold", "kl", "length", "proxy", "right")
    points = [
        dict(zip(names, (*row, 0.0), strict=True)) | {"step": i} for i, row in enumerate(rows)
    ]
    return {"base": points[0], "curve": points[1:]}


def test_the_claims_of_table_1_are_judged_as_their_rules_say():
    # gold, KL, tokens and proxy score of the base, then at five evaluations
    good = curve(
        [0.4, 0.6, 0.8, 0.9, 0.9, 0.9], [0, 1, 2, 3, 3.1, 3.2], [5] * 6, [0, 1, 2, 3, 3, 3]
    )
    poor = curve([0.4, 0.5, 0.2, 0, 0, 0], [0, 4, 8, 12, 13, 14], [5, *[9] * 5], [0, 2, 4, 5, 5, 5])
    names = [f"{arm}-{how}" for arm in proxy.ARMS for how in ("equal", "tuned")]
    claims = {claim.number: claim for claim in proxy.TABLE.claims}

    def judged(rpp, others):
        results = {name: dict.fromkeys(range(5), others) for name in names}
        results |= {f"rpp-{how}": dict.fromkeys(range(5), rpp) for how in ("equal", "tuned")}
        results["base"] = dict.fromkeys(range(5), {})
        return {n: reproducer.judge(c, results).status for n, c in claims.items()}, results

    statuses, results = judged(good, poor)
    assert set(statuses.values()) == {"confirmed"}, statuses
    statuses, _ = judged(poor, good)
    assert statuses == dict.fromkeys(claims, "refuted")
    # Fewer tokens do not make up for a worse score.
    short = curve([0.4, 0.5, 0.2, 0, 0, 0], [0, 4, 8, 12, 13, 14], [4] * 6, [0, 2, 4, 5, 5, 5])
    assert judged(short, good)[0]["T1-1"] == "refuted"
    # Of one mind in one matching alone: not resolved.
    mixed = results | {"rpp-tuned": results["grpo-tuned"], "grpo-tuned": results["rpp-tuned"]}
    assert reproducer.judge(claims["T1-1"], mixed).status == "not resolved"
