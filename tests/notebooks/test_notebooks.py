"""Every notebook runs from top to bottom, with the values of its 'parameters' cell shrunk."""

import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SMALL = {
    "01_quickstart": {"base_steps": 60, "rollouts": 3, "problems": 8},
    "02_lightning_attention": {"lengths": (256, 512)},
    "03_policy_optimisation": {"batches": 50},
    "06_shape_generation": {
        "checkpoint": "none",
        "shapes": 2,
        "vae_steps": 30,
        "dit_steps": 5,
        "steps": 4,
        "resolution": 24,
    },
}
# Of programs that run a few times, half of the time would be LLVM's optimiser's.
HASTY = {"06_shape_generation"}
PRINTED = {
    "01_quickstart": ("held-out pass@1", "without 'wait'"),
    "02_lightning_attention": ("the library's op", "break-even by operations: 160 tokens"),
    "03_policy_optimisation": (
        "rloo                   [1. 1. 1.]",
        "dr_grpo                [0.75 0.75 0.75]",
        "grpo                   [1.464 1.4   1.44 ]",
        "k1 in the reward: the gradient is that of KL(pi, ref)",
        "k2 as a loss: the gradient is that of KL(pi, ref)",
        "k3 as a loss: the gradient is that of KL(ref, pi)",
        "k1 as a loss: the gradient is 0",
    ),
    "06_shape_generation": ("training tiny ones", "saturates 0.2", "'watertight': True", "<iframe"),
}


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)


@pytest.mark.parametrize("started_in", ["notebooks", "."])
def test_shapes_find_the_trained_models_and_what_they_learned(tmp_path, monkeypatch, started_in):
    """As `make shape-model` leaves them, for a Jupyter that was started at the root or shows a notebook's folder."""
    for name, config in (("dit", {"vae": "runs/vae"}), ("vae", {"truncation": 0.07})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / started_in)
    (path,) = (path for path in NOTEBOOKS if path.stem == "06_shape_generation")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells[:2]:  # the parameters, and the set-up
        exec("".join(cell["source"]), names)
    assert names["trained"].samefile(tmp_path / "runs" / "dit")
    assert names["learned_truncation"](names["trained"]) == 0.07


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="install the extra 'notebooks'")
    import nbformat

    monkeypatch.delenv("XLA_FLAGS")  # the notebook chooses its own devices
    if path.stem in HASTY:
        monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    values = SMALL[path.stem] | {"workdir": str(tmp_path / "run")}
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    root = path.parents[1]
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(root)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot was drawn"
    shown = [output.get("text", output.get("data", {}).get("text/html", "")) for output in outputs]
    text = "".join(shown)
    assert all(words in text for words in PRINTED[path.stem])
