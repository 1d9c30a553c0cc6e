"""The sampler's programs on one device: prefill, seat, grow, decode, resume.

B rows decode side by side, n prompts wait after prefill; V vocabulary, S ring, T prompt bucket, R
places of history, F tokens that may be given to a row. All rows write at one place of the ring (see
`Cache`). A new prompt is laid so that it ends at the write head, so that rows of any age share the
next write; a row that goes on after a pause is turned for the same reason.
"""

import flax.struct
import jax
import jax.numpy as jnp

from research.lm.attention import Cache, Memory
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder, head_kernel, unstack
from research.lm.quantize import Quantized
from research.lm.sampling import draw, uniform


class Slots(flax.struct.PyTreeNode):
    """The device's state: a row per slot, and one cache with its clock per shard."""

    cache: Cache  # with index [1]
    token: jax.Array  # [B] the newest token, not yet in the cache
    position: jax.Array  # [B] its position
    count: jax.Array  # [B] tokens sampled so far
    key: jax.Array  # [B, 2] of the row's sample, raw
    active: jax.Array  # [B]
    stopped: jax.Array  # [B]
    tokens: jax.Array  # [R, B] what was sampled, a ring over the clock
    logprobs: jax.Array  # [R, B]
    truncated: jax.Array  # [R, B]
    left: jax.Array  # [B] tokens given to the row that it has not read yet,
    given: jax.Array  # [F, B] which are the last of these; F = 0: rows never pause


class Prefix(flax.struct.PyTreeNode):
    """Prompts after prefill, each ending at the last place of its bucket."""

    layers: tuple[Memory, ...]  # k [n N, K, T] and v [n N, T, K], or a state [n H, K, K]
    positions: jax.Array  # [n, T]
    logits: jax.Array  # [n, V], of the token to come


class Weights(flax.struct.PyTreeNode):
    """Parameters as decoding wants them: per layer, in the compute dtype (norm scales stay)."""

    params: dict


def prepare(config: DecoderConfig, params) -> Weights:
    """`config` is what decoding uses: if it is not tied and params are, the head gets a copy."""
    kept = lambda path, x: isinstance(x, Quantized) or path[-1].key == "scale"  # noqa: E731
    cast = lambda path, x: x if kept(path, x) else x.astype(config.dtype)  # noqa: E731
    if "0" not in params["layers"]:
        params = unstack(params, config)
    params = jax.tree_util.tree_map_with_path(
        cast, params, is_leaf=lambda x: isinstance(x, Quantized)
    )
    if not config.tie_embeddings and "head" not in params:
        params = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    return Weights(params)


PREFILL_WHOLE = 16384  # tokens of a prompt that go through the model at once,
PREFILL_CHUNK = 1024  # and what follows them, at a time


def rows_together(length: int) -> int:
    """Prompts of this length that prefill runs at a time; on CPUs, their activations stay in cache."""
    return max(1, (512 if jax.default_backend() == "cpu" else 16384) // length)


def prefill(model: Decoder, weights: Weights, tokens, lengths) -> Prefix:
    """Runs prompts int32 `[n, T]`, each in the last `lengths` places of its row, by chunks if they are long."""
    n, T = tokens.shape
    params = weights.params
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r <= rows_together(T))
    whole = min(T, PREFILL_WHOLE)

    def run(batch):
        tokens, lengths = batch
        positions = jnp.arange(T) - (T - lengths[:, None])
        positions = jnp.where(positions < 0, -1, positions)

        def go_on(cache, part, fresh=False):
            hidden, cache = model.apply(
                {"params": params}, *part, cache=cache, fresh=fresh, return_hidden=True
            )
            return cache, hidden[:, -1]

        empty = Cache.empty(model.config, rows, T)
        cache, last = go_on(empty, (tokens[:, :whole], positions[:, :whole]), fresh=True)
        if whole < T:
            rest = (x[:, whole:].reshape(rows, -1, PREFILL_CHUNK) for x in (tokens, positions))
            cache, last = jax.lax.scan(go_on, cache, [x.swapaxes(0, 1) for x in rest])
            last = last[-1]
        logits = jnp.matmul(
            last, head_kernel(params, model.config), preferred_element_type=jnp.float32
        )
        return Prefix(cache.layers, cache.positions, logits)

    if rows == n:
        return run((tokens, lengths))
    batches = tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(run, batches))


def start(history, prefix, seats, policy, key, *, ring, head, room) -> Slots:
    """Slots at clock `head`, those with a seat occupied; `seats` as for `insert`, `room` is F."""
    B = seats.shape[1]
    zeros = lambda dtype, *shape: jnp.zeros(shape, dtype)  # noqa: E731
    source = jnp.maximum(seats[0], 0)

    def take(x):  # all heads of a row together
        return x.reshape(len(prefix.positions), -1, *x.shape[1:])[source].reshape(-1, *x.shape[1:])

    prompts = jax.tree.map(take, (prefix.layers, prefix.positions))
    layers, positions = _laid(*prompts, ring, head)
    slots = Slots(
        cache=Cache(layers, positions, jnp.full((1,), head, jnp.int32)),
        token=zeros(jnp.int32, B),
        position=zeros(jnp.int32, B),
        count=zeros(jnp.int32, B),
        key=zeros(jnp.uint32, B, 2),
        active=zeros(bool, B),
        stopped=zeros(bool, B),
        tokens=zeros(jnp.int32, history, B),
        logprobs=zeros(jnp.float32, history, B),
        truncated=zeros(jnp.float32, history, B),
        left=zeros(jnp.int32, B),
        given=zeros(jnp.int32, room, B),
    )
    return _seat(slots, prefix, seats, policy, key)


def insert(slots, prefix, seats, policy, key) -> Slots:
    """Puts prompts into slots, and draws their first tokens; the other rows stay as they are.

    seats: int32 `[4, B]`: the prompt's row in `prefix` (-1: nobody new), its length, the prompt's id
    (the bits of a uint32) and the sample's number.
    """
    cache, new = slots.cache, seats[0] >= 0
    ring, head = cache.positions.shape[1], cache.index[0]
    rows = jnp.argsort(~new)  # the new ones first

    def copy(i, old):
        row = rows[i]

        def take(x):  # all heads of a row together
            heads = x.shape[0] // prefix.positions.shape[0]
            return jax.lax.dynamic_slice_in_dim(x, seats[0, row] * heads, heads)

        def put(x, y):
            return jax.lax.dynamic_update_slice_in_dim(x, y, row * y.shape[0], 0)

        one = jax.tree.map(take, (prefix.layers, prefix.positions))
        return jax.tree.map(put, old, _laid(*one, ring, head))

    layers, positions = jax.lax.fori_loop(
        0, jnp.sum(new), copy, (cache.layers, cache.positions)
    )
    slots = slots.replace(cache=cache.replace(layers=layers, positions=positions))
    return _seat(slots, prefix, seats, policy, key)


def _laid(layers, positions, ring, head):
    """Keys, values and positions of the ring's length, turned to end just before `head`; states as they are."""
    T = positions.shape[1]

    def lay(x, axis, fill=0):
        width = [(0, ring - T if a == axis % x.ndim else 0) for a in range(x.ndim)]
        return jnp.roll(jnp.pad(x, width, constant_values=fill), head - T, axis)

    layers = (x if isinstance(x, jax.Array) else (lay(x[0], -1), lay(x[1], -2)) for x in layers)
    return tuple(layers), lay(positions, -1, -1)


def _seat(slots, prefix, seats, policy, key) -> Slots:
    """Draws the first token of the newly seated rows."""
    source, length, prompt_id, sample = seats
    new = source >= 0

    def row_key(prompt_id, sample):
        key_of = jax.random.wrap_key_data(key, impl="threefry2x32")
        key_of = jax.random.fold_in(jax.random.fold_in(key_of, prompt_id), sample)
        return jax.random.key_data(key_of)

    keys = jax.vmap(row_key)(prompt_id.astype(jnp.uint32), sample)
    count = jnp.zeros_like(slots.count)
    token, logprob, truncated = draw(
        prefix.logits[jnp.maximum(source, 0)], uniform(keys, count), policy
    )
    now = (slots.cache.index[0] - 1) % slots.tokens.shape[0]
    pick = lambda a, b: jnp.where(new.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    at = lambda ring, x: ring.at[now].set(pick(x, ring[now]))  # noqa: E731
    stopped = policy.stops_V[token]
    return slots.replace(
        token=pick(token, slots.token),
        position=pick(length, slots.position),
        count=pick(count + 1, slots.count),
        key=pick(keys, slots.key),
        active=pick(~stopped & (policy.limit > 1), slots.active),
        stopped=pick(stopped, slots.stopped),
        tokens=at(slots.tokens, token),
        logprobs=at(slots.logprobs, logprob),
        truncated=at(slots.truncated, truncated),
        left=pick(jnp.zeros_like(slots.left), slots.left),
    )


def grow(slots, *, ring) -> Slots:
    """The same cache with a longer ring; only before it has wrapped."""
    cache = slots.cache

    def lengthen(x, axis, fill=0):  # faster than jnp.pad on CPUs
        shape = list(x.shape)
        shape[axis] = ring
        return jax.lax.dynamic_update_slice(jnp.full(shape, fill, x.dtype), x, [0] * x.ndim)

    layers = (
        x if isinstance(x, jax.Array) else (lengthen(x[0], -1), lengthen(x[1], -2))
        for x in cache.layers
    )
    return slots.replace(
        cache=cache.replace(layers=tuple(layers), positions=lengthen(cache.positions, -1, -1))
    )


def resume(slots, orders) -> Slots:
    """Rows that paused go on, with tokens to read before they draw again.

    orders: int32 `[2 + F, B]`: the steps that a row sat out since its last token (-1: it does not go
    on), how many tokens it is given, and these, at the end of the column.
    """
    out, left, given = orders[0], orders[1], orders[2:]
    cache, goes_on = slots.cache, out >= 0
    rows = jnp.argsort(out <= 0)  # those that must be turned first

    def turn(i, old):
        row = rows[i]

        def move(x, axis):  # all heads of a row together
            heads = x.shape[0] // out.size
            one = jax.lax.dynamic_slice_in_dim(x, row * heads, heads)
            return jax.lax.dynamic_update_slice_in_dim(
                x, jnp.roll(one, out[row], axis), row * heads, 0
            )

        layers, positions = old
        layers = (x if isinstance(x, jax.Array) else (move(x[0], -1), move(x[1], -2)) for x in layers)
        return tuple(layers), move(positions, -1)

    layers, positions = jax.lax.fori_loop(
        0, jnp.sum(out > 0), turn, (cache.layers, cache.positions)
    )
    return slots.replace(
        cache=cache.replace(layers=layers, positions=positions),
        active=slots.active | goes_on,
        stopped=slots.stopped & ~goes_on,
        left=jnp.where(goes_on, left, slots.left),
        given=jnp.where(goes_on, given, slots.given),
    )


def decode(model: Decoder, weights: Weights, slots, policy, control) -> tuple[Slots, jax.Array]:
    """Decodes up to `control[0]` tokens a row, to clock `control[1]` at most.

    Ends early when no row is active or `control[2]` rows have finished. Also returns int32 [4, B]:
    active, count, stopped, and the clock.
    """
    steps, bound, enough = control
    history, pauses = slots.tokens.shape[0], slots.given.shape[0] > 0
    cache = slots.cache
    slots = slots.replace(cache=cache.replace(index=cache.index[0]))
    busy = jnp.sum(slots.active)

    def go_on(carry):
        step, slots = carry
        active = jnp.sum(slots.active)
        return (step < steps) & (slots.cache.index < bound) & (active > 0) & (busy - active < enough)

    def body(carry):
        step, slots = carry
        position = jnp.where(slots.active, slots.position, -1)  # of a finished row: costs no expert
        logits, cache = model.apply(
            {"params": weights.params}, slots.token[:, None], position[:, None], cache=slots.cache
        )
        token, logprob, truncated = draw(logits[:, 0], uniform(slots.key, slots.count), policy)
        stopped = slots.active & policy.stops_V[token]
        if pauses:
            reads = slots.left > 0
            place = (-slots.left) % slots.given.shape[0]
            read = jnp.take_along_axis(slots.given, place[None], axis=0)[0]
            token = jnp.where(reads, read, token)
            logprob, truncated = (jnp.where(reads, 0.0, x) for x in (logprob, truncated))
            stopped &= ~reads
            # A row that sits out keeps what it needs to go on.
            token = jnp.where(slots.active, token, slots.token)
            cache = cache.replace(layers=_kept(slots.active, cache.layers, slots.cache.layers))
            slots = slots.replace(left=slots.left - (slots.active & reads))
        now = slots.cache.index % history
        write = lambda ring, x: jax.lax.dynamic_update_slice(ring, x[None], (now, 0))  # noqa: E731
        count = slots.count + slots.active
        return step + 1, slots.replace(
            cache=cache,
            token=token,
            position=slots.position + slots.active,
            count=count,
            active=slots.active & ~stopped & (count < policy.limit),
            stopped=slots.stopped | stopped,
            tokens=write(slots.tokens, token),
            logprobs=write(slots.logprobs, logprob),
            truncated=write(slots.truncated, truncated),
        )

    _, slots = jax.lax.while_loop(go_on, body, (0, slots))
    clock = slots.cache.index
    report = jnp.stack(
        [x.astype(jnp.int32) for x in (slots.active, slots.count, slots.stopped)]
        + [jnp.full_like(slots.count, clock)]
    )
    return slots.replace(cache=slots.cache.replace(index=clock[None])), report


def _kept(active, new, old):
    """States `[B H, K, K]` of the rows that are active renewed; keys and values are new already."""

    def state(x, y):
        return jnp.where(jnp.repeat(active, len(y) // len(active))[:, None, None], x, y)

    return tuple(state(x, y) if isinstance(x, jax.Array) else x for x, y in zip(new, old, strict=True))
