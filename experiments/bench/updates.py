"""Trained tokens per second beside plain PyTorch: language-model and GRPO updates of the same model on the same tokens.

    python -m experiments.bench.updates [--rounds=7] [--json=updates.json]

Ours are steps of the general trainers, on one and on two host devices. The rival is the loop anyone would write with
transformers: sequences padded to the longest of a micro-batch, gradients accumulated over micro-batches, clipped, AdamW
(fused). Language model: rows that are full, so that nobody pads. GRPO: sampled responses of all lengths, which ours
packs; the rival's are sorted by length. Only real tokens count. All sides start from the same weights, and a row is
made only if their losses and gradients are the same size.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.bench import measure
from experiments.bench.grpo import write_model
from experiments.bench.study import STUDY
from research.core import mesh as meshes
from research.core import metrics as metrics_lib
from research.core.data import DataConfig
from research.core.loop import Trainer
from research.core.optim import OptimConfig
from research.lm import trainer as lm
from research.lm.config import DecoderConfig
from research.rewards import RewardConfig
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.tasks import TaskConfig

# Steps so small that all rounds do the work of the first one.
OPTIM = OptimConfig(name="adamw", lr=1e-6, clip_norm=1.0)
GROUP_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """lm_rows of row_length tokens; responses of up to new_tokens after prompts of prompt_tokens."""

    model: DecoderConfig = STUDY
    lm_rows: int = 128
    row_length: int = 64
    responses: int = 128
    prompt_tokens: int = 16
    new_tokens: int = 48
    micro_rows: int = 8
    torch_micro_rows: int = 16
    devices: tuple[int, ...] = (1, 2)
    goal: float = 40_000.0


def rows(setting: Setting = Setting(), rounds: int = 7) -> list[measure.Row]:
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        write_model(setting.model, directory / "model", never_ends=False)
        return [
            *compare("LM update", lm_trainer, lm_loss, setting, directory, rounds),
            *compare("GRPO update", rl_trainer, grpo_loss, setting, directory, rounds),
        ]


def compare(
    what: str,
    build: Callable,
    loss: Callable,
    setting: Setting,
    directory: pathlib.Path,
    rounds: int,
) -> list[measure.Row]:
    """A row for each number of devices; all of them and the rival take turns."""
    sides = [Ours(*build(setting, directory, devices)) for devices in setting.devices]
    rival, rival_name = None, measure.missing("torch", "transformers")
    if not rival_name:
        rival = Theirs(directory / "model", sides[0].sequences(), loss, setting.torch_micro_rows)
        rival_name = rival.name
    *ours, theirs = measure.alternate([*sides, rival], rounds)
    result = []
    for devices, side, seconds in zip(setting.devices, sides, ours, strict=True):
        for other in [sides[0], rival] if rival else [sides[0]]:
            for name in ("loss", "grad_norm"):
                measure.same_value(f"{what}: {name}", side.first[name], other.first[name])
        result.append(
            measure.row(
                f"{what}, {devices} host device{'s' * (devices > 1)}",
                seconds,
                theirs,
                our_work=side.work,
                rival_work=rival and rival.work,
                rival_name=rival_name,
                amount=side.work["tokens"],
                unit="tok/s",
                goal=setting.goal if devices == max(setting.devices) else 0.0,
                goal_of="ours",
                bound="two thirds are matmuls 128 wide, which run at the cores' speed",
            )
        )
    return result


class Ours:
    """Steps of a trainer on one batch, each until it is done."""

    def __init__(self, trainer: Trainer, batch: Any):
        self.trainer, self.batch = trainer, batch
        self.state = trainer.init()
        self.first: dict[str, float] = {}
        sequences = self.sequences()
        self.work = {
            "sequences": len(sequences),
            "tokens": sum(len(s["tokens"]) for s in sequences),
        }

    def __call__(self) -> None:
        self.state, metrics = self.trainer.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.first = self.first or metrics_lib.to_floats(metrics)

    def sequences(self) -> list[dict[str, np.ndarray]]:
        """The packed sequences of the batch, one by one."""
        return unpacked(self.batch["minibatches"][0] if "minibatches" in self.batch else self.batch)


def unpacked(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The sequences of packed rows, one by one."""
    found = []
    for row, segments in enumerate(rows["segment_ids"]):
        for segment in range(1, int(segments.max()) + 1):
            place = segments == segment
            found.append({k: x[row][place] for k, x in rows.items() if k != "num_micro"})
    return found


def lm_trainer(setting: Setting, directory: pathlib.Path, devices: int) -> tuple[Trainer, Any]:
    """A trainer and its first batch: rows of random tokens."""
    config = lm.Config(
        mesh=f"data={devices}",
        init_from=str(directory / "model"),
        data=DataConfig(seq_len=setting.row_length, batch_size=setting.lm_rows, shuffle=False),
        micro_rows=setting.micro_rows,
        scan_layers=False,
        optim=OPTIM,
    )
    shape = (setting.lm_rows, setting.row_length)
    tokens = np.random.default_rng(0).integers(0, setting.model.vocab_size, shape, np.int32)
    documents = [{"tokens": row, "loss_mask": np.ones_like(row)} for row in tokens]
    trainer = lm.build(config, directory / f"lm{devices}", examples=documents)
    batch, _ = trainer.collect(None, 0)
    trainer.close()
    return trainer, batch


def rl_trainer(setting: Setting, directory: pathlib.Path, devices: int) -> tuple[Trainer, Any]:
    """A trainer and its first rollout."""
    operands = setting.prompt_tokens - 1  # and '='
    config = rl.Config(
        mesh=f"data={devices}",
        init_from=str(directory / "model"),
        scan_layers=False,
        task=TaskConfig("arithmetic", min_difficulty=operands, max_difficulty=operands),
        reward=RewardConfig(random=0.5),
        rollout=rl.RolloutConfig(
            prompts=setting.responses // GROUP_SIZE,
            group_size=GROUP_SIZE,
            max_prompt=setting.prompt_tokens,
            max_new_tokens=setting.new_tokens,
        ),
        loss=LossConfig(aggregation="token", kl_coef=0.0),
        micro_rows=setting.micro_rows,
        optim=OPTIM,
        eval=rl.EvalConfig(problems=0),
        save_samples_every=0,
    )
    trainer = rl.build(config, directory / f"rl{devices}")
    batch, _ = trainer.collect(trainer.init(), 0)
    return trainer, batch


class Theirs:
    """The same step in PyTorch: pad, forward, backward, clip, AdamW."""

    def __init__(
        self, directory: pathlib.Path, sequences: list[dict], loss: Callable, micro_rows: int
    ):
        import torch
        import transformers

        self.torch, self._loss = torch, loss
        self.name = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        # Else its embedding would not learn the pad token, which random weights sample like others.
        self.model.get_input_embeddings().padding_idx = None
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps,
            weight_decay=OPTIM.weight_decay, fused=True,
        )  # fmt: skip
        ordered = sorted(sequences, key=lambda s: -len(s["tokens"]))
        self.batches = [
            self._pad(ordered[i : i + micro_rows]) for i in range(0, len(ordered), micro_rows)
        ]
        self.first: dict[str, float] = {}
        tokens = sum(int(batch["attention_mask"].sum()) for batch in self.batches)
        self.work = {"sequences": sum(len(b["tokens"]) for b in self.batches), "tokens": tokens}

    def __call__(self) -> None:
        torch = self.torch
        total = 0.0
        for batch in self.batches:
            mask = batch["attention_mask"]
            logits = self.model(
                input_ids=batch["tokens"],
                attention_mask=None if mask.all() else mask,
                use_cache=False,
            ).logits[:, :-1]
            labels = batch["tokens"][:, 1:, None]
            logprobs = logits.gather(2, labels)[..., 0] - logits.logsumexp(dim=-1)
            loss = self._loss(logprobs, {k: v[:, 1:] for k, v in batch.items()})
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.first = self.first or {"loss": total, "grad_norm": float(norm)}

    def _pad(self, sequences: list[dict]) -> dict[str, Any]:
        longest = max(len(s["tokens"]) for s in sequences)
        padded = {
            key: np.stack([np.pad(s[key], (0, longest - len(s["tokens"]))) for s in sequences])
            for key in sequences[0]
        }
        padded["tokens"] = padded["tokens"].astype(np.int64)
        padded["attention_mask"] = (padded.pop("segment_ids") > 0).astype(np.int64)
        return {key: self.torch.from_numpy(value) for key, value in padded.items()}


def lm_loss(logprobs, batch):
    return -(logprobs * batch["weights"]).sum()


def grpo_loss(logprobs, batch):
    """On-policy: the ratio is 1 and carries the gradient; nothing is clipped."""
    ratio = (logprobs - logprobs.detach()).exp()
    return -(ratio * batch["advantages"] * batch["weights"]).sum()


def main() -> None:
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)
    measure.command(rows, __doc__)


if __name__ == "__main__":
    main()
