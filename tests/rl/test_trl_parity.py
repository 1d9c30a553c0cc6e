"""Advantages, losses and gradients beside TRL's own functions, executed on random tensors.

Of a `GRPOTrainer` and an `RLOOTrainer` the model, the sampler and the rewards are replaced by given numbers, in
float64; what is between them and the loss is TRL's. TRL has no PPO any more: no critic and no GAE to compare with.
"""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.grpo import write_model
from experiments.bench.study import STUDY
from research.rl import advantages, kl, losses
from research.rl.advantages import AdvantageConfig
from research.rl.algorithms import algorithm

pytestmark = pytest.mark.parity

GROUPS, SIZE, T, LIMIT, CAP = 3, 4, 7, 9, 1.5
B = GROUPS * SIZE


@dataclasses.dataclass(frozen=True)
class Given:
    """Random responses: everything that a model, a sampler and a reward would say of them. [B, T], rewards [B]."""

    mask: np.ndarray
    inside: np.ndarray
    new: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    rewards: np.ndarray


def given(seed: int, unread: int = 0, spans: bool = False) -> Given:
    """The second group has equal rewards. unread: rewards that are NaN, all but one of the last group among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    lengths[0] = T
    inside = np.arange(T) < lengths[:, None]
    mask = inside & ~(spans & (rng.random((B, T)) < 0.3))
    mask[:, 0] = True
    old = -2 * rng.random((B, T))
    off = lambda scale: np.where(inside, old + scale * rng.normal(size=(B, T)), 0.0)  # noqa: E731
    rewards = rng.normal(size=B)
    rewards[SIZE : 2 * SIZE] = 0.5
    if unread:
        rewards[[0, *range(B - SIZE, B - 1)][:unread]] = np.nan
    sampler = np.float64(np.float32(off(0.5)))  # TRL makes float32 of it
    return Given(mask, inside, off(0.4), np.where(inside, old, 0.0), off(0.4), sampler, rewards)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """(a GRPOTrainer, an RLOOTrainer)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import transformers
        import trl

        path = tmp_path_factory.mktemp("trl")
        write_model(
            dataclasses.replace(STUDY, hidden_size=16, num_layers=1, mlp_size=16), path / "model"
        )
        settings = {
            "output_dir": str(path), "per_device_train_batch_size": B, "num_generations": SIZE, "beta": 0.1,
            "bf16": False, "use_cpu": True, "report_to": [], "gradient_checkpointing": False,
        }  # fmt: skip

        def make(trainer, config):
            model = transformers.AutoModelForCausalLM.from_pretrained(path / "model")
            made = trainer(
                model=model,
                processing_class=transformers.AutoTokenizer.from_pretrained(path / "model"),
                reward_funcs=lambda **_: None,
                train_dataset=datasets.Dataset.from_list([{"prompt": "1"}] * B),
                args=config(**settings),
            )
            made.model.train()
            made.current_gradient_accumulation_steps = 1
            return made

        yield make(trl.GRPOTrainer, trl.GRPOConfig), make(trl.RLOOTrainer, trl.RLOOConfig)


def of_trl(trainer, g: Given, **switches):
    """TRL's (advantages [B], loss, gradient by the policy's log-probabilities [B, T]) under its own switches."""
    import torch

    usual = {
        "beta": 0.0, "scale_rewards": "group", "importance_sampling_level": "token", "use_vllm": False,
        "max_completion_length": LIMIT, "epsilon_low": 0.2, "epsilon_high": 0.2,
    }  # fmt: skip
    delta = switches.pop("delta", None)
    for name, value in (usual | switches).items():
        setattr(trainer, name, value)
    trainer.args.delta = delta
    trainer.args.use_bias_correction_kl = (
        False  # DeepSeek-V3.2's, not the papers' of the estimators here
    )
    new = torch.tensor(g.new, requires_grad=True)
    tensors = {"new": new, "old": torch.tensor(g.old), "ref": torch.tensor(g.ref)}
    now = "old"

    def scores(model, *args, **kwargs):
        name = "ref" if model is trainer.ref_model else now
        return tensors[name], torch.zeros(B, T), None

    counts = g.inside.sum(1)
    ids = [[5] * n for n in counts]
    prompts, texts = [[4, 4]] * B, [""] * B
    sampler = [row[:n].tolist() for row, n in zip(g.sampler, counts, strict=True)]
    tools = [row[:n].astype(int).tolist() for row, n in zip(g.mask, counts, strict=True)]
    if trainer.__class__.__name__ == "GRPOTrainer":
        trainer._generate = lambda p: (prompts, ids, tools, texts, sampler, {}, None, None)
    else:
        trainer._generate = lambda p: (prompts, ids, texts)
    trainer._get_per_token_logps_and_entropies = scores
    trainer._calculate_rewards = lambda *_: torch.tensor(g.rewards)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = trainer._generate_and_score_completions([{"prompt": "1"}] * B)
        if "old_logps" not in batch:
            batch["old_per_token_logps"] = tensors["old"]
        now = "new"
        loss = trainer._compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, new)
    return batch["advantages"].numpy(), float(loss), gradient.numpy()


def of_ours(name: str, g: Given, config: losses.LossConfig, epsilon=1e-4, penalty=None):
    """The same of ours: estimate, weights, loss."""
    found = advantages.estimate(
        name,
        g.rewards,
        g.mask,
        np.repeat(np.arange(GROUPS), SIZE),
        kl=penalty,
        config=AdvantageConfig(epsilon=epsilon),
    ).advantages
    mask = g.mask
    weights = losses.token_weights(
        mask.sum(1),
        config.aggregation,
        num_sequences=B,
        num_tokens=int(mask.sum()),
        length_limit=LIMIT,
    )

    def loss(new):
        value, _ = losses.policy_loss(
            config,
            logprobs=new,
            old_logprobs=jnp.asarray(g.old),
            ref_logprobs=jnp.asarray(g.ref) if config.kl_coef and config.kl_in == "loss" else None,
            sampler_logprobs=jnp.asarray(g.sampler),
            advantages=jnp.asarray(found, jnp.float64),
            weights=jnp.asarray(mask * weights[:, None], jnp.float64),
            segment_ids=jnp.asarray(g.inside.astype(np.int32)),
        )
        return value

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(g.new))
    return found, float(value), np.asarray(gradient)


def agree(theirs, ours, mask):
    for row, own in zip(theirs[0], ours[0], strict=True):
        assert own[own != 0] == pytest.approx(row, abs=1e-6) if own.any() else abs(row) < 1e-6
    assert np.abs(theirs[0]).max() > 0.1
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    np.testing.assert_allclose(ours[2], np.where(mask, theirs[2], 0.0), atol=1e-6)
    assert np.abs(theirs[2]).max() > 1e-3


def switches(name: str, **changes) -> losses.LossConfig:
    return dataclasses.replace(algorithm(name).loss, **changes)


SEQUENCE = {"importance_sampling_level": "sequence"}
CASES = {  # (our estimator, our loss, TRL's switches)
    "grpo": ("grpo", switches("grpo", kl_coef=0.1), {"loss_type": "grpo", "beta": 0.1}),
    "dr_grpo": ("dr_grpo", switches("dr_grpo"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ("dapo", switches("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ("grpo", switches("grpo", aggregation="token", kl_coef=0.0), {"loss_type": "bnpo"}),
    "batch_std": (
        "batch_std", switches("batch_std"), {"loss_type": "dapo", "scale_rewards": "batch"},
    ),
    "gspo": (
        "gspo", switches("gspo"),
        SEQUENCE | {"loss_type": "grpo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "luspo": (
        "grpo", switches("grpo", ratio="geometric", aggregation="sum", kl_coef=0.0),
        SEQUENCE | {"loss_type": "luspo"},
    ),
    # TRL's epsilon_high is the bound itself.
    "cispo": (
        "cispo", switches("cispo", clip_high=0.3), {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "dual clip": (
        "grpo", switches("grpo", dual_clip=1.4, kl_coef=0.0), {"loss_type": "grpo", "delta": 1.4},
    ),
    "truncated importance": (
        "dapo", switches("dapo", importance_cap=CAP),
        {
            "loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True,
            "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": CAP,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("data", ["whole", "unread", "spans"])
def test_grpo_and_its_kin(trainers, case, data):
    """Whole responses; with rewards that nothing could be said of; with spans inside that a tool wrote."""
    name, config, theirs = CASES[case]
    g = given(list(CASES).index(case), spans=data == "spans", unread=4 if data == "unread" else 0)
    if data == "unread":
        # TRL leaves such a response in the loss, at advantage 0: the KL term, where there is one, still counts it.
        assert np.isnan(g.rewards).sum() == 4
    agree(of_trl(trainers[0], g, **theirs), of_ours(name, g, config), g.mask)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("unread", [0, 4])
def test_rloo(trainers, beta, unread):
    """TRL's RLOO: k1 summed over the response inside the reward, and the ratio of whole responses, clipped."""
    g = given(17, unread)
    penalty = beta * kl.in_reward(g.old, g.ref, "k1")
    config = switches(
        "rloo", aggregation="grpo", ratio="sequence", clip_low=0.2, clip_high=0.2, kl_coef=0.0
    )
    agree(of_trl(trainers[1], g, beta=beta), of_ours("rloo", g, config, penalty=penalty), g.mask)


def test_rloo_s_own_loss_is_trl_s_where_nothing_is_clipped_and_on_policy(trainers):
    """Our default takes a ratio for each token and no clip: on the policy that sampled, the same gradient."""
    g = given(18)
    g = dataclasses.replace(g, new=g.old)
    theirs = of_trl(trainers[1], g)
    ours = of_ours("rloo", g, switches("rloo", clip_low=math.inf, clip_high=math.inf, kl_coef=0.0))
    np.testing.assert_allclose(ours[2], theirs[2], atol=1e-6)
