"""Sequences that pause to be told something, against generation one token at a time by full forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.metrics import CompileCounter
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.sampler import Pauses, Sampler, Sampling
from research.lm.sampling import uniform
from research.lm.seating import Run

# Keys and values are turned when a row goes on; states fade with every step that a row sits out.
CONFIG = DecoderConfig(
    vocab_size=13,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_size=24,
    max_position=64,
    init_std=0.4,
    mixers=("lightning", "softmax"),
    scan_layers=False,
)
# With a block of 16 a whole ring: not a place to spare.
MAX_PROMPT, MAX_NEW, LENGTH = 12, 36, 48
STOP, CALL, OTHER = 1, 2, 3
SAMPLING = Sampling(MAX_NEW, temperature=0.9, stop_ids=(STOP,))


def reply(row, tokens):
    """Depends on all that was said. After OTHER nothing is told; a result may hold ids that pause or stop."""
    if tokens[-1] == OTHER:
        return np.zeros(0, np.int32)
    seed = int(tokens.sum()) + len(tokens)
    return np.random.default_rng(seed).integers(0, 13, 1 + seed % 5)


ROOM = 5
PAUSES = Pauses((CALL, OTHER, STOP), reply, ROOM)  # STOP ends a sequence all the same


@functools.cache
def params():
    return Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@functools.cache
def sampler(slots, devices, block):
    mesh = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return Sampler(
        CONFIG,
        slots=slots,
        max_prompt=MAX_PROMPT,
        max_new_tokens=MAX_NEW,
        mesh=mesh,
        block=block,
    )


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 13, size=n) for n in (1, 12, 12, 3, 12)]


def run(slots=4, devices=1, block=16, *, pauses=PAUSES, sampling=SAMPLING):
    """20 sequences; rows have other ages, and the ring wraps."""
    return sampler(slots, devices, block)(
        params(), prompts(), jax.random.key(8), sampling, num_samples=4, pauses=pauses
    )


@jax.jit
def log_softmax(row):
    logits = Decoder(CONFIG).apply({"params": params()}, row[None])[0]
    return jax.nn.log_softmax(logits / SAMPLING.temperature)


NUMBER = jax.jit(lambda key, count: uniform(jax.random.key_data(key)[None], count[None])[0])


def one_by_one(prompt, prompt_id, sample, stop_ids=(STOP,)):
    """(tokens, log-probabilities, which were given, stopped): a full forward for each token, no cache, no batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(8), prompt_id), sample)
    tokens, logprobs, given, told = [], [], [], []
    while len(tokens) < MAX_NEW:
        if told:
            tokens, logprobs, given = [*tokens, told.pop(0)], [*logprobs, 0.0], [*given, True]
            continue
        row = np.zeros(LENGTH, np.int32)
        said = [*prompt, *tokens]
        row[: len(said)] = said
        log_p = np.asarray(log_softmax(row))[len(said) - 1].astype(np.float64)
        number = float(NUMBER(key, np.int32(len(tokens))))
        token = int(np.searchsorted(np.cumsum(np.exp(log_p)), number, "right"))
        tokens, logprobs, given = [*tokens, token], [*logprobs, log_p[token]], [*given, False]
        if token in stop_ids:
            return tokens, logprobs, given, True
        if token in (CALL, OTHER) and len(tokens) < MAX_NEW:
            told = reply(0, np.array(tokens)).tolist()
            if len(tokens) + len(told) >= MAX_NEW:
                break
    return tokens, logprobs, given, False


@pytest.mark.parametrize(
    ("slots", "devices", "block"),
    [
        (4, 1, 16),
        pytest.param(4, 2, 16, marks=pytest.mark.slow),
        pytest.param(20, 1, 64, marks=pytest.mark.slow),  # all at once, in a ring that grows
        pytest.param(3, 1, 64, marks=pytest.mark.slow),
    ],
)
def test_sequences_are_those_made_one_by_one(slots, devices, block):
    out = run(slots, devices, block)
    assert out.given.any(axis=1).sum() > 8 and out.stopped.any() and not out.stopped.all()
    check(out)


def test_so_are_those_that_sit_out_as_long_as_can_be(monkeypatch):
    """To the end of every block; sequences fill the ring, and only the place of a whole block is spared."""
    monkeypatch.setattr(Run, "_enough", lambda self, busy: len(busy) + 1)
    out = run(
        sampling=dataclasses.replace(SAMPLING, stop_ids=()),
        pauses=Pauses((CALL, OTHER), reply, ROOM),
    )
    assert (out.lengths == MAX_NEW).sum() > 8
    check(out, stop_ids=())


def check(out, stop_ids=(STOP,)):
    for row, sequence in enumerate(out.sequences):
        prompt_id, sample = divmod(row, 4)
        want, logprobs, given, stopped = one_by_one(
            prompts()[prompt_id], prompt_id, sample, stop_ids
        )
        assert sequence.tolist() == want
        assert out.stopped[row] == stopped
        n = len(want)
        np.testing.assert_array_equal(out.given[row, :n], given)
        np.testing.assert_allclose(out.logprobs[row, :n], logprobs, atol=1e-5)
        for rest in (out.tokens, out.logprobs, out.truncated_logprobs, out.given):
            assert not rest[row, n:].any()
        np.testing.assert_array_equal(out.sampled[row, :n], ~np.array(given))
        assert not out.sampled[row, n:].any()


def test_a_reply_is_asked_for_with_what_was_said():
    asked = []

    def recorded(row, tokens):
        asked.append((row, tokens))
        return reply(row, tokens)

    out = run(pauses=Pauses(PAUSES.ids, recorded, ROOM))
    assert len({row for row, _ in asked}) > 9
    for row, tokens in asked:
        assert tokens.tolist() == out.tokens[row, : len(tokens)].tolist()
        assert tokens[-1] in (CALL, OTHER) and not out.given[row, len(tokens) - 1]


def test_what_does_not_fit_cuts_a_sequence_off():
    long = Pauses((CALL, OTHER), lambda row, tokens: np.full(MAX_NEW, 5), ROOM)
    out, plain = run(pauses=long), run(pauses=Pauses((), reply, ROOM))
    assert not out.given.any() and not plain.given.any()
    for sequence, stopped, whole in zip(out.sequences, out.stopped, plain.sequences, strict=True):
        end = [i for i, token in enumerate(whole) if token in (CALL, OTHER)][:1]
        assert sequence.tolist() == whole[: end[0] + 1 if end else len(whole)].tolist()
        assert stopped == (sequence[-1] == STOP)


def test_a_reply_without_room_is_refused():
    long = Pauses((CALL, OTHER), lambda row, tokens: np.zeros(6, np.int32), ROOM)
    with pytest.raises(ValueError, match="a reply of 6 tokens, and Pauses.room is 5"):
        run(pauses=long)


def test_nothing_is_compiled_for_later_pauses():
    run()
    compiles = CompileCounter()
    other = Pauses(PAUSES.ids, lambda row, tokens: np.full(3, 7), ROOM)
    run(pauses=other)
    run()
    assert compiles.count == 0
