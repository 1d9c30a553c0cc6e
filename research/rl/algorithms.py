"""The published algorithms, by name: which advantage (`advantages.RULES`), which loss, what else of the rollout.

A configuration names one, and overrides single switches of it. Where a paper gives no number the comment says whose it
is. KL inside the reward is k1 and inside the loss k2 or k3 (see `kl` for why).
"""

import dataclasses
import math

from research.rl.losses import GRPO, LossConfig


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """loss: all its switches.
    rounds: most times that a rollout is sampled, to replace groups without a signal (1: taken as they come).
    overlong: the last part of the length limit in which responses are punished for their length (0: none).
    """

    loss: LossConfig
    rounds: int = 1
    overlong: float = 0.0


def _loss(**switches) -> LossConfig:
    return dataclasses.replace(GRPO, **switches)


_NO_KL = {"kl_coef": 0.0}
_NO_CLIP = {"clip_low": math.inf, "clip_high": math.inf}
_KL_IN_REWARD = {"kl_coef": 0.01, "kl_in": "reward", "kl_estimator": "k1"}  # OpenRLHF's 0.01
_SCORE = {"aggregation": "sum", **_NO_CLIP, **_KL_IN_REWARD}  # A grad log p(response)

ALGORITHMS = {
    "ppo": Algorithm(_loss(aggregation="token", **_KL_IN_REWARD)),
    "grpo": Algorithm(GRPO),
    "dr_grpo": Algorithm(_loss(aggregation="drgrpo", **_NO_KL)),
    "rloo": Algorithm(_loss(**_SCORE)),
    "remax": Algorithm(_loss(**_SCORE)),
    "reinforce": Algorithm(_loss(**_SCORE)),
    "reinforce_pp": Algorithm(_loss(aggregation="token", **_KL_IN_REWARD)),
    # lambda of eq. 8 is not published; 1e-5 is OpenRLHF's example.
    "reinforce_pp_baseline": Algorithm(_loss(aggregation="token", kl_coef=1e-5, kl_estimator="k2")),
    "batch_std": Algorithm(_loss(aggregation="token", **_NO_KL)),  # TRL
    # The published buffer is 4,096 of 20,480 tokens; the cap on rounds is verl's.
    "dapo": Algorithm(
        _loss(aggregation="token", clip_high=0.28, **_NO_KL), rounds=10, overlong=0.2
    ),
    "gspo": Algorithm(_loss(ratio="geometric", clip_low=3e-4, clip_high=4e-4, **_NO_KL)),
    # Only the upper bound matters in M1, and its value is not published; 5 is TRL's advice.
    "cispo": Algorithm(
        _loss(aggregation="token", objective="weight", clip_low=1.0, clip_high=4.0, **_NO_KL)
    ),
    # Neither the clip nor r_max nor the KL coefficient is published: choices.
    "minimax_grpo": Algorithm(_loss(aggregation="token", drop_above=2.0, kl_estimator="minimax")),
}


def algorithm(name: str) -> Algorithm:
    if name not in ALGORITHMS:
        raise ValueError(f"unknown estimator {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
