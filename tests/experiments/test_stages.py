"""Runs one after another: what each starts from, and that a stop anywhere changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import run as launcher
from experiments import stages
from experiments.stages import Config, Stage
from research.core import checkpoint, loop
from research.core import config as configs
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, dpo
from research.lm import trainer as lm
from research.lm.config import DecoderConfig

TINY = DecoderConfig(
    vocab_size=260, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
    mlp_size=32, max_position=32, tie_embeddings=True, scan_layers=False, init_std=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("stages")
    words = ["ab", "ba", "aab", "bab", "abba"] * 4
    records = [{"t": w, "q": w + "=", "good": w, "bad": w[::-1] + "?"} for w in words]
    (place / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = str(place / "a.jsonl")
    base = lm.Config(
        mesh="data=1",
        model=TINY,
        tokenizer="byte",
        data=DataConfig((SourceConfig(path, text_key="t"),), seq_len=16, batch_size=4),
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=3, checkpoint_every=1),
    )
    pairs = SourceConfig(path, prompt_key="q", chosen_key="good", rejected_key="bad")
    preferences = dpo.Config(
        mesh="data=1",
        data=DataConfig((pairs,), seq_len=16, batch_size=4, pack="none", overlong="drop"),
        optim=OptimConfig(lr=1e-2),
        loop=LoopConfig(steps=3, checkpoint_every=1),
    )
    return Config((Stage("base", lm=base), Stage("preferences", dpo=preferences)))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, stages.main(config, workdir)


def final(workdir):
    return checkpoint.load_params(workdir / "preferences")


def test_each_goes_on_from_the_one_before(config, straight):
    workdir, report = straight
    assert list(report) == ["base", "preferences"]
    assert report["base"]["step"] == report["preferences"]["step"] == 3
    assert configs.load(workdir / "config.json", Config) == config
    model, params, _ = checkpoints.load(workdir / "base")
    state = checkpoint.Checkpointer(workdir / "preferences" / "checkpoints")
    built = dpo.build(stages.resolved(config, workdir)["preferences"], workdir / "unused")
    jax.tree.map(np.testing.assert_array_equal, built.init().params, params)
    _, restored = state.restore(built.init())  # it can be called again
    state.close()
    jax.tree.map(np.testing.assert_array_equal, restored.extra["ref_params"], params)
    assert model.config == TINY


@pytest.mark.parametrize("where", [("base", 1), ("preferences", 0), ("preferences", 2)])
def test_a_stop_in_or_between_stages_changes_nothing(config, straight, tmp_path, monkeypatch, where):
    """Killed as it collects the batch of that step; the same command again then ends the same."""
    name, step = where
    module = {"base": lm, "preferences": dpo}[name]
    build = module.build

    class Killed(BaseException):
        pass

    def mortal(run, directory, **given):
        trainer = build(run, directory, **given)

        def collect(state, at):
            if at == step:
                raise Killed
            return trainer.collect(state, at)

        return dataclasses.replace(trainer, collect=collect)

    monkeypatch.setattr(module, "build", mortal)
    with pytest.raises(Killed):
        stages.main(config, tmp_path)
    monkeypatch.setattr(module, "build", build)
    opened, lm_build = [], lm.build
    monkeypatch.setattr(
        lm, "build", lambda run, directory: opened.append(directory) or lm_build(run, directory)
    )
    report = stages.main(config, tmp_path)
    assert len(opened) == (1 if name == "base" else 0)  # a finished stage is left alone
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(straight[0]))
    skip = lambda record: {k: v for k, v in record.items() if not k.startswith(("time/", "compil"))}  # noqa: E731
    assert {k: skip(v) for k, v in report.items()} == {k: skip(v) for k, v in straight[1].items()}


def changed(config, place, **changes):
    made = list(config.stages)
    (kind,) = [k for k in ("lm", "dpo") if getattr(made[place], k) is not None]
    run = dataclasses.replace(getattr(made[place], kind), **changes)
    made[place] = dataclasses.replace(made[place], **{kind: run})
    return Config(tuple(made))


def test_what_is_finished_can_be_logged_otherwise_but_not_changed(config, straight):
    workdir, report = straight
    logged = changed(config, 0, loop=LoopConfig(steps=3, checkpoint_every=2))
    assert stages.main(logged, workdir) == report
    longer = changed(config, 0, loop=LoopConfig(steps=4, checkpoint_every=1))
    with pytest.raises(ValueError, match="preferences goes on from another 'base' .* remove it"):
        stages.main(longer, workdir)
    with pytest.raises(checkpoint.ConfigMismatch, match="beta: 0.1 != 0.5"):
        stages.main(changed(config, 1, beta=0.5), workdir)


def test_files_of_later_stages_are_looked_for_first(config, tmp_path):
    data = config.stages[1].dpo.data
    gone = dataclasses.replace(data.sources[0], path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        stages.main(
            changed(config, 1, data=dataclasses.replace(data, sources=(gone,))), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_the_launcher_runs_them(config, straight, monkeypatch):
    workdir, report = straight
    called = []
    monkeypatch.setattr(loop, "run", lambda *_, **__: called.append(1))
    assert launcher.train(config, workdir) == report and not called
    flags = configs.to_config_dict(config)
    flags.stages[1].dpo.beta = 0.3
    assert configs.from_config_dict(Config, flags).stages[1].dpo.beta == 0.3


def test_what_are_no_stages_is_refused():
    run = lm.Config()
    with pytest.raises(ValueError, match="needs one of lm, dpo and rl"):
        Stage("a")
    with pytest.raises(ValueError, match="needs one of lm, dpo and rl"):
        Stage("a", lm=run, dpo=dpo.Config())
    with pytest.raises(ValueError, match="its directory, got 'a/b'"):
        Stage("a/b", lm=run)
    with pytest.raises(ValueError, match="names of their own"):
        Config((Stage("a", lm=run), Stage("a", lm=run)))
