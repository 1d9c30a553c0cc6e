"""The launcher: trains anything.

    python -m experiments.run --config=experiments/configs/deepseek_r1/zero_gsm8k.py \\
        --config.init_from=/models/Qwen2.5-0.5B --config.loop.steps=200 --workdir=runs/zero

`--config=FILE:argument` passes the argument to the file's `get_config`. A run's directory holds the resolved
`config.json`, `provenance.json`, `metrics.jsonl`, TensorBoard events, checkpoints and samples. The same command
resumes an interrupted run exactly where it was saved.
"""

import dataclasses
import importlib
import json
import logging
import os
import pathlib
import signal
import sys
import traceback
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from research.core import config as configs
from research.core import loop, mesh, provenance

KINDS = {  # a config's `kind` → the module with its `Config`, and `build` (a loop.Trainer) or `main` (several)
    "lm": "research.lm.trainer",
    "dpo": "research.lm.dpo",
    "reward_model": "research.lm.reward_model",
    "rl": "research.rl.trainer",
    "shape_vae": "research.hunyuan3d_2.vae.trainer",
    "shape_dit": "research.hunyuan3d_2.dit.trainer",
    "stages": "experiments.stages",
    "quickstart": "experiments.quickstart",
}

ERROR = "error.txt"  # in a run's directory: the traceback of what stopped it

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file with get_config()."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; default: runs/<name of the config file>."
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    min(2, os.cpu_count() or 1),
    "Devices that a CPU is split into, when there is no accelerator.",
    1,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for runs of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes of the run.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "This process's number, from 0.", 0)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/january/jax",
    "Where compiled programs are kept between runs ('' to keep none).",
)


def train(config: Any, workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """Runs the experiment of a resolved config (one of the `Config` classes of `KINDS`) in `workdir`."""
    module = importlib.import_module(KINDS[config.kind])
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / ERROR).unlink(missing_ok=True)
    if hasattr(module, "main"):
        _note(workdir)
        return module.main(config, workdir)
    trainer = module.build(config, workdir)

    def init():  # the loop calls it when it has found that the directory is not another run's
        _note(workdir)
        return trainer.init()

    loop.run(dataclasses.replace(trainer, init=init), config.loop, workdir, fingerprint_of=config)
    return None


def setup_from_flags() -> None:
    """Devices, compilation cache and processes, as the flags say; before JAX touches a device."""
    for name in ("absl", "jax", "tensorboardX"):  # Orbax tells its life in the first
        logging.getLogger(name).setLevel(logging.WARNING)
    mesh.force_cpu_devices(_CPU_DEVICES.value)
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if _NUM_PROCESSES.value > 1:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f"error: unknown arguments {arguments[1:]}; settings are --config.key=value")
    config, name = _config_from_flags()
    setup_from_flags()
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}")
    try:
        train(config, workdir)
    except loop.Interrupted as stop:
        print(f"{stop}. The same command goes on from there.", file=sys.stderr)
        sys.exit(128 + int(stop.signum))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        print(f"error: {text}", file=sys.stderr)
        if workdir.is_dir():
            (workdir / ERROR).write_text(traceback.format_exc())
            print(f"(the traceback is in {workdir / ERROR})", file=sys.stderr)
        sys.exit(2)


def _config_from_flags() -> tuple[Any, str]:
    """The config that the flags ask for, as the `Config` of its kind, and the name of its file."""
    if _CONFIG.value is None:
        sys.exit("error: --config=FILE is needed; see experiments/configs")
    kind = _CONFIG.value.get("kind")
    if kind not in KINDS:
        sys.exit(f"error: the config's kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    schema = importlib.import_module(KINDS[kind]).Config
    try:
        config = configs.from_config_dict(schema, _CONFIG.value)
    except configs.ConfigError as error:
        sys.exit(f"error: {error}")
    return config, _config_path(flags.FLAGS["config"].config_filename).stem


def _note(workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        (workdir / "provenance.json").write_text(json.dumps(provenance.describe(), indent=2) + "\n")


def parse(arguments: list[str]) -> list[str]:
    """absl's parsing of flags, for `app.run`; a config file that is not there ends the program with one line."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, rest = flag.partition("=")
        path = _config_path(rest if equals else value)
        if name in ("-config", "--config") and not path.is_file():
            sys.exit(f"error: there is no config file {path}; see experiments/configs")
    return app.parse_flags_with_usage(arguments)


def _config_path(value: str) -> pathlib.Path:
    """FILE of FILE:argument."""
    return pathlib.Path(value.partition(":")[0])


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
