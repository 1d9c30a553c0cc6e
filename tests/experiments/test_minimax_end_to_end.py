"""A directory that transformers made: reinforcement learning from it, exported, and read by transformers again."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from research.core import loop
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.deepseek_r1 import base_data
from research.lm import checkpoints
from research.lm.tokenizer import Tokenizer
from research.rewards import RewardConfig
from research.rl import trainer as rl
from research.tasks import TaskConfig

pytestmark = [
    pytest.mark.parity,
    # Their own affair; warnings of ours stay errors.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers)"),
]

TOKENIZER = Tokenizer.words(base_data.WORDS, pad=base_data.PAD, eos=base_data.END)


def made_by_transformers(directory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=len(base_data.WORDS), hidden_size=32, intermediate_size=24, num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"], num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, block_size=16,
        linear_attn_alpha_factor=1.6, full_attn_alpha_factor=1.6, mlp_alpha_factor=1.6,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MiniMaxForCausalLM(config)
    model.save_pretrained(directory)
    TOKENIZER.save(directory)


def their_logits(directory, tokens):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.numpy()


def test_a_published_directory_is_trained_and_published_again(tmp_path):
    made_by_transformers(tmp_path / "base")
    config = rl.Config(
        init_from=str(tmp_path / "base"),
        mesh="data=2",
        task=TaskConfig(min_difficulty=2, max_difficulty=3, test_size=16),
        reward=RewardConfig(answer_from="text", random=0.5),  # a coin: something to learn from at once
        rollout=rl.RolloutConfig(prompts=4, group_size=4, max_prompt=5, max_new_tokens=6),
        row_length=16,
        micro_rows=2,
        optim=OptimConfig("adam", lr=1e-2),
        eval=rl.EvalConfig(problems=0),
        loop=LoopConfig(steps=3),
    )
    run = tmp_path / "run"
    state = loop.run(rl.build(config, run), config.loop, run, fingerprint_of=config)
    assert int(state.step) == 3
    done = subprocess.run(
        [sys.executable, "-m", "experiments.export", f"--run={run}", f"--out={tmp_path / 'out'}", "--layout=minimax"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    tokens = np.random.default_rng(0).integers(0, len(base_data.WORDS), (2, 21))
    model, params, _ = checkpoints.load(run)
    ours = jax.jit(dataclasses.replace(model).apply)({"params": params}, tokens)
    before = their_logits(tmp_path / "base", tokens)
    after = their_logits(tmp_path / "out", tokens)
    np.testing.assert_allclose(ours, after, atol=1e-4)
    assert np.abs(after - before).max() > 0.1  # it has learned something


def test_what_cannot_be_exported_is_told(tmp_path):
    command = [sys.executable, "-m", "experiments.export", f"--run={tmp_path}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is no model" in done.stderr
