"""A hybrid of lightning and softmax attention with experts beside transformers' MiniMax: the same weights and tokens.

    python -m experiments.bench.hybrid [--rounds=2] [--json=hybrid.json]

15.4 M parameters: 8 layers, every eighth with softmax attention, 8 experts of which a token takes 2. Prefill fills the
cache and gives the last token's logits; a training step is forward, backward and AdamW on 16,384 tokens; decoding
samples 64 tokens after prompts of 16. The last rows time the lightning op alone at growing lengths.
"""

import dataclasses
import math
import statistics
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import measure
from pallas_kernels.lightning_attention import lightning_attention
from research.core import mesh as meshes
from research.core import optim, step
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.lm import hf, slots
from research.lm import trainer as lm
from research.lm.config import MoEConfig
from research.lm.decoder import Decoder
from research.lm.lightning import slopes
from research.lm.presets import PRESETS
from research.lm.sampler import Sampler, Sampling

# Unrolled, for speed; with whole heads turned by positions, because transformers knows nothing else; without the
# balancing loss, whose form differs there.
MODEL = dataclasses.replace(
    PRESETS["study-hybrid"], rotary_dim=None, scan_layers=False, moe=MoEConfig(8, aux_coef=0.0)
)
PREFILL, TRAIN = (1024, 4096, 16384), (1024, 4096, 16384)
TOKENS = 16384  # of a training step,
MICRO = 2048  # of which a device computes so many at a time
PROMPT, NEW = 16, 64
OPTIM = OptimConfig(lr=1e-4, b2=0.95, weight_decay=0.1, clip_norm=1.0)
FLAT = (4096, 16384, 65536, 262144)


def rows(rounds: int = 2) -> list[measure.Row]:
    params = jax.jit(Decoder(MODEL).init)(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    absent = measure.missing("torch", "transformers")
    rival = None if absent else Rival(params)
    name = absent or "transformers.MiniMaxForCausalLM"
    return [
        *(prefill(params, rival, name, length, rounds) for length in PREFILL),
        *(train(params, rival, name, length, rounds) for length in TRAIN),
        *(decode(params, rival, name, batch, rounds) for batch in (1, 32)),
        flat(rounds),
    ]


class Rival:
    """transformers on the same weights, with as many threads as PyTorch takes by itself."""

    def __init__(self, params):
        import torch
        import transformers

        self.torch = torch
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hf.save(f"{directory}/model", Decoder(MODEL), params, layout="minimax")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                f"{directory}/model", dtype=torch.float32
            )
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.initial = {k: v.clone() for k, v in self.model.state_dict().items()}

    def prefill(self, tokens):
        with self.torch.inference_mode():
            inputs = self.torch.from_numpy(tokens)
            return self.model.eval()(inputs, use_cache=True, logits_to_keep=1).logits.numpy()

    def trainer(self):
        torch, model = self.torch, self.model.train()
        model.load_state_dict(self.initial)
        model.config.output_router_logits = False
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), weight_decay=OPTIM.weight_decay
        )  # fmt: skip

        def update(tokens):
            inputs = torch.from_numpy(tokens)
            loss = model(inputs, labels=inputs, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
            optimizer.step()
            return float(loss)

        return update

    def sample(self, prompts):
        torch = self.torch
        inputs = torch.from_numpy(prompts)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model.eval().generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=NEW, min_new_tokens=NEW,
            )  # fmt: skip
        return out[:, PROMPT:].numpy()


def prefill(params, rival, name, length, rounds):
    tokens = np.random.default_rng(length).integers(0, MODEL.vocab_size, (1, length))
    weights = jax.jit(lambda p: slots.prepare(MODEL, p))(params)
    program = jax.jit(lambda w, t, n: slots.prefill(Decoder(MODEL), w, t, n))
    arguments = jnp.asarray(tokens, jnp.int32), jnp.asarray([length], jnp.int32)
    ours = lambda: jax.block_until_ready(program(weights, *arguments))  # noqa: E731
    theirs = None if rival is None else lambda: rival.prefill(tokens)
    if rival is not None:
        gap = np.abs(np.asarray(ours().logits) - rival.prefill(tokens)[:, 0]).max()
        measure.same_value(f"prefill {length}: largest difference of logits", gap, 0.0)
    mine, other = measure.alternate([ours, theirs], rounds)
    work = {"tokens": length}
    return measure.row(
        f"hybrid prefill, {length} tokens", mine, other, our_work=work, rival_work=work, rival_name=name,
        amount=length, unit="tok/s", goal=3.0, bound="matmuls of one row's tokens, and softmax scores of long ones",
    )  # fmt: skip


def train(params, rival, name, length, rounds):
    count = TOKENS // length
    tokens = np.random.default_rng(length).integers(0, MODEL.vocab_size, (count, length))
    devices = 2 if count > 1 else 1
    mesh = meshes.make({"data": devices}, jax.devices()[:devices])
    optimizer = optim.make(OPTIM, 100)
    update = step.data_parallel(
        lambda p, batch: lm.loss_fn(Decoder(MODEL), p, batch), optimizer, mesh,
        micro_rows=math.gcd(count // devices, max(1, MICRO // length)),
    )  # fmt: skip
    learned = np.ones((count, length), np.float32)
    learned[:, 0] = 0
    batch = {
        "tokens": tokens.astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "weights": learned / learned.sum(),
    }
    held = [TrainState.create(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))]

    losses, other_losses = [], []

    def ours():
        held[0], metrics = update(held[0], batch)
        losses.append(float(metrics["loss"]))

    theirs = None
    if rival is not None:
        other = rival.trainer()
        theirs = lambda: other_losses.append(other(tokens))  # noqa: E731
    mine, other = measure.alternate([ours, theirs], rounds)
    if rival is not None:
        for mine_, others in ((losses[0], other_losses[0]), (losses[-1], other_losses[-1])):
            measure.same_value(f"training on rows of {length}: loss", mine_, others)
    work = {"tokens": count * length, "rows": count}
    return measure.row(
        f"hybrid training step, {count} x {length} tokens", mine, other, our_work=work, rival_work=work,
        rival_name=name, amount=count * length, unit="tok/s", goal=3.0,
        bound="activations of a long row are beyond the caches",
    )  # fmt: skip


def decode(params, rival, name, batch, rounds):
    prompts = np.random.default_rng(batch).integers(0, MODEL.vocab_size, (batch, PROMPT))
    mesh = meshes.make({"data": 2}, jax.devices()[:2]) if batch > 1 else None
    sampler = Sampler(MODEL, slots=batch, max_prompt=PROMPT, max_new_tokens=NEW, mesh=mesh)
    weights, key = sampler.prepare(params), jax.random.key(0)
    ours = lambda: sampler(weights, list(prompts), key, Sampling(NEW)).tokens  # noqa: E731
    theirs = None if rival is None else lambda: rival.sample(prompts)
    shape = {"sequences": batch, "tokens": ours().shape[1]}
    other_shape = None
    if rival is not None:
        out = rival.sample(prompts)
        other_shape = {"sequences": out.shape[0], "tokens": out.shape[1]}
    mine, other = measure.alternate([ours, theirs], rounds)
    return measure.row(
        f"hybrid decoding, batch {batch}", mine, other, our_work=shape, rival_work=other_shape,
        rival_name=name, amount=batch * NEW, unit="tok/s", goal=5.0,
        bound="reading the weights: a chosen expert is copied before its matmul",
    )  # fmt: skip


def flat(rounds):
    """Lightning attention alone: time per token at the longest length over that at the shortest."""
    H, K = MODEL.num_heads, MODEL.head_dim
    decay = jnp.asarray(slopes(H, 8, "remote")[3], jnp.float32)
    # The output takes q's memory, as in a model, where q is not needed any more: fresh memory costs page faults.
    bounded = lambda q, k, v: jnp.clip(lightning_attention(q, k, v, decay)[0], -1, 1)  # noqa: E731
    program = jax.jit(bounded, donate_argnums=0)

    def side(length):
        q, k, v = (jax.random.normal(key, (1, length, H, K)) for key in jax.random.split(jax.random.key(length), 3))
        held = [q * 0 + 1]

        def run():
            held[0] = jax.block_until_ready(program(held[0], k, v))

        return run

    sides = list(map(side, FLAT))
    seconds = measure.alternate(sides, max(rounds, 5), warm_up=2)
    per_token = [[t / n for t in times] for times, n in zip(seconds, FLAT, strict=True)]
    ratio = statistics.median(last / first for first, last in zip(per_token[0], per_token[-1], strict=True))
    return measure.Row(
        what=f"lightning op, {FLAT[-1]} tokens against {FLAT[0]}",
        unit="us/token",
        ours=1e6 * statistics.median(per_token[-1]),
        rival=1e6 * statistics.median(per_token[0]),
        rival_name=f"itself at {FLAT[0]} tokens",
        ratio=1 / ratio,
        goal=1 / 1.1,
        goal_of="ratio",
        work={
            f"us/token at {n}": f"{1e6 * statistics.median(times):.3f}"
            for n, times in zip(FLAT, per_token, strict=True)
        },
        rounds=len(seconds[0]),
        bound="memory traffic beyond the caches",
    )  # fmt: skip


if __name__ == "__main__":
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)
    measure.command(rows, __doc__)
