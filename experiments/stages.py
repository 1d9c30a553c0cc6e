"""Several runs one after another: each stage goes on from the model of the one before.

A stage is a run of its own in a subdirectory of its name. Interrupted anywhere, the same command goes on in the stage
where it was; stages that were finished with the same settings are not opened again.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Literal

from research.core import config as configs
from research.core import loop, metrics, sources
from research.lm import dpo as dpo_trainer
from research.lm import trainer as lm_trainer
from research.rl import trainer as rl_trainer

_MODULES = {"lm": lm_trainer, "dpo": dpo_trainer, "rl": rl_trainer}
FINISHED = "finished.json"  # in the directory: which stages are, with the fingerprints of their settings


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run, of one of the kinds. If it names no model, it starts from the stage before."""

    name: str
    lm: lm_trainer.Config | None = None
    dpo: dpo_trainer.Config | None = None
    rl: rl_trainer.Config | None = None

    def __post_init__(self):
        if len(self._given()) != 1:
            raise ValueError(f"the stage {self.name!r} needs one of lm, dpo and rl")
        if not self.name or self.name != pathlib.Path(self.name).name:
            raise ValueError(f"the name of a stage is that of its directory, got {self.name!r}")

    @property
    def config(self) -> Any:
        """The run's own configuration."""
        return self._given()[0]

    def _given(self) -> list[Any]:
        return [x for x in (self.lm, self.dpo, self.rl) if x is not None]


@dataclasses.dataclass(frozen=True)
class Config:
    stages: tuple[Stage, ...]
    kind: Literal["stages"] = "stages"

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages need names of their own, got {names}")


def main(config: Config, workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Runs the stages; returns the last line of each one's metrics.

    Raises ValueError for a stage that is to be trained while a later one exists already, made from another model; and
    what the stages' trainers raise, for files that are not there before the first stage.
    """
    workdir = pathlib.Path(workdir)
    runs = resolved(config, workdir)
    for run in runs.values():
        if hasattr(run, "data"):
            for source in (*run.data.sources, *run.eval_sources):
                sources.check(source)
    report = {}
    for place, (name, run) in enumerate(runs.items(), 1):
        print(f"{place}/{len(runs)}  {name}: {run.loop.steps} steps", flush=True)
        if _finished(workdir).get(name) != _identity(run):
            for later in list(runs)[place:]:
                if (workdir / later).exists():
                    raise ValueError(
                        f"{workdir / later} goes on from another {name!r} than this one will be; remove it"
                    )
            trainer = _MODULES[run.kind].build(run, workdir / name)
            loop.run(trainer, run.loop, workdir / name, fingerprint_of=run, name=name)
            _note_finished(workdir, name, run)
            configs.save(workdir / "config.json", config)
        lines = metrics.read(workdir / name / "metrics.jsonl")
        report[name] = lines[-1] if lines else {}
    return report


def resolved(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """The runs by name, with the directories that they start from."""
    runs, before = {}, None
    for stage in config.stages:
        run = stage.config
        if before is not None and not run.init_from and getattr(run, "model", None) is None:
            run = dataclasses.replace(run, init_from=str(workdir / before))
        runs[stage.name] = run
        before = stage.name
    return runs


def _identity(run: Any) -> str:
    """Of what a run computes, so without when it logs and what it keeps."""
    return configs.fingerprint(dataclasses.replace(run, loop=loop.LoopConfig(run.loop.steps)))


def _finished(workdir: pathlib.Path) -> dict[str, str]:
    path = workdir / FINISHED
    return json.loads(path.read_text()) if path.exists() else {}


def _note_finished(workdir: pathlib.Path, name: str, run: Any) -> None:
    finished = _finished(workdir) | {name: _identity(run)}
    temporary = workdir / f"{FINISHED}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(finished, indent=2) + "\n")
    os.replace(temporary, workdir / FINISHED)
