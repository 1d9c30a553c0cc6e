"""The configuration of an RL run."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from research.core import config as configs
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm.sampler import Sampling
from research.rewards import RewardConfig
from research.rl import advantages, kl
from research.rl.algorithms import algorithm
from research.rl.critic import CriticConfig
from research.rl.losses import LossConfig
from research.rl.reward_model import RewardModelConfig
from research.rl.tools import ToolConfig
from research.tasks import TaskConfig


def _at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn.

    prompts, group_size: problems for each rollout over all processes, and responses to each.
    max_prompt, max_new_tokens: limits in tokens; `length_schedule` holds (step, limit) pairs, each of which replaces
      the response limit from that loop step on (R1-Zero doubles it at update 8,200).
    template, chat: see `Actor`.
    slots: responses sampled at the same time, over this process's devices (0: all of a rollout).
    rounds: groups whose responses are all right or all wrong, or to which a reward model gives one reward, teach
      nothing: at most so often are further problems sampled to replace them (DAPO's dynamic sampling; 1: never; None:
      as the algorithm has it). Groups that are still missing then are filled with such ones.
    overlong: in the last part of the length limit, as a share of it, reward falls to 1 less (DAPO's shaping; 0: not;
      None: as the algorithm has it).
    tools: see `ToolConfig`; what a tool says counts towards max_new_tokens.
    staleness: 1: the next rollout is sampled while the policy learns from this one, so by the policy from before that,
      and ratios are to its log-probabilities. 0: one after the other.
    """

    prompts: int = 32
    group_size: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_prompt: int = 512
    max_new_tokens: int = 1024
    length_schedule: tuple[tuple[int, int], ...] = ()
    template: str = "{question}"
    chat: bool = False
    slots: int = 0
    rounds: int | None = None
    overlong: float | None = None
    tools: ToolConfig = ToolConfig()
    staleness: int = 0

    def __post_init__(self):
        _at_least(1, self, "prompts", "group_size", "max_prompt", "max_new_tokens")
        _at_least(0, self, "slots")
        if self.staleness not in (0, 1):
            raise ValueError(f"staleness={self.staleness}: it must be 0 or 1 rollouts")
        if self.rounds is not None:
            _at_least(1, self, "rounds")
        if self.overlong is not None and not 0 <= self.overlong <= 1:
            raise ValueError(f"overlong={self.overlong}: it must lie in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: a greedy rollout explores nothing, and has no probabilities to "
                "learn from; it must be positive"
            )

    @property
    def longest_response(self) -> int:
        return max([self.max_new_tokens, *(limit for _, limit in self.length_schedule)])

    def limit_at(self, step: int) -> int:
        """Response limit at a loop step."""
        limit = self.max_new_tokens
        for start, value in sorted(self.length_schedule):
            if step >= start:
                limit = value
        return limit

    def sampling(self, limit: int, stop_ids: tuple[int, ...]) -> Sampling:
        """What the sampler is told for responses of at most `limit` tokens."""
        return Sampling(
            max_new_tokens=limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_ids=stop_ids,
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """pass@1 and the rest over `samples` responses to the first `problems` of the test split (0: no evaluation)."""

    problems: int = 64
    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        _at_least(0, self, "problems")
        _at_least(1, self, "samples")


@dataclasses.dataclass(frozen=True)
class Config:
    """An RL run.

    init_from: an HF directory or the directory of a run, whose model and tokenizer are taken.
    dtype, remat, scan_layers, kernels: how the model is run, see `DecoderConfig`.
    advantage: see `AdvantageConfig`.
    mask_truncated: leave the tokens of responses that hit the length limit out of the loss (the paper does not say; off
      keeps the pressure to finish); their rewards still count in their group's mean.
    updates, epochs: optimizer updates drawn from one rollout, and passes over it.
    reference_every: the reference becomes the policy every so many updates (0: never).
    row_length, micro_rows: training rows hold `row_length` tokens (0: prompt + response limit); a device computes
      `micro_rows` of them at a time.
    save_samples_every: write the first groups of every n-th rollout to samples/ (0: never).
    """

    kind: Literal["rl"] = "rl"
    seed: int = 0
    mesh: str = "data=-1"
    init_from: str = ""
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    kernels: Literal["auto", "reference", "xla", "pallas"] = "auto"
    task: TaskConfig = TaskConfig()
    reward: RewardConfig = RewardConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    estimator: advantages.Estimator = "grpo"
    loss: LossConfig = LossConfig()
    advantage: advantages.AdvantageConfig = advantages.AdvantageConfig()
    critic: CriticConfig = CriticConfig()
    mask_truncated: bool = False
    updates: int = 1
    epochs: int = 1
    reference_every: int = 400
    row_length: int = 0
    micro_rows: int = 8
    optim: OptimConfig = OptimConfig(lr=1e-6)
    eval: EvalConfig = EvalConfig()
    save_samples_every: int = 10
    loop: LoopConfig = LoopConfig(steps=100)

    def __post_init__(self):
        _at_least(1, self, "updates", "epochs", "micro_rows")
        _at_least(0, self, "reference_every", "row_length", "save_samples_every")
        responses = self.rollout.prompts * self.rollout.group_size
        if responses % self.updates:
            raise ValueError(
                f"{responses} responses of a rollout do not split into updates={self.updates} minibatches; "
                "choose a divisor of rollout.prompts * rollout.group_size"
            )
        settled = self._settled()
        rollout, compares = settled["rollout"], advantages.rule_of(self.estimator).compares
        if rollout.group_size < 2 and (compares or rollout.rounds > 1):
            raise ValueError(
                f"group_size={rollout.group_size}: advantages compare the responses to a prompt, so there must be at "
                f"least 2 with estimator={self.estimator}"
            )
        loss = settled["loss"]
        if loss.kl_coef and loss.kl_in == "reward" and loss.kl_estimator not in kl.IN_REWARD:
            raise ValueError(
                f"loss.kl_estimator={loss.kl_estimator} with loss.kl_in=reward: it has no form there; use k1"
            )

    @property
    def off_policy(self) -> bool:
        """Whether an update may meet tokens that another policy sampled, so that their log-probabilities are kept."""
        return self.updates * self.epochs > 1 or self.rollout.staleness > 0

    def resolved(self) -> "Config":
        """The same with every switch set that was left to the algorithm."""
        return dataclasses.replace(self, **self._settled())

    def _settled(self) -> dict[str, Any]:
        usual, rollout = algorithm(self.estimator), self.rollout
        rounds = usual.rounds if rollout.rounds is None else rollout.rounds
        overlong = usual.overlong if rollout.overlong is None else rollout.overlong
        return {
            "loss": self.loss.over(usual.loss),
            "rollout": dataclasses.replace(rollout, rounds=rounds, overlong=overlong),
        }


def of_run(workdir: str | pathlib.Path) -> Config | None:
    """The config of a run of reinforcement learning; None of other runs.

    Raises ValueError where there is no such directory.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"{workdir}: there is no such directory")
    if not path.exists() or json.loads(path.read_text()).get("kind") != "rl":
        return None
    return configs.load(path, Config)
