"""Sampling beside `transformers.generate`: the same weights, prompts and number of tokens.

    python -m experiments.bench.sampling [--batches=1,32,256] [--repeats=7] [--json=sampling.json]

Both sides sample 64 tokens at temperature 1 after prompts of 16, prefill included, no stop token.
Rounds alternate between the two, so that a busy machine slows both; the ratio is the median over
rounds. On CPUs the batch is split over two host devices from 32 rows up.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
import warnings

import jax
import numpy as np

from experiments.bench.study import STUDY
from research.core import mesh as meshes
from research.core import provenance
from research.lm import hf
from research.lm.decoder import Decoder
from research.lm.sampler import Sampler, Sampling

PROMPT, NEW = 16, 64


def ours(params, batch: int, slots: int):
    """A function that samples `batch` completions and returns their tokens [batch, NEW]."""
    mesh = meshes.make("data=2") if batch >= 32 and jax.device_count() >= 2 else None
    sampler = Sampler(
        STUDY, slots=min(batch, slots), max_prompt=PROMPT, max_new_tokens=NEW, mesh=mesh
    )
    weights = sampler.prepare(params)
    return lambda prompts, seed: sampler(
        weights, list(prompts), jax.random.key(seed), Sampling(NEW)
    ).tokens


def theirs(directory):
    """The same through transformers, with as many threads as PyTorch takes by itself."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def sample(prompts, seed):
        torch.manual_seed(seed)
        inputs = torch.from_numpy(prompts)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
        return out[:, PROMPT:].numpy()

    return sample


def seconds(sample, prompts, seed) -> float:
    start = time.perf_counter()
    tokens = sample(prompts, seed)
    elapsed = time.perf_counter() - start
    assert tokens.shape == (len(prompts), NEW)
    return elapsed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--slots", type=int, default=256, help="rows decoded side by side, at most")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per batch size")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args()
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)

    model = Decoder(STUDY)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    with tempfile.TemporaryDirectory() as directory:
        hf.save(directory, model, params, layout="qwen2")
        rival = theirs(directory)
    rows = []
    print(f"{'batch':>6} {'transformers tok/s':>19} {'ours tok/s':>12} {'ratio':>7}")
    for batch in map(int, args.batches.split(",")):
        prompts = np.random.default_rng(batch).integers(0, STUDY.vocab_size, (batch, PROMPT))
        own = ours(params, batch, args.slots)
        for sample in (own, rival):  # compile, warm up
            seconds(sample, prompts, 0)
        pairs = []
        for seed in range(args.repeats):
            pairs.append((seconds(rival, prompts, seed), seconds(own, prompts, seed)))
        speeds = [[batch * NEW / t for t in side] for side in zip(*pairs, strict=True)]
        ratio = statistics.median(their / our for their, our in pairs)
        rows.append(
            {
                "batch": batch,
                "transformers_tokens_per_second": statistics.median(speeds[0]),
                "transformers_best": max(speeds[0]),
                "tokens_per_second": statistics.median(speeds[1]),
                "best": max(speeds[1]),
                "ratio": ratio,
            }
        )
        print(
            f"{batch:>6} {statistics.median(speeds[0]):>10,.0f} ({max(speeds[0]):,.0f})"
            f" {statistics.median(speeds[1]):>10,.0f} ({max(speeds[1]):,.0f}) {ratio:>6.1f}x",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **provenance.describe()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
