"""MiniMax-01's experiments: every variant is one that its trainer takes, and the tiny ones run one after another."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from experiments import run as launcher
from experiments.configs.minimax_01 import dpo, long_context, pretrain, sft
from experiments.stages import Config as Stages
from research.core import config as configs
from research.core import metrics
from research.core.data import SourceConfig
from research.lm.presets import PRESETS

VARIANTS = [
    (pretrain, ""), (pretrain, "70m"), (pretrain, "410m-softmax"), (pretrain, "7b-lightning"),
    (pretrain, "text_01"), (long_context, ""), (long_context, "paper"), (sft, ""), (sft, "short"),
    (sft, "long"), (dpo, ""), (dpo, "short"), (dpo, "long"),
]  # fmt: skip


@pytest.mark.parametrize(
    "module, arg", VARIANTS, ids=lambda x: x if isinstance(x, str) else x.__name__.split(".")[-1]
)
def test_every_variant_is_one_of_its_kind(module, arg):
    made = module.get_config(arg)
    schema = importlib.import_module(launcher.KINDS[made.kind]).Config
    assert configs.from_config_dict(schema, made) == module.config(arg)


@pytest.mark.parametrize("module", [pretrain, long_context, sft, dpo])
def test_unknown_variants_are_refused(module):
    with pytest.raises(ValueError, match="no variant 'huge'"):
        module.get_config("huge")


def test_sizes_are_the_presets():
    assert pretrain.config("410m").model == PRESETS["minimax-410m-hybrid"]
    assert pretrain.config("3b-softmax").model == PRESETS["minimax-3b-softmax"]


def small(config, sources, steps=2):
    """The same for a few steps on other files."""
    data = dataclasses.replace(config.data, sources=sources)
    loop = dataclasses.replace(config.loop, steps=steps, checkpoint_every=0, eval_every=0)
    return dataclasses.replace(config, data=data, loop=loop, mesh="data=1")


@pytest.mark.slow
def test_the_tiny_ones_run_from_text_to_preferences(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "green", "blue"], 60)) for _ in range(30)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    pairs = [{"prompt": "say red:", "response": "red", "chosen": "red", "rejected": "blue"}] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    path = str(tmp_path / "a.jsonl")
    text = SourceConfig(str(tmp_path / "a.txt"), format="text")
    first = small(pretrain.config(), (text,))
    first = dataclasses.replace(first, batch_ramp=((0, 2), (512, 16)))
    second = small(sft.config(), (SourceConfig(path, prompt_key="prompt", response_key="response"),))
    second = dataclasses.replace(second, optim=dataclasses.replace(second.optim, warmup_steps=1))
    preferences = SourceConfig(
        path, prompt_key="prompt", chosen_key="chosen", rejected_key="rejected"
    )
    third = small(dpo.config(), (preferences,))
    before = ""
    for name, run in (("pretrain", first), ("sft", second), ("dpo", third)):
        run = dataclasses.replace(run, init_from=before) if before else run
        launcher.train(run, tmp_path / name)
        (one, two) = metrics.read(tmp_path / name / "metrics.jsonl")
        assert np.isfinite([one["loss"], two["loss"], two["router/entropy"]]).all()
        before = str(tmp_path / name)
    assert one["loss"] == pytest.approx(one["pair_loss"] + 0.01 * one["aux"], rel=1e-5)
    assert one["accuracy"] == 0 and two["accuracy"] == 1  # after one update it prefers the right one


def test_the_stages_of_long_context_follow_the_pretraining():
    made = long_context.config()
    assert isinstance(made, Stages)
    runs = [stage.lm for stage in made.stages]
    assert [run.data.seq_len for run in runs] == [256, 1024, 2048, 4096]
    assert runs[0].model is not None and all(run.model is None for run in runs[1:])
    rates = runs[0].optim
    assert runs[1].optim.lr == pytest.approx(rates.lr * rates.factors[-1])
