"""The host's half of sampling: who waits, who sits in which slot, what came out, and who only paused."""

import dataclasses
from collections.abc import Callable

import numpy as np

from research.lm import slots as programs


@dataclasses.dataclass(frozen=True)
class Completions:
    """What was sampled, in NumPy; rows are prompt-major, sample-minor."""

    tokens: np.ndarray  # int32 [N, max_new_tokens], stop id included, then 0
    lengths: np.ndarray  # int32 [N]
    logprobs: np.ndarray  # float32 [N, max_new_tokens], over the whole vocabulary, at temperature
    truncated_logprobs: np.ndarray  # the same over what top-k, top-p, min-p, suppression left
    stopped: np.ndarray  # bool [N]; False = cut at max_new_tokens
    given: np.ndarray | None = None  # bool [N, max_new_tokens]: read, not sampled (`Pauses`)

    @property
    def sampled(self) -> np.ndarray:
        """bool [N, max_new_tokens]: the tokens that the model chose."""
        inside = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return inside if self.given is None else inside & ~self.given

    @property
    def sequences(self) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(self.tokens, self.lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class Pauses:
    """Where a sequence waits to be told something, as the result of a tool that it calls.

    ids: tokens after which it pauses. One that also ends a sequence does that.
    reply: (row of the completions, its tokens so far int32 [n]) → int array of the tokens that come
      next, which the model reads and does not choose; none at all lets it go on. What does not fit
      into max_new_tokens, with one more token after it, cuts the sequence off.
    room: most tokens of a reply; what the sampler is compiled for, so always the same number.
    """

    ids: tuple[int, ...]
    reply: Callable[[int, np.ndarray], np.ndarray]
    room: int = 128


class Run:
    """One call of a sampler: who waits, who sits where, and what came out."""

    def __init__(
        self, sampler, weights, prompts, prompt_ids, num_samples, key, policy, sampling, pauses
    ):
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
        self.since = np.zeros(shards * rows, np.int64)  # clock of its first token since `begun`
        self.begun = np.zeros(shards * rows, np.int64)  # tokens it had when it last went on
        self.count = np.zeros(shards * rows, np.int64)
        self.clock = np.zeros(shards, np.int64)
        self.head = max(map(self._bucket, self.lengths), default=0)
        self.pauses = pauses
        self.rings = sampler.rings if pauses is None else sampler.pausing_rings
        most = self.head + self.limit + (0 if pauses is None else sampler.block)
        self.full = next(r for r in self.rings if r >= min(most, self.rings[-1]))
        self.ring = 0
        shape = (self.total, self.limit)
        self.out = (
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        )
        self.out_lengths = np.zeros(self.total, np.int32)
        self.out_stopped = np.zeros(self.total, bool)
        self.out_given = None if pauses is None else np.zeros(shape, bool)

    def completions(self) -> Completions:
        while self.next < self.total or (self.owner >= 0).any():
            if self.next < self.total and (self.owner < 0).any():
                self._refill()
            self._decode()
        tokens, logprobs, truncated = self.out
        return Completions(
            tokens, self.out_lengths, logprobs, truncated, self.out_stopped, self.out_given
        )

    def _refill(self):
        """Gives the free slots to those who wait, evenly over the shards."""
        sampler, free = self.sampler, (self.owner < 0).reshape(self.sampler.shards, -1)
        # A shard's k-th free slot counts as its (taken + k)-th: the lowest are taken first.
        level = np.where(
            free, (~free).sum(1, keepdims=True) + free.cumsum(1), np.iinfo(np.int64).max
        )
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
                room = 0 if self.pauses is None else self.pauses.room
                self.slots = sampler._start(*arguments, ring=self.ring, head=self.head, room=room)
                self.clock[:] = self.head
            else:
                self.slots = sampler._insert(self.slots, *arguments)
        self.owner[slots], self.since[slots], self.count[slots] = (
            requests,
            self.clock[shards] - 1,
            1,
        )
        self.begun[slots] = 0
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
        steps, enough = min(sure or sampler.block, sampler.block), self._enough(busy)
        if self.next < self.total:
            if (
                sampler.shards > 1 and not sure
            ):  # the first shard that has enough waits for the last
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

    def _enough(self, busy):
        """How many rows of a shard must finish or pause before the others wait for the host."""
        rows = self.sampler.rows
        if self.next < self.total:
            return max(1, rows // 8)
        if self.pauses is not None:
            return max(1, busy.reshape(-1, rows).sum(1).max() // 8)
        return rows

    def _harvest(self, done, stopped):
        requests, lengths, begun = self.owner[done], self.count[done], self.begun[done]
        places = np.arange((lengths - begun).max())
        time = (self.since[done, None] + places) % self.slots.tokens.shape[0]
        rings = (self.slots.tokens, self.slots.logprobs, self.slots.truncated)
        row, place = np.nonzero(places < (lengths - begun)[:, None])
        for out, ring in zip(self.out, rings, strict=True):
            values = np.asarray(ring)[time, done[:, None]]
            out[requests[row], begun[row] + place] = values[row, place]
        self.out_lengths[requests], self.out_stopped[requests] = lengths, stopped[done]
        if self.pauses is not None:
            done = done[~self._go_on(done)]
        self.owner[done] = -1

    def _go_on(self, done):
        """Lets those that have only paused go on; returns which of `done` did, bool."""
        sampler, limit, room = self.sampler, self.limit, self.pauses.room
        resumed = np.zeros(len(done), bool)
        orders = np.zeros((2 + room, self.owner.size), np.int32)
        orders[0] = -1
        for i, slot in enumerate(done):
            request, count = self.owner[slot], self.count[slot]
            if not (
                self.out_stopped[request] and self.out[0][request, count - 1] in self.pauses.ids
            ):
                continue
            self.out_stopped[request] = False
            if count == limit:
                continue
            given = np.asarray(self.pauses.reply(int(request), self.out[0][request, :count].copy()))
            if count + given.size >= limit:
                continue
            if given.size > room:
                raise ValueError(f"a reply of {given.size} tokens, and Pauses.room is {room}")
            clock = self.clock[slot // sampler.rows]
            orders[:2, slot] = clock - self.since[slot] - (count - self.begun[slot]), given.size
            orders[2 + room - given.size :, slot] = given
            self.out_given[request, count : count + given.size] = True
            self.since[slot], self.begun[slot] = clock, count
            resumed[i] = True
        if resumed.any():
            self.slots = sampler._resume(self.slots, orders)
        return resumed

    def _grow(self, ring):
        self.slots, self.ring = self.sampler._grow(self.slots, ring=ring), ring

    def _next_ring(self, length):
        return min(self.full, next(r for r in self.rings if r > length))

    def _bucket(self, length):
        return next(b for b in self.sampler.buckets if b >= length)
