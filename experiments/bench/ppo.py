"""A PPO step with a critic beside the same step in PyTorch: sampling, grading, scoring, and both models' updates.

    python -m experiments.bench.ppo [--rounds=9] [--json=ppo.json]

TRL has no PPO trainer any more, so the rival is written here, with transformers, as plainly and as fast as it goes:
every response is exactly 50 tokens after prompts of 16, so nothing is padded; logits are computed for the responses
alone; AdamW is fused. Both sample 8 x 8 responses with the same 0.76 M-parameter Qwen2, score them under policy,
reference and critic (as large as the policy), estimate advantages by GAE with k1 in the reward, whiten them, and make
one update of the critic and one of the policy. Before anything is timed the rival learns from the first rollout of
ours: a row is made only if its losses and gradients are ours.

The last row is what advantages and losses alone cost, of that step.
"""

import pathlib
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import measure
from experiments.bench.grpo import (
    CLIP_NORM,
    KL_COEF,
    LEARNING_RATE,
    REWARD,
    Ours,
    Setting,
    work,
    write_model,
)
from experiments.bench.updates import unpacked
from research.core import mesh as meshes
from research.core.optim import OptimConfig
from research.rewards import Rewarder
from research.rl import advantages
from research.rl.advantages import AdvantageConfig
from research.rl.algorithms import algorithm
from research.rl.critic import CriticConfig, value_loss
from research.rl.losses import LossConfig, policy_loss
from research.tasks import make

LAM, VALUE_CLIP = 0.95, 0.5
OPTIM = OptimConfig(name="adamw", lr=LEARNING_RATE, clip_norm=CLIP_NORM)
PPO: dict[str, Any] = {
    "estimator": "ppo",
    "loss": LossConfig(kl_coef=KL_COEF),
    "critic": CriticConfig(OPTIM, clip=VALUE_CLIP),
    "advantage": AdvantageConfig(lam=LAM),
}


def rows(setting: Setting = Setting(), rounds: int = 9) -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        write_model(setting.model, directory / "model")
        ours, rival = Ours(setting, directory, **PPO), None
        rival_name = measure.missing("torch", "transformers")
        if not rival_name:
            rival = Theirs(setting, directory / "model")
            rival_name = rival.name
            same_update(ours, rival, setting)
        part = AdvantagesAndLoss(setting)
        seconds, theirs, parts = measure.alternate([ours, rival, part], rounds, warm_up=2)
    what = f"PPO step, {setting.responses} x {setting.new_tokens} tokens"
    return [
        measure.row(
            what,
            seconds,
            theirs,
            our_work=ours.work,
            rival_work=rival and rival.work,
            rival_name=rival_name,
            goal=3.0,
            bound="the matmuls of two updates and three scorings on two cores",
        ),
        measure.row(
            "its advantages and losses",
            parts,
            seconds,
            our_work=ours.work,
            rival_work=ours.work,
            rival_name="the whole step of ours",
            goal=20.0,
            bound="the host's loop over tokens",
        ),
    ]


def same_update(ours: Ours, rival: "Theirs", setting: Setting) -> None:
    """Raises UnlikeWork unless the rival makes of our first rollout the losses and gradients that ours did."""
    ours()
    (packed,) = ours.batch["minibatches"]
    sequences = unpacked(packed)
    tokens = np.stack([s["tokens"] for s in sequences])
    # The critic says 0 at first, so the return at the last token is the reward.
    rewards = np.array([s["returns"][-1] for s in sequences])
    figures = rival.learn(tokens, rewards)
    for name, value in figures.items():
        measure.same_value(f"PPO step: {name}", ours.metrics[name], value)
    rival.step = ours.step


class Theirs:
    """The step in PyTorch."""

    def __init__(self, setting: Setting, directory: pathlib.Path):
        import torch
        import transformers

        self.torch, self.setting = torch, setting
        self.name = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.policy, self.reference, critic = (
                transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
                for _ in range(3)
            )
        self.trunk = critic.model
        for model in (
            self.policy,
            critic,
        ):  # else it would not learn the pad token, which is sampled too
            model.get_input_embeddings().padding_idx = None
        self.head = torch.nn.Linear(setting.model.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.critic_parameters = [*self.trunk.parameters(), *self.head.parameters()]
        self.optimizers = [
            torch.optim.AdamW(
                parameters, lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps,
                weight_decay=OPTIM.weight_decay, fused=True,
            )
            for parameters in (list(self.policy.parameters()), self.critic_parameters)
        ]  # fmt: skip
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.task, self.step = make(setting.task), 0
        self.rewarder = Rewarder(REWARD, self.task)
        self.work: measure.Work = {}

    def __call__(self) -> None:
        setting, torch = self.setting, self.torch
        first = self.step * setting.prompts
        problems = [self.task.problem("train", first + i) for i in range(setting.prompts)]
        self.step += 1
        questions = [p.question for p in problems]
        prompts = self.tokenizer(questions, return_tensors="pt").input_ids
        prompts = prompts.repeat_interleave(setting.group_size, 0)
        with torch.inference_mode():
            tokens = self.policy.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=setting.new_tokens,
            ).numpy()
        texts = self.tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
        repeated = [p for p in problems for _ in range(setting.group_size)]
        answers = self.rewarder(repeated, texts, [True] * len(texts), seed=self.step)
        self.learn(tokens, np.array([answer.total for answer in answers]))
        self.work = work(
            questions,
            responses=len(tokens),
            new=tokens[:, prompts.shape[1] :].size,
            total=tokens.size,
        )

    def learn(self, tokens_NT: np.ndarray, rewards_N: np.ndarray) -> dict[str, float]:
        """Scores, advantages, one update of each model; its figures, by our names."""
        torch, new = self.torch, self.setting.new_tokens
        tokens = torch.tensor(tokens_NT, dtype=torch.long)
        with torch.no_grad():
            old, ref = self._logprobs(self.policy, tokens), self._logprobs(self.reference, tokens)
            old_values = self._values(tokens)
        rewards = -KL_COEF * (old - ref)
        rewards[:, -1] += torch.tensor(rewards_N, dtype=torch.float32)
        advantage, running = torch.zeros_like(rewards), torch.zeros(len(tokens))
        for t in reversed(range(new)):
            following = old_values[:, t + 1] if t + 1 < new else 0.0
            running = rewards[:, t] + following - old_values[:, t] + LAM * running
            advantage[:, t] = running
        returns = advantage + old_values
        advantage = (advantage - advantage.mean()) / advantage.var(unbiased=False).clamp(
            1e-8
        ).sqrt()

        values = self._values(tokens)
        bounded = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
        worst = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
        value_loss = 0.5 * worst.mean()
        value_norm = self._update(1, value_loss, self.critic_parameters)
        ratio = (self._logprobs(self.policy, tokens) - old).exp()
        clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        norm = self._update(0, loss, list(self.policy.parameters()))
        return {
            "loss": float(loss.detach()),
            "grad_norm": norm,
            "value/loss": float(value_loss.detach()),
            "value/grad_norm": value_norm,
        }

    def _logprobs(self, model, tokens):
        new = self.setting.new_tokens
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=new + 1).logits[:, :-1]
        chosen = logits.gather(2, tokens[:, -new:, None])[..., 0]
        return chosen - logits.logsumexp(dim=-1)

    def _values(self, tokens):
        hidden = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return self.head(hidden[:, -self.setting.new_tokens - 1 : -1])[..., 0]

    def _update(self, which: int, loss, parameters) -> float:
        loss.backward()
        norm = self.torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()
        return float(norm)


class AdvantagesAndLoss:
    """What PPO adds to the models' work on one rollout: the estimate, and both losses with their gradients."""

    def __init__(self, setting: Setting):
        rng = np.random.default_rng(0)
        shape = (setting.responses, setting.new_tokens)
        self.rewards, self.mask = rng.random(shape[0]), np.ones(shape, bool)
        self.group = np.repeat(np.arange(setting.prompts), setting.group_size)
        self.kl, self.values = (rng.normal(size=shape) for _ in range(2))
        config = PPO["loss"].over(algorithm("ppo").loss)
        segments = jnp.ones(shape, jnp.int32)

        def losses(logprobs, values, old_logprobs, old_values, advantages_, returns, weights):
            policy, _ = policy_loss(
                config,
                logprobs=logprobs,
                old_logprobs=old_logprobs,
                ref_logprobs=None,
                sampler_logprobs=old_logprobs,
                advantages=advantages_,
                weights=weights,
                segment_ids=segments,
            )
            value, _ = value_loss(
                values=values,
                old_values=old_values,
                returns=returns,
                weights=weights,
                clip=VALUE_CLIP,
            )
            return policy + value

        self.program = jax.jit(jax.grad(losses, argnums=(0, 1)))
        self.logprobs = -rng.random(shape).astype(np.float32)
        self.weights = np.full(shape, 1 / np.prod(shape), np.float32)

    def __call__(self) -> None:
        found = advantages.estimate(
            "ppo",
            self.rewards,
            self.mask,
            self.group,
            kl=self.kl,
            values=self.values,
            config=PPO["advantage"],
        )
        old_values = self.values.astype(np.float32)
        arrays = (self.logprobs, old_values, self.logprobs, old_values)
        jax.block_until_ready(self.program(*arrays, found.advantages, found.returns, self.weights))


def main() -> None:
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)
    measure.command(rows, __doc__)


if __name__ == "__main__":
    main()
