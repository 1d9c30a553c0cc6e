"""Samples completions: shared prefill, a ring cache, and slots refilled as sequences finish.

The host decides who sits where (`seating.py`); the device runs programs of a closed set of shapes (`slots.py`):

* `prefill`: prompts padded on the left to a bucket → their keys, values and last logits. A prompt is
  run once (per shard that needs it), and all its samples start from copies.
* `decode`: up to so many tokens for all slots in one loop, which ends early when all rows are done or
  enough have finished to be worth refilling.

* `resume`: rows that paused go on from the cache they have, with what the host gives them to read.

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
from research.lm.seating import Completions, Pauses, Run
from research.lm.slots import Slots, Weights

__all__ = ["Completions", "Pauses", "Sampler", "Sampling"]

RING_STEPS = 4  # lengths the ring takes as it grows,
RING_UNIT = 16  # in multiples of this many tokens,
RING_ROWS = 8  # if there are at least so many rows; below, attention costs little
SMALLEST_BUCKET = 16


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

        def rings(longest):
            lengths = (-(-longest * i // (steps * RING_UNIT)) for i in range(1, steps + 1))
            return sorted({RING_UNIT * length for length in lengths})

        # While a row sits out, at most a block, the others write over the oldest of its places.
        self.rings, self.pausing_rings = rings(longest), rings(longest + block)
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
        pauses: Pauses | None = None,
    ) -> Completions:
        """Samples `num_samples` completions of every prompt.

        Token t of sample s of a prompt depends on the key, the prompt's id, s and t alone, not on
        what else is sampled (up to rounding: two tokens within one ulp of a draw may swap).

        Args:
          params: the decoder's, or what `prepare` made of them.
          prompts: int arrays, each of 1 to `max_prompt` tokens.
          key: a jax random key.
          prompt_ids: one per prompt, in [0, 2^32); by default its index.
          pauses: where to ask for tokens that are not sampled. They count as tokens of their
            sequence, have log-probability 0, and never stop it.

        Raises:
          ValueError: before any work, naming the prompt or setting that is wrong.
        """
        prompts = self._checked(prompts, sampling, num_samples)
        ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids, np.int64)
        if len(ids) != len(prompts):
            raise ValueError(f"{len(ids)} prompt_ids for {len(prompts)} prompts")
        if ids.size and not (0 <= ids.min() and ids.max() < 2**32):
            raise ValueError("prompt_ids must lie in [0, 2^32)")
        stop_ids = sampling.stop_ids
        if pauses is not None:
            sampling = dataclasses.replace(sampling, stop_ids=(*stop_ids, *pauses.ids))
            pauses = dataclasses.replace(pauses, ids=tuple(set(pauses.ids) - set(stop_ids)))
        policy = Policy.of(sampling, self.config.vocab_size)
        weights = params if isinstance(params, Weights) else self.prepare(params)
        policy, key = self._everywhere((policy, _raw(key)))
        run = Run(self, weights, prompts, ids, num_samples, key, policy, sampling, pauses)
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
            stopped=split, tokens=timed, logprobs=timed, truncated=timed, left=split, given=timed,
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
            bind(programs.start, history),
            (split, timed, whole, whole),
            slots,
            static=("ring", "head", "room"),
        )
        self._insert = program(programs.insert, (slots, split, timed, whole, whole), slots, (0,))
        self._grow = program(programs.grow, (slots,), slots, (), ("ring",))
        self._resume = program(programs.resume, (slots, timed), slots, (0,))
        self._decode = program(
            bind(programs.decode, model), (whole, slots, whole, whole), (slots, timed), (1,)
        )


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
