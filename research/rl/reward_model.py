"""A reward model's score as the reward of a rollout, alone or beside what a program can check.

What the verifier says stays known as the gold reward, whatever is trained on: with both logged, `reward/proxy` and
`reward/gold`, one sees a policy exploit its reward model (Gao et al. 2022, "Scaling Laws for Reward Model
Overoptimization").
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from research.core import checkpoint
from research.core import mesh as meshes
from research.lm import reward_scorer
from research.lm.examples import Tokenize
from research.rewards import Reward, Rewarder
from research.tasks import Problem


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """reward = weight * clip(score) + verifier * (the reward that `RewardConfig` speaks of).

    path: the run of a reward model; empty: none, and the reward is the verifier's.
    step: of its checkpoints; None: the newest.
    template: the text that responses answer, with `{question}` in it, as the reward model was trained to see it.
    weight, verifier: see above. Where one of the two judges, the other's weight is 0.
    normalise: scores to mean 0 and deviation 1 over the held-out data of the reward model's own run.
    clip: scores, normalised or not, are clipped to +- this (OpenRLHF's 10; None: not).
    micro_rows: rows of packed responses that a device scores at a time.
    dtype: in which the reward model is run; None: its own.
    """

    path: str = ""
    step: int | None = None
    template: str = "{question}"
    weight: float = 1.0
    verifier: float = 0.0
    normalise: bool = False
    clip: float | None = 10.0
    micro_rows: int = 8
    dtype: str | None = None

    def __post_init__(self):
        if self.micro_rows < 1 or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"reward_model: micro_rows={self.micro_rows} must be at least 1 and clip={self.clip} positive"
            )
        if "{question}" not in self.template:
            raise ValueError(f"reward_model.template={self.template!r} has no '{{question}}' in it")


class ModelRewarder:
    """A `Rewarder` whose totals come from a reward model; parts 'gold' and 'proxy' hold both, before weights.

    The reward model tokenizes texts by itself, so its tokenizer need not be the policy's. A response that the length
    limit cut off has no end token, and is scored at its last one. One beyond the reward model's context has no score,
    and so no finite reward: it is left out of the update and counted in `rollout/dropped`.
    """

    def __init__(self, config: RewardModelConfig, rewarder: Rewarder, devices: int | None = None):
        """devices: how many of this process's score; None: all.

        Raises ValueError if `config.path` is no reward model, or has nothing to normalise by.
        """
        model = reward_scorer.load(config.path, config.step)
        self.config, self.task, self._rewarder = config, rewarder.task, rewarder
        self._tokenize = Tokenize(model.tokenizer, model.chat)
        self._shift, self._scale = (
            moments(config.path, config.step) if config.normalise else (0.0, 1.0)
        )
        local = jax.local_devices()
        grid = meshes.make({"data": devices or len(local)}, local[: devices or len(local)])
        self._score = reward_scorer.Scorer(model, grid, config.micro_rows, config.dtype)

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        finished: Sequence[bool],
        seed: int,
    ) -> list[Reward]:
        gold = self._rewarder(problems, completions, finished, seed)
        config = self.config
        scores = self.scores(problems, completions, finished)
        clipped = scores if config.clip is None else np.clip(scores, -config.clip, config.clip)
        return [
            dataclasses.replace(
                reward,
                total=float(config.weight * value + config.verifier * reward.total),
                parts={**reward.parts, "gold": reward.total, "proxy": float(score)},
            )
            for reward, score, value in zip(gold, scores, clipped, strict=True)
        ]

    def scores(
        self, problems: Sequence[Problem], completions: Sequence[str], finished: Sequence[bool]
    ) -> np.ndarray:
        """[N] float32, normalised if that is asked for, not clipped."""
        sequences = []
        for problem, text, ended in zip(problems, completions, finished, strict=True):
            prompt = self.config.template.replace("{question}", problem.question)
            tokens = self._tokenize({"prompt": prompt, "response": text})["tokens"]
            sequences.append(tokens if ended else tokens[:-1])
        return (self._score(sequences) - self._shift) / self._scale

    def close(self) -> None:
        self._rewarder.close()


def moments(path: str | pathlib.Path, step: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's scores on its run's held-out data, at a checkpoint.

    Raises ValueError if that was not evaluated, or if all scores are one.
    """
    figures = checkpoint.load_metrics(path, step)
    if not figures.get("eval/score/std", 0.0) > 0:
        raise ValueError(
            f"reward_model.normalise needs the mean and deviation of the scores of {path}, and its checkpoint has "
            "none: train it with eval_sources, or set normalise=false and choose weight"
        )
    return figures["eval/score/mean"], figures["eval/score/std"]
