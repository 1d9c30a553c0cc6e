"""The quickstart: an able but unreliable base model, R1-Zero on it, and the same with random rewards beside it.

Three stages, each a run of its own in the quickstart's directory: `base` (a language model on noisy traces of chained
arithmetic), `zero` (GRPO with accuracy and format rewards) and `control` (the same with a coin for a reward). Each is
measured on the same held-out problems, which no stage was trained on.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import numpy as np

from experiments import plots
from research.core import config as configs
from research.core import loop, metrics
from research.core import mesh as meshes
from research.deepseek_r1 import base_data
from research.lm import checkpoints
from research.lm import trainer as lm
from research.lm.decoder import Decoder
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import Rewarder
from research.rl import trainer as rl
from research.rl.rollout import Actor, Episodes, evaluate
from research.tasks import make


@dataclasses.dataclass(frozen=True)
class Config:
    """A quickstart.

    base: the language model; its data are `textbook` correct traces, then `noise` traces of the web-like mixture.
    zero: reinforcement learning from the base model.
    control: also train with random rewards.
    problems, samples: held-out problems for the table, and responses to each.
    """

    base: lm.Config
    zero: rl.Config
    kind: Literal["quickstart"] = "quickstart"
    textbook: int = 19_200
    noise: int = 25_600
    control: bool = True
    problems: int = 512
    samples: int = 16


def main(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the stages, prints the table, and writes summary.json, curves.png and the samples."""
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    if (workdir / "summary.json").exists():
        return finished(config, workdir)
    configs.save(workdir / "config.json", config)
    print("1/3  base model: learning from noisy traces of chained arithmetic", flush=True)
    model, params, tokenizer = train_base(config, workdir / "base")
    judge = Judge(config, model, tokenizer)
    before, _ = judge(params)
    print(f"     {brief(before)}")

    print("2/3  R1-Zero: reinforcement learning from accuracy and format alone", flush=True)
    zero = train_rl(config.zero, workdir / "zero", model, params, tokenizer)
    after, episodes = judge(zero)
    print(f"     {brief(after)}")

    control = None
    if config.control:
        print("3/3  control: the same with a random reward", flush=True)
        coin = dataclasses.replace(config.zero.reward, random=0.5)
        control_config = dataclasses.replace(config.zero, reward=coin)
        control, _ = judge(train_rl(control_config, workdir / "control", model, params, tokenizer))
        print(f"     {brief(control)}")

    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "before": before,
        "after": after,
        **({"control": control} if control else {}),
        "held_out_problems": config.problems,
        "responses_per_problem": config.samples,
    }
    records = list(episodes.records())
    (workdir / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    draw(workdir, config)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(report(summary, records, workdir))
    return summary


def finished(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Prints the result of a quickstart that was run to its end before.

    Raises ValueError if that was one of another configuration.
    """
    changed = configs.differences(configs.load(workdir / "config.json", Config), config)
    if changed:
        raise ValueError(
            f"{workdir} holds a finished quickstart with other settings (there != here):\n  "
            + "\n  ".join(changed)
            + "\nGive this one a directory of its own: --workdir=runs/another"
        )
    summary = json.loads((workdir / "summary.json").read_text())
    records = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    print(f"finished before; remove {workdir}, or name another --workdir, to run it again")
    print(report(summary, records, workdir))
    return summary


def train_base(config: Config, workdir: pathlib.Path) -> tuple[Decoder, Any, Tokenizer]:
    """The base model of a seed: (model, parameters, tokenizer)."""
    tokenizer = Tokenizer.words(base_data.WORDS, pad=base_data.PAD, eos=base_data.END)
    table = {word: tokenizer.token_id(word) for word in base_data.WORDS}
    seed = config.base.seed
    examples = [
        {"tokens": ids[:length], "loss_mask": (np.arange(length) >= prompt).astype(np.int32)}
        for part in (
            base_data.textbook(config.textbook, seed),
            base_data.web_noise(config.noise, seed),
        )
        for ids, length, prompt in zip(
            part.ids(table), part.lengths, part.prompt_lengths, strict=True
        )
    ]
    read = config.base.loop.steps * config.base.data.batch_size * config.base.data.seq_len
    held = sum(len(example["tokens"]) for example in examples)
    if read > held:
        raise ValueError(
            f"base.loop.steps={config.base.loop.steps} would read {read} tokens, and there are {held}: the run would "
            "begin again with the textbook. Set fewer steps, or more `noise`."
        )
    trainer = lm.build(config.base, workdir, tokenizer=tokenizer, examples=examples)
    state = loop.run(trainer, config.base.loop, workdir, fingerprint_of=config.base, name="base")
    model, _, tokenizer = checkpoints.load(workdir)
    return model, state.params, tokenizer


def train_rl(
    config: rl.Config, workdir: pathlib.Path, model: Decoder, params: Any, tokenizer: Tokenizer
) -> Any:
    """The parameters after reinforcement learning."""
    trainer = rl.build(config, workdir, model=model, params=params, tokenizer=tokenizer)
    name = workdir.name
    return loop.run(trainer, config.loop, workdir, fingerprint_of=config, name=name).params


class Judge:
    """Measures parameters on the held-out problems, always with the same random numbers."""

    def __init__(self, config: Config, model: Decoder, tokenizer: Tokenizer):
        rollout = config.zero.rollout
        self._task = make(config.zero.task)
        self._config = config
        grid = meshes.make(config.zero.mesh)
        sampler = Sampler(
            model,
            slots=_round_up(512, grid.size),
            max_prompt=rollout.max_prompt,
            max_new_tokens=rollout.longest_response,
            mesh=grid,
        )
        rewarder = Rewarder(config.zero.reward, self._task)
        self._actor = Actor(sampler, tokenizer, rewarder, rollout.template)
        self._tokenizer = tokenizer

    def __call__(self, params: Any, suppress: tuple[str, ...] = ()) -> tuple[dict, Episodes]:
        """The report, with the words `suppress` never sampled."""
        sampling = Sampling(
            max_new_tokens=self._config.zero.rollout.longest_response,
            stop_ids=self._tokenizer.stop_ids,
            suppress_ids=tuple(self._tokenizer.token_id(word) for word in suppress),
        )
        figures, episodes = evaluate(
            self._actor,
            params,
            self._task,
            problems=self._config.problems,
            samples=self._config.samples,
            sampling=sampling,
            seed=self._config.zero.seed,
        )
        return figures | self_correction(episodes), episodes


def self_correction(episodes: Episodes) -> dict[str, float]:
    """Reflection where it is needed: on problems with a product, which the base cannot work out in one step."""
    waits = episodes.of_problem(["wait" in text.split() for text in episodes.texts])
    needed = np.array([problem.data.get("products", 0) > 0 for problem in episodes.problems])
    if not needed.any():
        return {}
    return {"self_correction": float(waits[needed].mean())}


ROWS = {  # key of a report → what the table calls it, and its format
    "pass@1": ("pass@1", "{:.1%}"),
    "cons@16": ("cons@16", "{:.1%}"),
    "format": ("format rate", "{:.1%}"),
    "length": ("mean length, tokens", "{:.1f}"),
    "length/correct": ("mean length when right", "{:.1f}"),
    "reflection/wait": ('responses with "wait"', "{:.1%}"),
    "self_correction": ('"wait" where a product is', "{:.1%}"),
}


def brief(figures: dict[str, float]) -> str:
    return f"held-out pass@1 {figures['pass@1']:.1%}, mean length {figures['length']:.1f} tokens"


def report(summary: dict[str, Any], records: list[dict], workdir: pathlib.Path) -> str:
    """The table of before and after, samples, what to make of them, and where to go on."""
    arms = [arm for arm in ("before", "after", "control") if arm in summary]
    titles = {"before": "base", "after": "R1-Zero", "control": "random reward"}
    lines = ["", " " * 26 + "".join(f"{titles[arm]:>18}" for arm in arms)]
    for key, (title, form) in ROWS.items():
        cells = []
        for arm in arms:
            value = summary[arm].get(key)
            cell = "-" if value is None else form.format(value)
            error = summary[arm].get(f"{key}/stderr")
            cells.append(f"{cell} ± {error:.1%}" if error is not None else cell)
        lines.append(f"{title:<26}" + "".join(f"{cell:>18}" for cell in cells))
    lines += [
        "",
        f"{summary['held_out_problems']} held-out problems, {summary['responses_per_problem']} responses each, "
        "temperature 1; ± is one standard error over problems.",
        "",
        "What is learned, and what was there before: the base data hold every skill. Textbook traces show",
        'products redone after "wait"; noisier data then bury them, and the base hardly ever does it.',
        "Reinforcement learning selects what is rewarded: first whole, well-formed traces, then the redone",
        "products. It invents neither. The control shows what the optimizer does without information in the",
        "reward.",
        "",
        "After R1-Zero, for example:",
    ]
    shown = [r for r in records if "wait" in r["response"]][:: 16 * 7][:3]
    lines += [f"  {r['question']} {r['response']}   ({r['status']})" for r in shown]
    lines += [
        "",
        f"{summary['seconds']:.0f} s. Curves: {workdir}/curves.png · figures: {workdir}/summary.json · all responses: "
        f"{workdir}/samples.jsonl",
        "Go on from here:",
        f"  .venv/bin/python -m experiments.generate --run={workdir}/zero --prompt='4 *3 -5 +9 ='",
        f"  .venv/bin/python -m experiments.evaluate --run={workdir}/zero --task=arithmetic",
        "  make run ARGS='--workdir=runs/longer --config.zero.loop.steps=300'",
        "  make tables   (the claims of the paper, each with three seeds and its control)",
    ]
    return "\n".join(lines)


def draw(workdir: pathlib.Path, config: Config) -> None:
    """curves.png: the RL stages' training curves."""
    panels = {
        "accuracy on training problems": "rollout/pass@1",
        "response length, tokens": "rollout/length",
        'share of responses with "wait"': "rollout/reflection/wait",
        "entropy, nats per token": "entropy",
    }
    arms = {"R1-Zero": "zero"} | ({"random reward": "control"} if config.control else {})
    records = {arm: metrics.read(workdir / name / "metrics.jsonl") for arm, name in arms.items()}
    plots.curves(
        workdir / "curves.png",
        {
            title: {
                arm: [[(r["step"], r[key]) for r in rows if key in r]]
                for arm, rows in records.items()
            }
            for title, key in panels.items()
        },
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
