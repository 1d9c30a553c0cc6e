"""The rasteriser against geometry in float64, and the cameras' and maps' conventions."""

import numpy as np
import pytest
import trimesh
from PIL import Image

from research.hunyuan3d_2.geometry import cleaning, meshes
from research.hunyuan3d_2.render import cameras, condition, rasterize, shading, turntable

BOTH = pytest.mark.parametrize("implementation", ["numpy", "jax"])


def pixel_rays(size):
    """x right and y up of the pixels' centres in the camera's plane, float64 [S, S] each."""
    ndc = np.linspace(-1, 1, size) * cameras.HALF_EXTENT
    return np.meshgrid(ndc, -ndc)


def distance(raster):
    """From the camera's plane along the ray, from z / w in [-1, 1]."""
    return cameras.NEAR + (raster.depth_VHW.astype(float) + 1) / 2 * (cameras.FAR - cameras.NEAR)


@BOTH
def test_a_sphere_is_between_its_inner_and_outer_radius(implementation):
    mesh = trimesh.creation.icosphere(subdivisions=3)
    vertices = cameras.frame(mesh.vertices)
    outer = cameras.DIAMETER / 2
    inner = outer * np.abs((mesh.triangles[:, 0] * mesh.face_normals).sum(-1)).min()
    clip = cameras.project(vertices, [0, 37, 200], [0, -20, 60])
    raster = rasterize.rasterize(clip, mesh.faces, 96, implementation=implementation)
    x, y = pixel_rays(96)
    radius = np.hypot(x, y)
    assert (raster.faces_VHW[:, radius < inner - 1e-6] > 0).all()
    assert (raster.faces_VHW[:, radius > outer + 1e-6] == 0).all()
    core = radius < inner * 0.9
    near, far = (cameras.DISTANCE - np.sqrt(r**2 - radius[core] ** 2) for r in (outer, inner))
    seen = distance(raster)[:, core]
    assert (seen >= near - 1e-6).all() and (seen <= far + 1e-6).all()
    assert np.isinf(raster.depth_VHW[raster.faces_VHW == 0]).all()


@BOTH
@pytest.mark.parametrize("semantics", ["float", "official"])
def test_a_box_is_where_rays_meet_it(implementation, semantics):
    half = np.array([0.5, 0.3, 0.2])
    mesh = trimesh.creation.box(2 * half)
    scale = cameras.DIAMETER / 2 / np.linalg.norm(half)
    views = [(0, 0), (30, 20), (215, -20), (90, 90), (180, -90), (-50, 65)]
    azimuth, elevation = zip(*views, strict=True)
    clip = cameras.project(cameras.frame(mesh.vertices), azimuth, elevation)
    raster = rasterize.rasterize(
        clip, mesh.faces, 80, semantics=semantics, implementation=implementation
    )
    x, y = pixel_rays(80)
    for i, (right, up, back) in enumerate(cameras.rotations(azimuth, elevation)):
        start = x[..., None] * right + y[..., None] * up + cameras.DISTANCE * back
        with np.errstate(divide="ignore", invalid="ignore"):
            safe = np.where(np.abs(back) < 1e-12, 1e-30, -back)
            slabs = np.stack([(-half * scale - start) / safe, (half * scale - start) / safe])
        enter, leave = slabs.min(0).max(-1), slabs.max(0).min(-1)
        hit = raster.faces_VHW[i] > 0
        clear = np.abs(leave - enter) > 1e-3
        np.testing.assert_array_equal(hit[clear], (enter < leave)[clear])
        assert clear.mean() > 0.9
        both = hit & clear & (enter < leave)
        np.testing.assert_allclose(distance(raster)[i][both], enter[both], atol=2e-6)
        axis = np.argmax(slabs.min(0), -1)
        normals = mesh.face_normals[raster.faces_VHW[i] - 1]
        second = np.sort(slabs.min(0), -1)[..., 1]
        inner = both & (enter - second > 1e-3)  # not at an edge between two sides
        assert inner.sum() > 100
        facing = np.take_along_axis(normals, axis[..., None], -1)[..., 0]
        assert (np.abs(facing[inner]) > 0.99).all()


def brute_force(clip_N4, faces, size):
    """float64, one pixel and face at a time: (id, weights, ambiguous)."""
    clip = clip_N4.astype(float)
    pix = (clip[:, :2] / clip[:, 3:] * 0.5 + 0.5) * (size - 1) + 0.5
    z = clip[:, 2] / clip[:, 3]
    ids, weights = np.zeros((size, size), int), np.zeros((size, size, 3))
    ambiguous = np.zeros((size, size), bool)
    best = np.full((size, size), np.inf)
    for number, corners in enumerate(faces):
        a, b, c = pix[corners]
        area = np.linalg.det(np.stack([b - a, c - a]))
        for row in range(size):
            for column in range(size):
                p = np.array([column + 0.5, row + 0.5])
                s = np.array(
                    [
                        np.linalg.det(np.stack([u - p, v - p])) / area
                        for u, v in ((b, c), (c, a), (a, b))
                    ]
                )
                if np.abs(s).min() < 1e-4:
                    ambiguous[row, column] = True
                if (s < 0).any():
                    continue
                depth = s @ z[corners]
                if abs(depth - best[row, column]) < 1e-5:
                    ambiguous[row, column] = True
                if depth < best[row, column]:
                    best[row, column], ids[row, column] = depth, number + 1
                    w = s / clip[corners, 3]
                    weights[row, column] = w / w.sum()
    return ids, weights, ambiguous


@pytest.fixture(scope="module")
def soup():
    """Triangles of all sizes through each other, in perspective, partly outside of the image: clip, faces."""
    rng = np.random.default_rng(3)
    clip = np.concatenate([rng.uniform(-1.6, 1.6, (90, 3)), rng.uniform(0.7, 1.6, (90, 1))], 1)
    clip[:30] = clip[:10].repeat(3, 0) + rng.normal(0, 0.2, (30, 4)) * [1, 1, 1, 0]
    return clip.astype(np.float32)[None], np.arange(90).reshape(30, 3)


@BOTH
@pytest.mark.parametrize("semantics", ["float", "official"])
def test_a_soup_of_triangles_is_as_by_brute_force(soup, implementation, semantics):
    clip, faces = soup
    ids, weights, ambiguous = brute_force(clip[0], faces, 24)
    raster = rasterize.rasterize(
        clip, faces, 24, semantics=semantics, implementation=implementation
    )
    assert ambiguous.mean() < 0.05 and (ids > 0).mean() > 0.8 and len(np.unique(ids)) > 15
    np.testing.assert_array_equal(raster.faces_VHW[0][~ambiguous], ids[~ambiguous])
    np.testing.assert_allclose(raster.weights_VHW3[0][~ambiguous], weights[~ambiguous], atol=2e-5)


def test_jax_and_numpy_agree_whatever_the_chunks(soup, monkeypatch):
    clip, faces = soup
    clip = np.concatenate([clip, clip * np.float32([-0.7, 0.9, 1, 1])])
    whole = rasterize.rasterize(clip, faces, (40, 56), implementation="numpy")
    assert whole.faces_VHW.shape == (2, 40, 56)
    monkeypatch.setattr(rasterize, "_CHUNK_FACES", 7)
    monkeypatch.setattr(rasterize, "_CHUNK_NUMPY", 100)
    monkeypatch.setattr(rasterize, "_MOST_CANDIDATES", 2000)  # JAX: takes the views apart
    for implementation in ("numpy", "jax"):
        other = rasterize.rasterize(clip, faces, (40, 56), implementation=implementation)
        assert (other.faces_VHW == whole.faces_VHW).mean() > 0.999
        same = other.faces_VHW == whole.faces_VHW
        np.testing.assert_allclose(other.weights_VHW3[same], whole.weights_VHW3[same], atol=1e-4)
        np.testing.assert_allclose(other.depth_VHW[same], whole.depth_VHW[same], atol=1e-5)


@BOTH
def test_equal_depths_go_to_the_lower_face(implementation):
    corners = np.float32([[-0.9, -0.9], [0.9, -0.9], [0.0, 0.9]])
    levels = [0.3, 0.2, 0.2, 0.25, 0.2]
    clip = np.concatenate([np.c_[corners, np.full((3, 2), [z, 1])] for z in levels])[None]
    faces = np.arange(15).reshape(5, 3)[:, [0, 2, 1]]
    raster = rasterize.rasterize(clip, faces, 20, implementation=implementation)
    assert set(np.unique(raster.faces_VHW)) == {0, 2}


@BOTH
def test_only_the_official_comparison_cannot_tell_close_depths(implementation):
    corners = np.float32([[-0.9, -0.9], [0.9, -0.9], [0.0, 0.9]])
    step = (
        2 / 0.99998 / 2**18
    )  # of z / w, in which the official one has 2^18 levels between 0 and 1
    for gap, official in ((0.2 * step, 1), (1.5 * step, 2)):
        far = 0.25 + 0.5 * step - (0.25 + 1) % step  # in the middle of a level, about
        far = (np.floor((far * 0.49999 + 0.5) * 2**18) + 0.9) / 2**18 / 0.49999 - 0.5 / 0.49999
        clip = np.concatenate([np.c_[corners, np.full((3, 2), [z, 1])] for z in (far, far - gap)])[
            None
        ]
        faces = np.arange(6).reshape(2, 3)
        for semantics, expected in (("official", official), ("float", 2)):
            raster = rasterize.rasterize(
                clip, faces, 20, semantics=semantics, implementation=implementation
            )
            assert set(np.unique(raster.faces_VHW)) == {0, expected}


@BOTH
def test_there_are_no_cracks_between_faces(implementation):
    # Diagonals run exactly through pixels' centres, and vertices lie on them.
    n = 16
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n + 1)] * 2), -1).reshape(-1, 2)
    i = (np.arange(n)[:, None] * (n + 1) + np.arange(n)).reshape(-1, 1)
    faces = np.concatenate([i + [0, 1, n + 2], i + [0, n + 2, n + 1]])
    for size in (n + 1, 49, 77) if implementation == "numpy" else (49,):
        clip = np.c_[grid, np.zeros(len(grid)), np.ones(len(grid))][None]
        for scale in (1, 0.83, 1.7) if implementation == "numpy" else (1, 0.99):
            flat = clip * [scale, scale, 1, 1]
            raster = rasterize.rasterize(flat, faces, size, implementation=implementation)
            inside = np.abs(np.linspace(-1, 1, size)) <= min(scale, 1) - 1e-6 * (scale < 1)
            assert (raster.faces_VHW[0][np.ix_(inside, inside)] > 0).all()


def test_what_cannot_be_rasterised_is_refused():
    clip, faces = np.zeros((1, 3, 4), np.float32), np.array([[0, 1, 2]])
    for bad, message in (
        ((clip[0], faces, 8), "clip \\[V, N, 4\\]"),
        ((clip, faces + 1, 8), "faces name vertices 1 to 3; there are 3"),
        ((clip + np.nan, faces, 8), "finite"),
        ((clip, faces, 0), "0 x 0 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            rasterize.rasterize(*bad)
    assert (rasterize.rasterize(clip, faces, 8).faces_VHW == 0).all()  # w = 0, and no area
    assert (rasterize.rasterize(clip, faces[:0], 8).faces_VHW == 0).all()


def test_the_frame_is_centred_on_the_box_and_as_wide_as_said():
    rng = np.random.default_rng(0)
    framed = cameras.frame(rng.normal(size=(50, 3)) * [1, 5, 2] + [10, -3, 7])
    np.testing.assert_allclose(framed.min(0), -framed.max(0), atol=1e-6)
    np.testing.assert_allclose(2 * np.linalg.norm(framed, axis=1).max(), 1.15, rtol=1e-6)
    for bad in (np.zeros((0, 3)), np.ones((4, 3)), np.full((4, 3), np.nan)):
        with pytest.raises(ValueError, match="cannot render"):
            cameras.frame(bad)


def test_cameras_do_not_turn_round_at_the_poles():
    """§8.9: a right vector made with an up vector has no direction there, and the opposite one beyond."""
    for pole in (-90, 90):
        near = cameras.rotations(np.full(3, 30.0), pole + np.array([-1e-6, 0, 1e-6]))
        assert np.ptp(near, axis=0).max() < 1e-6
        right = [np.cos(np.deg2rad(30)), 0, -np.sin(np.deg2rad(30))]
        np.testing.assert_allclose(near[1, 0], right, atol=1e-12)


def test_views_have_the_numbers_of_the_released_model():
    ids = [cameras.view_id(azimuth, elevation) for azimuth, elevation, _ in cameras.TEXTURE_VIEWS]
    assert ids == [21, 12, 15, 18, 43, 37]
    every = [cameras.view_id(a, e) for e in (-20, 0, 20) for a in range(0, 360, 30)]
    every += [cameras.view_id(a, e) for e in (-90, 90) for a in range(0, 360, 90)]
    assert sorted(every) == list(range(44))
    for bad in ((15, 0), (0, 45), (30, 90)):
        with pytest.raises(ValueError, match="no preset view"):
            cameras.view_id(*bad)


def colour_at(image, xy, size):
    """The pixel over camera-plane coordinates (right, up)."""
    column, row = (
        ((np.array([xy[0], -xy[1]]) / cameras.HALF_EXTENT / 2 + 0.5) * (size - 1))
        .round()
        .astype(int)
    )
    return image[row, column]


def test_maps_have_the_axes_and_colours_of_the_released_pipeline():
    # A long box with a small one off to (+x, +y, +z): no two axes look alike.
    boxes = [trimesh.creation.box([1.0, 0.4, 0.2]), trimesh.creation.box([0.1, 0.1, 0.1])]
    boxes[1].apply_translation([0.45, 0.25, 0.15])
    mesh = trimesh.util.concatenate(boxes)
    of, size = shading.surface(mesh), 161
    scale = np.linalg.norm(of.vertices_N3[0] - of.vertices_N3[1]) / np.linalg.norm(
        mesh.vertices[0] - mesh.vertices[1]
    )
    centre = mesh.bounds.mean(0)
    views = {  # (azimuth, elevation): object axes that point right, up and to the camera
        (0, 0): ("+x", "+y", "+z"),
        (90, 0): ("-z", "+y", "+x"),
        (180, 0): ("-x", "+y", "-z"),
        (270, 0): ("+z", "+y", "-x"),
        (0, 90): ("+x", "-z", "+y"),
        (180, -90): ("-x", "-z", "-y"),
    }
    normal_colours = {
        "+x": (1, 0.5, 0.5), "-x": (0, 0.5, 0.5), "+y": (0.5, 0.5, 1), "-y": (0.5, 0.5, 0),
        "+z": (0.5, 0, 0.5), "-z": (0.5, 1, 0.5),
    }  # fmt: skip
    clip = cameras.project(of.vertices_N3, *zip(*views, strict=True))
    raster = rasterize.rasterize(clip, of.faces_F3, size)
    normals, positions = shading.normal_map(raster, of), shading.position_map(raster, of)
    axis = lambda name: np.eye(3)["xyz".index(name[1])] * (1 if name[0] == "+" else -1)  # noqa: E731
    rotations = cameras.rotations(*zip(*views, strict=True))
    for i, (right, up, back) in enumerate(views.values()):
        np.testing.assert_allclose(rotations[i], [axis(right), axis(up), axis(back)], atol=1e-12)
        for box in (
            boxes
        ):  # a place near the middle of the side that looks at the camera: nothing hides it
            off_middle = axis(back) / 2 + 0.03 * (axis(right) + axis(up))
            place = (box.bounds.mean(0) + off_middle * box.extents - centre) * scale
            xy = (place @ axis(right), place @ axis(up))
            np.testing.assert_allclose(
                colour_at(normals[i], xy, size), normal_colours[back], atol=1e-5
            )
            expected = 0.5 + np.array([place[0], -place[2], place[1]]) / 1.15
            np.testing.assert_allclose(colour_at(positions[i], xy, size), expected, atol=0.006)
    outside = raster.faces_VHW == 0
    assert outside.any() and (normals[outside] == 1).all() and (positions[outside] == 1).all()


def test_smooth_faces_shade_smoothly_and_edges_stay_sharp():
    ball, box = trimesh.creation.icosphere(subdivisions=3), trimesh.creation.box()
    of = shading.surface(ball)
    np.testing.assert_allclose(of.normals_F33, of.vertices_N3[of.faces_F3] / (1.15 / 2), atol=0.02)
    of = shading.surface(box)
    np.testing.assert_allclose(of.normals_F33, box.face_normals[:, None].repeat(3, 1), atol=1e-6)


def test_views_to_learn_from():
    mesh = trimesh.creation.box([1.0, 0.5, 0.25])
    mesh.visual.face_colors = [200, 30, 30, 255]
    images = condition.views(mesh, 6, 64, np.random.default_rng(5))
    assert images.shape == (6, 64, 64, 4) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, condition.views(mesh, 6, 64, np.random.default_rng(5)))
    for image, (width, height) in zip(
        images, [(1, 0.5), (0.25, 0.5), (1, 0.5), (0.25, 0.5)], strict=False
    ):
        rows, columns = (np.flatnonzero((image[..., 3] > 127).any(axis)) for axis in (1, 0))
        long = 0.85 * 64 / max(width, height)
        assert (
            abs(np.ptp(columns) + 1 - long * width) <= 1.5
            and abs(np.ptp(rows) + 1 - long * height) <= 1.5
        )
        assert abs(columns.mean() - 31.5) <= 0.75 and abs(rows.mean() - 31.5) <= 0.75
    solid = images[images[..., 3] == 255]
    assert (solid[:, 0] > 5 * solid[:, 1]).all() and solid[:, 0].max() > 180
    assert (images[images[..., 3] == 0] == 0).all()
    # Straight alpha: what is half covered is not half as bright.
    edge = images[4:][(images[4:, ..., 3] > 0) & (images[4:, ..., 3] < 255)]
    assert len(edge) and (edge[:, 0] > 5 * edge[:, 1]).all()
    assert edge[:, 0].min() > 0.9 * solid[:, 0].min()
    white = shading.on_white(images)
    assert white.shape == (6, 64, 64, 3) and (white[:, 0, 0] == 255).all()
    with pytest.raises(ValueError, match="positive"):
        condition.views(mesh, 0, 64, np.random.default_rng(0))
    with pytest.raises(ValueError, match="without faces"):
        condition.views(trimesh.Trimesh(), 1, 64, np.random.default_rng(0))


def test_a_material_without_uvs_is_the_colour_of_all(tmp_path):
    """As in our own files: what is saved can be rendered."""
    box = trimesh.creation.box()
    plain = meshes.read(cleaning.save(box, tmp_path / "plain.glb"))
    assert (shading.surface(plain).colours_F33 == np.float32(200 / 255)).all()
    assert shading.render(plain, [0], [0], 16)[0, 8, 8, 3] == 255
    red = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 0, 0, 255])
    box.visual = trimesh.visual.TextureVisuals(material=red)
    found = meshes.read(cleaning.save(box, tmp_path / "red.glb"))
    assert (shading.surface(found).colours_F33 == [1, 0, 0]).all()


def test_vertices_of_no_face_change_nothing():
    box = trimesh.creation.box([1.0, 0.5, 0.25])
    box.visual.vertex_colors = np.random.default_rng(0).integers(0, 256, (8, 4))
    stray = trimesh.Trimesh(
        np.concatenate([[[10.0, 0, 0]], box.vertices, [[np.nan, 0, 0]]]),
        box.faces + 1,
        vertex_colors=np.pad(box.visual.vertex_colors, ((1, 1), (0, 0))),
        process=False,
    )
    for a, b in zip(shading.surface(stray), shading.surface(box), strict=True):
        np.testing.assert_array_equal(a, b)
    for fill in (None, 0.85):
        images = [shading.render(m, [20], [10], 32, fill=fill) for m in (stray, box)]
        np.testing.assert_array_equal(*images)


def test_named_views_see_their_side():
    mesh = trimesh.creation.box()
    colours = {"front": (2, 1), "left": (0, 1), "back": (2, -1), "right": (0, -1)}  # +z, +x, -z, -x
    for i, (axis, sign) in enumerate(colours.values()):
        mesh.visual.face_colors[mesh.face_normals[:, axis] * sign > 0.5] = [40 * i + 40, 0, 0, 255]
    images = condition.views(mesh, 4, 32, np.random.default_rng(0))
    middle = images[:, 12:20, 12:20, 0].mean((1, 2)) / (40 * np.arange(4) + 40)
    assert list(cameras.NAMED_VIEWS) == list(colours)
    assert (middle > 0.6).all() and (middle < 1.05).all()


def test_turntables_are_written(tmp_path):
    mesh = trimesh.creation.cone(radius=1, height=2)
    turntable.save(mesh, tmp_path / "a.gif", size=40, count=6)
    turntable.save(mesh, tmp_path / "b.png", size=40)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 6 and image.size == (40, 40) and image.info["loop"] == 0
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (160, 80) and image.mode == "RGBA"
        tiles = np.asarray(image).reshape(2, 40, 4, 40, 4).swapaxes(1, 2)
        assert (tiles[..., 3].reshape(8, -1).max(1) == 255).all()
    with pytest.raises(ValueError, match="c.webp: a turntable is"):
        turntable.save(mesh, tmp_path / "c.webp")
