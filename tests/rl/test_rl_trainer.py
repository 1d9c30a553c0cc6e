"""The RL trainer: one rollout's updates against the plain objective, schedules, mistakes."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import checkpoint, metrics
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.deepseek_r1 import base_data, zero
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.sampler import Completions
from research.lm.tokenizer import Tokenizer
from research.rewards import Reward, RewardConfig, Status
from research.rl import trainer as rl
from research.rl.advantages import AdvantageConfig
from research.rl.losses import LossConfig
from research.rl.rollout import Episodes
from research.tasks import Problem, TaskConfig

TOKENIZER = Tokenizer.words(base_data.WORDS, pad=base_data.PAD, eos=base_data.END)
MODEL = Decoder(
    DecoderConfig(
        vocab_size=len(base_data.WORDS),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_size=32,
        max_position=64,
        init_std=0.1,
    )
)
CONFIG = rl.Config(
    mesh="data=2",
    scan_layers=False,
    task=TaskConfig(min_difficulty=2, max_difficulty=3, test_size=16),
    reward=RewardConfig(answer_from="text"),
    rollout=rl.RolloutConfig(prompts=4, group_size=4, max_prompt=5, max_new_tokens=6),
    row_length=16,
    micro_rows=1,
    optim=OptimConfig("sgd", lr=0.1, clip_norm=0.0),
    eval=rl.EvalConfig(problems=4, samples=4),
    loop=LoopConfig(steps=6),
)


@functools.cache
def init_params(seed=0):
    """A base that mostly says a digit, then ends, and now and then anything else."""
    params = MODEL.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    # Every token shares one direction of the embedding, about 4 after the norm: a bias in the head.
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, 0].set(2.0)
    liked = {word: 0.5 for word in "0123456789"} | {"wait": 0.25, base_data.END: 1.0}
    for word, bias in liked.items():
        place = (0, TOKENIZER.token_id(word))
        params["head"]["kernel"] = params["head"]["kernel"].at[place].add(bias)
    return params


def build(workdir, config=CONFIG, **changes):
    config = dataclasses.replace(config, **changes)
    return rl.build(config, workdir, model=MODEL, params=init_params(), tokenizer=TOKENIZER)


class FakeActor:
    """Episodes of random tokens, lengths, rewards and log-probabilities; keeps what it gave."""

    def __init__(self, actor):
        self.rewarder, self.given, self.limits = actor.rewarder, [], []

    def __call__(self, params, problems, key, sampling, group_size, *, seed, first=0):
        rng = np.random.default_rng(jax.random.key_data(key).tolist())
        count, limit = len(problems) * group_size, sampling.max_new_tokens
        lengths = rng.integers(1, limit + 1, count).astype(np.int32)
        cells = np.arange(limit) < lengths[:, None]
        tokens = np.where(cells, rng.integers(0, len(base_data.WORDS), cells.shape), 0)
        logprobs = np.where(cells, -3 * rng.random(cells.shape), 0).astype(np.float32)
        stopped = rng.random(count) < 0.7
        completions = Completions(tokens.astype(np.int32), lengths, logprobs, logprobs, stopped)
        prompts = [rng.integers(0, 30, rng.integers(1, 6)).astype(np.int32) for _ in problems]
        totals = rng.integers(0, 3, count) * 0.5
        totals[:group_size] = 1.0  # a group without a signal
        rewards = [
            Reward(t, {"accuracy": t, "format": 0.0}, Status.RIGHT if t else Status.WRONG, "1")
            for t in totals
        ]
        episodes = Episodes(problems, prompts, completions, [""] * count, rewards, group_size)
        self.given.append(episodes)
        self.limits.append(limit)
        return episodes


def run_of(trainer):
    return trainer.step.__self__


def variant(run, **changes):
    """The same compiled programs under a configuration that differs in what only the host reads."""
    other = copy.copy(run)
    other.config = dataclasses.replace(run.config, **changes)
    return other


def exact(workdir):
    """All that a resumed run must reproduce."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "compiles"}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    params = checkpoint.load_params(workdir)
    return lines, jax.tree.map(lambda x: np.asarray(x).tobytes(), params)


# One rollout against the definition.


def members(batch, episodes):
    """Rows of the rollout that a packed minibatch holds."""
    place = {
        (*episodes.prompts[row // episodes.group_size], *response): row
        for row, response in enumerate(episodes.completions.sequences)
    }
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            found.append(place[tuple(tokens[segments == segment])])
    return found


def unpacked(episodes):
    """tokens [N, T], and where the response stands [N, T]."""
    rows, inside = [], []
    for row, response in enumerate(episodes.completions.sequences):
        prompt = episodes.prompts[row // episodes.group_size]
        fill = 11 - len(prompt) - len(response)
        rows.append(np.concatenate([prompt, response, np.zeros(fill, np.int32)]))
        inside.append([0] * len(prompt) + [1] * len(response) + [0] * fill)
    return np.array(rows), np.array(inside, bool)


@functools.partial(jax.jit, static_argnames="temperature")
def plain_logprobs(params, tokens, temperature):
    """One row for each response, no packing: log p of every token but the first, which gets 0."""
    logits = MODEL.apply({"params": params}, tokens) / temperature
    logprobs = jax.nn.log_softmax(logits)[:, :-1]
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


def objective(config, tokens, inside, advantages, old, ref, limit, params):
    """-J as the papers write it, by responses (DeepSeek-R1 v1 eq. 1-3)."""
    loss = config.loss
    gap = jnp.where(inside, plain_logprobs(params, tokens, config.rollout.temperature) - old, 0)
    to_ref = jnp.where(inside, ref - gap - old, 0)
    if loss.ratio == "sequence":
        gap, to_ref = gap.sum(1, keepdims=True), to_ref.sum(1, keepdims=True)
    ratio, A = jnp.exp(gap), advantages[:, None]
    clipped = jnp.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    J = jnp.minimum(ratio * A, clipped * A) - loss.kl_coef * (jnp.exp(to_ref) - to_ref - 1)
    if loss.ratio == "sequence":
        return -J.mean()
    J = jnp.where(inside, J, 0)
    lengths = inside.sum(1)
    return -{
        "grpo": (J.sum(1) / jnp.maximum(lengths, 1)).mean(),
        "token": J.sum() / lengths.sum(),
        "drgrpo": J.sum() / (len(J) * limit),
    }[loss.aggregation]


def group_advantages(episodes, config):
    rewards = np.array([r.total for r in episodes.rewards]).reshape(-1, episodes.group_size)
    centred = rewards - rewards.mean(1, keepdims=True)
    if config.estimator == "grpo":
        centred /= rewards.std(1, ddof=config.advantage.ddof, keepdims=True) + 1e-6
    return centred.reshape(-1)


def plain_updates(run, state, episodes, minibatches):
    """Parameters after each SGD update on the minibatches (rows of the rollout)."""
    config, params = run.config, jax.device_get(state.params)
    ref_params = jax.device_get(state.extra["ref_params"])
    tokens, inside = unpacked(episodes)
    if config.mask_truncated:
        inside &= episodes.completions.stopped[:, None]
    score = functools.partial(plain_logprobs, tokens=tokens, temperature=config.rollout.temperature)
    old, ref = score(params), score(ref_params)
    advantages = group_advantages(episodes, config)
    limit = config.rollout.max_new_tokens
    grad = jax.jit(jax.grad(functools.partial(objective, config), argnums=6), static_argnums=5)
    history = []
    for rows in minibatches:
        rows = np.array(rows)
        grads = grad(
            tokens[rows], inside[rows], advantages[rows], old[rows], ref[rows], limit, params
        )
        params = jax.tree.map(lambda p, g: p - config.optim.lr * g, params, grads)
        history.append(params)
    return history


CASES = {
    # aggregation, or ratio: (devices, micro_rows, updates, epochs, other changes)
    "grpo": (1, 3, 1, 1, {}),
    "token": (2, 1, 2, 1, {"mask_truncated": True}),
    "drgrpo": (8, 1, 2, 2, {"estimator": "dr_grpo"}),
    "sequence": (
        *(2, 2, 4, 1),
        {
            "advantage": AdvantageConfig(ddof=0),
            "optim": OptimConfig("sgd", lr=0.01, clip_norm=0.0),
        },
    ),
}


LOSS = LossConfig("grpo", clip_low=0.02, clip_high=0.05, kl_coef=0.1)
REDUCTION = {"sequence": {"ratio": "sequence"}}


@pytest.fixture(scope="module")
def faked(tmp_path_factory):
    """Runs by aggregation, fed by a FakeActor; each is compiled once."""

    @functools.cache
    def make(aggregation):
        devices, micro_rows, updates, epochs, changes = CASES[aggregation]
        run = run_of(
            build(
                tmp_path_factory.mktemp(aggregation),
                mesh=f"data={devices}",
                rollout=dataclasses.replace(CONFIG.rollout, temperature=0.7),
                loss=dataclasses.replace(
                    LOSS, **REDUCTION.get(aggregation, {"aggregation": aggregation})
                ),
                reference_every=0,
                micro_rows=micro_rows,
                updates=updates,
                epochs=epochs,
                save_samples_every=0,
                **changes,
            )
        )
        run.actor = FakeActor(run.actor)
        return run

    return make


def off_reference(state):
    """The state with another reference, so that the KL term counts."""
    ref = jax.tree.map(lambda x: x * 1.1, state.params)
    return state.replace(extra={"ref_params": ref})


@pytest.mark.parametrize("aggregation", CASES)
def test_updates_equal_the_unpacked_objective_s(faked, aggregation):
    run = faked(aggregation)
    config = run.config
    before = off_reference(run.init())
    batch, host = run.collect(before, 3)
    (episodes,) = run.actor.given[-1:]
    parts = [members(b, episodes) for b in batch["minibatches"]]
    assert len(parts) == config.updates * config.epochs
    for epoch in range(config.epochs):  # each pass takes every response once, in equal parts
        pass_ = parts[epoch * config.updates : (epoch + 1) * config.updates]
        assert sorted(sum(pass_, [])) == list(range(16))
        assert {len(rows) for rows in pass_} == {16 // config.updates}
    if config.epochs > 1:
        assert parts[0] != parts[config.updates]
    expected = plain_updates(run, before, episodes, parts)
    start = jax.device_get(before.params)
    state, device = run.step(before, batch)
    change = jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, start)
    wanted = jax.tree.map(lambda x, y: np.asarray(x) - y, expected[-1], start)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert largest > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest),
        change,
        wanted,
    )
    figures = metrics.to_floats(device)
    assert int(state.step) == 4 and figures["updates"] == 4 * config.updates * config.epochs
    assert host["rollout/zero_std"] == np.mean(
        [len({r.total for r in episodes.rewards[i : i + 4]}) == 1 for i in range(0, 16, 4)]
    )
    assert figures["kl"] > 0
    if config.updates == 1:
        assert figures["clip_frac"] == 0 and figures["ratio_max"] == 1
    else:
        assert figures["clip_frac"] > 0 and figures["ratio_max"] > 1.02
    lengths = episodes.completions.lengths
    tokens = sum(lengths) + 4 * sum(map(len, episodes.prompts))
    assert host["tokens"] == config.epochs * tokens


def test_old_logprobs_of_an_unchanged_policy_change_nothing(faked):
    """The path of several updates, on the first of them, is the on-policy one."""
    run = faked("grpo")
    old = copy.copy(run)
    old.keeps_old = True
    ends = []
    for each in (run, old):
        state = off_reference(each.init())
        batch, _ = each.collect(state, 0)
        state, device = each.step(state, batch)
        ends.append((jax.device_get(state.params), metrics.to_floats(device)))
    (params, figures), (old_params, old_figures) = ends
    assert old_figures["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), params, old_params)
    for name in ("loss", "kl", "entropy", "grad_norm", "mismatch/abs", "clip_frac"):
        assert figures[name] == pytest.approx(old_figures[name], rel=1e-5, abs=1e-6)


def test_masked_responses_leave_no_trace(faked):
    """With every response cut off and masked, there is no gradient and nothing is counted."""
    run = copy.copy(faked("token"))
    assert run.config.mask_truncated
    give = run.actor

    def cut_off(*args, **kwargs):
        episodes = give(*args, **kwargs)
        episodes.completions.stopped[:] = False
        return episodes

    run.actor = cut_off
    before = off_reference(run.init())
    start = jax.device_get(before.params)
    batch, host = run.collect(before, 0)
    state, device = run.step(before, batch)
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(state.params))
    assert host["rollout/truncated"] == 1.0
    assert float(device["loss"]) == float(device["grad_norm"]) == 0.0


@pytest.mark.parametrize("aggregation", ["grpo", "token"])
def test_the_second_rollout_compiles_nothing(faked, aggregation):
    """Neither on one device nor on several does the first state differ from later ones."""
    run = faked(aggregation)
    state, compiles = run.init(), metrics.CompileCounter()
    counts = []
    for step in range(4):
        batch, _ = run.collect(state, step)
        state, _ = run.step(state, batch)
        counts.append(compiles.count)
    assert counts == counts[:1] * 4


@pytest.mark.parametrize("every", [3, 4, 0])
def test_the_reference_is_renewed_after_exactly_so_many_updates(faked, every):
    """Two updates to a rollout: at updates 3 and 6, or 4 and 8, in the middle or at an end."""
    run = variant(faked("token"), reference_every=every)
    after = []  # parameters and reference after each update

    def recorded(state, batch):
        state, figures = faked("token").update(state, batch)
        after.append(jax.device_get(state.params)["head"]["kernel"])
        return state, figures

    run.update = recorded
    state = run.init()
    first = jax.device_get(state.extra["ref_params"])["head"]["kernel"]
    np.testing.assert_array_equal(first, init_params()["head"]["kernel"])
    for step in range(4):
        batch, _ = run.collect(state, step)
        state, _ = run.step(state, batch)
        updates = 2 * (step + 1)
        last = updates - updates % every if every else 0
        expected = after[last - 1] if last else first
        ref = jax.device_get(state.extra["ref_params"])["head"]["kernel"]
        np.testing.assert_array_equal(ref, expected)
        assert len(after) == updates and (after[-1] != first).any()


def test_the_published_schedule():
    """400 updates are 25 rollouts; the limit doubles at update 8,200, in the middle of rollout 512."""
    config = zero.paper()
    assert config.reference_every % config.updates == 0
    limits = {step: config.rollout.limit_at(step) for step in (0, 511, 512, 513, 650)}
    assert limits == {0: 32_768, 511: 32_768, 512: 32_768, 513: 65_536, 650: 65_536}
    assert config.rollout.longest_response == 65_536
    assert config.rollout.prompts * config.rollout.group_size // config.updates == 512


def test_the_length_limit_switches_at_its_step(faked):
    run = faked("drgrpo")
    rollout = dataclasses.replace(
        run.config.rollout, max_new_tokens=3, length_schedule=((4, 6), (2, 4))
    )
    run = variant(run, rollout=rollout)
    state, limits, weights = run.init(), [], []
    for step in range(6):
        batch, host = run.collect(state, step)
        limits.append(host["rollout/limit"])
        weights.append(np.unique(batch["minibatches"][0]["weights"])[1:])
    assert limits == run.actor.limits[-6:] == [3, 3, 4, 4, 6, 6]
    # Dr.GRPO divides by the limit in force: 8 responses in each of two minibatches.
    np.testing.assert_allclose(np.concatenate(weights), 1 / (8 * np.array(limits)), rtol=1e-6)


class FiniteTask:
    name, isolated = "finite", None

    def size(self, split):
        return 5

    def problem(self, split, index):
        return Problem(f"finite/{index}", "?", "1", 0)


def test_a_finite_split_is_gone_through_in_a_new_order_each_time(faked):
    run = copy.copy(faked("token"))
    run.task = FiniteTask()
    epochs = [[run._train_problem(5 * e + i).id for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == [f"finite/{i}" for i in range(5)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [run._train_problem(5 + i).id for i in range(5)] == epochs[1]  # as a resumed run asks
    other = variant(run, seed=1)
    other._epoch = -1
    assert [other._train_problem(i).id for i in range(20)] != sum(epochs, [])


# Mistakes.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout": {"group_size": 1}}, "group_size=1: advantages compare"),
        ({"rollout": {"temperature": 0.0}}, "temperature=0.0: a greedy rollout"),
        ({"rollout": {"prompts": 0}}, "prompts=0: it must be at least 1"),
        ({"rollout": {"top_p": 0.0}}, "top_p must lie in"),
        ({"rollout": {"max_new_tokens": 60}}, "is 65 tokens, and the model's context is 64"),
        ({"rollout": {"length_schedule": ((5, 70),)}}, "is 75 tokens"),
        ({"rollout": {"max_prompt": 3}}, "problem arithmetic/train/.* has a prompt of 4 tokens"),
        ({"rollout": {"template": "{question"}}, "no '{question}' in it"),
        ({"rollout": {"chat": True}}, "no chat template"),
        ({"updates": 3}, "16 responses .* updates=3"),
        ({"updates": 0}, "updates=0: it must be at least 1"),
        ({"reference_every": -1}, "reference_every=-1: it must be at least 0"),
        ({"row_length": 9}, "row_length 9 is shorter"),
        ({"eval": {"problems": 17}}, "16 test problems, 17 are asked for"),
        ({"eval": {"top_p": 1.5}}, "top_p must lie in"),
        ({"mesh": "data=9"}, "needs 9 devices"),
        ({"mesh": "data=2,model=2"}, "the one axis 'data'"),
        ({"task": TaskConfig("gsm8k")}, "gsm8k reads its problems from files"),
        ({"optim": {"lr": -1.0}}, "must not be negative"),
    ],
)
def test_mistakes_are_refused_before_anything_is_computed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        changes = {
            key: dataclasses.replace(getattr(CONFIG, key), **value)
            if isinstance(value, dict)
            else value
            for key, value in changes.items()
        }
        build(tmp_path, **changes)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    endless = Tokenizer.words(base_data.WORDS, pad=base_data.PAD)
    with pytest.raises(ValueError, match="no end token"):
        rl.build(CONFIG, tmp_path, model=MODEL, params=init_params(), tokenizer=endless)
    with pytest.raises(ValueError, match="init_from"):
        rl.build(CONFIG, tmp_path)
