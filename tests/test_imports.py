"""Who may import whom: the layers of the codebase, held by reading every file's imports."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = {"research.core", "pallas_kernels"}
SHARED = BASE | {f"research.{name}" for name in ("lm", "tasks", "sandbox", "vision")}
BELOW_PAPERS = SHARED | {"research.rewards", "research.rl"}
ALLOWED = {  # package → ours that it may import, besides itself; one that is not here is a paper's
    "pallas_kernels": set(),
    "research.core": set(),
    "research.lm": BASE,
    "research.tasks": BASE,
    "research.sandbox": BASE,
    "research.vision": BASE,
    "research.rewards": BASE | {"research.tasks", "research.sandbox"},
    "research.rl": SHARED | {"research.rewards"},
}
RIVALS = {"pallas_kernels/on_device.py": {"torch", "fla"}}  # what a benchmark times beside ours, where it is
FILES = [
    path.relative_to(ROOT)
    for top in ("pallas_kernels", "research", "experiments")
    for path in sorted((ROOT / top).rglob("*.py"))
]


def imported(source: str, file: pathlib.Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it the statement stands.

    `from a import b` gives a.b too, since b may be a module.
    """
    package = list(file.with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def owner(module: str) -> str | None:
    """The package of ours that a module belongs to; None for one that is not ours."""
    parts = module.split(".")
    if parts[0] == "research":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    return parts[0] if parts[0] in ("pallas_kernels", "experiments") else None


def violations(source: str, file: pathlib.Path) -> list[str]:
    importer = owner(".".join(file.with_suffix("").parts))
    if importer in (None, "experiments"):
        return []
    names = imported(source, file)
    allowed = ALLOWED.get(importer, BELOW_PAPERS) | {importer, None}
    wrong = [f"{file} imports {name}" for name in sorted(names) if owner(name) not in allowed]
    if importer == "pallas_kernels":
        others = {name.split(".")[0] for name in names if owner(name) is None}
        foreign = others - {"jax", "numpy"} - sys.stdlib_module_names - RIVALS.get(str(file), set())
        wrong += [f"{file} imports {name}" for name in sorted(foreign)]
    return wrong


def test_the_layers_hold():
    assert len(FILES) > 50
    assert not [line for file in FILES for line in violations((ROOT / file).read_text(), file)]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pallas_kernels/a/b.py", "import flax"),
        ("pallas_kernels/a/b.py", "from research.core import step"),
        ("research/core/a.py", "from research.lm import decoder"),
        ("research/core/a.py", "def f():\n    import pallas_kernels"),
        ("research/lm/a.py", "import research.tasks"),
        ("research/lm/hf/a.py", "from ...rl import trainer"),
        ("research/rewards/a.py", "from research import lm"),
        ("research/rl/a.py", "from research.deepseek_r1 import zero"),
        ("research/deepseek_r1/a.py", "from research.reinforce_pp import losses"),
        ("research/deepseek_r1/a.py", "import experiments.run"),
    ],
)
def test_a_wrong_import_is_found(file, line):
    assert len(violations(line, pathlib.Path(file))) >= 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pallas_kernels/a/b.py", "import functools\nimport jax.numpy\nimport numpy as np"),
        ("pallas_kernels/a/b.py", "from pallas_kernels.a import reference\nfrom . import xla"),
        ("research/lm/hf/a.py", "from ..decoder import Decoder\nfrom research.core import mesh"),
        ("research/rl/a.py", "from research.rewards import Reward\nimport optax"),
        ("research/deepseek_r1/a.py", "from research.rl import trainer"),
        ("experiments/a.py", "from research.deepseek_r1 import zero"),
    ],
)
def test_a_right_import_passes(file, line):
    assert violations(line, pathlib.Path(file)) == []
