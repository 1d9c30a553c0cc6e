"""Images to meshes end to end, with tiny random models: runs and released directories, the program, its errors."""

import itertools
import json
import os
import pathlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trimesh
import yaml
from PIL import Image

from experiments import shape as program
from research.core.checkpoint import Checkpointer, CheckpointError
from research.core.state import TrainState
from research.hunyuan3d_2 import condition, pipeline
from research.hunyuan3d_2.dit import checkpoint as dit_checkpoint
from research.hunyuan3d_2.dit import model as dit_model
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.geometry.isosurface import NoSurface
from research.hunyuan3d_2.pipeline import ImageToShape
from research.hunyuan3d_2.vae import checkpoint as vae_checkpoint
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.grid import Grid
from research.vision import hf
from research.vision.vit import ViT, ViTConfig

VAE = VAEConfig(
    num_tokens=16, latent_dim=8, width=32, heads=2, encoder_layers=1, decoder_layers=1, num_freqs=3,
    uniform_points=64, sharp_points=64, downsample_ratio=4, scale_factor=0.8,
)  # fmt: skip
DIT = DiTConfig(
    num_latents=16,
    latent_dim=8,
    cond_dim=32,
    hidden_size=32,
    num_heads=2,
    depth=1,
    single_depth=1,
    scan_blocks=False,
)
TOWER = ViTConfig(32, 1, 2, 128, patch_size=14, image_size=28)
SHIFT = 1.7  # brings 0 into the middle of the random decoder's field
FAST = {"steps": 3, "resolution": 20, "method": "dense"}


def random_like(shapes, seed):
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def params():
    """'dit', 'vae', 'tower': random, and the decoder's field crosses 0 on the grid."""
    dit = random_like(dit_model.shapes(DIT), 0)
    vae = random_like(vae_checkpoint.shapes(VAE, encoder=False), 1)
    vae["geo_decoder"]["output_proj"]["bias"] -= SHIFT
    image = jnp.zeros((1, 28, 28, 3))
    tower = random_like(jax.eval_shape(ViT(TOWER).init, jax.random.key(0), image)["params"], 2)
    return {"dit": dit, "vae": vae, "tower": tower}


@pytest.fixture(scope="module")
def release(params, tmp_path_factory):
    """A directory laid out as the released ones."""
    return write_release(tmp_path_factory.mktemp("release"), params)


def write_release(
    directory, params, *, views=False, turbo=False, parts=("model", "vae", "conditioner")
):
    prefix = "main_image_encoder.model."
    tower = {prefix + name: x for name, x in hf.to_tensors(TOWER, params["tower"])}
    everything = {
        "model": dit_checkpoint.to_tensors(DIT, params["dit"], "float32"),
        "vae": vae_checkpoint.to_tensors(params["vae"]),
        "conditioner": tower,
    }
    dit_checkpoint.write_bundle(directory, {name: everything[name] for name in parts})
    encoder = {
        "type": "DinoImageEncoderMV" if views else "DinoImageEncoder",
        "kwargs": {"config": hf.write_config(TOWER), "use_cls_token": True, "image_size": 28},
    }
    scheduler = (
        "ConsistencyFlowMatchEulerDiscreteScheduler" if turbo else "FlowMatchEulerDiscreteScheduler"
    )
    content = {
        "model": {"target": "a.b.Hunyuan3DDiT", "params": {}},
        "vae": {
            "target": vae_checkpoint.TARGET,
            "params": vae_checkpoint.to_arguments(VAE, encoder=False),
        },
        "conditioner": {
            "target": "a.b.SingleImageEncoder",
            "params": {"main_image_encoder": encoder},
        },
        "scheduler": {
            "target": f"a.b.{scheduler}",
            "params": {"pcm_timesteps": 100} if turbo else {},
        },
        "image_processor": {"target": "a.b.ImageProcessorV2", "params": {"size": 56}},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    return directory


def save_run(directory, params, describe):
    describe(directory)
    state = TrainState.create(params, optax.sgd(0.1), jax.random.key(0))
    checkpointer = Checkpointer(directory / "checkpoints")
    checkpointer.save(3, state)
    checkpointer.close()


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    """Runs of our trainers side by side: runs/dit names its VAE as runs/vae, from a place that is not here."""
    home = tmp_path_factory.mktemp("runs")
    save_run(home / "vae", params["vae"], lambda where: vae_checkpoint.describe(where, VAE))
    hf.save(home / "tower", ViT(TOWER), params["tower"])
    made = dit_checkpoint.Description(DIT, "elsewhere/vae", str(home / "tower"), 28, 1, 1.25)
    save_run(
        home / "dit", {"dit": params["dit"]}, lambda where: dit_checkpoint.describe(where, made)
    )
    return home / "dit"


def picture(seed=0, size=48):
    """A square of four drawn colours on a transparent ground."""
    image = np.zeros((size, size, 4), np.uint8)
    colours = (
        np.random.default_rng(seed)
        .integers(0, 255, (2, 2, 4))
        .repeat(size // 4, 0)
        .repeat(size // 4, 1)
    )
    image[size // 4 : size // 4 * 3, size // 4 : size // 4 * 3] = colours | [0, 0, 0, 255]
    return image


@pytest.fixture(scope="module")
def loaded(release):
    return ImageToShape.load(release)


def test_an_image_becomes_a_closed_mesh_and_says_how(loaded):
    shape = loaded(picture(), seed=5, **FAST)
    mesh, statistics = shape.mesh, shape.statistics
    assert isinstance(mesh, trimesh.Trimesh) and mesh.is_watertight and mesh.volume > 0
    assert np.isfinite(mesh.vertices).all() and np.abs(mesh.vertices).max() <= 1.01 + 1e-6
    assert set(statistics["time"]) == {
        "prepare",
        "encode",
        "diffuse",
        "decode",
        "extract",
        "clean",
        "total",
    }
    expected = {
        "seed": 5,
        "steps": 3,
        "guidance": 5.0,
        "latents": 16,
        "resolution": 20,
        "method": "dense",
        "selection": "none",
        "faces_limit": 40_000,
        "faces": len(mesh.faces),
    }
    assert {key: statistics[key] for key in expected} == expected and statistics["query_ratio"] == 1
    json.dumps(statistics)


def test_the_seed_and_the_image_decide_the_shape(loaded):
    first, again = (loaded(picture(), seed=5, **FAST).mesh.vertices for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other_seed = loaded(picture(), seed=6, **FAST).mesh.vertices
    other_image = loaded(picture(1), seed=5, **FAST).mesh.vertices
    assert first.shape != other_seed.shape or np.abs(first - other_seed).max() > 1e-4
    assert first.shape != other_image.shape or np.abs(first - other_image).max() > 1e-4


def test_settings_reach_what_they_are_for(loaded):
    few = loaded(picture(), faces=60, **FAST)
    assert few.statistics["faces"] <= 60 < loaded(picture(), **FAST).statistics["faces"]
    smooth = loaded(picture(), surface="surface_nets", **FAST)
    assert smooth.mesh.is_watertight and smooth.statistics["surface"] == "surface_nets"
    a, b = (loaded(picture(), guidance=g, **FAST).mesh for g in (3.0, 7.0))
    assert len(a.vertices) != len(b.vertices) or np.abs(a.vertices - b.vertices).max() > 1e-4
    fat, thin = (loaded(picture(), level=level, **FAST).mesh.volume for level in (-0.05, 0.05))
    assert fat > thin


def test_a_mesh_stands_as_its_field_does(loaded, monkeypatch):
    """§8.9: no axis turned over or exchanged on the way, and faces outward."""
    low, high = np.array([-0.8, -0.1, 0.2]), np.array([-0.2, 0.9, 0.5])

    def decode(model, params, latents, config, progress):
        line = np.linspace(-config.bound, config.bound, 41)
        at = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1)
        field = 1 - (np.abs(at - (low + high) / 2) / ((high - low) / 2)).max(-1)
        return Grid(field.astype(np.float32), field > 2, config.bound, (40,), field.size)

    monkeypatch.setattr(pipeline, "decode_grid", decode)
    mesh = loaded(picture(), **FAST).mesh
    np.testing.assert_allclose(mesh.bounds, [low, high], atol=3e-3)
    assert mesh.volume == pytest.approx(np.prod(high - low), rel=0.1)


def test_no_surface_is_an_error_that_says_the_field_s_range(loaded):
    with pytest.raises(NoSurface, match="no surface at level 1000: the field is between"):
        loaded(picture(), level=1000.0, **FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"faces": 3}, "at least 4 faces"),
        ({"surface": "cubes"}, "'surface_nets', not 'cubes'"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
    ],
)
def test_settings_are_refused_before_any_work(loaded, settings, message):
    with pytest.raises(ValueError, match=message):
        loaded("there is no such image.png", **settings)


def test_what_the_conditions_are(loaded, params):
    """The transformer sees the tower's tokens of the prepared image: computed here step by step."""
    pixels, ids = loaded._prepare(picture(), None)
    assert pixels.shape == (1, 56, 56, 3) and ids.tolist() == [0]
    prepared = condition.prepare(picture(), 56).image_SS3
    np.testing.assert_allclose(pixels[0] / 127.5 - 1, prepared, atol=1e-6)
    unit = jax.image.resize(
        jnp.asarray((prepared + 1) / 2)[None], (1, 28, 28, 3), "linear", antialias=True
    )
    normal = (unit - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    tokens = ViT(TOWER).apply({"params": params["tower"]}, normal.astype(jnp.float32))
    np.testing.assert_allclose(loaded._encode(pixels, ids), tokens, atol=1e-4)


def test_several_views_go_in_by_name_in_any_order(params, tmp_path, loaded):
    views = ImageToShape.load(write_release(tmp_path, params, views=True))
    front, back = picture(1), picture(2)
    a = views({"front": front, "back": back}, **FAST).mesh.vertices
    b = views({"back": back, "front": front}, **FAST).mesh.vertices
    np.testing.assert_array_equal(a, b)
    c = views({"front": back, "back": front}, **FAST).mesh.vertices
    assert a.shape != c.shape or np.abs(a - c).max() > 1e-4
    assert views._prepare(front, None)[1].tolist() == [0]  # one view is the front
    with pytest.raises(ValueError, match="one image, not 2 views"):
        loaded({"front": front, "back": back}, **FAST)
    with pytest.raises(ValueError, match="front, left, back, right, got top"):
        views({"top": front}, **FAST)


def test_turbo_models_use_their_own_times(params, tmp_path, monkeypatch):
    turbo = ImageToShape.load(write_release(tmp_path, params, turbo=True))
    assert turbo.turbo_grid == 100 and turbo.default_steps == 5
    seen = []
    integrate = pipeline.sampler.integrate
    monkeypatch.setattr(
        pipeline.sampler, "integrate", lambda *a: (seen.append(a[4]), integrate(*a))[1]
    )
    turbo(picture(), resolution=8, method="dense")
    np.testing.assert_allclose(seen[0], [0, 0.199199, 0.399399, 0.5996, 0.7998, 1], atol=1e-6)


def test_a_run_finds_the_vae_beside_it_and_uses_its_own_scale(run, loaded):
    ours = ImageToShape.load(run)
    assert ours.scale_factor == 1.25 and ours.image_size == 28 and not ours.multi_view
    assert ours.dit == DIT and ours.vae == VAE
    assert loaded.scale_factor == 0.8 and loaded.dit.num_latents == 16
    assert ours(picture(), **FAST).mesh.volume > 0
    half = ImageToShape.load(run, dtype="bfloat16")
    assert (
        half.dit.dtype == half.vae.dtype == "bfloat16" and half(picture(), **FAST).mesh.volume > 0
    )


def test_the_decoder_gets_latents_in_its_own_scale(run, monkeypatch):
    made, decoded = [], []
    integrate, decode = pipeline.sampler.integrate, pipeline.decode_grid
    monkeypatch.setattr(
        pipeline.sampler, "integrate", lambda *a: (made.append(integrate(*a)), made[-1])[1]
    )
    monkeypatch.setattr(
        pipeline, "decode_grid", lambda *a, **k: (decoded.append(a[2]), decode(*a, **k))[1]
    )
    ImageToShape.load(run)(picture(), **FAST)
    np.testing.assert_allclose(np.asarray(decoded[0]) * 1.25, made[0][0], rtol=1e-6)


def test_what_is_no_model_is_refused(run, release, params, tmp_path):
    for directory, kwargs, error, message in (
        (tmp_path / "absent", {}, FileNotFoundError, "no checkpoint directory"),
        (tmp_path, {}, ValueError, "neither model/dit.json .* nor config.yaml"),
        (release, {"step": 3}, ValueError, "has no step 3"),
        (run, {"step": 4}, CheckpointError, "No readable checkpoint for step 4"),
        (run, {"vae": run}, ValueError, "is no VAE"),
    ):
        with pytest.raises(error, match=message):
            ImageToShape.load(directory, **kwargs)
    broken = tmp_path / "broken"
    save_run(broken, {"dit": params["dit"]}, lambda where: dit_checkpoint.describe(
        where, dit_checkpoint.Description(DIT, "runs/nowhere", "tiny", 64, 1, 1.0)
    ))  # fmt: skip
    with pytest.raises(
        FileNotFoundError, match="the VAE 'runs/nowhere', which is not there; say where"
    ):
        ImageToShape.load(broken)
    partial = write_release(tmp_path / "partial", params, parts=("model", "vae"))
    with pytest.raises(ValueError, match="has no conditioner"):
        ImageToShape.load(partial)


def command(*arguments):
    """Runs the program as `python -m experiments.shape` does; returns its exit status."""
    program._FLAGS.unparse_flags()
    for name in program._FLAGS:
        program._FLAGS[name].unparse()
    program._FLAGS(["shape", "--compilation_cache=", "--steps=3", "--resolution=16", *arguments])
    try:
        program.main(["shape"])
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_program_writes_mesh_statistics_and_turntable(release, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "chair.png")
    before, out = (tmp_path / "chair.png").read_bytes(), tmp_path / "chair.glb"
    arguments = [f"--image={tmp_path / 'chair.png'}", f"--checkpoint={release}", f"--out={out}"]
    arguments += [f"--vae={release}", "--dtype=float32", "--turntable=png", "--faces=200"]
    assert command(*arguments) == 0
    mesh = trimesh.load(out, force="mesh")
    content = json.loads(out.with_suffix(".json").read_text())
    assert (
        len(mesh.faces) == content["faces"] <= 200
        and content["seed"] == 1234
        and content["steps"] == 3
    )
    assert content["image"] == str(tmp_path / "chair.png") and content["checkpoint"] == str(release)
    asked = {"step": None, "vae": str(release), "dtype": "float32", "matting": None}
    assert {name: content[name] for name in asked} == asked and content["faces_limit"] == 200
    assert out.with_suffix(".turntable.png").exists()
    assert (tmp_path / "chair.png").read_bytes() == before  # beside its mesh
    assert f"{content['faces']} faces" in capsys.readouterr().out


def test_folders_become_folders_and_bad_images_are_passed_over(release, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "meshes-1.5"
    (photos / "folder.png").mkdir(parents=True)
    (photos / "link.png").symlink_to(tmp_path / "nowhere.png")
    for i in range(2):
        Image.fromarray(picture(i)).save(photos / f"{i}.png")
    Image.new("RGBA", (40, 40)).save(photos / "empty.png")
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:20])
    (photos / "notes.txt").write_text("not an image")
    status = command(f"--image={photos}", f"--checkpoint={release}", f"--out={out}", "--format=ply")
    assert status == "2 of the images failed"
    assert sorted(path.name for path in out.iterdir()) == ["0.json", "0.ply", "1.json", "1.ply"]
    told = capsys.readouterr().out
    assert "[3/4] cut.ply: passed over" in told and "[4/4] empty.ply: passed over" in told

    (photos / "empty.png").unlink()
    (photos / "cut.png").unlink()
    (out / "1.ply").unlink()
    before = (out / "0.ply").stat().st_mtime_ns
    arguments = [f"--image={photos}", f"--checkpoint={release}", f"--out={out}", "--format=ply"]
    assert command(*arguments, "--skip_existing") == 0
    assert (out / "1.ply").exists() and (out / "0.ply").stat().st_mtime_ns == before
    assert command(*arguments, "--skip_existing") == 0  # nothing to do
    assert (out / "0.ply").stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["turntable", 0, 1, 2])
def test_where_a_mesh_is_all_is_whenever_it_was_stopped(tmp_path, monkeypatch, moment):
    """--skip_existing looks for the mesh alone. `moment`: the turntable is drawn, or the nth file put in place."""
    calls, replace, names = itertools.count(), os.replace, {"a.glb", "a.json", "a.turntable.png"}

    def draw(mesh, path):
        if moment == "turntable":
            raise KeyboardInterrupt
        path.write_bytes(b"a picture")

    def stop(*paths):
        if next(calls) == moment:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(program.turntable, "save", draw)
    monkeypatch.setattr(os, "replace", stop)
    shape = pipeline.Shape(trimesh.creation.box(), {"faces": 12})
    with pytest.raises(KeyboardInterrupt):
        program.write(shape, tmp_path / "a.glb", "png", {})
    assert {path.name for path in tmp_path.iterdir()} <= names - {"a.glb"}
    moment = None
    program.write(shape, tmp_path / "a.glb", "png", {})
    assert {path.name for path in tmp_path.iterdir()} == names


def test_folders_for_meshes_may_have_any_name_but_a_mesh_s(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for name in ("run-1.5", "meshes_2024.01", "there.v2", "there.glb"):
        if name.startswith("there"):
            (tmp_path / name).mkdir()
        found = program.find_images(str(tmp_path), str(tmp_path / name), {}, "ply")
        assert found == {tmp_path / name / "a.ply": tmp_path / "a.png"}
    for name in ("new.glb", "new.PLY", "a.png"):
        with pytest.raises(ValueError, match="must be one too"):
            program.find_images(str(tmp_path), str(tmp_path / name), {}, "ply")


def test_a_function_of_the_user_s_cuts_opaque_images_out(release, tmp_path, capsys, monkeypatch):
    def cut(image):
        assert image.mode == "RGB"
        return Image.fromarray(picture(size=image.width))

    monkeypatch.setitem(sys.modules, "scissors", SimpleNamespace(cut=cut))
    Image.new("RGB", (48, 48), "red").save(tmp_path / "photo.png")
    arguments = [f"--image={tmp_path / 'photo.png'}", f"--checkpoint={release}"]
    arguments.append(f"--out={tmp_path / 'new' / 'photo.stl'}")
    assert command(*arguments, "--matting=scissors:cut") == 0
    assert (tmp_path / "new" / "photo.stl").exists()
    for name in ("scissors:paste", "absent:cut", ":", "os:sep"):
        assert command(*arguments, f"--matting={name}") == 2
        assert f"error: --matting={name}: " in capsys.readouterr().err


def test_errors_are_one_line_before_any_work(release, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ImageToShape, "load", lambda *a, **k: pytest.fail("the models were loaded"))
    Image.fromarray(picture()).save(tmp_path / "a.png")
    Image.new("RGBA", (40, 40)).save(tmp_path / "empty.png")
    (tmp_path / "folder.glb").mkdir()
    image, checkpoint, out = (
        f"--image={tmp_path / 'a.png'}",
        f"--checkpoint={release}",
        f"--out={tmp_path / 'a.glb'}",
    )
    for arguments, message in (
        ((image, out), "give --checkpoint"),
        ((image, "--checkpoint=absent", out), "no checkpoint directory absent"),
        ((checkpoint, out), "give --image and --out"),
        (("--image=absent.png", checkpoint, out), "there is no image absent.png"),
        ((image, checkpoint, "--out=a.fbx"), "must end in one of .glb, .obj, .ply, .stl"),
        (
            (image, checkpoint, f"--out={tmp_path / 'folder.glb'}"),
            "is a folder, and --image is not",
        ),
        ((f"--image={tmp_path}", checkpoint, "--out=a.glb"), "must be one too"),
        ((f"--image={tmp_path}", checkpoint, "--out=b", "--back=a.png"), "--back need one --image"),
        ((f"--image={tmp_path / 'empty.png'}", checkpoint, out), "transparent all over"),
    ):
        assert command(*arguments) == 2
        assert (
            message in (text := capsys.readouterr().err)
            and text.startswith("error: ")
            and text.count("\n") == 1
        )


def test_no_surface_ends_the_program_with_one_line(release, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    out = tmp_path / "a.glb"
    assert (
        command(
            f"--image={tmp_path / 'a.png'}",
            f"--checkpoint={release}",
            f"--out={out}",
            "--level=1000",
        )
        == 2
    )
    assert "no surface at level 1000: the field is between" in capsys.readouterr().err
    assert not pathlib.Path(out).exists()
