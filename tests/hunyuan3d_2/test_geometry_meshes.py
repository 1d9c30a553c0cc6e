"""Meshes in and out: every kind of bad mesh gives a clear error or a stated repair; volumes are trimesh's."""

import inspect
import itertools
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from research.hunyuan3d_2.data import families
from research.hunyuan3d_2.geometry import cleaning, meshes, solids, topology
from research.hunyuan3d_2.geometry.meshes import MeshError

BOX = trimesh.creation.box()  # side 1 about 0
SQUARE = [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]]


def mesh(vertices, faces) -> trimesh.Trimesh:
    return trimesh.Trimesh(
        np.asarray(vertices, float).reshape(-1, 3), np.reshape(faces, (-1, 3)), process=False
    )


def moved(source: trimesh.Trimesh, *shift: float, scale: float = 1.0) -> trimesh.Trimesh:
    return mesh(source.vertices * scale + (shift or (0, 0, 0)), source.faces)


def joined(*parts: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.util.concatenate(list(parts))


def turned(source: trimesh.Trimesh) -> trimesh.Trimesh:
    return mesh(source.vertices, source.faces[:, ::-1])


def with_nan(source: trimesh.Trimesh) -> trimesh.Trimesh:
    vertices = np.array(source.vertices)
    vertices[0] = np.nan
    return mesh(vertices, source.faces)


def some_turned(source: trimesh.Trimesh) -> trimesh.Trimesh:
    return mesh(
        source.vertices,
        np.where(np.arange(len(source.faces))[:, None] % 2, source.faces, source.faces[:, ::-1]),
    )


BAD = {
    "empty": (mesh([], []), "empty"),
    "nothing finite": (mesh(np.full((8, 3), np.inf), BOX.faces), "NaN or infinite"),
    "a point": (mesh([[1, 1, 1]] * 3, [0, 1, 2]), "extent is 0"),
    "zero area": (mesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [0, 1, 2]), "no area"),
    "beyond numbers": (mesh(BOX.vertices * 1e308 * 1.9, BOX.faces), "too large"),
}
OVERLAP = joined(BOX, moved(BOX, 0.5, 0.2, 0.1))
OVERLAP_VOLUME = 2 - 0.5 * 0.8 * 0.9
CAVITY = joined(BOX, turned(moved(BOX, scale=0.5)))
EDGE_TO_EDGE = joined(BOX, moved(BOX, 1, 1, 0))
HALF = mesh(BOX.vertices, BOX.faces[2:])
FINE = trimesh.creation.icosphere(4)
REPAIRED = {  # name → (mesh, what is said of it, its volume then)
    "sound": (BOX, [], 1.0),
    "soup of triangles": (mesh(BOX.triangles, np.arange(36)), [], 1.0),
    "far away and huge": (moved(BOX, 1e12, 0, 0, scale=1e9), [], 1e27),
    "tiny": (moved(BOX, scale=1e-9), [], 1e-27),
    "inside out": (turned(BOX), ["inside out, turned: 1"], 1.0),
    "wound at random": (some_turned(BOX), ["wound differently"], 1.0),
    "cavity": (CAVITY, [], 0.875),
    "cavity, inside out": (turned(CAVITY), ["inside out, turned: 2"], 0.875),
    "apart": (joined(BOX, moved(BOX, 3, 0, 0)), [], 2.0),
    "one of two inside out": (
        joined(BOX, turned(moved(BOX, 3, 0, 0))),
        ["inside out, turned: 1"],
        2.0,
    ),
    "overlapping": (OVERLAP, ["united"], OVERLAP_VOLUME),
    "overlapping, a hollow box elsewhere": (
        joined(OVERLAP, moved(CAVITY, 5, 0, 0)),
        ["united"],
        OVERLAP_VOLUME + 0.875,
    ),
    "overlapping a hollow box": (
        joined(CAVITY, moved(BOX, 0.9, 0, 0)),
        ["united"],
        0.875 + 0.9,
    ),
    "a hollow box in the cavity of another": (
        joined(OVERLAP, moved(CAVITY, 9, 0, 0), moved(CAVITY, 9, 0, 0, scale=0.4)),
        ["united"],
        OVERLAP_VOLUME + 0.875 + 0.875 * 0.4**3,
    ),
    "overlapping, edge to edge elsewhere": (
        joined(OVERLAP, moved(EDGE_TO_EDGE, 5, 0, 0)),
        ["united"],
        OVERLAP_VOLUME + 2,
    ),
    "one in the other": (joined(BOX, moved(BOX, scale=0.5)), ["united"], 1.0),
    "face to face": (
        joined(BOX, turned(mesh(BOX.vertices * [-1, 1, 1] + [1, 0, 0], BOX.faces))),
        ["cancel"],
        2.0,
    ),
    "edge to edge (non-manifold)": (EDGE_TO_EDGE, [], 2.0),
    "faces twice": (
        mesh(BOX.vertices, [*BOX.faces, *BOX.faces[:3]]),
        ["repeat or cancel others, dropped: 3"],
        1.0,
    ),
    "small hole": (mesh(FINE.vertices, FINE.faces[1:]), ["small holes, filled: 1"], FINE.volume),
    # ε = 1/128 of the longest side; of these volumes the rims are the inexact part.
    "a sheet": (mesh(SQUARE, [0, 1, 2, 0, 2, 3]), ["shells: 1"], 2 / 128),
    "both sides of a sheet": (
        mesh(SQUARE, [0, 1, 2, 0, 2, 3, 0, 2, 1, 0, 3, 2]),
        ["cancel", "shells: 1"],
        2 / 128,
    ),
    "open box": (HALF, ["shells: 1"], 5 * 2 / 128),
    "not finite in part": (with_nan(BOX), ["NaN or infinite, dropped: 4"], 4 * 2 / 128),
    "open beside closed": (joined(moved(BOX, 3, 0, 0), HALF), ["shells: 1"], 1 + 5 * 4 * 2 / 128),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_repaired_is_an_error_that_says_why(name):
    bad, message = BAD[name]
    with pytest.raises(MeshError, match=message):
        meshes.repair(bad)


@pytest.mark.parametrize("name", REPAIRED)
def test_a_repair_is_stated_and_gives_a_solid_of_the_right_volume(name):
    source, said, volume = REPAIRED[name]
    before = np.array(source.vertices)
    result, done = meshes.repair(source)
    np.testing.assert_array_equal(source.vertices, before)  # the mesh given is left alone
    assert len(done) >= len(said) and all(any(s in line for line in done) for s in said), done
    if not said:
        assert done == []
    report = meshes.check(result)
    assert report.closed and report.degenerate_faces == 0
    assert np.isfinite(result.vertices).all()
    assert result.volume / volume == pytest.approx(
        1, rel=0.05 if "shells" in str(done) else 1e-3 if "holes" in str(done) else 1e-6
    )


def test_vertices_nearer_than_a_millionth_are_one_wherever_they_lie():
    """Each triangle of the soup has corners of its own, which are off by less than half of that."""
    ball = trimesh.creation.icosphere(3)
    soup = ball.triangles.reshape(-1, 3)
    soup = soup + np.random.default_rng(0).uniform(-1, 1, soup.shape) * 2 * 0.5e-6 / np.sqrt(3)
    vertices, faces = topology.weld(soup / 2, np.arange(len(soup)).reshape(-1, 3), 1e-6)
    assert (len(vertices), len(faces)) == (len(ball.vertices), len(ball.faces))
    found, done = meshes.repair(mesh(soup, np.arange(len(soup))))
    assert done == [] and found.is_watertight
    assert found.volume == pytest.approx(ball.volume, rel=1e-5)


def test_vertices_further_apart_than_four_millionths_stay_two():
    line = np.arange(200)[:, None] * [4.1e-6, 0, 0]
    points = np.concatenate([line, line + [0, 1, 0], line + [0, 0, 1]])
    faces = np.arange(600).reshape(3, 200).T
    vertices, kept = topology.weld(points, faces, 1e-6)
    assert len(vertices) == 600 and len(kept) == 200
    heap = np.random.default_rng(0).uniform(0, 1e-6, (60_000, 3))  # of as good as one place: quick
    assert len(topology.weld(np.concatenate([heap, points]), faces + 60_000, 1e-6)[0]) == 600
    assert len(topology.weld(heap, np.arange(60_000).reshape(-1, 3), 1e-6)[1]) == 0


def test_the_points_that_cover_faces_come_a_few_at_a_time():
    """20 000 long slivers, as of a fan, need 8385 points each: at once they would be 4 GB."""
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    rim = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], axis=1) / 2
    i = np.arange(len(rim))
    faces = np.stack([i, (i + 1) % len(rim), np.full(len(rim), len(rim))], axis=1)
    few = next(iter(solids._cover(np.concatenate([rim, [[0, 0.1, 0]]]), faces)))
    assert 0 < len(few) < 1_000_000


def test_closed_surfaces_never_become_double_shells():
    sphere = trimesh.creation.icosphere(3)
    result, _ = meshes.repair(sphere)
    assert result.volume == pytest.approx(sphere.volume) and result.body_count == 1


def test_more_faces_than_allowed_are_simplified_and_stay_closed():
    assert inspect.signature(meshes.repair).parameters["max_faces"].default == 1_000_000
    sphere = trimesh.creation.icosphere(4)
    result, done = meshes.repair(sphere, max_faces=500)
    assert "faces more than 500, simplified: 5120" in done
    assert len(result.faces) <= 500 and meshes.check(result).closed
    assert result.volume == pytest.approx(sphere.volume, rel=0.02)


def test_a_report_counts_what_is_wrong():
    report = meshes.check(BOX)
    assert (
        report.watertight and report.bodies == 1 and report.longest_side == 1 and not report.has_uv
    )
    report = meshes.check(with_nan(BOX))
    assert (report.nonfinite_vertices, report.degenerate_faces, report.closed) == (1, 4, False)
    report = meshes.check(joined(BOX, moved(BOX, 1, 1, 0)))
    assert report.nonmanifold_edges == 1 and report.closed and not report.watertight
    report = meshes.check(HALF)
    assert report.boundary_edges == 4 and not report.closed
    assert meshes.check(mesh([], [])).bodies == 0
    uv = BOX.copy()
    uv.visual = trimesh.visual.TextureVisuals(uv=np.zeros((8, 2)))
    assert meshes.check(uv).has_uv


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e154, 1e200, 1e300, 1.9e308])
def test_a_report_comes_whatever_the_numbers(scale):
    with np.errstate(over="ignore"):
        report = meshes.check(mesh(BOX.vertices * scale, BOX.faces))
    if scale < 1e308:
        assert report.watertight and report.degenerate_faces == 0
    assert report.faces == 12


def test_normalised_meshes_span_the_cube_and_can_be_put_back():
    long = moved(BOX, 5, -7, 1e5, scale=3.0)
    long.vertices[:, 1] *= 2
    scaled, transform = meshes.normalize(long)
    np.testing.assert_allclose(
        scaled.bounds, [[-0.49995, -0.9999, -0.49995], [0.49995, 0.9999, 0.49995]], rtol=1e-9
    )
    np.testing.assert_allclose(transform.undo(scaled.vertices), long.vertices, rtol=1e-12)
    for bad, message in (
        (mesh([], []), "empty"),
        (with_nan(BOX), "NaN"),
        (BAD["a point"][0], "extent"),
    ):
        with pytest.raises(MeshError, match=message):
            meshes.normalize(bad)


@pytest.mark.parametrize("suffix", ["glb", "obj", "stl", "ply"])
def test_what_is_saved_is_read_back_the_same_way_up(tmp_path, suffix):
    tall = moved(BOX, 0, 2, 0)
    tall.vertices[:, 1] *= 3
    found = meshes.read(cleaning.save(tall, tmp_path / "new" / f"tall.{suffix}"))
    np.testing.assert_allclose(found.bounds, tall.bounds, atol=1e-6)
    assert meshes.check(found).watertight and found.volume == pytest.approx(3, rel=1e-5)


def test_a_glb_has_one_material_and_keeps_colours(tmp_path):
    coloured = BOX.copy()
    colours = np.random.default_rng(0).integers(0, 256, (8, 4)).astype(np.uint8)
    coloured.visual.vertex_colors = colours
    data = cleaning.save(coloured, tmp_path / "box.glb").read_bytes()
    header = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    assert (
        len(header["materials"])
        == len(header["meshes"])
        == len(header["meshes"][0]["primitives"])
        == 1
    )
    assert {"POSITION", "NORMAL", "COLOR_0"} <= set(
        header["meshes"][0]["primitives"][0]["attributes"]
    )
    back = meshes.read(tmp_path / "box.glb")
    np.testing.assert_array_equal(back.visual.vertex_colors, colours)


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        meshes.read(tmp_path / "absent.glb")
    for name, content, message in (
        ("a.blend", b"x", "not a format"),
        ("a.glb", b"glTF but damaged", "cannot be read"),
        ("a.stl", b"", "cannot be read|no faces"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\n", "no faces|cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MeshError, match=message):
            meshes.read(tmp_path / name)
    with pytest.raises(ValueError, match="must end in"):
        cleaning.save(BOX, tmp_path / "box.xyz")
    with pytest.raises(ValueError, match="empty"):
        cleaning.save(mesh([], []), tmp_path / "box.glb")


def test_a_scene_of_several_parts_is_one_mesh_in_its_place(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(BOX)
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([3, 0, 0]))
    scene.export(tmp_path / "two.glb")
    found = meshes.read(tmp_path / "two.glb")
    np.testing.assert_allclose(found.bounds, [[-0.5, -0.5, -0.5], [3.5, 0.5, 0.5]])


def painted(kind: str) -> trimesh.Trimesh:
    """A box, that is all of one colour: PAINT[kind]."""
    box = trimesh.creation.box()
    of = trimesh.visual.material.PBRMaterial
    if kind == "texture":
        image = Image.new("RGB", (16, 16), PAINT[kind])
        material = of(baseColorTexture=image)
        box.visual = trimesh.visual.TextureVisuals(uv=box.vertices[:, :2] + 0.5, material=material)
    elif kind == "material":
        box.visual = trimesh.visual.TextureVisuals(material=of(baseColorFactor=[*PAINT[kind], 255]))
    elif kind == "vertices":
        box.visual.vertex_colors = [*PAINT[kind], 255]
    return box


PAINT = {
    "texture": (0, 200, 0),
    "material": (0, 0, 255),
    "vertices": (255, 0, 0),
    "nothing": (190, 190, 190),
}


@pytest.mark.parametrize(
    "kinds", [*itertools.combinations_with_replacement(PAINT, 2)], ids="+".join
)
def test_the_parts_of_a_scene_keep_their_colours(tmp_path, kinds):
    scene = trimesh.Scene()
    for i, kind in enumerate(kinds):
        place = trimesh.transformations.translation_matrix([3 * i, 0, 0])
        scene.add_geometry(painted(kind), transform=place)
    scene.export(tmp_path / "two.glb")
    found = meshes.read(tmp_path / "two.glb")
    colours = meshes.vertex_colours(found)
    assert colours.shape == (len(found.vertices), 4)
    for i, kind in enumerate(kinds):
        mine = colours[np.abs(found.vertices[:, 0] - 3 * i) < 1]
        assert len(mine) and (mine == [*PAINT[kind], 255]).all()


def test_lines_and_points_beside_triangles_are_left_out(tmp_path):
    scene = trimesh.Scene([BOX, trimesh.load_path(np.array([[[0, 0, 0], [9, 9, 9.0]]]))])
    scene.add_geometry(trimesh.PointCloud(np.full((5, 3), -9.0)))
    scene.export(tmp_path / "mixed.glb")
    found = meshes.read(tmp_path / "mixed.glb")
    assert len(found.faces) == 12 and meshes.check(found).watertight
    np.testing.assert_allclose(found.bounds, BOX.bounds)
    trimesh.Scene(list(scene.geometry.values())[1:]).export(tmp_path / "none.glb")
    with pytest.raises(MeshError, match="holds no faces"):
        meshes.read(tmp_path / "none.glb")


def test_small_bodies_and_faces_without_area_go():
    ball = trimesh.creation.icosphere(4)  # 5120 faces; half a per cent are 25.6
    found = cleaning.drop_small(joined(ball, moved(BOX, 3, 0, 0)))
    assert found.volume == pytest.approx(ball.volume) and len(found.faces) == 5120
    kept = cleaning.drop_small(joined(ball, moved(trimesh.creation.icosphere(1), 3, 0, 0)))
    assert len(kept.faces) == 5120 + 80
    soup = cleaning.drop_degenerate(mesh([*BOX.triangles, [[0, 0, 0]] * 3], np.arange(39)))
    assert len(soup.faces) == 12 and soup.is_watertight


def test_decimation_keeps_a_closed_mesh_closed_and_its_volume():
    ball = trimesh.creation.icosphere(5)
    found = cleaning.clean(ball, 1000)
    assert len(found.faces) <= 1000 and found.is_watertight
    assert found.volume == pytest.approx(ball.volume, rel=0.01)
    assert len(cleaning.decimate(BOX, 100).faces) == 12
    with pytest.raises(ValueError, match="at least 4"):
        cleaning.decimate(ball, 3)


@pytest.mark.parametrize("unit", [1, 1e-4, 1e6])
def test_decimation_keeps_thin_parts_whatever_the_units(unit):
    figure = families.make("figure", 0)
    thin = mesh(figure.vertices * unit, figure.faces)
    found = cleaning.decimate(thin, 600)
    assert len(found.faces) <= 600 and found.is_watertight
    assert found.volume / thin.volume == pytest.approx(1, abs=0.15)


def test_pinches_of_decimation_become_points_where_the_shape_allows(monkeypatch):
    """Of two balls that share one short edge both keep their shape; two boxes would lose theirs."""
    ball = trimesh.creation.icosphere(3)
    middle = ball.vertices[ball.edges_unique[0]].mean(0)
    balls = joined(ball, turned(mesh(2 * middle - ball.vertices, ball.faces)))
    boxes = joined(BOX, moved(BOX, 1, 1, 0))
    for pinched, loose in ((balls, True), (boxes, False)):
        welded = topology.weld(np.array(pinched.vertices), np.array(pinched.faces), 1e-6)
        assert (topology.edges(welded[1]).faces == 4).sum() == 1
        monkeypatch.setattr(cleaning.solids, "simplify", lambda *_, welded=welded: welded)
        found = cleaning.decimate(trimesh.creation.icosphere(4, radius=0.5), 4000)
        assert meshes.check(found).closed and found.is_watertight == loose
        assert found.volume == pytest.approx(pinched.volume, rel=1e-3)
