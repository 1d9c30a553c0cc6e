"""Samples completions: batched prefill, a ring cache, and slots refilled as sequences finish.

The host decides who sits where; the device runs two programs of a closed set of shapes:

* `prefill`: prompts padded on the left to a bucket → their keys, values and last logits. A prompt is
  run once, and all its samples start from that copy.
* `decode`: up to so many tokens for all slots in one loop, ended early when all rows are done or
  enough have finished to be worth refilling.

All rows of a shard write at one slot of the ring (see `Cache`). A new prompt is copied so that it ends
at the write head, so rows of any age share the next write. The ring starts short and grows in a few
steps to its full length, as attention costs what the ring's length is.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.lm.attention import Cache
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder, head_kernel, unstack
from research.lm.sampling import Policy, Sampling, draw, uniform

__all__ = ["Completions", "Sampler", "Sampling"]

RING_STEPS = 4  # lengths the ring takes as it grows, in multiples of RING_UNIT
RING_UNIT = 16
PREFILL_TOKENS = 512  # run together on one device: their activations stay in a core's cache
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Completions:
    """What was sampled, in NumPy; rows are prompt-major, sample-minor."""

    tokens: np.ndarray  # int32 [N, max_new_tokens], stop id included, then 0
    lengths: np.ndarray  # int32 [N]
    logprobs: np.ndarray  # float32 [N, max_new_tokens], over the whole vocabulary, at temperature
    truncated_logprobs: np.ndarray  # the same over what top-k, top-p, min-p, suppression left
    stopped: np.ndarray  # bool [N]; False = cut at max_new_tokens

    @property
    def sequences(self) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(self.tokens, self.lengths, strict=True)]


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


class Prefix(flax.struct.PyTreeNode):
    """Prompts after prefill, each ending at the last place of its bucket."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]  # k [n, N, K, T], v [n, N, T, K]
    positions: jax.Array  # [n, T]
    logits: jax.Array  # [n, V], of the token to come


class Sampler:
    """Samples from a decoder with a fixed number of slots.

    Args:
      model: a `Decoder` or its config.
      slots: sequences decoded side by side, over all devices.
      max_prompt, max_new_tokens: longest prompt and completion, in tokens.
      mesh: its axis 'data' splits the slots; each shard decodes and stops by itself. None: one device.
      block: most tokens per row between two looks of the host.

    Raises:
      ValueError: lengths beyond the model's context, or slots the mesh cannot split.
    """

    def __init__(
        self,
        model: Decoder | DecoderConfig,
        *,
        slots: int,
        max_prompt: int,
        max_new_tokens: int,
        mesh: jax.sharding.Mesh | None = None,
        block: int = 64,
    ):
        self.config = model if isinstance(model, DecoderConfig) else model.config
        # CPUs are slow at a matrix that is stored transposed: give a tied head a copy of its own.
        untie = self.config.tie_embeddings and jax.default_backend() == "cpu"
        self.model = Decoder(
            dataclasses.replace(self.config, tie_embeddings=False) if untie else self.config
        )
        self.shards = 1 if mesh is None else mesh.shape["data"]
        if min(slots, max_prompt, max_new_tokens, block) < 1:
            raise ValueError("slots, max_prompt, max_new_tokens and block must be at least 1")
        if max_prompt + max_new_tokens > self.config.max_position:
            raise ValueError(
                f"max_prompt {max_prompt} + max_new_tokens {max_new_tokens} exceed the model's "
                f"context of {self.config.max_position} tokens (max_position)"
            )
        if slots % self.shards:
            raise ValueError(f"{slots} slots do not divide over {self.shards} devices on 'data'")
        self.slots, self.max_prompt, self.max_new_tokens = slots, max_prompt, max_new_tokens
        self.mesh, self.block = mesh, block
        self.rows = slots // self.shards  # per shard
        self.buckets = _buckets(max_prompt)
        self.prefill_sizes = _prefill_sizes(self.rows)
        parts = (RING_STEPS * RING_UNIT, max_prompt + max_new_tokens)
        self.rings = sorted(
            {-(-parts[1] * i // parts[0]) * RING_UNIT for i in range(1, RING_STEPS + 1)}
        )
        self._build()

    def __call__(
        self,
        params,
        prompts: Sequence[np.ndarray],
        key: jax.Array,
        sampling: Sampling,
        *,
        num_samples: int = 1,
        prompt_ids: Sequence[int] | None = None,
    ) -> Completions:
        """Samples `num_samples` completions of every prompt.

        Token t of sample s of a prompt depends on the key, the prompt's id, s and t alone, not on
        what else is sampled (up to rounding: two tokens within one ulp of a draw may swap).

        Args:
          params: the decoder's, stacked or already `unstack`ed (which saves copying them).
          prompts: int arrays, each of 1 to `max_prompt` tokens.
          key: a jax random key.
          prompt_ids: one per prompt, in [0, 2^32); by default its index.

        Raises:
          ValueError: before any work, naming the prompt or setting that is wrong.
        """
        prompts = self._checked(prompts, sampling, num_samples)
        if prompt_ids is None:
            prompt_ids = range(len(prompts))
        if len(prompt_ids) != len(prompts):
            raise ValueError(f"{len(prompt_ids)} prompt_ids for {len(prompts)} prompts")
        run = _Run(self, params, prompts, key, sampling, num_samples, np.asarray(prompt_ids))
        return run.completions()

    def _checked(self, prompts, sampling, num_samples):
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if sampling.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens {sampling.max_new_tokens} exceed this sampler's "
                f"{self.max_new_tokens}"
            )
        arrays = []
        for i, prompt in enumerate(prompts):
            prompt = np.asarray(prompt)
            if prompt.ndim != 1 or not prompt.size:
                raise ValueError(f"prompt {i} must be a non-empty 1-d array, is {prompt.shape}")
            if prompt.size > self.max_prompt:
                raise ValueError(
                    f"prompt {i} has {prompt.size} tokens, more than max_prompt {self.max_prompt}"
                )
            if not (0 <= prompt.min() and prompt.max() < self.config.vocab_size):
                raise ValueError(f"prompt {i} has ids outside [0, {self.config.vocab_size})")
            arrays.append(prompt.astype(np.int32))
        return arrays

    def _build(self):
        """Compiles nothing yet: wraps the device functions for this mesh."""
        split, whole = PartitionSpec("data"), PartitionSpec()
        timed = PartitionSpec(None, "data")
        slots = Slots(
            cache=split, token=split, position=split, count=split, key=split, active=split,
            stopped=split, tokens=timed, logprobs=timed, truncated=timed,
        )  # fmt: skip
        history = self.max_new_tokens + self.block

        def program(function, in_specs, out_specs, donate=(), static=()):
            def on_mesh(*args, **kwargs):
                return jax.shard_map(
                    functools.partial(function, **kwargs),
                    mesh=self.mesh,
                    in_specs=in_specs,
                    out_specs=out_specs,
                    check_vma=False,
                )(*args)

            chosen = function if self.mesh is None else on_mesh
            return jax.jit(chosen, donate_argnums=donate, static_argnames=static)

        bind = functools.partial
        self.prepare = jax.jit(bind(_prepare, self.model.config))
        self.prefill = program(bind(_prefill, self.model), (whole, split, split), split)
        self.start = program(
            bind(_start, self.config, history),
            (split, timed, whole, whole),
            slots,
            static=("ring", "head"),
        )
        self.insert = program(_insert, (slots, split, timed, whole, whole), slots, donate=(0,))
        self.grow = program(_grow, (slots,), slots, static=("ring",))
        self.decode = program(
            bind(_decode, self.model), (whole, slots, whole, whole), (slots, timed), donate=(1,)
        )


class _Run:
    """One call of a sampler: who waits, who sits where, and what came out."""

    def __init__(self, sampler, params, prompts, key, sampling, num_samples, prompt_ids):
        self.s, self.sampling, self.prompts = sampler, sampling, prompts
        self.num_samples, self.prompt_ids = num_samples, prompt_ids.astype(np.uint32)
        policy = Policy.of(sampling, sampler.config.vocab_size)
        if sampler.mesh is not None:
            everywhere = NamedSharding(sampler.mesh, PartitionSpec())
            params, policy, key = jax.device_put((params, policy, key), everywhere)
        else:
            policy = jax.device_put(policy)
        self.policy = policy
        self.params, self.key = sampler.prepare(params, key)

        total = len(prompts) * num_samples
        self.queue = collections.deque(range(total))
        first = {}
        self.same = [first.setdefault(p.tobytes(), i) for i, p in enumerate(prompts)]
        self.waiting = collections.Counter(p for p in self.same for _ in range(num_samples))
        self.resident = [{} for _ in range(sampler.shards)]  # prompt → (prefix, row)

        self.slots = None
        self.owner = np.full(sampler.slots, -1)  # request a slot serves; -1 = free
        self.since = np.zeros(sampler.slots, np.int64)  # clock of its first token
        self.count = np.zeros(sampler.slots, np.int64)
        self.clock = np.zeros(sampler.shards, np.int64)
        limit = sampling.max_new_tokens
        self.head = max((self._bucket(len(p)) for p in prompts), default=0)
        self.full = min(ring for ring in sampler.rings if ring >= self.head + limit)
        self.ring = 0
        self.tokens = np.zeros((total, limit), np.int32)
        self.logprobs = np.zeros((total, limit), np.float32)
        self.truncated = np.zeros((total, limit), np.float32)
        self.lengths = np.zeros(total, np.int32)
        self.stopped = np.zeros(total, bool)

    def completions(self) -> Completions:
        while self.queue or (self.owner >= 0).any():
            if self.queue and (self.owner < 0).any():
                self._refill()
            self._decode()
        return Completions(self.tokens, self.lengths, self.logprobs, self.truncated, self.stopped)

    def _refill(self):
        """Gives the free slots to those who wait, evenly over the shards."""
        if self.slots is not None and self.ring < self.full:  # from now on rows have all ages
            self._grow(self.full)
        rows = self.owner.reshape(self.s.shards, -1)
        taken = (rows >= 0).sum(1)
        quota = np.zeros(self.s.shards, int)
        for _ in range(min(len(self.queue), (rows < 0).sum())):
            quota[np.argmin(taken + quota)] += 1
        seated, missing = [], [[] for _ in rows]
        for shard, free in enumerate(quota):
            for row in np.flatnonzero(rows[shard] < 0)[:free]:
                request = self.queue.popleft()
                slot = shard * self.s.rows + row
                prompt = self.same[request // self.num_samples]
                self.owner[slot] = request
                seated.append((slot, shard, prompt))
                if prompt not in self.resident[shard] and prompt not in missing[shard]:
                    missing[shard].append(prompt)
        self._prefill(missing)
        seats = {}
        for slot, shard, prompt in seated:
            prefix, row = self.resident[shard][prompt]
            request = self.owner[slot]
            table = seats.setdefault(id(prefix), (prefix, self._no_seats()))[1]
            ids = self.prompt_ids[request // self.num_samples]
            table[:, slot] = row, len(self.prompts[prompt]), ids.view(np.int32), (
                request % self.num_samples
            )
        for prefix, table in seats.values():
            if self.slots is None:
                self.ring = self._next_ring(self.head)
                self.slots = self.s.start(
                    prefix, table, self.policy, self.key, ring=self.ring, head=self.head
                )
                self.clock[:] = self.head
            else:
                self.slots = self.s.insert(self.slots, prefix, table, self.policy, self.key)
        for slot, shard, prompt in seated:
            self.since[slot] = self.clock[shard] - 1
            self.count[slot] = 1
            self.waiting[prompt] -= 1
            if not self.waiting[prompt]:
                for residents in self.resident:
                    residents.pop(prompt, None)

    def _prefill(self, missing):
        """Runs the prompts each shard lacks, by length, in batches of the closed set of sizes."""
        for bucket in self.s.buckets:
            lists = [[p for p in ps if self._bucket(len(self.prompts[p])) == bucket] for ps in missing]
            while any(lists):
                size = next(
                    (n for n in self.s.prefill_sizes if n >= max(map(len, lists))), self.s.rows
                )
                tokens = np.zeros((self.s.shards, size, bucket), np.int32)
                lengths = np.zeros((self.s.shards, size), np.int32)
                batch = [ps[:size] for ps in lists]
                lists = [ps[size:] for ps in lists]
                for shard, row, p in ((d, i, p) for d, ps in enumerate(batch) for i, p in enumerate(ps)):
                    lengths[shard, row] = len(self.prompts[p])
                    tokens[shard, row, bucket - len(self.prompts[p]) :] = self.prompts[p]
                prefix = self.s.prefill(
                    self.params, tokens.reshape(-1, bucket), lengths.reshape(-1)
                )
                for shard, ps in enumerate(batch):
                    for row, p in enumerate(ps):
                        self.resident[shard][p] = (prefix, row)

    def _decode(self):
        """Runs until someone may have finished, or the ring must grow."""
        limit, busy = self.sampling.max_new_tokens, self.owner >= 0
        if self.ring < self.full and self.clock.max() == self.ring:
            self._grow(self._next_ring(self.ring))
        bound = self.ring if self.ring < self.full else np.iinfo(np.int32).max
        sure = (limit - self.count[busy]).min() if not self.sampling.stop_ids else 0
        steps = min(sure or self.s.block, self.s.block)
        enough = max(1, self.s.rows // 8) if self.queue else self.s.rows
        control = np.asarray([steps, bound, enough], np.int32)
        self.slots, report = self.s.decode(self.params, self.slots, self.policy, control)
        certain = min(steps, bound - self.clock.max())
        if sure > certain:  # nobody can have finished: do not wait for the device
            self.count[busy] += certain
            self.clock += certain
            return
        active, self.count, stopped, clock = np.array(report)
        self.clock = clock.reshape(self.s.shards, -1)[:, 0].astype(np.int64)
        done = np.flatnonzero(busy & ~active.astype(bool))
        if done.size:
            self._harvest(done, stopped)

    def _harvest(self, done, stopped):
        requests, lengths = self.owner[done], self.count[done]
        time = (self.since[done, None] + np.arange(lengths.max())) % self.slots.tokens.shape[0]
        valid = np.arange(lengths.max()) < lengths[:, None]
        for out, ring in (
            (self.tokens, self.slots.tokens),
            (self.logprobs, self.slots.logprobs),
            (self.truncated, self.slots.truncated),
        ):
            values = np.asarray(ring)[time, done[:, None]]
            out[requests, : lengths.max()] = np.where(valid, values, 0)
        self.lengths[requests], self.stopped[requests] = lengths, stopped[done]
        self.owner[done] = -1

    def _grow(self, ring):
        self.slots, self.ring = self.s.grow(self.slots, ring=ring), ring

    def _next_ring(self, length):
        return min(self.full, next(ring for ring in self.s.rings if ring > length))

    def _bucket(self, length):
        return next(b for b in self.s.buckets if b >= length)

    def _no_seats(self):
        return np.full((4, self.s.slots), -1, np.int32)


# What runs on a device; B, n and the clock are one shard's.


def _prepare(config, params, key):
    """Per-layer weights in the compute dtype (norm scales stay), and a raw threefry key."""
    cast = lambda path, x: x if path[-1].key == "scale" else x.astype(config.dtype)  # noqa: E731
    if "0" not in params["layers"]:
        params = unstack(params)
    params = jax.tree_util.tree_map_with_path(cast, params)
    if not config.tie_embeddings and "head" not in params:
        params = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    return params, jax.random.bits(key, (2,), jnp.uint32)


def _prefill(model, params, tokens, lengths) -> Prefix:
    n, T = tokens.shape
    cells = PREFILL_TOKENS if jax.default_backend() == "cpu" else 32 * PREFILL_TOKENS
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r <= max(1, cells // T))

    def run(batch):
        tokens, lengths = batch
        positions = jnp.arange(T) - (T - lengths[:, None])
        positions = jnp.where(positions < 0, -1, positions)
        hidden, cache = model.apply(
            {"params": params},
            tokens,
            positions,
            cache=Cache.empty(model.config, rows, T),
            return_hidden=True,
        )
        logits = jnp.matmul(
            hidden[:, -1],
            head_kernel(params, model.config),
            preferred_element_type=jnp.float32,
        )
        return Prefix(cache.layers, cache.positions, logits)

    if rows == n:
        return run((tokens, lengths))
    batches = tokens.reshape(-1, rows, T), lengths.reshape(-1, rows)
    return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), jax.lax.map(run, batches))


def _start(config, history, prefix, seats, policy, key, *, ring, head) -> Slots:
    """A full house of `seats` at clock `head`; slots without a seat are idle."""
    B = seats.shape[1]
    zeros = lambda dtype, *shape: jnp.zeros(shape, dtype)  # noqa: E731
    source = jnp.maximum(seats[0], 0)
    laid = _lay(prefix, ring, head)
    layers, positions = jax.tree.map(lambda x: x[source], (laid.layers, laid.positions))
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
    )
    return _seat(slots, prefix, seats, policy, key)


def _insert(slots, prefix, seats, policy, key) -> Slots:
    """Puts prompts where `seats` says, ending at the write head; the other rows stay."""
    cache = slots.cache
    laid = _lay(prefix, cache.positions.shape[1], cache.index[0])
    new = seats[0] >= 0
    rows = jnp.argsort(~new)  # the new ones first

    def copy(i, old):
        row = rows[i]
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, seats[0, row], 1)  # noqa: E731
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, take(y), row, 0)  # noqa: E731
        return jax.tree.map(put, old, (laid.layers, laid.positions))

    layers, positions = jax.lax.fori_loop(
        0, jnp.sum(new), copy, (cache.layers, cache.positions)
    )
    slots = slots.replace(cache=cache.replace(layers=layers, positions=positions))
    return _seat(slots, prefix, seats, policy, key)


def _lay(prefix, ring, head) -> Prefix:
    """Pads a prefix to the ring's length and turns it so that it ends just before `head`."""
    T = prefix.positions.shape[1]

    def lay(x, axis, fill=0):
        width = [(0, ring - T if a == axis % x.ndim else 0) for a in range(x.ndim)]
        return jnp.roll(jnp.pad(x, width, constant_values=fill), head - T, axis)

    layers = tuple((lay(k, -1), lay(v, -2)) for k, v in prefix.layers)
    return Prefix(layers, lay(prefix.positions, -1, -1), prefix.logits)


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
    )


def _grow(slots, *, ring) -> Slots:
    """The same cache with a longer ring; only before it has wrapped."""
    cache = slots.cache

    def lengthen(x, axis, fill=0):  # faster than jnp.pad on CPUs
        shape = list(x.shape)
        shape[axis] = ring
        return jax.lax.dynamic_update_slice(jnp.full(shape, fill, x.dtype), x, [0] * x.ndim)

    layers = tuple((lengthen(k, -1), lengthen(v, -2)) for k, v in cache.layers)
    return slots.replace(
        cache=cache.replace(layers=layers, positions=lengthen(cache.positions, -1, -1))
    )


def _decode(model, params, slots, policy, control) -> tuple[Slots, jax.Array]:
    """Decodes up to `control[0]` tokens a row, to clock `control[1]` at most.

    Ends early when no row is active or `control[2]` rows have finished. Also returns int32 [4, B]:
    active, count, stopped, and the clock.
    """
    steps, bound, enough = control
    history = slots.tokens.shape[0]
    cache = slots.cache
    slots = slots.replace(cache=cache.replace(index=cache.index[0]))
    busy = jnp.sum(slots.active)

    def go_on(carry):
        step, slots = carry
        active = jnp.sum(slots.active)
        return (step < steps) & (slots.cache.index < bound) & (active > 0) & (busy - active < enough)

    def body(carry):
        step, slots = carry
        logits, cache = model.apply(
            {"params": params}, slots.token[:, None], slots.position[:, None], cache=slots.cache
        )
        token, logprob, truncated = draw(logits[:, 0], uniform(slots.key, slots.count), policy)
        now = slots.cache.index % history
        write = lambda ring, x: jax.lax.dynamic_update_slice(ring, x[None], (now, 0))  # noqa: E731
        count = slots.count + slots.active
        stopped = slots.active & policy.stops_V[token]
        return step + 1, slots.replace(
            cache=cache,
            token=token,
            position=slots.position + 1,
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


def _buckets(longest):
    """Prompt lengths that get a program of their own: powers of two, and the longest."""
    sizes, size = [], SMALLEST_BUCKET
    while size < longest:
        sizes.append(size)
        size *= 2
    return [*sizes, longest]


def _prefill_sizes(rows):
    """Batch sizes of prefill: powers of four, and all rows."""
    sizes, size = [], 1
    while size < rows:
        sizes.append(size)
        size *= 4
    return [*sizes, rows]
