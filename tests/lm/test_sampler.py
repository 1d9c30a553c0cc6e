"""The sampler against full forwards, and against itself batched, split and refilled differently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.metrics import CompileCounter
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder, unstack
from research.lm.logprobs import token_logprobs
from research.lm.sampler import Sampler, Sampling

CONFIG = DecoderConfig(
    vocab_size=13,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=24,
    tie_embeddings=True,
    qkv_bias=True,
    max_position=64,
    init_std=0.4,
    scan_layers=False,
)
MAX_PROMPT, MAX_NEW = 20, 24
STOP = 1
SAMPLING = Sampling(MAX_NEW, temperature=0.9, stop_ids=(STOP,))


@functools.cache
def params():
    return Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@functools.cache
def sampler(slots, devices=1):
    mesh = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return Sampler(
        Decoder(CONFIG), slots=slots, max_prompt=MAX_PROMPT, max_new_tokens=MAX_NEW, mesh=mesh
    )


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 13, size=n) for n in (1, 5, 20, 3, 17, 16, 2)]


@functools.cache
def sampled(slots=4, devices=1):
    """The same 21 sequences (7 prompts, 3 samples each), however they are run."""
    return sampler(slots, devices)(params(), prompts(), jax.random.key(8), SAMPLING, num_samples=3)


def score(tokens, start, stop, temperature):
    """log p of tokens[start:stop] by one full forward."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_score(row, temperature))[0, start:stop]


@functools.partial(jax.jit, static_argnums=1)
def _score(row, temperature):
    return token_logprobs(Decoder(CONFIG), params(), row, temperature=temperature)[0]


def test_log_probabilities_are_those_of_scoring_the_tokens():
    """Four slots serve 21 sequences: ages differ, and the ring wraps several times."""
    out = sampled(slots=4)
    assert MAX_PROMPT + out.lengths.sum() / 4 > 2 * 48  # the clock passed the ring's length twice
    for i, sequence in enumerate(out.sequences):
        prompt = prompts()[i // 3]
        want = score([*prompt, *sequence], len(prompt), len(prompt) + len(sequence), 0.9)
        np.testing.assert_allclose(out.logprobs[i, : len(sequence)], want, atol=2e-5)
        np.testing.assert_array_equal(out.truncated_logprobs[i], out.logprobs[i])


def test_stop_ids_end_a_sequence_and_are_its_last_token():
    out = sampled(slots=4)
    assert 0 < out.stopped.sum() < len(out.stopped)
    for sequence, stopped, row, logprobs in zip(
        out.sequences, out.stopped, out.tokens, out.logprobs, strict=True
    ):
        assert (sequence[-1] == STOP) == stopped
        assert STOP not in sequence[:-1]
        assert stopped or len(sequence) == MAX_NEW
        assert not row[len(sequence) :].any() and not logprobs[len(sequence) :].any()


@pytest.mark.parametrize("slots, devices", [(1, 1), (32, 1), (4, 2)])
def test_the_same_sequences_come_out_however_they_are_batched(slots, devices):
    want, got = sampled(slots=4), sampled(slots, devices)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_array_equal(got.stopped, want.stopped)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_a_sequence_depends_on_its_prompt_id_and_sample_alone():
    order = [4, 0, 6]
    got = sampler(4)(
        params(),
        [prompts()[i] for i in order],
        jax.random.key(8),
        SAMPLING,
        num_samples=2,
        prompt_ids=order,
    )
    want = sampled().tokens.reshape(7, 3, -1)[order, :2].reshape(6, -1)
    np.testing.assert_array_equal(got.tokens, want)


def test_samples_prompts_and_keys_give_different_randomness():
    prompt = prompts()[1]
    sampling = Sampling(8)
    run = lambda key: sampler(4)(params(), [prompt, prompt], key, sampling, num_samples=2).tokens  # noqa: E731
    rows = np.concatenate([run(jax.random.key(0)), run(jax.random.key(1))])
    assert len({row.tobytes() for row in rows}) == 8
    np.testing.assert_array_equal(rows[:4], run(jax.random.key(0)))


def test_greedy_takes_the_best_token_of_a_full_forward():
    out = sampler(4)(params(), prompts()[:4], jax.random.key(0), Sampling(6, temperature=0.0))
    for prompt, sequence, logprobs in zip(prompts(), out.sequences, out.logprobs, strict=False):
        tokens = list(prompt)
        for _ in range(6):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(_logits(row)[0, len(tokens) - 1])))
        np.testing.assert_array_equal(sequence, tokens[len(prompt) :])
        want = score(tokens, len(prompt), len(tokens), 1.0)
        np.testing.assert_allclose(logprobs[:6], want, atol=1e-5)


@jax.jit
def _logits(row):
    return Decoder(CONFIG).apply({"params": params()}, row)


def test_sequences_have_the_model_s_distribution():
    """Both tokens of 4000 samples against the 13 x 13 joint probabilities."""
    prompt, number = prompts()[1], 4000
    out = sampler(32)(params(), [prompt], jax.random.key(3), Sampling(2), num_samples=number)
    rows = np.zeros((13, 64), np.int32)
    rows[:, : len(prompt)], rows[:, len(prompt)] = prompt, np.arange(13)
    logits = np.asarray(_logits(rows), np.float64)[:, len(prompt) - 1 : len(prompt) + 1]
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    joint = (p[:, 0].diagonal()[:, None] * p[:, 1]).ravel()
    counts = np.bincount(out.tokens @ [13, 1], minlength=169)
    likely = number * joint > 5
    expected = number * np.append(joint[likely], joint[~likely].sum())
    seen = np.append(counts[likely], counts[~likely].sum())
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = len(seen) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_truncated_log_probabilities_are_those_of_the_kept_tokens():
    sampling = Sampling(6, temperature=0.8, top_k=4, top_p=0.9, min_p=0.05, suppress_ids=(2, STOP))
    out = sampler(4)(params(), prompts()[:3], jax.random.key(0), sampling, num_samples=4)
    assert not np.isin(out.tokens, (2, STOP)).any()
    for i, sequence in enumerate(out.sequences):
        prompt = prompts()[i // 4]
        row = np.zeros((1, 64), np.int32)
        row[0, : len(prompt) + 6] = [*prompt, *sequence]
        logits = np.asarray(_logits(row), np.float64)[0, len(prompt) - 1 : len(prompt) + 5] / 0.8
        for t, z in enumerate(logits):
            order = [v for v in np.argsort(-z) if v not in (2, STOP)][:4]
            p = np.exp(z[order]) / np.exp(z[order]).sum()
            inside = (p.cumsum() - p < 0.9) & (p >= 0.05 * p[0])
            assert sequence[t] in np.asarray(order)[inside]
            want = np.log(p[order.index(sequence[t])] / p[inside].sum())
            assert out.truncated_logprobs[i, t] == pytest.approx(want, abs=1e-5)
            full = z[sequence[t]] - np.log(np.exp(z).sum())
            assert out.logprobs[i, t] == pytest.approx(full, abs=1e-5)


def test_nothing_is_compiled_twice():
    """After one pass over the shapes, settings, prompts, lengths and waves may change freely."""
    run = functools.partial(sampler(4), num_samples=3)
    run(params(), prompts(), jax.random.key(0), SAMPLING)
    counter = CompileCounter()
    for seed, sampling in enumerate(
        (
            SAMPLING,
            Sampling(MAX_NEW, temperature=0.5, stop_ids=(STOP, 5)),
            Sampling(MAX_NEW - 1, temperature=1.3),
        )
    ):
        for some in (prompts(), prompts()[::-1]):
            run(params(), some, jax.random.key(seed), sampling)
    assert counter.count == 0


def test_unstacked_parameters_and_no_prompts_are_fine():
    want = sampler(4)(params(), prompts()[:2], jax.random.key(0), Sampling(5))
    got = sampler(4)(unstack(params(), CONFIG), prompts()[:2], jax.random.key(0), Sampling(5))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    none = sampler(4)(params(), [], jax.random.key(0), Sampling(5))
    assert none.tokens.shape == (0, 5) and none.sequences == []


@pytest.mark.parametrize(
    "some, sampling, options, message",
    [
        ([np.arange(21) % 13], Sampling(2), {}, "prompt 0 has 21 tokens, more than max_prompt 20"),
        ([np.arange(3), []], Sampling(2), {}, "prompt 1 must be a non-empty"),
        ([[13]], Sampling(2), {}, r"ids outside \[0, 13\)"),
        ([[1]], Sampling(25), {}, "max_new_tokens 25 exceed this sampler's 24"),
        ([[1]], Sampling(2, stop_ids=(13,)), {}, "stop_ids"),
        ([[1]], Sampling(2), dict(num_samples=0), "num_samples"),
        ([[1]], Sampling(2), dict(prompt_ids=[1, 2]), "2 prompt_ids for 1 prompts"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(some, sampling, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(4)(None, some, jax.random.key(0), sampling, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_prompt=50), "context of 64"),
        (dict(slots=0), "at least 1"),
        (dict(slots=3, devices=2), "3 slots do not divide over 2"),
    ],
)
def test_impossible_samplers_are_refused(options, message):
    devices = options.pop("devices", 1)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    settings = dict(slots=4, max_prompt=MAX_PROMPT, max_new_tokens=MAX_NEW, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        Sampler(CONFIG, **{**settings, **options})
