"""Preparing shapes and batches of them: complete, cached, exact to resume; bad files passed over."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import deadly_tasks
import jax
import numpy as np
import pytest
import trimesh

from research.hunyuan3d_2.data import crashes, pipeline, shapes
from research.hunyuan3d_2.data.shapes import (
    FamilySource,
    FolderSource,
    PoolConfig,
    build,
    open_split,
)
from research.hunyuan3d_2.geometry.distance import signed_distance
from research.hunyuan3d_2.geometry.meshes import MeshError

SMALL = PoolConfig(uniform=256, sharp=128, queries=96, views=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("shapes")
    build(FamilySource("train", 6), directory, SMALL)
    return directory


def test_pools_have_their_sizes_points_on_the_surface_and_true_distances():
    ball = trimesh.creation.icosphere(4)
    found = shapes.pools(ball, np.random.default_rng(0), PoolConfig(500, 400, 300, views=0))
    sizes = {
        "uniform": (500, 7),
        "sharp": (400, 7),
        "volume": (300, 4),
        "near": (300, 4),
        "near_sharp": (300, 4),
    }
    assert {name: x.shape for name, x in found.items()} == sizes
    assert all(x.dtype == np.float32 for x in found.values())  # §8.4
    for name in ("volume", "near", "near_sharp"):
        points = found[name].astype(np.float64)
        np.testing.assert_allclose(
            points[:, 3], 1 - np.linalg.norm(points[:, :3], axis=1), atol=2e-3
        )
    assert found["volume"][:, 3].min() < -0.5  # not clipped
    assert np.abs(found["near"][:150, 3]).max() < 0.03 and not found["sharp"][:, 6].any()
    box = shapes.pools(trimesh.creation.box((2, 2, 2)), np.random.default_rng(0), SMALL)
    assert (box["sharp"][:, 6] == 1).all() and not box["uniform"][:, 6].any()


def test_what_is_built_is_what_is_read(prepared):
    found = open_split(prepared, "train")
    assert len(found) == 6 and found.config == SMALL
    assert (
        found.names[0] == "superquadric-000000" and len({n.split("-")[0] for n in found.names}) == 5
    )
    shape = found[1]
    mesh = trimesh.Trimesh(shape["vertices"], shape["faces"], process=False)
    assert mesh.is_watertight
    near = shape["near"]
    np.testing.assert_allclose(signed_distance(mesh, near[:, :3]), near[:, 3], atol=1e-5)
    for name in ("uniform", "sharp"):  # §8.4: half precision would put them 5e-4 off the surface
        assert np.abs(signed_distance(mesh, shape[name][:, :3])).max() < 1e-6
    assert set(shape) == {"uniform", "sharp", "volume", "near", "near_sharp", "vertices", "faces"}
    with pytest.raises(KeyError, match="views"):
        shape["views"]


def test_files_are_made_anew_only_if_something_changed(prepared):
    root = prepared / "train"
    times = {p.name: p.stat().st_mtime_ns for p in root.glob("*.safetensors")}
    (root / "csg-000000.safetensors").write_bytes(b"damaged")
    (root / "figure-000000.safetensors").unlink()
    build(FamilySource("train", 6), prepared, SMALL)
    after = {p.name: p.stat().st_mtime_ns for p in root.glob("*.safetensors")}
    assert {name for name in times if times[name] != after[name]} == {
        "csg-000000.safetensors", "figure-000000.safetensors",
    }  # fmt: skip
    for change in (
        {"config": dataclasses.replace(SMALL, angle=25.0)},
        {"config": SMALL, "seed": 1},
    ):
        root = build(FamilySource("train", 1), prepared / "other", **change)
        at = (root / "superquadric-000000.safetensors").stat().st_mtime_ns
        build(FamilySource("train", 1), prepared / "other", SMALL)
        assert (root / "superquadric-000000.safetensors").stat().st_mtime_ns != at


def test_an_interrupted_build_is_not_opened_and_goes_on_where_it_was(tmp_path, monkeypatch):
    source, run, prepared = FamilySource("train", 4), shapes._Job.run, []

    def twice(job):
        if len(prepared) == 2:
            raise KeyboardInterrupt
        prepared.append(job.name)
        return run(job)

    build(source, tmp_path, SMALL)
    other = dataclasses.replace(SMALL, uniform=100)
    monkeypatch.setattr(shapes._Job, "run", twice)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path, other)
    with pytest.raises(FileNotFoundError, match="interrupted"):  # two files are of either kind
        open_split(tmp_path, "train")
    monkeypatch.setattr(shapes._Job, "run", lambda job: (prepared.append(job.name), run(job))[1])
    build(source, tmp_path, other)
    assert sorted(prepared) == sorted(source.names())
    assert [len(shape["uniform"]) for shape in open_split(tmp_path, "train")] == [100] * 4


def test_what_is_up_to_date_stays_untouched(tmp_path):
    """Latents are encoded anew if the index is (dit/latents.py), and bad files do not change from run to run."""
    trimesh.creation.box().export(tmp_path / "box.stl")
    (tmp_path / "damaged.glb").write_bytes(b"glTF and no more")
    source = FolderSource(str(tmp_path), "train", 0.0)
    index = build(source, tmp_path / "out", SMALL) / "index.json"
    os.utime(index, (1, 1))
    build(source, tmp_path / "out", SMALL)
    assert index.stat().st_mtime == 1
    trimesh.creation.box().export(tmp_path / "damaged.glb")
    build(source, tmp_path / "out", SMALL)
    assert index.stat().st_mtime > 1
    assert open_split(tmp_path / "out", "train").names == ["box.stl", "damaged.glb"]


def test_views_are_stored_with_the_shape(tmp_path):
    build(FamilySource("heldout", 1), tmp_path, dataclasses.replace(SMALL, views=2, view_size=32))
    views = open_split(tmp_path, "heldout")[0]["views"]
    assert views.shape == (2, 32, 32, 4) and views.dtype == np.uint8
    covered = (views[..., 3] > 127).mean((1, 2))
    assert (0.1 < covered).all() and (covered < 0.9).all()


def meshes_of_a_user(directory: pathlib.Path) -> None:
    (directory / "below").mkdir(parents=True)
    trimesh.creation.box((1, 2, 3)).apply_translation((9, 9, 9)).export(directory / "box.stl")
    trimesh.creation.box().export(directory / "below" / "box.ply")
    (directory / "damaged.glb").write_bytes(b"glTF and no more")
    (directory / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (directory / "notes.txt").write_text("no mesh")


def test_a_folder_of_meshes_is_read_and_bad_files_are_passed_over_with_the_reason(tmp_path, caplog):
    meshes_of_a_user(tmp_path / "mine")
    source = FolderSource(str(tmp_path / "mine"), "train", heldout=0.0)
    build(source, tmp_path, SMALL)
    found = open_split(tmp_path, "train")
    assert found.names == ["below/box.ply", "box.stl"]
    np.testing.assert_allclose(
        np.ptp(found[1]["vertices"], axis=0), 2 * 0.9999 * np.array([1, 2, 3]) / 3, rtol=1e-5
    )
    told = caplog.text
    assert "damaged.glb is passed over" in told and "cannot be read" in told
    assert "flat.obj is passed over" in told and "no area" in told
    index = (tmp_path / "train" / "index.json").read_text()
    assert "damaged.glb" in index and "no area" in index


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Boxes, called as one likes."""

    called: tuple[str, ...]
    split = "train"

    def names(self):
        return list(self.called)

    def fingerprint(self, name):
        return "a box"

    def load(self, name):
        box = trimesh.creation.box()
        return box, box, []


def test_shapes_may_have_any_name(tmp_path):
    long = "below/" + "ä" * 200
    names = ["plain", os.fsdecode(b"caf\xe9"), long + "1", long + "2", "%-" + "a" * 300]
    root = build(Boxes(tuple(names)), tmp_path, SMALL)
    found = open_split(tmp_path, "train")
    assert found.names == names and (root / "plain.safetensors").is_file()
    assert len(list(root.glob("*.safetensors"))) == len(names)
    assert len({shape["uniform"].tobytes() for shape in found}) == len(names)  # of other seeds
    before = [path.stat().st_mtime_ns for path in sorted(root.iterdir())]
    build(Boxes(tuple(names)), tmp_path, SMALL)
    assert [path.stat().st_mtime_ns for path in sorted(root.iterdir())] == before


def test_what_cannot_be_written_ends_the_build_and_leaves_nothing(tmp_path):
    (tmp_path / "train" / "taken.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        build(Boxes(("good", "taken")), tmp_path, SMALL)
    assert {path.name for path in (tmp_path / "train").iterdir()} == {
        "good.safetensors", "taken.safetensors",
    }  # fmt: skip


def test_names_that_are_no_text_are_parted_too(tmp_path):
    for name in (b"caf\xe9.stl", b"box.stl"):
        pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    parts = [FolderSource(str(tmp_path), split, 0.5).names() for split in ("train", "heldout")]
    assert sorted(os.fsencode(name) for name in sum(parts, [])) == [b"box.stl", b"caf\xe9.stl"]


def test_a_folder_is_parted_by_names_alone(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.stl").write_bytes(b"x")
    train, heldout = (
        FolderSource(str(tmp_path), split, 0.25).names() for split in ("train", "heldout")
    )
    assert (
        sorted(train + heldout) == sorted(f"{i}.stl" for i in range(40)) and 3 <= len(heldout) <= 18
    )
    (tmp_path / "new.stl").write_bytes(b"x")
    assert set(FolderSource(str(tmp_path), "heldout", 0.25).names()) - {"new.stl"} == set(heldout)


def test_sources_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        build(FolderSource(str(tmp_path / "absent"), "train"), tmp_path, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no meshes"):
        build(FolderSource(str(tmp_path / "empty"), "train"), tmp_path, SMALL)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.glb").write_bytes(b"glTF")
    with pytest.raises(MeshError, match="no shape of 1 could be prepared; a.glb"):
        build(FolderSource(str(tmp_path / "bad"), "train", 0.0), tmp_path, SMALL)
    with pytest.raises(FileNotFoundError, match="data.build"):
        open_split(tmp_path / "nowhere", "train")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "mine").mkdir()
    trimesh.creation.box().export(tmp_path / "mine" / "box.stl")
    (tmp_path / "mine" / "a.glb").write_bytes(b"glTF")  # the one that is held out
    for folder, message in (("absent", "there is no directory"), ("mine", "no shape of 1")):
        options = [f"--out={tmp_path / 'out'}", f"--meshes={tmp_path / folder}", "--views=0"]
        command = [sys.executable, "-m", "research.hunyuan3d_2.data.build", *options]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        assert f"error: {message}" in ended.stderr.splitlines()[-1]


def batches(directory, **changes):
    options = {"batch_size": 4, "uniform": 32, "sharp": 16, "points": 31, "seed": 3} | changes
    return pipeline.vae_batches(directory, **options)


def same(a: dict, b: dict) -> bool:
    return all((a[name] == b[name]).all() for name in a) and a.keys() == b.keys()


def test_batches_are_subsets_of_the_pools_a_third_of_each_group(prepared):
    batch = next(iter(batches(prepared, points=96)))
    sizes = {"uniform": (4, 32, 7), "sharp": (4, 16, 7), "points": (4, 96, 3), "distance": (4, 96)}
    assert {name: x.shape for name, x in batch.items()} == sizes
    assert all(x.dtype == np.float32 for x in batch.values())
    held = list(open_split(prepared, "train"))
    for row in range(4):
        mine = next(s for s in held if (s["uniform"] == batch["uniform"][row, 0]).all(1).any())
        for name in ("uniform", "sharp"):
            pool = {p.tobytes() for p in mine[name]}
            rows = [p.tobytes() for p in batch[name][row]]
            assert set(rows) <= pool and len(set(rows)) == len(rows)
        asked = np.concatenate([batch["points"][row], batch["distance"][row][:, None]], axis=1)
        for i, name in enumerate(("volume", "near", "near_sharp")):
            assert {p.tobytes() for p in asked[32 * i : 32 * (i + 1)]} <= {
                p.tobytes() for p in mine[name]
            }


def test_batches_resume_exactly_and_depend_on_the_seed_alone(prepared):
    stream = iter(batches(prepared))
    seen = [next(stream) for _ in range(3)]
    state = stream.get_state()
    ahead = [next(stream) for _ in range(4)]
    resumed = iter(batches(prepared))
    resumed.set_state(state)
    assert all(same(a, next(resumed)) for a in ahead)
    again = iter(batches(prepared))
    assert all(same(a, next(again)) for a in seen)
    assert not same(seen[0], next(iter(batches(prepared, seed=4))))
    # Six shapes and rows of four: the third batch begins the second epoch with other points.
    assert not (seen[0]["points"][:, None] == seen[2]["points"][None]).all((2, 3)).any()


def test_processes_share_the_rows_of_a_batch(prepared, monkeypatch):
    whole = next(iter(batches(prepared)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(next(iter(batches(prepared))))
    for index, part in enumerate(parts):
        assert same(part, {name: x[index::2] for name, x in whole.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uniform": 257}, "256 uniform"),
        ({"points": 289}, "288 points"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_more_than_there_is_is_an_error(prepared, change, message):
    with pytest.raises(ValueError, match=message):
        batches(prepared, **change)


def test_a_task_that_kills_its_process_is_reported_and_the_others_are_done():
    ended = list(
        crashes.as_completed(deadly_tasks.double_or_die, range(6), 2, deadly_tasks.nothing)
    )
    assert sorted((task, done) for task, done, reason in ended if not reason) == [
        (i, 2 * i) for i in (0, 1, 2, 4, 5)
    ]
    assert [(task, "died" in reason) for task, _, reason in ended if reason] == [(3, True)]


@pytest.mark.slow
def test_processes_build_what_one_does(tmp_path):
    config = dataclasses.replace(SMALL, views=2, view_size=32)
    for workers in (0, 2):
        build(FamilySource("train", 5), tmp_path / str(workers), config, workers=workers)
    one, two = (open_split(tmp_path / name, "train") for name in ("0", "2"))
    assert one.names == two.names
    for a, b in zip(one, two, strict=True):
        assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.slow
def test_the_command_prepares_both_splits(tmp_path):
    command = [sys.executable, "-m", "research.hunyuan3d_2.data.build", f"--out={tmp_path}"]
    small = [
        "--train=3",
        "--heldout=2",
        "--points=64",
        "--views=1",
        "--view_size=16",
        "--workers=1",
    ]
    told = subprocess.run(command + small, check=True, capture_output=True, text=True).stdout
    assert "3 of 3 shapes" in told and "2 of 2 shapes" in told
    train, heldout = (open_split(tmp_path, split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (3, 2)
    assert train[0]["views"].shape == (1, 16, 16, 4) and train[0]["volume"].shape == (64, 4)
    assert (train[0]["vertices"].shape != heldout[0]["vertices"].shape) or (
        train[0]["vertices"] != heldout[0]["vertices"]
    ).any()
