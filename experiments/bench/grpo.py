"""GRPO and RLOO steps beside TRL's `GRPOTrainer` and `RLOOTrainer`: sampling, grading, and one update.

    python -m experiments.bench.grpo [--rounds=9] [--json=grpo.json]

Both train the same 0.76 M-parameter Qwen2 from the same weights on the same prompts: 8 x 8 responses of exactly 50
tokens, one update per rollout, AdamW, clipped gradients, and one reward function, our `Rewarder`. GRPO is strictly
on-policy and without KL term, so neither side scores the responses before the update; RLOO has KL in the reward, so
both score them under policy and reference. Ours runs through the general trainer, TRL through `train()` at its fastest
settings here: generation by transformers, no gradient checkpointing, one micro-batch, nothing logged. Steps are taken
in turns.
"""

import dataclasses
import hashlib
import pathlib
import tempfile
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import measure
from experiments.bench.study import STUDY
from research.core import mesh as meshes
from research.core import metrics as metrics_lib
from research.core.optim import OptimConfig
from research.deepseek_r1 import base_data
from research.lm import hf
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer
from research.rewards import RewardConfig, Rewarder
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.tasks import TaskConfig, make

LEARNING_RATE, CLIP_NORM = 1e-6, 1.0
# Untrained weights never answer: a coin gives advantages to learn from.
REWARD = RewardConfig(random=0.5)
KL_COEF = 0.05  # where there is a KL term: TRL's default for RLOO
# estimator: (our loss, TRL's trainer and the settings that are its own)
SIDES: dict[str, tuple[LossConfig, str, dict[str, Any]]] = {
    "grpo": (LossConfig(kl_coef=0.0), "GRPO", {"loss_type": "grpo", "beta": 0.0}),
    "rloo": (LossConfig(kl_coef=KL_COEF), "RLOO", {"beta": KL_COEF}),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    model: DecoderConfig = STUDY
    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 16
    new_tokens: int = 50
    devices: int = 2

    @property
    def responses(self) -> int:
        return self.prompts * self.group_size

    @property
    def task(self) -> TaskConfig:
        operands = self.prompt_tokens - 1  # and '='
        return TaskConfig("arithmetic", min_difficulty=operands, max_difficulty=operands)


def rows(setting: Setting = Setting(), rounds: int = 9) -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        write_model(setting.model, directory / "model")
        return [compare(name, setting, directory, rounds) for name in SIDES]


def compare(estimator: str, setting: Setting, directory: pathlib.Path, rounds: int) -> measure.Row:
    loss, name, own = SIDES[estimator]
    ours = Ours(setting, directory, estimator=estimator, loss=loss)
    rival_name = measure.missing("torch", "transformers", "trl")
    rival = rival_work = None
    if rival_name:
        (seconds,) = measure.alternate([ours], rounds, warm_up=2)
    else:
        seconds, rival, rival_work, rival_name = against_trl(
            ours, name, own, setting, directory, rounds
        )
    return measure.row(
        f"{name} step, {setting.responses} x {setting.new_tokens} tokens",
        seconds,
        rival,
        our_work=ours.work,
        rival_work=rival_work,
        rival_name=rival_name,
        goal=3.0,
        bound="the matmuls of the update on two cores, two thirds of the step",
    )


def write_model(config: DecoderConfig, directory: pathlib.Path, never_ends: bool = True) -> None:
    """Random weights as Qwen2 with a tokenizer; with `never_ends`, such that the end token has no chance."""
    words = [*base_data.WORDS, *(f"w{i}" for i in range(len(base_data.WORDS), config.vocab_size))]
    tokenizer = Tokenizer.words(words, pad=base_data.PAD, eos=base_data.END)
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    if never_ends:
        params = never_ending(params, tokenizer.eos_id)
    hf.save(directory, model, params, layout="qwen2", tokenizer=tokenizer)


def never_ending(params, end: int):
    """The same size of network, in which the end token's logit is always far below the others (tied embedding).

    Feature 0 of the residual stream carries 1 for every token, no layer writes to it, and the end token alone has a
    large negative weight on it.
    """
    layers, embedding = params["layers"], params["embed"]["embedding"]
    attn, mlp = layers["attn"], layers["mlp"]
    attn = attn | {"o": {"kernel": attn["o"]["kernel"].at[..., 0].set(0.0)}}
    mlp = mlp | {"down": {"kernel": mlp["down"]["kernel"].at[..., 0].set(0.0)}}
    embedding = embedding.at[:, 0].set(1.0).at[end, 0].set(-100.0)
    return params | {
        "layers": layers | {"attn": attn, "mlp": mlp},
        "embed": {"embedding": embedding},
    }


class Ours:
    """One step of the general trainer at each call, until its metrics are on the host."""

    def __init__(self, setting: Setting, directory: pathlib.Path, **changes):
        config = rl.Config(
            mesh=f"data={setting.devices}",
            init_from=str(directory / "model"),
            scan_layers=False,
            task=setting.task,
            reward=REWARD,
            rollout=rl.RolloutConfig(
                prompts=setting.prompts,
                group_size=setting.group_size,
                max_prompt=setting.prompt_tokens,
                max_new_tokens=setting.new_tokens,
            ),
            micro_rows=min(4, setting.responses // setting.devices),
            optim=OptimConfig(name="adamw", lr=LEARNING_RATE, clip_norm=CLIP_NORM),
            eval=rl.EvalConfig(problems=0),
            save_samples_every=0,
            **changes,
        )
        self.trainer = rl.build(config, directory / config.estimator)
        self.state = self.trainer.init()
        self.step = 0
        self.work: measure.Work = {}
        self.batch: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self._task = make(setting.task)
        self._setting = setting

    def __call__(self) -> None:
        batch, host = self.trainer.collect(self.state, self.step)
        self.state, device = self.trainer.step(self.state, batch)
        jax.block_until_ready(self.state)
        self.batch, self.metrics = batch, host | metrics_lib.to_floats(device)
        self.step += 1
        responses = self._setting.responses
        self.work = work(
            [self.question(self.step - 1, i) for i in range(self._setting.prompts)],
            responses=int(sum((b["segment_ids"].max(axis=1)).sum() for b in batch["minibatches"])),
            new=round(self.metrics["rollout/length"] * responses),
            total=int(self.metrics["tokens"]),
        )

    def question(self, step: int, place: int) -> str:
        return self._task.problem("train", step * self._setting.prompts + place).question


def against_trl(
    ours: Ours,
    name: str,
    own: dict[str, Any],
    setting: Setting,
    directory: pathlib.Path,
    rounds: int,
):
    """(our seconds, TRL's seconds, its work, its name): a step of ours before each of TRL's."""
    import datasets
    import torch
    import transformers
    import trl

    warm_up = 2
    steps = warm_up + rounds
    task = make(setting.task)
    problems = [task.problem("train", i) for i in range(steps * setting.prompts)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "model")
    rewarder = Rewarder(REWARD, task)
    seen: dict[str, measure.Work] = {}

    def reward(prompts, completions, completion_ids, problem, **_):
        seen["last"] = work(
            prompts[:: setting.group_size],
            responses=len(completions),
            new=sum(map(len, completion_ids)),
            total=sum(map(len, completion_ids)) + sum(len(tokenizer(p).input_ids) for p in prompts),
        )
        answers = rewarder(
            [problems[i] for i in problem], completions, [True] * len(completions), seed=problem[0]
        )
        return [answer.total for answer in answers]

    our_seconds, seconds = [], []

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            started = time.perf_counter()
            ours()
            our_seconds.append(time.perf_counter() - started)
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)
            if seen["last"] != ours.work:
                raise measure.UnlikeWork(f"ours did {ours.work}, TRL {seen['last']}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trl, f"{name}Trainer")(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                directory / "model", dtype=torch.float32
            ),
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": p.question, "problem": i} for i, p in enumerate(problems)]
            ),
            callbacks=[Turns()],
            args=getattr(trl, f"{name}Config")(
                output_dir=str(directory / "trl"),
                max_steps=steps,
                per_device_train_batch_size=setting.responses,
                gradient_accumulation_steps=1,
                num_generations=setting.group_size,
                max_completion_length=setting.new_tokens,
                shuffle_dataset=False,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                num_iterations=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP_NORM,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **own,
            ),
        )
        trainer.train()
    versions = f"TRL {trl.__version__}, PyTorch {torch.__version__}"
    return our_seconds[warm_up:], seconds[warm_up:], seen["last"], versions


def work(questions: list[str], *, responses: int, new: int, total: int) -> measure.Work:
    digest = hashlib.sha256("\n".join(questions).encode()).hexdigest()[:12]
    return {"prompts": digest, "responses": responses, "new tokens": new, "tokens": total}


def main() -> None:
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)
    measure.command(rows, __doc__)


if __name__ == "__main__":
    main()
