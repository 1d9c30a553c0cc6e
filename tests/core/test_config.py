"""Configurations: what the schema refuses, how flags edit them, what files keep of them."""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from research.core import config

ROOT = str(pathlib.Path(__file__).parents[2])


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 0.001
    name: Literal["adamw", "sgd"] = "adamw"
    clip_norm: float | None = None
    nesterov: bool = False
    boundaries: tuple[int, ...] = ()

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, got {self.lr}")


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    factor: float = 8.0


@dataclasses.dataclass(frozen=True)
class Experiment:
    steps: int
    optim: Optim = Optim()
    sources: tuple[Source, ...] = (Source("a.jsonl"), Source("b.jsonl", 2.0))
    scaling: Scaling | None = None
    note: str | None = None
    range: tuple[int, float] = (0, 1.0)


@pytest.fixture
def full():
    return Experiment(
        steps=7,
        optim=Optim(lr=0.1, name="sgd", clip_norm=1.0, nesterov=True, boundaries=(3, 5)),
        sources=(Source("c.jsonl", 0.5),),
        scaling=Scaling(2.0),
        note="x",
        range=(4, 2.5),
    )


def parse(dc, *arguments):
    """What flags make of dc. (From a file, they do the same: the last test starts a launcher.)"""
    argv = ["launcher", *arguments]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict(
        "config", config.to_config_dict(dc), flag_values=values, sys_argv=argv
    )
    values(argv)
    return config.from_config_dict(type(dc), holder.value)


def test_round_trip_through_config_dict(full):
    for dc in (full, Experiment(steps=1)):
        cd = config.to_config_dict(dc)
        assert isinstance(cd, ConfigDict) and cd.is_locked
        assert config.from_config_dict(Experiment, cd) == dc
        assert config.from_config_dict(Experiment, ConfigDict(config.to_dict(dc))) == dc
        assert config.from_config_dict(Experiment, copy.deepcopy(cd)) == dc
        assert config.from_config_dict(Experiment, cd.copy_and_resolve_references()) == dc


def test_every_kind_of_flag(full):
    got = parse(
        Experiment(steps=1),
        "--config.steps=7",
        "--config.optim.lr=0.1",
        "--config.optim.name=sgd",
        "--config.optim.clip_norm=1",
        "--config.optim.nesterov",
        "--config.optim.boundaries=3,5",
        "--config.sources=({'path': 'c.jsonl', 'weight': 0.5},)",
        "--config.scaling={'factor': 2}",
        "--config.note=x",
        "--config.range=(4, 2.5)",
    )
    assert got == full


def test_flags_set_none_and_index_tuples(full):
    got = parse(
        full,
        "--config.optim.clip_norm=none",
        "--config.scaling=None",
        "--config.note=none",
        "--config.sources[0].path=d.jsonl",
        "--noconfig.optim.nesterov",
    )
    assert (got.optim.clip_norm, got.scaling, got.note) == (None, None, None)
    assert got.sources == (Source("d.jsonl", 0.5),)
    assert got.optim.nesterov is False


UNKNOWN = [
    ("optim.lrr", "unknown key optim.lrr; did you mean optim.lr?"),
    ("optm.lr", "unknown key optm; did you mean optim?"),
    ("learning_rate", "unknown key learning_rate; Experiment has steps, optim, sources"),
    ("lr", "unknown key lr; did you mean optim.lr?"),
    ("sources[1].weigth", "unknown key sources[1].weigth; did you mean sources[1].weight?"),
]


@pytest.mark.parametrize("key, message", UNKNOWN)
def test_unknown_key_in_flags_names_the_nearest(key, message):
    with pytest.raises(flags.Error, match=re.escape(message)):
        parse(Experiment(steps=1), f"--config.{key}=1")


def test_unknown_key_in_files_and_dicts_names_the_nearest():
    cd = config.to_config_dict(Experiment(steps=1))
    message = re.escape("unknown key optim.lrr; did you mean optim.lr?")
    with pytest.raises(AttributeError, match=message):
        cd.optim.lrr = 0.1
    with pytest.raises(AttributeError, match=message):
        _ = cd.optim.lrr
    with pytest.raises(KeyError, match=message):
        cd.optim["lrr"] = 0.1
    with cd.unlocked(), pytest.raises(config.UnknownKeyError, match=message):
        cd.optim["lrr"] = 0.1
    with pytest.raises(config.UnknownKeyError, match=message):
        config.from_config_dict(Experiment, {"steps": 1, "optim": {"lrr": 0.1}})
    with pytest.raises(config.UnknownKeyError, match=re.escape("sources[0].pth")):
        config.from_config_dict(Experiment, {"steps": 1, "sources": [{"pth": "x"}]})
    assert not hasattr(cd.optim, "lrr") and cd.optim.get("lrr", 5) == 5


WRONG = [
    (("steps",), 1.5, "steps: needs int, got 1.5"),
    (("steps",), True, "steps: needs int, got True"),
    (("steps",), "3", "steps: needs int, got '3'"),
    (("steps",), None, "steps: needs int, got None"),
    (("optim", "lr"), "0.1", "optim.lr: needs float, got '0.1'"),
    (("optim", "lr"), False, "optim.lr: needs float, got False"),
    (("optim", "clip_norm"), "x", "optim.clip_norm: needs float, got 'x'"),
    (("optim", "nesterov"), 1, "optim.nesterov: needs bool, got 1"),
    (("optim", "name"), "adam", "optim.name: 'adam' is not one of adamw, sgd; did you mean 'adamw'?"),
    (("optim", "boundaries"), (1, 2.5), "optim.boundaries[1]: needs int, got 2.5"),
    (("optim", "boundaries"), 3, "optim.boundaries: needs tuple"),
    (("range",), (1, 2.0, 3.0), "range: needs 2 values"),
    (("optim",), 3, "optim: needs Optim, got 3"),
    (("optim",), Source("x"), "optim: needs Optim"),
    (("scaling",), {"factor": "2"}, "scaling.factor: needs float, got '2'"),
]


@pytest.mark.parametrize("path, value, message", WRONG)
def test_wrong_types_are_refused_where_they_are_written(path, value, message):
    *parents, last = path
    node = config.to_config_dict(Experiment(steps=1))
    nested = {last: value}
    for name in parents:
        node = node[name]
    for name in reversed(parents):
        nested = {name: nested}
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        node[last] = value
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.from_config_dict(Experiment, {"steps": 1, **nested})


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.steps=1.5", "config.steps"),
        ("--config.optim.lr=fast", "config.optim.lr"),
        ("--config.optim.name=adam", "optim.name: 'adam' is not one of adamw, sgd"),
        ("--config.optim.clip_norm=big", "config.optim.clip_norm"),
        ("--config.optim.nesterov=2", "config.optim.nesterov"),
        ("--config.optim.boundaries=1,2.5", "optim.boundaries[1]: needs int"),
        ("--config.optim.lr=-1", "optim: lr must not be negative, got -1.0"),
    ],
)
def test_wrong_types_in_flags_name_the_key(flag, message):
    with pytest.raises(flags.Error, match=re.escape(message)):
        parse(Experiment(steps=1), flag)


def test_a_dataclass_holding_a_wrong_type_is_refused():
    with pytest.raises(config.ConfigError, match="steps: needs int, got 1.5"):
        config.to_config_dict(Experiment(steps=1.5))
    with pytest.raises(config.ConfigError, match=re.escape("optim.boundaries[0]: needs int")):
        config.to_dict(Experiment(steps=1, optim=Optim(boundaries=("x",))))


def test_missing_value_and_unsupported_type():
    with pytest.raises(config.ConfigError, match=re.escape("sources[0].path: missing")):
        config.from_config_dict(Experiment, {"steps": 1, "sources": [{"weight": 1.0}]})

    @dataclasses.dataclass(frozen=True)
    class Bad:
        table: dict = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match="table: a config field cannot be of type"):
        config.to_config_dict(Bad())


def test_an_int_stands_for_a_float_and_lists_become_tuples():
    got = config.from_config_dict(
        Experiment, {"steps": 1, "optim": {"lr": 1, "boundaries": [1, 2]}, "range": [1, 2]}
    )
    assert type(got.optim.lr) is float and got.optim.boundaries == (1, 2)
    assert got.range == (1, 2.0) and type(got.range[1]) is float
    hash(got)  # frozen all the way down


def test_json_round_trip(full, tmp_path):
    path = tmp_path / "config.json"
    for dc in (full, Experiment(steps=1)):
        config.save(path, dc)
        assert config.load(path, Experiment) == dc
        assert json.loads(path.read_text()) == config.to_dict(dc)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    path.write_text('{"steps": 1, "optim": {"lrr": 3}}')
    with pytest.raises(config.UnknownKeyError, match="config.json: unknown key optim.lrr"):
        config.load(path, Experiment)
    path.write_text('{"steps": ')
    with pytest.raises(config.ConfigError, match="config.json is not valid JSON"):
        config.load(path, Experiment)


def test_fingerprint_is_of_the_values(full):
    values = json.dumps(dataclasses.asdict(full), sort_keys=True)  # json writes tuples as lists
    assert config.fingerprint(full) == hashlib.sha256(values.encode()).hexdigest()
    assert config.fingerprint(Experiment(1, Optim(lr=1))) == config.fingerprint(
        Experiment(1, Optim(lr=1.0))
    )
    prints = {
        config.fingerprint(dataclasses.replace(full, **change))
        for change in ({}, {"steps": 8}, {"scaling": None}, {"range": (4, 2.25)})
    }
    assert len(prints) == 4


def test_differences(full):
    other = dataclasses.replace(
        full,
        optim=dataclasses.replace(full.optim, lr=0.01, boundaries=(3,)),
        sources=(Source("c.jsonl", 0.5), Source("e.jsonl")),
        scaling=None,
    )
    assert config.differences(full, full) == []
    assert sorted(config.differences(full, other)) == [
        "optim.boundaries: [3, 5] != [3]",
        "optim.lr: 0.1 != 0.01",
        "scaling.factor: 2.0 != absent",
        "scaling: absent != None",
        "sources[1].path: absent != 'e.jsonl'",
        "sources[1].weight: absent != 1.0",
    ]
    stored = json.loads(json.dumps(config.to_dict(full)))
    assert config.differences(stored, full) == []


def test_a_mistyped_flag_is_one_line_and_not_a_traceback(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(
        "from absl import app\n"
        "from ml_collections import config_flags\n"
        "CONFIG = config_flags.DEFINE_config_file('config')\n"
        "app.run(lambda argv: print(CONFIG.value.lr))\n"
    )
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "import dataclasses\n"
        "from research.core import config\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Optim:\n"
        "    lr: float = 0.1\n"
        "def get_config(arg=''):\n"
        "    return config.to_config_dict(Optim())\n"
    )
    command = [sys.executable, str(script), f"--config={experiment}"]
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    bad = run([*command, "--config.lrr=2"])
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    assert "unknown key lrr; did you mean lr?" in bad.stderr
    good = run([*command, "--config.lr=2"])
    assert good.stdout == "2.0\n"
