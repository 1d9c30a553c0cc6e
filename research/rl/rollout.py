"""From problems to graded responses (`Actor`), and from these to packed training minibatches (`minibatches`)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from research.lm.packing import pack, pack_sequences
from research.lm.sampler import Completions, Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import Reward, Rewarder, Status, language, summarize
from research.rl import evaluation
from research.rl.evaluation import Samples, reflection_words
from research.rl.tools import ToolConfig, Tools
from research.tasks import Problem, Task


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Graded responses: `group_size` rows for each problem, in the problems' order.

    texts are the decoded responses without their end token, with the results of tools in their places;
    `completions.sampled` says which tokens the policy chose.
    calls, failed: int [N], tool calls of each response, and those without a result; None where there is no tool.
    """

    problems: list[Problem]
    prompts: list[np.ndarray]
    completions: Completions
    texts: list[str]
    rewards: list[Reward]
    group_size: int
    calls: np.ndarray | None = None
    failed: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """[N] int, tokens of each response that the policy chose."""
        return self.completions.sampled.sum(axis=1)

    @property
    def tool_use(self) -> np.ndarray | None:
        """[N, 3] int, each response's calls, failed calls and tokens of results; None where there is no tool."""
        if self.calls is None:
            return None
        given = self.completions.lengths - self.lengths
        return np.stack([self.calls, self.failed, given], axis=1)

    def of_problem(self, rows: Sequence) -> np.ndarray:
        """[P * G] per-response values as [P, G]."""
        return np.asarray(rows).reshape(len(self.problems), self.group_size)

    def samples(self) -> Samples:
        """The responses as `evaluation` measures them."""
        by_problem = self.of_problem
        return Samples(
            correct=by_problem([r.status == Status.RIGHT for r in self.rewards]),
            answers=self._lists([r.answer for r in self.rewards]),
            formatted=by_problem([r.parts["format"] > 0 for r in self.rewards]),
            lengths=by_problem(self.lengths),
            truncated=by_problem(~self.completions.stopped),
            difficulty=np.array([p.difficulty for p in self.problems]),
            texts=self._lists(self.texts),
        )

    def graded(self) -> "Graded":
        """All that `measure` needs."""
        samples = self.samples()
        words = [[reflection_words(text) for text in row] for row in samples.texts]
        shares = [
            language.consistency(
                self.problems[row // self.group_size].question, language.thought_of(text)
            )
            for row, text in enumerate(self.texts)
        ]
        known = [share for share in shares if share is not None]
        words_only = dataclasses.replace(samples, texts=words)
        return Graded(words_only, self.rewards, known, self.tool_use)

    def metrics(self) -> dict[str, float]:
        """`measure` of these responses."""
        return measure([self.graded()])

    def mixed(self) -> np.ndarray:
        """[P] bool: problems with both right responses and others (DAPO: 0 < accuracy < 1)."""
        share = self.of_problem([r.status == Status.RIGHT for r in self.rewards]).mean(axis=1)
        return (share > 0) & (share < 1)

    def _lists(self, rows: list) -> list[list]:
        size = self.group_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def records(self) -> Iterator[dict]:
        """One JSON-ready record for each response: question, response, reward and status."""
        lengths = self.lengths
        for row, (text, reward) in enumerate(zip(self.texts, self.rewards, strict=True)):
            problem = self.problems[row // self.group_size]
            record = {
                "id": problem.id,
                "question": problem.question,
                "answer": problem.answer,
                "difficulty": problem.difficulty,
                "response": text,
                "length": int(lengths[row]),
                "stopped": bool(self.completions.stopped[row]),
                "reward": reward.total,
                "parts": dict(reward.parts),
                "status": str(reward.status),
            }
            if self.calls is not None:
                record |= {"calls": int(self.calls[row]), "failed_calls": int(self.failed[row])}
            yield record


def select(parts: Sequence[Episodes], chosen: Sequence[tuple[int, int]]) -> Episodes:
    """The groups `chosen`, as (which part, which of its problems), of parts with equally large groups."""
    size = parts[0].group_size
    rows = [(part, row) for part, p in chosen for row in range(p * size, (p + 1) * size)]

    def chosen_rows(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return None if arrays[0] is None else np.stack([arrays[part][row] for part, row in rows])

    completions = {
        field.name: chosen_rows([getattr(part.completions, field.name) for part in parts])
        for field in dataclasses.fields(Completions)
    }
    return Episodes(
        problems=[parts[part].problems[p] for part, p in chosen],
        prompts=[parts[part].prompts[p] for part, p in chosen],
        completions=Completions(**completions),
        texts=[parts[part].texts[row] for part, row in rows],
        rewards=[parts[part].rewards[row] for part, row in rows],
        group_size=size,
        calls=chosen_rows([part.calls for part in parts]),
        failed=chosen_rows([part.failed for part in parts]),
    )


@dataclasses.dataclass(frozen=True)
class Graded:
    """What is measured of responses, without the responses: small enough to send between processes.

    `samples.texts` hold the reflection words alone; `language` the shares of the responses to questions with words.
    """

    samples: Samples
    rewards: list[Reward]
    language: list[float]
    tool_use: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The groups to learn from (`episodes`), all that were sampled for them (`seen`), and how.

    greedy: [N] float64, reward of the greedy response to the problem of each response, where the estimator asks for it.
    rounds: of sampling, up to and with this rollout.
    """

    episodes: Episodes
    seen: list[Episodes]
    greedy: np.ndarray | None
    rounds: int
    metrics: dict[str, float]
    seconds: float


def measure(parts: Sequence[Graded]) -> dict[str, float]:
    """All that is logged of a rollout: rewards, statuses, accuracy, lengths, reflection, language."""
    samples = evaluation.join([part.samples for part in parts])
    metrics = summarize([reward for part in parts for reward in part.rewards])
    figures = evaluation.report(samples, k=samples.correct.shape[1])
    metrics |= {f"rollout/{key}": value for key, value in figures.items()}
    if known := [share for part in parts for share in part.language]:
        metrics["rollout/language"] = float(np.mean(known))
    used = measure_tools([part.tool_use for part in parts])
    return metrics | {f"rollout/{key}": value for key, value in used.items()}


def measure_tools(parts: Sequence[np.ndarray | None]) -> dict[str, float]:
    """Means over responses of `tool_use`: calls, tokens of results; and the share of the calls that failed."""
    if parts[0] is None:
        return {}
    calls, failed, tokens = np.concatenate(parts).mean(axis=0)
    figures = {"tools/calls": float(calls), "tools/tokens": float(tokens)}
    return figures | ({"tools/failed": float(failed / calls)} if calls else {})


class Actor:
    """Answers problems with a policy and grades the answers.

    Args:
      template: prompt text with `{question}` in it.
      chat: wrap that text as a user's turn in the tokenizer's chat template.
      tools: what the policy may call in the middle of a response; results count towards the length limit.

    Raises ValueError for a template without the question, or a tokenizer that cannot write what a tool says.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        rewarder: Rewarder,
        template: str = "{question}",
        chat: bool = False,
        tools: ToolConfig = ToolConfig(),
    ):
        if "{question}" not in template:
            raise ValueError(f"the prompt template {template!r} has no '{{question}}' in it")
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.rewarder = rewarder
        self._template = template
        self._chat = chat
        self.tools = Tools(tools, tokenizer) if tools.calls else None

    def prompt(self, problem: Problem) -> str:
        text = self._template.replace("{question}", problem.question)
        if self._chat:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return text

    def _encode(self, problems: Sequence[Problem]) -> list[np.ndarray]:
        encode = self.tokenizer.encode_batch if self._chat else self.tokenizer.encode_prompts
        return encode([self.prompt(problem) for problem in problems])

    def check(self, task: Task, split: str, count: int | None = None) -> None:
        """Refuses a prompt that does not fit, before any work: among the first `count`, or all of a finite split.

        Raises ValueError naming the problem, its length and the limit, and for a split with fewer than `count`.
        """
        if count:
            _check_size(task, split, count)
        count = count or task.size(split) or 64  # of an endless split, a sample
        problems = [task.problem(split, i) for i in range(count)]
        prompts = self._encode(problems)
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) > self.sampler.max_prompt:
                raise ValueError(
                    f"{split} problem {problem.id} has a prompt of {len(prompt)} tokens, and max_prompt is "
                    f"{self.sampler.max_prompt}; raise max_prompt (context permitting) or leave the problem out"
                )

    def __call__(
        self,
        params,
        problems: Sequence[Problem],
        key: jax.Array,
        sampling: Sampling,
        group_size: int,
        *,
        seed: int,
        first: int = 0,
    ) -> Episodes:
        """Samples `group_size` responses to each problem and grades them.

        What is drawn for a problem depends on (key, first + its place, sample) alone; `seed` feeds the random-reward
        control in the same way. `first` tells apart problems that different processes answer.
        """
        prompts = self._encode(problems)
        options, calls, failed = {}, None, None
        if self.tools is not None:
            session = self.tools.session(len(problems) * group_size)
            options, calls, failed = {"pauses": session.pauses}, session.calls, session.failed
        completions = self.sampler(
            params,
            prompts,
            key,
            sampling,
            num_samples=group_size,
            prompt_ids=range(first, first + len(problems)),
            **options,
        )
        bodies = [
            ids[:-1] if stopped else ids
            for ids, stopped in zip(completions.sequences, completions.stopped, strict=True)
        ]
        texts = self.tokenizer.decode_batch(bodies)
        repeated = [p for p in problems for _ in range(group_size)]
        rewards = self.rewarder(repeated, texts, completions.stopped, seed=seed)
        return Episodes(
            list(problems), prompts, completions, texts, rewards, group_size, calls, failed
        )


def evaluate(
    actor: Actor,
    params,
    task: Task,
    *,
    problems: int,
    samples: int,
    sampling: Sampling,
    seed: int,
    split: str = "test",
) -> tuple[dict[str, float], Episodes]:
    """`evaluation.report` over `samples` responses to the first `problems` of a split, and the responses.

    The same seed draws the same random numbers, whatever the parameters: two policies are compared on common noise.
    Raises ValueError for a split with fewer problems.
    """
    _check_size(task, split, problems)
    chosen = [task.problem(split, i) for i in range(problems)]
    key = jax.random.fold_in(jax.random.key(seed), 0x7E57)
    episodes = actor(params, chosen, key, sampling, samples, seed=seed)
    figures = evaluation.report(episodes.samples(), k=samples)
    return figures | measure_tools([episodes.tool_use]), episodes


def minibatches(
    episodes: Episodes,
    order: np.ndarray,
    per_token: Mapping[str, np.ndarray],
    weights: np.ndarray,
    *,
    row_length: int,
    capacity: int,
    devices: int,
    micro_rows: int,
) -> dict[str, np.ndarray]:
    """Packs the responses `order` (row numbers, one minibatch) into training rows for `devices`.

    Whole sequences (prompt and response) are packed best-fit into rows of `row_length`, the rows dealt to the
    devices in turn. The result has a fixed shape, `capacity` rows for each device, and `num_micro` [devices]
    tells how many micro-batches of `micro_rows` hold anything: cost follows the tokens, and shapes never change.

    `per_token` holds arrays [N, at least the longest response], as the advantages, and `weights` [N] what each token of
    a response weighs that the policy chose; the others, a tool's, weigh nothing.

    Returns: tokens, segment_ids, positions int32, weights and sampler_logprobs float32, and the arrays of `per_token`,
      all [devices * capacity, row_length]; num_micro int32 [devices]. Outside the responses all but the first three are
      zero.
    """
    sequences, sampled = [], episodes.completions.sampled
    for row in order:
        prompt = episodes.prompts[row // episodes.group_size]
        length = int(episodes.completions.lengths[row])
        response = episodes.completions.tokens[row, :length]
        before = len(prompt)
        columns = {
            "weights": np.where(sampled[row, :length], np.float32(weights[row]), np.float32(0)),
            "sampler_logprobs": episodes.completions.logprobs[row, :length],
            **{key: values[row, :length] for key, values in per_token.items()},
        }
        sequences.append(
            {"tokens": np.concatenate([prompt, response], dtype=np.int32)}
            | {key: np.pad(values, (before, 0)) for key, values in columns.items()}
        )
    best_fit = pack([len(s["tokens"]) for s in sequences], row_length)
    share = -(-best_fit.num_rows // devices)
    dealt = best_fit._replace(
        row=best_fit.row % devices * capacity + best_fit.row // devices, num_rows=devices * capacity
    )
    batch = pack_sequences(sequences, row_length, assignment=dealt)
    batch["num_micro"] = np.full(devices, -(-share // micro_rows), np.int32)
    return batch


def rows_needed(
    sequences: int, longest: int, row_length: int, devices: int, micro_rows: int
) -> int:
    """Rows for each device that hold `sequences` of at most `longest` tokens, however they fall.

    Best-fit leaves at most one row half empty, so N tokens never need more than 2N / row_length + 1 rows; nor more than
    one row for every floor(row_length / longest) sequences.
    """
    if longest > row_length:
        raise ValueError(
            f"row_length {row_length} is shorter than prompt and response together, {longest}"
        )
    rows = min(-(-sequences // (row_length // longest)), 2 * sequences * longest // row_length + 1)
    return -(-rows // (devices * micro_rows)) * micro_rows


def _check_size(task: Task, split: str, count: int) -> None:
    size = task.size(split)
    if size == 0 < count:
        task.problem(split, 0)  # raises an error that says what to give it
    if size is not None and size < count:
        raise ValueError(
            f"{task.name} has {size} {split} problems, {count} are asked for; ask for fewer, or give it a larger "
            f"{split} set"
        )


def local_devices(mesh: Mesh) -> int:
    """Devices of the mesh that this process feeds."""
    return sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
