"""Evaluates a policy on a task: pass@1 with its error, cons@k, unbiased pass@k, by difficulty.

    python -m experiments.evaluate --run=runs/quickstart/zero
    python -m experiments.evaluate --hf=/models/Qwen2.5-1.5B --task=gsm8k --task_options=test_file=gsm8k_test.jsonl \\
        --template=r1_zero --samples=8 --max_new_tokens=1024 --temperature=0.6 --top_p=0.95 --json=out.json

A run of reinforcement learning brings its task, prompt, rewards and limits along; flags replace them. The paper's
protocol is temperature 0.6, top-p 0.95 and 4 to 64 responses to a question (DeepSeek-R1 v1, section 3).
"""

import dataclasses
import json
import pathlib
import sys

import jax
from absl import app, flags

from experiments import run as launcher
from research.core import mesh as meshes
from research.core import provenance
from research.core.checkpoint import CheckpointError
from research.deepseek_r1 import zero
from research.lm import checkpoints
from research.lm.decoder import unstack
from research.lm.sampler import Sampler, Sampling
from research.rewards import RewardConfig, Rewarder, RewardFailure
from research.rl import config as rl_config
from research.rl import trainer as rl
from research.rl.evaluation import pass_at_k
from research.rl.rollout import Actor, evaluate
from research.tasks import TaskConfig, make

TEMPLATES = {"question": "{question}", "r1_zero": zero.TEMPLATE}

_RUN = flags.DEFINE_string("run", None, "A run's directory.")
_STEP = flags.DEFINE_string(
    "step", None, "Checkpoint of the run: a step or 'best'; default: the newest."
)
_HF = flags.DEFINE_string("hf", None, "A published checkpoint's directory.")
_TASK = flags.DEFINE_string(
    "task", None, "arithmetic, countdown, knights, tool_arithmetic, gsm8k, math or gym:NAME."
)
_TASK_OPTIONS = flags.DEFINE_list("task_options", [], "Settings of the task, each name=value.")
_TEMPLATE = flags.DEFINE_string(
    "template", None, "question, r1_zero, or a text with {question} in it."
)
_CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat template.")
_ANSWER_FROM = flags.DEFINE_enum(
    "answer_from", None, ["answer_tag", "boxed", "text"], "Where a response's answer stands."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "train"], "Which problems.")
_PROBLEMS = flags.DEFINE_integer("problems", 0, "How many problems; 0: all of a finite split.", 0)
_SAMPLES = flags.DEFINE_integer("samples", 16, "Responses to each problem.", 1)
_K = flags.DEFINE_list("k", ["1", "4", "16"], "pass@k for these, as far as there are samples.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy; default: that of the run's evaluation, or 0.6.", 0.0
)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Default: that of the run's evaluation, or 0.95.", 0.0, 1.0
)
_MAX_PROMPT = flags.DEFINE_integer(
    "max_prompt", None, "Longest prompt, in tokens; default: the run's, or 512.", 1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest response; default: the run's, or 1024.", 1
)
_TOOL_CALLS = flags.DEFINE_integer(
    "tool_calls", None, "Calculator calls answered in a response; default: the run's, or none.", 0
)
_SLOTS = flags.DEFINE_integer("slots", 256, "Responses sampled side by side.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
_JSON = flags.DEFINE_string("json", None, "Write the figures and provenance here.")
_RESPONSES = flags.DEFINE_string(
    "responses", None, "Write every graded response here, as JSON lines."
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {arguments[1:]}; settings are --name=value")
    if (_RUN.value is None) == (_HF.value is None):
        sys.exit("error: give either --run=DIRECTORY or --hf=DIRECTORY")
    launcher.setup_from_flags()
    try:
        figures, settings = measure()
    except (ValueError, OSError, CheckpointError, RewardFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4f}")
    if _JSON.value:
        record = {"figures": figures, "settings": settings, "provenance": provenance.describe()}
        pathlib.Path(_JSON.value).write_text(json.dumps(record, indent=1) + "\n")


def measure() -> tuple[dict[str, float], dict]:
    """The figures that the flags ask for, and the settings they were obtained with."""
    config = rl_config.of_run(_RUN.value) if _RUN.value else None
    rollout = config.rollout if config else rl.RolloutConfig()
    drawn = config.eval if config else rl.EvalConfig(temperature=0.6, top_p=0.95)
    if _TASK.value:
        task_config = TaskConfig(name=_TASK.value, options=tuple(_TASK_OPTIONS.value))
    elif config:
        task_config = config.task
    else:
        raise ValueError("give --task; only a run of reinforcement learning brings its own")
    reward = config.reward if config else RewardConfig()
    # An evaluation is never paid by a coin, and counts every readable right answer.
    reward = dataclasses.replace(reward, random=None)
    if _ANSWER_FROM.value:
        reward = dataclasses.replace(reward, answer_from=_ANSWER_FROM.value)
    tools = rollout.tools
    if _TOOL_CALLS.value is not None:
        tools = dataclasses.replace(tools, calls=_TOOL_CALLS.value)
    task = make(task_config)
    size = task.size(_SPLIT.value)
    problems = _PROBLEMS.value or size
    if problems is None:
        raise ValueError(f"the {_SPLIT.value} split of {task.name} has no end; give --problems")

    step = int(_STEP.value) if _STEP.value and _STEP.value.isdigit() else _STEP.value
    model, params, tokenizer = checkpoints.load(_RUN.value or _HF.value, step)
    template = rollout.template if _TEMPLATE.value is None else _TEMPLATE.value
    limit = _MAX_NEW_TOKENS.value or rollout.longest_response
    mesh = meshes.make("data=-1")
    slots = min(_SLOTS.value, problems * _SAMPLES.value)
    sampler = Sampler(
        model,
        slots=-(-slots // mesh.size) * mesh.size,
        max_prompt=_MAX_PROMPT.value or rollout.max_prompt,
        max_new_tokens=limit,
        mesh=mesh,
    )
    sampling = Sampling(
        max_new_tokens=limit,
        temperature=drawn.temperature if _TEMPERATURE.value is None else _TEMPERATURE.value,
        top_p=drawn.top_p if _TOP_P.value is None else _TOP_P.value,
        stop_ids=tokenizer.stop_ids,
    )
    with Rewarder(reward, task) as rewarder:
        chat = _CHAT.value or bool(config and config.rollout.chat)
        template = TEMPLATES.get(template, template)
        actor = Actor(sampler, tokenizer, rewarder, template, chat, tools)
        actor.check(task, _SPLIT.value, problems)
        figures, episodes = evaluate(
            actor,
            jax.jit(unstack, static_argnums=1)(params, model.config),
            task,
            problems=problems,
            samples=_SAMPLES.value,
            sampling=sampling,
            seed=_SEED.value,
            split=_SPLIT.value,
        )
    correct = episodes.samples().correct.sum(axis=1)
    for k in map(int, _K.value):
        if 1 < k <= _SAMPLES.value:
            figures[f"pass@{k}"] = float(pass_at_k(_SAMPLES.value, correct, k).mean())
    if _RESPONSES.value:
        with open(_RESPONSES.value, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in episodes.records())
    settings = {
        "model": _RUN.value or _HF.value,
        "task": dataclasses.asdict(task_config),
        "problems": problems,
        "samples": _SAMPLES.value,
        "sampling": dataclasses.asdict(sampling),
        "tools": dataclasses.asdict(tools),
        "seed": _SEED.value,
    }
    return figures, settings


if __name__ == "__main__":
    app.run(main)
