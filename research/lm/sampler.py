"""Samples completions: shared prefill, a ring cache, and slots refilled as sequences finish.

The host decides who sits where; the device runs programs of a closed set of shapes (`slots.py`):

* `prefill`: prompts padded on the left to a bucket → their keys, values and last logits. A prompt is
  run once (per shard that needs it), and all its samples start from copies.
* `decode`: up to so many tokens for all slots in one loop, which ends early when all rows are done or
  enough have finished to be worth refilling.

The cache is a ring all rows of a shard write at together. It starts short and grows in a few steps to
its full length, because attention costs what the ring's length is.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.lm import slots as programs
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.sampling import Policy, Sampling
from research.lm.slots import Slots, Weights

__all__ = ["Completions", "Sampler", "Sampling"]

RING_STEPS = 4  # lengths the ring takes as it grows,
RING_UNIT = 16  # in multiples of this many tokens,
RING_ROWS = 8  # if there are at least so many rows; below, attention costs little
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


class Sampler:
    """Samples from a decoder with a fixed number of slots.

    Args:
      model: a `Decoder` or its config.
      slots: sequences decoded side by side, over all devices. With more samples than slots, those
        that finish make room; a fraction of the samples per call keeps the batch full to the end.
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
        self.shards = 1 if mesh is None else mesh.shape["data"]
        if min(slots, max_prompt, max_new_tokens, block) < 1:
            raise ValueError("slots, max_prompt, max_new_tokens and block must be at least 1")
        longest = max_prompt + max_new_tokens
        if longest > self.config.max_position:
            raise ValueError(
                f"max_prompt {max_prompt} + max_new_tokens {max_new_tokens} exceed the model's "
                f"context of {self.config.max_position} tokens (max_position)"
            )
        if slots % self.shards:
            raise ValueError(f"{slots} slots do not divide over {self.shards} devices on 'data'")
        self.slots, self.max_prompt, self.max_new_tokens = slots, max_prompt, max_new_tokens
        self.mesh, self.block = mesh, block
        self.rows = slots // self.shards  # per shard
        self.buckets = _powers(2, SMALLEST_BUCKET, max_prompt)
        if max_prompt > programs.PREFILL_WHOLE:  # whole chunks
            self.buckets[-1] += -max_prompt % programs.PREFILL_CHUNK
        longest += self.buckets[-1] - max_prompt
        self.prefill_sizes = _powers(4, 1, self.rows)
        steps = RING_STEPS if self.rows >= RING_ROWS else 1
        lengths = (-(-longest * i // (steps * RING_UNIT)) for i in range(1, steps + 1))
        self.rings = sorted({RING_UNIT * length for length in lengths})
        self._build()

    def prepare(self, params) -> Weights:
        """The decoder's parameters, stacked or not, laid out for decoding, where it will happen.

        Sampling does this by itself; do it once to sample many times from the same parameters.
        """
        return self._prepare(self._everywhere(params))

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
          params: the decoder's, or what `prepare` made of them.
          prompts: int arrays, each of 1 to `max_prompt` tokens.
          key: a jax random key.
          prompt_ids: one per prompt, in [0, 2^32); by default its index.

        Raises:
          ValueError: before any work, naming the prompt or setting that is wrong.
        """
        prompts = self._checked(prompts, sampling, num_samples)
        ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids, np.int64)
        if len(ids) != len(prompts):
            raise ValueError(f"{len(ids)} prompt_ids for {len(prompts)} prompts")
        if ids.size and not (0 <= ids.min() and ids.max() < 2**32):
            raise ValueError("prompt_ids must lie in [0, 2^32)")
        policy = Policy.of(sampling, self.config.vocab_size)
        weights = params if isinstance(params, Weights) else self.prepare(params)
        policy, key = self._everywhere((policy, _raw(key)))
        return _Run(self, weights, prompts, ids, num_samples, key, policy, sampling).completions()

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

    def _everywhere(self, tree):
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _build(self):
        """The device's programs for this mesh, compiled when first used."""
        # CPUs are slow at a matrix that is stored transposed: give a tied head a copy of its own.
        untie = self.config.tie_embeddings and jax.default_backend() == "cpu"
        config = dataclasses.replace(self.config, tie_embeddings=False) if untie else self.config
        model, bind = Decoder(config), functools.partial
        split, whole = PartitionSpec("data"), PartitionSpec()
        timed = PartitionSpec(None, "data")
        slots = Slots(
            cache=split, token=split, position=split, count=split, key=split, active=split,
            stopped=split, tokens=timed, logprobs=timed, truncated=timed,
        )  # fmt: skip

        def program(function, in_specs, out_specs, donate=(), static=()):
            def on_mesh(*args, **kwargs):
                return jax.shard_map(
                    bind(function, **kwargs),
                    mesh=self.mesh,
                    in_specs=in_specs,
                    out_specs=out_specs,
                    check_vma=False,
                )(*args)

            chosen = function if self.mesh is None else on_mesh
            return jax.jit(chosen, donate_argnums=donate, static_argnames=static)

        history = self.max_new_tokens + self.block
        self._prepare = jax.jit(bind(programs.prepare, config))
        self._prefill = program(bind(programs.prefill, model), (whole, split, split), split)
        self._start = program(
            bind(programs.start, history), (split, timed, whole, whole), slots, (), ("ring", "head")
        )
        self._insert = program(programs.insert, (slots, split, timed, whole, whole), slots, (0,))
        self._grow = program(programs.grow, (slots,), slots, (), ("ring",))
        self._decode = program(
            bind(programs.decode, model), (whole, slots, whole, whole), (slots, timed), (1,)
        )


class _Run:
    """One call of a sampler: who waits, who sits where, and what came out."""

    def __init__(self, sampler, weights, prompts, prompt_ids, num_samples, key, policy, sampling):
        self.sampler, self.weights, self.key, self.policy = sampler, weights, key, policy
        self.limit, self.can_stop = sampling.max_new_tokens, bool(sampling.stop_ids)
        self.num_samples = num_samples
        self.prompts, self.lengths = prompts, np.asarray([p.size for p in prompts], np.int64)
        self.prompt_ids = prompt_ids.astype(np.uint32).view(np.int32)
        first = {}
        same = [first.setdefault(p.tobytes(), i) for i, p in enumerate(prompts)]
        self.prompt_of = np.repeat(np.asarray(same, np.int64), num_samples)  # by request
        self.id_of = np.repeat(self.prompt_ids, num_samples)
        self.sample_of = np.tile(np.arange(num_samples, dtype=np.int32), len(prompts))
        self.total, self.next = self.prompt_of.size, 0  # requests; the first that waits
        last = np.zeros(len(prompts), np.int64)
        np.maximum.at(last, self.prompt_of, np.arange(self.total))
        self.last_use = last  # of a prompt: the last request that needs its prefix

        shards, rows = sampler.shards, sampler.rows
        self.prefixes: list = []
        self.prefix_of = np.full((shards, len(prompts), 2), -1)  # number in the list, row; -1: none
        self.slots = None
        self.owner = np.full(shards * rows, -1)  # request a slot serves; -1 = free
        self.since = np.zeros(shards * rows, np.int64)  # clock of its first token
        self.count = np.zeros(shards * rows, np.int64)
        self.clock = np.zeros(shards, np.int64)
        self.head = max(map(self._bucket, self.lengths), default=0)
        self.full = next(r for r in sampler.rings if r >= min(self.head + self.limit, sampler.rings[-1]))
        self.ring = 0
        shape = (self.total, self.limit)
        self.out = (np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
        self.out_lengths = np.zeros(self.total, np.int32)
        self.out_stopped = np.zeros(self.total, bool)

    def completions(self) -> Completions:
        while self.next < self.total or (self.owner >= 0).any():
            if self.next < self.total and (self.owner < 0).any():
                self._refill()
            self._decode()
        tokens, logprobs, truncated = self.out
        return Completions(tokens, self.out_lengths, logprobs, truncated, self.out_stopped)

    def _refill(self):
        """Gives the free slots to those who wait, evenly over the shards."""
        sampler, free = self.sampler, (self.owner < 0).reshape(self.sampler.shards, -1)
        # A shard's k-th free slot counts as its (taken + k)-th: the lowest are taken first.
        level = np.where(free, (~free).sum(1, keepdims=True) + free.cumsum(1), np.iinfo(np.int64).max)
        number = min(self.total - self.next, free.sum())
        slots = np.sort(np.argsort(level.ravel(), kind="stable")[:number])
        requests = np.arange(self.next, self.next + number)
        self.next += number
        shards, prompts = slots // sampler.rows, self.prompt_of[requests]
        self._prefill(shards, prompts)
        source = self.prefix_of[shards, prompts]
        if self.slots is not None and self.ring < self.full:  # from now on rows have all ages
            self._grow(self.full)
        for number in np.unique(source[:, 0]):
            mine = source[:, 0] == number
            seats = np.full((4, sampler.slots), -1, np.int32)
            seats[:, slots[mine]] = (
                source[mine, 1],
                self.lengths[prompts[mine]],
                self.id_of[requests[mine]],
                self.sample_of[requests[mine]],
            )
            arguments = (self.prefixes[number], seats, self.policy, self.key)
            if self.slots is None:
                self.ring = self._next_ring(self.head)
                self.slots = sampler._start(*arguments, ring=self.ring, head=self.head)
                self.clock[:] = self.head
            else:
                self.slots = sampler._insert(self.slots, *arguments)
        self.owner[slots], self.since[slots], self.count[slots] = requests, self.clock[shards] - 1, 1
        self.prefix_of[:, self.last_use < self.next] = -1
        for number in range(len(self.prefixes)):
            if not (self.prefix_of[:, :, 0] == number).any():
                self.prefixes[number] = None

    def _prefill(self, shards, prompts):
        """Runs the prompts that their shards lack, by length, in batches of few sizes."""
        sampler = self.sampler
        lacking = np.unique(
            np.stack([shards, prompts], 1)[self.prefix_of[shards, prompts, 0] < 0], axis=0
        )
        for bucket in sampler.buckets:
            fits = np.asarray([self._bucket(self.lengths[p]) == bucket for _, p in lacking], bool)
            lists = [list(lacking[fits & (lacking[:, 0] == d), 1]) for d in range(sampler.shards)]
            if any(lists) and self.num_samples >= sampler.shards:  # every shard may need any prompt
                lists = [self._with_next(shard, some, bucket) for shard, some in enumerate(lists)]
            while longest := max(map(len, lists)):
                size = next((n for n in sampler.prefill_sizes if n >= longest), sampler.rows)
                tokens = np.zeros((sampler.shards, size, bucket), np.int32)
                lengths = np.zeros((sampler.shards, size), np.int32)
                for shard, some in enumerate(lists):
                    for row, p in enumerate(some[:size]):
                        lengths[shard, row] = self.lengths[p]
                        tokens[shard, row, bucket - self.lengths[p] :] = self.prompts[p]
                        self.prefix_of[shard, p] = len(self.prefixes), row
                lists = [some[size:] for some in lists]
                tokens, lengths = tokens.reshape(-1, bucket), lengths.reshape(-1)
                self.prefixes.append(sampler._prefill(self.weights, tokens, lengths))

    def _with_next(self, shard, some, bucket):
        """`some` prompts and as many that will be needed next as are run together at no loss."""
        number = min(self.sampler.rows, programs.rows_together(bucket))
        waiting = self.prompt_of[self.next : self.next + number * self.num_samples]
        for p in dict.fromkeys(waiting.tolist()):
            if len(some) >= number:
                break
            if self.prefix_of[shard, p, 0] < 0 and self._bucket(self.lengths[p]) == bucket:
                some = some if p in some else [*some, p]
        return some

    def _decode(self):
        """Runs until somebody may have finished, or the ring must grow."""
        sampler, busy = self.sampler, self.owner >= 0
        if self.ring < self.full and self.clock.max() == self.ring:
            self._grow(self._next_ring(self.ring))
        bound = self.ring if self.ring < self.full else np.iinfo(np.int32).max
        sure = 0 if self.can_stop else (self.limit - self.count[busy]).min()
        steps, enough = min(sure or sampler.block, sampler.block), sampler.rows
        if self.next < self.total:
            enough = max(1, sampler.rows // 8)
            if sampler.shards > 1 and not sure:  # the first shard that has enough waits for the last
                steps = min(steps, 16)
        control = np.asarray([steps, bound, enough], np.int32)
        self.slots, report = sampler._decode(self.weights, self.slots, self.policy, control)
        taken = min(steps, bound - self.clock.max())
        if sure > taken:  # nobody can have finished: do not wait for the device
            self.count[busy] += taken
            self.clock += taken
            return
        active, count, stopped, clock = np.asarray(report)
        self.count[:] = count
        self.clock[:] = clock[:: sampler.rows]
        done = np.flatnonzero(busy & (active == 0))
        if done.size:
            self._harvest(done, stopped)

    def _harvest(self, done, stopped):
        requests, lengths = self.owner[done], self.count[done]
        places = np.arange(lengths.max())
        time = (self.since[done, None] + places) % self.slots.tokens.shape[0]
        rings = (self.slots.tokens, self.slots.logprobs, self.slots.truncated)
        for out, ring in zip(self.out, rings, strict=True):
            values = np.asarray(ring)[time, done[:, None]]
            out[requests, : places.size] = np.where(places < lengths[:, None], values, 0)
        self.out_lengths[requests], self.out_stopped[requests] = lengths, stopped[done]
        self.owner[done] = -1

    def _grow(self, ring):
        self.slots, self.ring = self.sampler._grow(self.slots, ring=ring), ring

    def _next_ring(self, length):
        return min(self.full, next(r for r in self.sampler.rings if r > length))

    def _bucket(self, length):
        return next(b for b in self.sampler.buckets if b >= length)


def _raw(key):
    """The two words of a threefry key, whatever the key's kind."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)


def _powers(factor, smallest, largest):
    """Powers of `factor` times `smallest` below `largest`, and `largest`: the sizes we compile."""
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return [*sizes, largest]
