"""Generation from a published directory, by flags, against a plain greedy loop."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import flagsaver

from experiments import generate
from research.core import config as configs
from research.core.checkpoint import Checkpointer
from research.core.state import TrainState
from research.lm import checkpoints, hf
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.hf import tiny
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import RewardConfig, Rewarder
from research.rl.config import Config, RolloutConfig
from research.rl.rollout import Actor
from research.rl.tools import ToolConfig
from research.tasks import Problem, make

PROMPTS = ["2+2=", "hello, ", "é"]
NEW = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("generate") / "tiny", hidden_size=32, num_layers=1)


def run(directory, tmp_path, **values):
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    values = {"hf": directory and str(directory), "json": str(out), "max_new_tokens": NEW} | values
    with flagsaver.flagsaver(**values):
        generate.run_from_flags()
    return [json.loads(line) for line in out.read_text().splitlines()]


def greedy(directory, text: str) -> str:
    model, params = hf.load(directory)
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode(text).tolist()
    start = len(ids)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for _ in range(NEW):
        padded = jnp.asarray([ids + [0] * (64 - len(ids))])  # one shape; later tokens do not matter
        logits = np.array(apply(padded)[0, len(ids) - 1])
        logits[tokenizer.vocab_size :] = -np.inf  # rows that pad the embedding
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_id:
            return tokenizer.decode(ids[start:-1])
    return tokenizer.decode(ids[start:])


def test_greedy_is_the_most_likely_token_each_time(directory, tmp_path):
    rows = run(directory, tmp_path, prompt=PROMPTS, temperature=0.0)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        assert row["completion"] == greedy(directory, row["prompt"])
        assert row["stopped"] == (row["tokens"] < NEW) and row["logprob"] < 0


def test_samples_depend_on_seed_and_place_not_on_the_batch(directory, tmp_path):
    settings = {"prompt": PROMPTS, "samples": 2, "temperature": 0.8}
    rows = run(directory, tmp_path, **settings, batch=64)
    assert [(row["index"], row["sample"]) for row in rows] == [
        (i, s) for i in range(3) for s in range(2)
    ]
    assert len({row["completion"] for row in rows}) == 6
    again = run(directory, tmp_path, **settings, batch=1)
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    other = run(directory, tmp_path, **settings, seed=1)
    assert all(a["completion"] != b["completion"] for a, b in zip(rows, other, strict=True))


def test_int8_from_both_kinds_of_directory(directory, tmp_path):
    """Of a hybrid with experts: near the exact log-probability, and not it."""
    hybrid = tiny.write(tmp_path / "hybrid", layout="minimax", hidden_size=32)
    model, params = hf.load(hybrid)
    checkpoints.describe(tmp_path, model, Tokenizer.load(hybrid))
    saver = Checkpointer(tmp_path / "checkpoints")
    saver.save(1, TrainState.create(params, optax.sgd(0.1), jax.random.key(0)))
    saver.close()
    settings = {"prompt": PROMPTS[:1], "max_new_tokens": 1, "temperature": 0.0}
    exact = run(hybrid, tmp_path, **settings)[0]["logprob"]
    int8 = run(hybrid, tmp_path, **settings, int8=True)[0]["logprob"]
    assert 0 < abs(int8 - exact) < 0.1
    again = run(hybrid, tmp_path, **settings, int8=True, hf=None, run=str(tmp_path))
    assert again[0]["logprob"] == int8


def test_prompts_file_and_chat(directory, tmp_path):
    file = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "2+2="}]
    file.write_text(json.dumps({"id": "a", "messages": talk}) + '\n\n{"prompt": "2+2="}\n')
    rows = run(directory, tmp_path, prompts_file=str(file), chat=True, temperature=0.0)
    assert rows[0]["id"] == "a" and rows[0]["completion"] == rows[1]["completion"]
    assert rows[0]["completion"] == greedy(
        directory, "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
    )


def test_runs_continue_from_the_checkpoint_asked_for(directory, tmp_path):
    model, params = hf.load(directory)
    checkpoints.describe(tmp_path, model, Tokenizer.load(directory))
    saver = Checkpointer(tmp_path / "checkpoints", best_metric="reward")
    state = TrainState.create(params, optax.sgd(0.1), jax.random.key(0))
    mirrored = state.replace(params=jax.tree.map(lambda x: -x, params))
    saver.save(1, state, metrics={"reward": 1.0})
    saver.save(2, mirrored, metrics={"reward": 0.5})
    saver.close()
    settings = {"prompt": PROMPTS, "temperature": 0.0, "hf": None, "run": str(tmp_path)}
    best = run(directory, tmp_path, **settings, step="best")
    assert [row["completion"] for row in best] == [greedy(directory, text) for text in PROMPTS]
    newest = run(directory, tmp_path, **settings)
    assert newest == run(directory, tmp_path, **settings, step="2") != best


def test_text_goes_to_standard_output(directory, tmp_path, capsys):
    with flagsaver.flagsaver(
        hf=str(directory), prompt=PROMPTS, max_new_tokens=NEW, temperature=0.0
    ):
        generate.run_from_flags()
    out = capsys.readouterr().out
    for index, text in enumerate(PROMPTS):
        head, out = out.split(" ===\n", 1)
        assert head.startswith(f"=== prompt {index}, sample 0, ")
        assert out.startswith(greedy(directory, text) + "\n")
        out = out.removeprefix(greedy(directory, text) + "\n")
    assert not out


TAGS = ["<tool>", "</tool>", "<result>", "</result>"]


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """(directory, model, parameters, tokenizer) of a run with a calculator: its policy babbles sums and calls."""
    tokenizer = Tokenizer.byte(TAGS, eos="<|endoftext|>")
    model = Decoder(
        DecoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=16, mlp_size=16, max_position=96, scan_layers=False,
        )
    )  # fmt: skip
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    # Every token shares one direction of the embedding: a bias in the head.
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, 0].set(3.0)
    liked = [*map(tokenizer.token_id, TAGS[:2]), *tokenizer.encode("12+")]
    head = jnp.zeros_like(params["head"]["kernel"]).at[0].set(-4.0)
    params["head"]["kernel"] = (
        head.at[0, jnp.array(liked)].set(0.0).at[0, tokenizer.eos_id].set(-0.5)
    )
    path = tmp_path_factory.mktemp("caller")
    checkpoints.describe(path, model, tokenizer)
    configs.save(path / "config.json", Config(rollout=RolloutConfig(tools=ToolConfig(calls=2))))
    saver = Checkpointer(path / "checkpoints")
    saver.save(1, TrainState.create(params, optax.sgd(0.1), jax.random.key(0)))
    saver.close()
    return path, model, params, tokenizer


def test_a_run_with_a_calculator_has_it_here_too(caller, tmp_path):
    path, model, params, tokenizer = caller
    settings = {"prompt": ["1+", "22"], "samples": 32, "max_new_tokens": 64, "seed": 3}
    settings |= {"run": str(path), "batch": 8}  # two fillings
    rows = run(None, tmp_path, **settings)
    # What training would see of this policy.
    rewarder = Rewarder(RewardConfig(), make("arithmetic"))
    sampler = Sampler(model, slots=16, max_prompt=2, max_new_tokens=64)
    actor = Actor(sampler, tokenizer, rewarder, tools=ToolConfig(calls=2))
    problems = [Problem(text, text, "", 1) for text in settings["prompt"]]
    drawn = Sampling(64, stop_ids=tokenizer.stop_ids)
    episodes = actor(params, problems, jax.random.key(3), drawn, 32, seed=0)
    rewarder.close()
    assert [row["completion"] for row in rows] == episodes.texts
    assert [row["calls"] for row in rows] == episodes.calls.tolist()
    sums = 0
    for row in rows:
        called = row["completion"].split("</tool>")[:-1]
        at_the_limit = row["completion"].endswith("</tool>")  # and perhaps not looked at
        assert row["calls"] in (len(called), len(called) - at_the_limit)
        told = re.findall(r"</tool><result>(.*?)</result>", row["completion"])
        assert len(called) - len(told) in (0, 1)  # the limit may cut off the last
        for number, (text, output) in enumerate(zip(called, told, strict=False)):
            if number >= 2:
                assert output == "error: no calls left"
            elif call := re.search(r"<tool>([12]+(\+[12]+)+)$", text):
                assert output == str(eval(call[1]))
                sums += 1
    assert sums
    without = run(None, tmp_path, **settings, tool_calls=0)
    for row, other in zip(rows, without, strict=True):
        first, result, _ = row["completion"].partition("<result>")
        assert other["completion"].startswith(first) and "calls" not in other
        assert "<result>" not in other["completion"] and (result or first == other["completion"])
    # A run without a calculator has one for the asking.
    configs.save(path / "config.json", Config())
    assert run(None, tmp_path, **settings) == without
    assert run(None, tmp_path, **settings, tool_calls=2) == rows


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "prompts.jsonl, line 2: not JSON"),
        ('{"question": "x"}', "prompts.jsonl, line 2: needs 'prompt'"),
        ("[]", "prompts.jsonl, line 2: needs 'prompt'"),
        ('{"messages": []}', "prompt 1 is a conversation; add --chat"),
        ('{"prompt": ""}', "prompt 1 is empty"),
    ],
)
def test_bad_lines_are_named(line, reason, directory, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=reason):
        run(directory, tmp_path, prompts_file=str(file))


def test_settings_are_refused_before_the_output_is_touched(directory, tmp_path):
    out = tmp_path / "out.jsonl"
    for values, reason in (
        ({"run": "x"}, "one of --run and --hf"),
        ({"prompt": []}, "nothing to continue"),
        ({"max_new_tokens": 5000}, "context"),
        ({"top_p": 0.0}, "top_p"),
    ):
        out.write_text("kept")
        values = {"hf": str(directory), "json": str(out), "prompt": ["a"], **values}
        with flagsaver.flagsaver(**values), pytest.raises(ValueError, match=reason):
            generate.run_from_flags()
        assert out.read_text() == "kept"
