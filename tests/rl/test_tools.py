"""Tool calls: what is spliced in, that it counts for nothing, and that the policy's own tokens count as before."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_rl_trainer as base

from research.core import loop, metrics
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import trainer as lm
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.sampler import Completions, Sampling
from research.lm.tokenizer import Tokenizer
from research.reinforce_pp import tool_data
from research.rewards import RewardConfig, Rewarder, Status
from research.rl import rollout
from research.rl import trainer as rl
from research.rl.advantages import AdvantageConfig
from research.rl.losses import LossConfig
from research.rl.tools import ToolConfig, Tools
from research.tasks import TaskConfig, make

TOKENIZER = tool_data.tokenizer()
SPELLED = Tokenizer.byte()  # has no tags: they are written letter by letter


class ScriptedSampler:
    """Says `scripts` token by token, asking at pauses like the sampler; what it does not get to is cut off."""

    max_prompt = 40

    def __init__(self, scripts, tokenizer=TOKENIZER):
        self.scripts, self.tokenizer = scripts, tokenizer

    def __call__(self, params, prompts, key, sampling, *, num_samples, prompt_ids, pauses=None):
        rows = []
        for row, script in enumerate(self.scripts):
            tokens, given, stopped = [], [], False
            for token in self.tokenizer.encode(script):
                tokens, given = [*tokens, token], [*given, False]
                stopped = token in sampling.stop_ids
                if pauses is not None and token in pauses.ids:
                    told = pauses.reply(row, np.array(tokens, np.int32)).tolist()
                    tokens, given = tokens + told, given + [True] * len(told)
            rows.append((tokens, given, stopped))
        lengths = np.array([len(tokens) for tokens, *_ in rows], np.int32)
        shape = (len(rows), lengths.max())
        tokens, given = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, (said, told, _) in enumerate(rows):
            tokens[row, : len(said)], given[row, : len(said)] = said, told
        logprobs = np.where(given, 0, -1.0).astype(np.float32)
        stopped = np.array([stopped for *_, stopped in rows])
        return Completions(
            tokens, lengths, logprobs, logprobs, stopped, None if pauses is None else given
        )


def said(scripts, tools=tool_data.TOOLS, tokenizer=TOKENIZER, difficulty=2):
    """Episodes of one problem whose responses the scripts are."""
    task = make("tool_arithmetic", min_difficulty=difficulty, max_difficulty=difficulty)
    rewarder = Rewarder(RewardConfig(format=0.0), task)
    sampler = ScriptedSampler(scripts, tokenizer)
    actor = rollout.Actor(sampler, tokenizer, rewarder, tools=tools)
    problem = task.problem("test", 0)
    sampling = Sampling(200, stop_ids=tokenizer.stop_ids)
    return actor({}, [problem], jax.random.key(0), sampling, len(scripts), seed=0)


END = "<|endoftext|>"


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SPELLED])
def test_results_are_spliced_in_behind_their_calls(tokenizer):
    scripts = [
        f"a > b <tool>12*34</tool> so <tool>408+1</tool><answer>409</answer>{END}",
        f"<tool>1/0</tool><tool>7</tool>{END}",
        "<tool>2*(3",
        f"12</tool>{END}",
        f"<answer>1</answer>{END}",
    ]
    episodes = said(scripts, tokenizer=tokenizer)
    assert episodes.texts == [
        "a > b <tool>12*34</tool><result>408</result> so <tool>408+1</tool><result>409</result><answer>409</answer>",
        "<tool>1/0</tool><result>error: division by zero</result><tool>7</tool><result>7</result>",
        "<tool>2*(3",
        "12</tool><result>error: no <tool></result>",
        "<answer>1</answer>",
    ]
    assert episodes.calls.tolist() == [2, 2, 0, 1, 0]
    assert episodes.failed.tolist() == [0, 1, 0, 1, 0]
    for row, script in enumerate(scripts):
        own = episodes.completions.tokens[row, episodes.completions.sampled[row]]
        assert own.tolist() == tokenizer.encode(script).tolist()  # as sampled
        assert episodes.lengths[row] == len(own)


def test_calls_beyond_the_limit_and_beyond_one_operation_are_refused():
    tools = ToolConfig(calls=2, operations=1)
    (text,) = said(["<tool>1+2*3</tool><tool>2*3</tool><tool>1+1</tool>"], tools).texts
    assert text == (
        "<tool>1+2*3</tool><result>error: too many operations</result>"
        "<tool>2*3</tool><result>6</result>"
        "<tool>1+1</tool><result>error: no calls left</result>"
    )


def test_a_result_s_tags_are_tokens_and_its_body_is_not():
    tools = Tools(ToolConfig(calls=1), TOKENIZER)
    ids = tools.splice("</result><answer>1</answer>")
    specials = [i for i in ids if i >= 256]
    assert specials == [TOKENIZER.token_id("<result>"), TOKENIZER.token_id("</result>")]
    assert TOKENIZER.decode(ids) == "<result></result><answer>1</answer></result>"
    assert tools.pause_ids == (TOKENIZER.token_id("</tool>"),)
    assert Tools(ToolConfig(calls=1), SPELLED).pause_ids == (ord(">"),)


def test_tokens_that_end_a_tag_with_more_behind_it_are_waited_for():
    """Learned merges join the end of a tag with what follows."""
    tokenizer = Tokenizer.train_bpe(["<tool>1+1</tool></b>"] * 50, 256 + 24)
    ids = tokenizer.encode("<tool>1+1</tool></b>").tolist()
    assert any(
        text.startswith(">") and len(text) > 1
        for text in tokenizer.decode_batch([[i] for i in ids])
    )
    (text,) = said(["<tool>1+1</tool></b>"], ToolConfig(calls=1), tokenizer).texts
    assert text == "<tool>1+1</tool></<result>2</result>b>"


def test_records_and_metrics_by_hand():
    problem = make("tool_arithmetic").problem("test", 0)
    right = "".join(f"<tool>{step}</tool>" for step in problem.data["steps"])
    scripts = [
        f"{right}<answer>{problem.answer}</answer>{END}",
        f"<tool>1</tool><tool>)</tool>{END}",
    ]
    episodes = said(scripts)
    assert [r.status for r in episodes.rewards] == [Status.RIGHT, Status.UNPARSED]
    assert [r.total for r in episodes.rewards] == [1.0, 0.0]
    figures, given = (
        episodes.metrics(),
        ~episodes.completions.sampled & (episodes.completions.tokens > 0),
    )
    assert figures["rollout/tools/calls"] == 2.0
    assert figures["rollout/tools/failed"] == 1 / 4
    assert figures["rollout/tools/tokens"] == given.sum() / 2
    own = [len(TOKENIZER.encode(script)) for script in scripts]
    assert figures["rollout/length"] == np.mean(own)
    good, bad = episodes.records()
    assert good["response"].count("<result>") == 2 and good["length"] == own[0]
    assert (good["calls"], good["failed_calls"], bad["failed_calls"]) == (2, 0, 1)
    without = said(scripts, ToolConfig())
    assert without.completions.given is None and without.calls is None
    assert not any("tools/" in name for name in without.metrics())
    assert "calls" not in next(without.records())


def test_groups_of_several_rounds_keep_their_calls():
    parts = [said([f"<tool>1</tool>{END}", f"a{END}"]), said([f"a{END}", f"<tool>)</tool>{END}"])]
    width = max(part.completions.tokens.shape[1] for part in parts)
    for part in parts:
        for name in ("tokens", "logprobs", "truncated_logprobs", "given"):
            value = getattr(part.completions, name)
            padded = np.pad(value, ((0, 0), (0, width - value.shape[1])))
            object.__setattr__(part.completions, name, padded)
    both = rollout.select(parts, [(1, 0), (0, 0)])
    assert both.calls.tolist() == [0, 1, 1, 0] and both.failed.tolist() == [0, 1, 0, 0]
    np.testing.assert_array_equal(both.completions.sampled[2], parts[0].completions.sampled[0])
    assert rollout.select([said([END])], [(0, 0)]).calls.tolist() == [0]


# What is learned from.


class FakeActor(base.FakeActor):
    """Episodes in which about a third of the tokens, never the first, were a tool's."""

    def __call__(self, params, problems, key, sampling, group_size, *, seed, first=0):
        options = {"seed": seed, "first": first}
        episodes = super().__call__(params, problems, key, sampling, group_size, **options)
        rng = np.random.default_rng(int(episodes.completions.tokens.sum()))
        given = rng.random(episodes.completions.tokens.shape) < 0.35
        given[:, 0] = False
        given &= np.arange(given.shape[1]) < episodes.completions.lengths[:, None]
        logprobs = np.where(given, 0, episodes.completions.logprobs)
        completions = dataclasses.replace(episodes.completions, given=given, logprobs=logprobs)
        none = np.zeros(len(given), np.int64)
        self.given[-1] = dataclasses.replace(
            episodes, completions=completions, calls=none, failed=none
        )
        return self.given[-1]


def faked(workdir, **changes):
    run = base.run_of(base.build(workdir, save_samples_every=0, **changes))
    run.actor = FakeActor(run.actor)
    return run


def own_tokens(episodes):
    """For each response the places of the tokens that the policy chose."""
    return [
        [t for t in range(n) if not row[t]]
        for n, row in zip(episodes.completions.lengths, episodes.completions.given, strict=True)
    ]


def per_place(batch, episodes, name):
    """The array of the minibatches, [N, T], by response; nan past their ends."""
    found = np.full(episodes.completions.tokens.shape, np.nan)
    for minibatch in batch["minibatches"]:
        for row, segments in enumerate(minibatch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                cells = segments == segment
                one = {"tokens": minibatch["tokens"][row, cells][None]}
                one["segment_ids"] = np.ones_like(one["tokens"])
                (place,) = base.members(one, episodes)
                n = episodes.completions.lengths[place]
                values = minibatch[name][row, cells]
                found[place, :n] = values[-n:]
                assert not values[:-n].any()
    return found


@pytest.mark.parametrize(
    ("estimator", "gamma"), [("reinforce_pp", 0.9), ("reinforce_pp_baseline", 1.0), ("grpo", 1.0)]
)
def test_returns_and_statistics_are_those_without_the_tool_s_tokens(tmp_path, estimator, gamma):
    """In float64, by loops, on the responses with every token of a tool cut out."""
    run = faked(
        tmp_path,
        estimator=estimator,
        advantage=AdvantageConfig(gamma=gamma),
        loss=LossConfig("token", kl_coef=0.0),
    )
    batch, host = run.collect(run.init(), 0)
    (episodes,) = run.actor.given
    places = own_tokens(episodes)
    rewards = np.array([r.total for r in episodes.rewards], np.float64).reshape(4, 4)
    scores = rewards - (0 if estimator == "reinforce_pp" else rewards.mean(1, keepdims=True))
    if estimator == "grpo":
        scores = scores / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    scores = scores.ravel()
    wanted = [
        [s * gamma ** (len(row) - 1 - i) for i in range(len(row))]
        for s, row in zip(scores, places, strict=True)
    ]
    everything = np.array([a for row in wanted for a in row])
    if estimator != "grpo":
        mean, deviation = everything.mean(), everything.std()
        wanted = [[(a - mean) / deviation for a in row] for row in wanted]
        assert host["advantages/mean"] == pytest.approx(mean)
        assert host["advantages/std"] == pytest.approx(deviation)
    advantages, weights = (per_place(batch, episodes, key) for key in ("advantages", "weights"))
    logprobs = per_place(batch, episodes, "sampler_logprobs")
    for row, own in enumerate(places):
        np.testing.assert_allclose(advantages[row, own], wanted[row], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(weights[row, own], 1 / len(everything), rtol=1e-6)
        others = [t for t in range(episodes.completions.lengths[row]) if t not in own]
        for array in (advantages, weights, logprobs):
            assert not array[row, others].any()
    flat = np.array([a for row in wanted for a in row])
    assert host["advantages/abs"] == pytest.approx(np.abs(flat).mean())
    assert host["rollout/length"] == pytest.approx(len(everything) / 16)


def test_an_update_is_that_of_the_policy_s_own_tokens(tmp_path):
    """The plain objective of each response, in which a tool's tokens are read and nothing more."""
    loss = LossConfig("grpo", clip_low=0.02, clip_high=0.05, kl_coef=0.1)
    run = faked(tmp_path, loss=loss, reference_every=0, updates=2)
    before = base.off_reference(run.init())
    batch, _ = run.collect(before, 0)
    (episodes,) = run.actor.given
    tokens, inside = base.unpacked(episodes)
    for row, prompt in enumerate(np.repeat(np.arange(4), 4)):
        start = len(episodes.prompts[prompt])
        told = np.flatnonzero(episodes.completions.given[row])
        inside[row, start + told] = False
    params, ref = jax.device_get((before.params, before.extra["ref_params"]))
    score = functools.partial(base.plain_logprobs, tokens=tokens, temperature=1.0)
    old, ref = score(params), score(ref)
    advantages = base.group_advantages(episodes, run.config)
    grad = jax.jit(
        jax.grad(functools.partial(base.objective, run.config), argnums=6), static_argnums=5
    )
    want = params
    for minibatch in batch["minibatches"]:
        rows = np.array(base.members(minibatch, episodes))
        grads = grad(tokens[rows], inside[rows], advantages[rows], old[rows], ref[rows], 6, want)
        want = jax.tree.map(lambda p, g: p - run.config.optim.lr * g, want, grads)
    state, device = run.step(before, batch)
    figures = metrics.to_floats(device)
    moved = max(
        np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (want, params)), strict=True)
    )
    assert moved > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * moved + 1e-7), state.params, want
    )
    # The sampler's numbers were random; the mean is over the policy's tokens alone.
    theirs = np.where(inside[:, 1:], 1, 0).sum()
    assert theirs == episodes.lengths.sum() and figures["mismatch/abs"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_policy_learns_to_call(tmp_path, base_model, staleness):
    """The base calls in half of its responses; products of two-digit numbers cannot be guessed."""
    model, params = base_model
    config = rl.Config(
        mesh="data=2",
        task=TaskConfig("tool_arithmetic", min_difficulty=1, max_difficulty=1, test_size=64),
        reward=RewardConfig(format=0.0),
        rollout=rl.RolloutConfig(
            prompts=16,
            group_size=8,
            max_prompt=8,
            max_new_tokens=32,
            tools=tool_data.TOOLS,
            staleness=staleness,
        ),
        estimator="reinforce_pp_baseline",
        scan_layers=False,
        row_length=48,
        optim=OptimConfig("adam", lr=1e-3, b2=0.95),
        eval=rl.EvalConfig(problems=64, samples=8),
        loop=LoopConfig(steps=20),
    )
    trainer = rl.build(config, tmp_path, model=model, params=params, tokenizer=TOKENIZER)
    before = trainer.evaluate(trainer.init())
    loop.run(trainer, config.loop, tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    after = lines[-1]
    assert before["pass@1"] < 0.4 and before["tools/calls"] < 0.7
    assert after["eval/pass@1"] > 0.7 and after["eval/tools/calls"] > 0.9
    assert after["eval/pass@1"] <= after["eval/tools/calls"]
    assert all(line["mismatch/max"] < 1e-4 for line in lines)
    assert (
        lines[1]["compiles"] == after["compiles"]
    )  # calls come and go, and nothing is compiled for them


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """(model, parameters) after 150 steps on the tool data."""
    task = make("tool_arithmetic", min_difficulty=1, max_difficulty=1)
    examples = tool_data.examples(TOKENIZER, task, textbook=5000, noise=8000, seed=0)
    config = lm.Config(
        mesh="data=2",
        model=DecoderConfig(
            vocab_size=TOKENIZER.vocab_size,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            mlp_size=128,
            tie_embeddings=True,
            max_position=128,
            init_std=0.1,
            scan_layers=False,
        ),
        data=DataConfig(seq_len=128, batch_size=12, shuffle=False),
        micro_rows=3,
        optim=OptimConfig(
            lr=4e-3, b2=0.98, schedule="cosine", warmup_steps=20, final_fraction=0.05
        ),
        loop=LoopConfig(steps=150),
    )
    workdir = tmp_path_factory.mktemp("base")
    trainer = lm.build(config, workdir, tokenizer=TOKENIZER, examples=examples)
    return Decoder(config.model), loop.run(trainer, config.loop, workdir).params


# Mistakes.


def test_mistakes_are_named():
    words = Tokenizer.words(["<tool>", "</tool>", "<result>", "</result>", "1", "$"], eos="$")
    with pytest.raises(
        ValueError, match="cannot write calls of a tool and their results: words outside"
    ):
        Tools(ToolConfig(calls=1), words)
    with pytest.raises(ValueError, match="calls=-1"):
        ToolConfig(calls=-1)
    with pytest.raises(ValueError, match="an opening and another, closing tag"):
        ToolConfig(calls=1, call=("<t>", "<t>"))
