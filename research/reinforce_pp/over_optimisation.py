"""Gold against proxy: what becomes of a known score when a policy is trained on a reward model's guess of it.

A request names some words, and a response is to list each of them once. How well it does is a number that a program
knows: the gold score. A reward model learns it from pairs of a base policy's responses that are labelled by the gold
score, some of them wrongly, and becomes the proxy that reinforcement learning sees (Gao et al. 2022, "Scaling Laws for
Reward Model Overoptimization"). In the base's responses more words mean more of the requested ones, so a proxy can
mistake length for worth.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.core import checkpoint, loop
from research.core import mesh as meshes
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, reward_model
from research.lm import trainer as lm
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import Reward, Status
from research.rl.reward_model import ModelRewarder, RewardModelConfig
from research.rl.rollout import Actor, Episodes
from research.tasks.base import GeneratedTask, Problem

PAD, END, ASK = "<pad>", "$", ":"
LETTERS = tuple("abcdefghijklmnop")
WORDS = (PAD, *LETTERS, ASK, END)


class Requests(GeneratedTask):
    """Problems of `min_difficulty` to `max_difficulty` different words out of `vocabulary`, in its order.

    `question` is what is asked, with `{words}` in it; `data['words']` are those of a problem. An answer is right if its
    gold score is 1: every word of the request once, and nothing else.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        test_size: int = 256,
        min_difficulty: int = 3,
        max_difficulty: int = 6,
        vocabulary: Sequence[str] = LETTERS,
        question: str = "{words} " + ASK,
        waste: float = 0.1,
    ):
        limits = (1, len(vocabulary))
        super().__init__("requests", limits, min_difficulty, max_difficulty, seed, test_size)
        self.vocabulary, self.question, self.waste = tuple(vocabulary), question, waste

    def draw(self, rng: random.Random, difficulty: int) -> list[str]:
        chosen = rng.sample(range(len(self.vocabulary)), difficulty)
        return [self.vocabulary[at] for at in sorted(chosen)]

    def canonical_problem(self, drawn: list[str]) -> str:
        return "requests: " + " ".join(drawn)

    def build(self, drawn: list[str], id: str, difficulty: int, rng: random.Random) -> Problem:
        question = self.question.replace("{words}", " ".join(drawn))
        return Problem(id, question, " ".join(drawn), difficulty, {"words": tuple(drawn)})

    def gold(self, problem: Problem, text: str) -> float:
        """Share of the requested words that are there, less `waste` for each word that is repeated or not requested."""
        wanted, said = set(problem.data["words"]), text.lower().split()
        met = wanted.intersection(word.strip(".,;!?") for word in said)
        return len(met) / len(wanted) - self.waste * (len(said) - len(met))

    def verify(self, problem: Problem, answer: str) -> bool:
        return self.gold(problem, answer) == 1.0

    def canonical(self, problem: Problem, answer: str) -> str:
        return " ".join(sorted(answer.split()))


class GoldRewarder:
    """The gold score as the reward of a `Requests` task, or (not `graded`) 1 for right and 0 for wrong answers.

    noise: standard deviation of Gaussian noise on it, which depends on (seed, place) alone; parts keep it apart.
    """

    def __init__(self, task: Requests, *, graded: bool = True, noise: float = 0.0):
        self.task, self._graded, self._noise = task, graded, noise

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        finished: Sequence[bool],
        seed: int,
    ) -> list[Reward]:
        noise = self._noise * np.random.default_rng(seed).standard_normal(len(problems))
        rewards = []
        for problem, text, ended, extra in zip(problems, completions, finished, noise, strict=True):
            score = self.task.gold(problem, text)
            right = bool(ended) and score == 1.0
            parts = {"accuracy": float(right), "format": float(ended), "score": score}
            total = (score if self._graded else float(right)) + float(extra)
            status = Status.RIGHT if right else Status.WRONG
            rewards.append(Reward(total, parts, status, self.task.canonical(problem, text)))
        return rewards

    def close(self) -> None:
        """There is nothing to end."""


# The base policy.


def demonstrations(
    task: Requests, count: int, seed: int, said: float = 0.6, strayed: float = 0.15
) -> list[tuple[str, str]]:
    """Careless answers: each word of the request with probability `said`, any word after it with `strayed`."""
    rng = random.Random(f"demonstrations/{seed}")
    pairs = []
    for index in range(count):
        problem = task.problem("train", index)
        words = []
        for word in problem.data["words"]:
            if rng.random() < said:
                words.append(word)
            if rng.random() < strayed:
                words.append(rng.choice(task.vocabulary))
        pairs.append((problem.question, " ".join(words)))
    return pairs


def base_config(seed: int, *, width: int = 48, layers: int = 2, steps: int = 400) -> lm.Config:
    """A decoder that reads `demonstrations`, rows of four or so of them at a time."""
    model = DecoderConfig(
        vocab_size=-(-len(WORDS) // 8) * 8,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        mlp_size=2 * width,
        max_position=64,
        scan_layers=False,
    )
    return lm.Config(
        seed=seed,
        model=model,
        data=DataConfig(seq_len=64, batch_size=16, seed=seed),
        optim=OptimConfig(
            lr=6e-3, b2=0.98, schedule="cosine", warmup_steps=20, final_fraction=0.05
        ),
        loop=LoopConfig(steps=steps, log_every=50),
    )


def train_base(
    config: lm.Config, task: Requests, workdir: pathlib.Path, count: int = 8000
) -> tuple[Decoder, Any, Tokenizer]:
    """(model, parameters, tokenizer) of a policy that answers requests carelessly."""
    tokenizer = Tokenizer.words(WORDS, pad=PAD, eos=END)
    pairs = demonstrations(task, count, config.seed)
    examples = []
    for prompt, response in pairs:
        parts = tokenizer.encode(prompt), tokenizer.encode(f"{response} {END}".strip())
        mask = np.repeat(np.int32([0, 1]), [len(part) for part in parts])
        examples.append({"tokens": np.concatenate(parts), "loss_mask": mask})
    trainer = lm.build(config, workdir, tokenizer=tokenizer, examples=examples)
    loop.run(trainer, config.loop, workdir, fingerprint_of=config, name="base")
    return checkpoints.load(workdir)


# The proxy.


def scored_samples(
    actor: Actor, params: Any, task: Requests, *, problems: int, samples: int, first: int, seed: int
) -> list[dict[str, Any]]:
    """{'prompt', 'response', 'score'} of `samples` responses to each of `problems` training problems, from `first`."""
    chosen = [task.problem("train", first + i) for i in range(problems)]
    key = jax.random.fold_in(jax.random.key(seed), 0x9A125)
    episodes = actor(params, chosen, key, sampling_of(actor), samples, seed=seed)
    return [
        {
            "prompt": actor.prompt(episodes.problems[row // samples]),
            "response": text,
            "score": task.gold(episodes.problems[row // samples], text),
        }
        for row, text in enumerate(episodes.texts)
    ]


def noisy_pairs(
    samples: Sequence[Mapping[str, Any]], flip: float, seed: int
) -> list[dict[str, str]]:
    """Each sample against the next one to its prompt, the better one chosen but for a share `flip` of them.

    Pairs with equal scores say nothing and are left out.
    """
    rng = np.random.default_rng([seed, 0xF11B])
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    pairs = []
    for prompt, group in by_prompt.items():
        for one, other in zip(group[::2], group[1::2], strict=False):
            if one["score"] == other["score"]:
                continue
            better, worse = (one, other) if one["score"] > other["score"] else (other, one)
            if rng.random() < flip:
                better, worse = worse, better
            pairs.append(
                {"prompt": prompt, "chosen": better["response"], "rejected": worse["response"]}
            )
    return pairs


def train_proxy(
    config: reward_model.Config,
    workdir: pathlib.Path,
    train: Sequence[Mapping[str, str]],
    held_out: Sequence[Mapping[str, str]],
    *,
    base: tuple[Decoder, Any, Tokenizer] | None = None,
) -> dict[str, float]:
    """Trains the reward model of `config` in `workdir` on pairs, from `base` or its init_from; its held-out figures."""
    workdir.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, pairs in (("train", train), ("held_out", held_out)):
        path = workdir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        sources.append(
            SourceConfig(
                str(path), prompt_key="prompt", chosen_key="chosen", rejected_key="rejected"
            )
        )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=(sources[0],)),
        eval_sources=(sources[1],),
    )
    model, params, tokenizer = base or (None, None, None)
    trainer = reward_model.build(config, workdir, model=model, params=params, tokenizer=tokenizer)
    loop.run(trainer, config.loop, workdir, fingerprint_of=config, name="proxy")
    figures = checkpoint.load_metrics(workdir)
    return {k.removeprefix("eval/"): v for k, v in figures.items() if k.startswith("eval/")}


# Measuring.


def make_actor(
    model: Decoder,
    tokenizer: Tokenizer,
    rewarder: Any,
    *,
    slots: int,
    max_prompt: int,
    max_new_tokens: int,
    template: str = "{question}",
) -> Actor:
    grid = meshes.make("data=1", jax.devices()[:1])
    sampler = Sampler(
        model, slots=slots, max_prompt=max_prompt, max_new_tokens=max_new_tokens, mesh=grid
    )
    return Actor(sampler, tokenizer, rewarder, template)


def sampling_of(actor: Actor) -> Sampling:
    return Sampling(max_new_tokens=actor.sampler.max_new_tokens, stop_ids=actor.tokenizer.stop_ids)


class Judge:
    """Figures of a policy on held-out requests, always the same ones with the same random numbers.

    gold and proxy (means over responses), kl (of whole responses, from the policy to `reference`, in nats), length in
    tokens, gold_per_token, right (share of responses that are).
    """

    def __init__(
        self,
        model: Decoder,
        actor: Actor,
        task: Requests,
        reference: Any,
        proxy: RewardModelConfig | None,
        *,
        problems: int = 128,
        samples: int = 2,
        seed: int = 0,
    ):
        self._actor, self._task, self._reference = actor, task, reference
        self._problems = [task.problem("test", i) for i in range(problems)]
        self._samples, self._seed = samples, seed
        self._proxy = None if proxy is None else ModelRewarder(proxy, actor.rewarder, devices=1)
        self._logprobs = jax.jit(
            lambda params, tokens, segments: (
                token_logprobs(model, params, tokens, None, segments).logprobs_BT
            )
        )

    def __call__(self, params: Any) -> dict[str, float]:
        params = jax.device_put(params, jax.devices()[0])
        key = jax.random.fold_in(jax.random.key(self._seed), 0x7E57)
        episodes = self._actor(
            params, self._problems, key, sampling_of(self._actor), self._samples, seed=self._seed
        )
        problems = [p for p in episodes.problems for _ in range(self._samples)]
        golds = [self._task.gold(p, t) for p, t in zip(problems, episodes.texts, strict=True)]
        lengths = episodes.completions.lengths
        figures = {
            "gold": float(np.mean(golds)),
            "length": float(lengths.mean()),
            "gold_per_token": float(np.mean(golds) / lengths.mean()),
            "right": float(np.mean([r.parts["accuracy"] for r in episodes.rewards])),
            "kl": float(np.mean(self.divergence(episodes))),
        }
        if self._proxy is not None:
            stopped = episodes.completions.stopped
            figures["proxy"] = float(np.mean(self._proxy.scores(problems, episodes.texts, stopped)))
        return figures

    def divergence(self, episodes: Episodes) -> np.ndarray:
        """[N] log π(response) - log π_ref(response), whose mean over a policy's own responses is KL(π, π_ref)."""
        lengths, size = episodes.completions.lengths, episodes.group_size
        before = np.repeat([len(prompt) for prompt in episodes.prompts], size)
        width = self._actor.sampler.max_prompt + self._actor.sampler.max_new_tokens
        tokens = np.zeros((len(lengths), width), np.int32)
        for row, (start, length) in enumerate(zip(before, lengths, strict=True)):
            tokens[row, :start] = episodes.prompts[row // size]
            tokens[row, start : start + length] = episodes.completions.tokens[row, :length]
        place = np.arange(width)
        segments = (place < (before + lengths)[:, None]).astype(np.int32)
        reference = np.asarray(self._logprobs(self._reference, tokens, segments), np.float64)
        reference = np.where((place >= before[:, None]) & (segments > 0), reference, 0.0)
        return episodes.completions.logprobs.sum(axis=1, dtype=np.float64) - reference.sum(axis=1)


def at_equal_kl(
    one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], key: str = "gold"
) -> float:
    """Mean of `key` of one run less another's over the range of sqrt(KL) that both reach, each interpolated linearly.

    Runs are figures in the order of training; where a run's KL falls back, its later figures at that KL are left out.
    NaN if the two reach no range in common.
    """
    curves = []
    for figures in (one, other):
        roots = np.sqrt([max(f["kl"], 0.0) for f in figures])
        kept = np.flatnonzero(roots >= np.maximum.accumulate(roots))
        curves.append((roots[kept], np.array([figures[i][key] for i in kept])))
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not high > low:
        return float("nan")
    grid = np.linspace(low, high, 101)
    first, second = (np.interp(grid, *curve) for curve in curves)
    return float(np.trapezoid(first - second, grid) / (high - low))
