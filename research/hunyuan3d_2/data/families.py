"""Procedural shapes to train and test on: six families of solids, each closed, with colours.

A shape is a function of (family, index, split) alone: `parameters` draws its numbers, `make` builds
it. In each family the ranges of one or two numbers that shape it most are cut in two, a large part for
'train' and the rest for 'heldout'; and the whole family HELD_OUT is never trained on (§7).
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import manifold3d
import numpy as np
import trimesh

from research.hunyuan3d_2.geometry import meshes

Split = Literal["train", "heldout"]
Parameters = dict[str, Any]
Solid = manifold3d.Manifold

HELD_OUT = "gear"
_EDGE = 0.16  # no edge of a finished mesh is longer, so colours at its vertices show a pattern


@dataclass(frozen=True)
class Family:
    draw: Callable[[np.random.Generator, bool], Parameters]  # (rng, whether held out)
    build: Callable[[Parameters], Solid]  # any size and place
    # The parameters whose ranges differ between the splits, with (train, held out) intervals.
    ranges: dict[str, tuple[tuple[float, float], tuple[float, float]]]


def parameters(family: str, index: int, split: Split = "train") -> Parameters:
    """The numbers that make the shape; raises ValueError for a family or split that is not there."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if family == HELD_OUT and split == "train":
        raise ValueError(f"the family {family!r} is held out; it has no shapes to train on")
    rng = _generator(family, index, split, "shape")
    return FAMILIES[family].draw(rng, split == "heldout")


def make(family: str, index: int, split: Split = "train") -> trimesh.Trimesh:
    """The shape, closed, y up, normalised (§2.1), with colours at its vertices in a pattern."""
    solid = FAMILIES[family].build(parameters(family, index, split)) if family in FAMILIES else None
    if solid is None:
        parameters(family, index, split)  # raises
    extent = np.ptp(np.reshape(solid.bounding_box(), (2, 3)), axis=0).max()
    mesh = solid.refine_to_length(_EDGE * extent / 2).to_mesh64()
    faces = np.asarray(mesh.tri_verts, np.int64)
    vertices = np.asarray(mesh.vert_properties[:, :3], np.float64)
    shape, _ = meshes.normalize(trimesh.Trimesh(vertices, faces, process=False))
    shape.visual.vertex_colors = _colours(
        np.asarray(shape.vertices), _generator(family, index, split, "colour")
    )
    return shape


def names(split: Split) -> tuple[str, ...]:
    """The families that a split has."""
    return tuple(name for name in FAMILIES if split == "heldout" or name != HELD_OUT)


def _generator(family: str, index: int, split: str, what: str) -> np.random.Generator:
    return np.random.default_rng([*f"{family}/{split}/{what}".encode(), index])


def _from(rng: np.random.Generator, name: str, family_ranges: dict, held_out: bool) -> float:
    low, high = family_ranges[name][held_out]
    return float(rng.uniform(low, high))


# Superquadrics: |x|^(2/e) and the like; from boxes (e near 0) over ellipsoids (1) to octahedra (2).

_SUPERQUADRIC = {"east": ((0.2, 1.3), (1.35, 1.9)), "aspect": ((0.45, 1.0), (0.3, 0.42))}


def _draw_superquadric(rng: np.random.Generator, held_out: bool) -> Parameters:
    return {
        "east": _from(rng, "east", _SUPERQUADRIC, held_out),
        "north": float(rng.uniform(0.2, 1.8)),
        "aspect": _from(rng, "aspect", _SUPERQUADRIC, held_out),
        "depth": float(rng.uniform(0.5, 1.0)),
    }


def _superquadric(p: Parameters) -> Solid:
    def power(x: np.ndarray, e: float) -> np.ndarray:
        return np.sign(x) * np.abs(x) ** e

    sphere = trimesh.creation.icosphere(4)
    x, y, z = sphere.vertices.T
    ring = np.hypot(x, z)
    # From a sphere's latitude and longitude, so that the two poles are vertices like all others.
    cos_n, sin_n = power(np.clip(ring, 0, 1), p["north"]), power(y, p["north"])
    safe = np.where(ring > 0, ring, 1)
    points = np.stack(
        [
            cos_n * power(x / safe, p["east"]),
            p["aspect"] * sin_n,
            p["depth"] * cos_n * power(z / safe, p["east"]),
        ],
        1,
    )
    return _solid(points, sphere.faces)


# Trees of solids: a body, to which parts are added and from which parts are cut.

_CSG = {"parts": ((2, 5), (6, 7))}


def _draw_csg(rng: np.random.Generator, held_out: bool) -> Parameters:
    low, high = _CSG["parts"][held_out]
    parts = int(rng.integers(low, high + 1))
    return {
        "parts": parts,
        "kind": rng.choice(["box", "ball", "cylinder", "cone"], parts).tolist(),
        "cut": [False, *(rng.random(parts - 1) < 0.5).tolist()],
        "size": np.concatenate(
            [rng.uniform(0.7, 1.0, (1, 3)), rng.uniform(0.25, 0.7, (parts - 1, 3))]
        ).tolist(),
        "place": np.concatenate(
            [np.zeros((1, 3)), rng.uniform(-0.6, 0.6, (parts - 1, 3))]
        ).tolist(),
        "turn": np.concatenate(
            [np.zeros((1, 3)), rng.choice([0.0, 0.0, 30.0, 45.0, 90.0], (parts - 1, 3))]
        ).tolist(),
    }


def _csg(p: Parameters) -> Solid:
    shapes = {
        "box": lambda: Solid.cube((2, 2, 2), True),
        "ball": lambda: Solid.sphere(1, 40),
        "cylinder": lambda: Solid.cylinder(2, 1, 1, 40, True).rotate((-90, 0, 0)),
        "cone": lambda: Solid.cylinder(2, 1, 0.25, 40, True).rotate((-90, 0, 0)),
    }
    body = Solid()
    for kind, cut, size, place, turn in zip(
        p["kind"], p["cut"], p["size"], p["place"], p["turn"], strict=True
    ):
        part = shapes[kind]().scale(size).rotate(turn).translate(place)
        if not cut:
            body = body + part
        elif (body - part).volume() > 0.3 * body.volume():  # what is left is still a shape
            body = body - part
    return _largest(body)


# Gears: teeth around a disc with a bore and, for some, holes or spokes.

_GEAR = {"teeth": ((0, 0), (7, 24))}  # held out whole


def _draw_gear(rng: np.random.Generator, held_out: bool) -> Parameters:
    del held_out
    return {
        "teeth": int(rng.integers(7, 25)),
        "tooth": float(rng.uniform(0.12, 0.28)),
        "bore": float(rng.uniform(0.12, 0.35)),
        "holes": int(rng.choice([0, 0, 4, 5, 6])),
        "thickness": float(rng.uniform(0.25, 0.8)),
        "twist": float(rng.choice([0.0, 0.0, 15.0, 25.0])),
        "standing": bool(rng.random() < 0.5),
    }


def _gear(p: Parameters) -> Solid:
    step = 2 * np.pi / p["teeth"]
    inner = 1 - p["tooth"]
    corners = [(-0.3, inner), (-0.17, 1.0), (0.17, 1.0), (0.3, inner)]
    angles = np.concatenate([[(k + a) * step for a, _ in corners] for k in range(p["teeth"])])
    radii = np.tile([r for _, r in corners], p["teeth"])
    outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    section = manifold3d.CrossSection([outline]) - manifold3d.CrossSection.circle(
        p["bore"] * inner, 48
    )
    middle, room = (1 + p["bore"]) / 2 * inner, (1 - p["bore"]) / 2 * inner
    for k in range(p["holes"]):
        around = 2 * np.pi * k / p["holes"]
        hole = manifold3d.CrossSection.circle(min(0.6 * room, 2.2 * middle / p["holes"]), 32)
        section -= hole.translate((middle * np.cos(around), middle * np.sin(around)))
    gear = Solid.extrude(section, p["thickness"], 8 if p["twist"] else 0, p["twist"])
    return gear if p["standing"] else gear.rotate((-90, 0, 0))


# Torus knots: a tube that winds p times around the axis and q times through the hole.

_KNOT = {"tube": ((0.1, 0.22), (0.24, 0.3)), "waist": ((0.35, 0.5), (0.52, 0.6))}


def _draw_knot(rng: np.random.Generator, held_out: bool) -> Parameters:
    around, through = [(1, 0), (1, 2), (1, 3), (2, 1), (2, 3)][int(rng.integers(5))]
    return {
        "around": around,
        "through": through,
        "tube": _from(rng, "tube", _KNOT, held_out),
        "waist": _from(rng, "waist", _KNOT, held_out),
        "flat": float(rng.uniform(0.7, 1.0)),
        "standing": bool(rng.random() < 0.5),
    }


def _knot(p: Parameters) -> Solid:
    steps, sides = 160 * max(p["around"], 1), 16
    t = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    ring = 1 + p["waist"] * np.cos(p["through"] * t)
    path = np.stack(
        [
            ring * np.cos(p["around"] * t),
            p["flat"] * p["waist"] * np.sin(p["through"] * t),
            ring * np.sin(p["around"] * t),
        ],
        1,
    )
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    # Outward from the core circle: a frame that closes up after one round, unlike a transported one.
    core = np.stack([np.cos(p["around"] * t), np.zeros(steps), np.sin(p["around"] * t)], 1)
    out = path - core if p["through"] else core
    out = out - (out * ahead).sum(1, keepdims=True) * ahead
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    side = np.cross(ahead, out)
    a = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    tube = p["tube"] / max(1, p["around"] - 0.5)
    points = path[:, None] + tube * (
        np.cos(a)[:, None] * out[:, None] + np.sin(a)[:, None] * side[:, None]
    )
    i, j = np.meshgrid(np.arange(steps), np.arange(sides), indexing="ij")
    i2, j2 = (i + 1) % steps, (j + 1) % sides
    quads = np.stack(
        [i * sides + j, i * sides + j2, i2 * sides + j2, i2 * sides + j], axis=-1
    ).reshape(-1, 4)
    knot = _solid(points.reshape(-1, 3), np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]))
    return knot.rotate((-90, 0, 0)) if p["standing"] else knot


# Extruded polygons: stars and prisms, straight, tapered or twisted.

_EXTRUSION = {"height": ((0.3, 1.6), (1.7, 2.6)), "inset": ((0.55, 1.0), (0.4, 0.52))}


def _draw_extrusion(rng: np.random.Generator, held_out: bool) -> Parameters:
    corners = int(rng.integers(3, 9))
    return {
        "corners": corners,
        "inset": _from(rng, "inset", _EXTRUSION, held_out),  # of every second corner; 1: a prism
        "jitter": rng.uniform(0.85, 1.0, 2 * corners).tolist(),
        "height": _from(rng, "height", _EXTRUSION, held_out),
        "taper": float(rng.choice([1.0, 1.0, 0.7, 0.4])),
        "twist": float(rng.choice([0.0, 0.0, 30.0, 60.0])),
        "hole": float(rng.choice([0.0, 0.0, 0.2])),
    }


def _extrusion(p: Parameters) -> Solid:
    angles = np.pi * np.arange(2 * p["corners"]) / p["corners"]
    radii = np.asarray(p["jitter"]) * np.where(np.arange(2 * p["corners"]) % 2, p["inset"], 1)
    section = manifold3d.CrossSection(
        [np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)]
    )
    if p["hole"]:
        section -= manifold3d.CrossSection.circle(p["hole"], 32)
    slices = 12 if p["twist"] else 0
    solid = Solid.extrude(section, p["height"], slices, p["twist"], (p["taper"], p["taper"]))
    return solid.rotate((-90, 0, 0))


# Figures: a trunk, a head and limbs of capsules, facing +z.

_FIGURE = {"arm": ((-70.0, 20.0), (30.0, 70.0)), "stride": ((0.0, 25.0), (30.0, 45.0))}


def _draw_figure(rng: np.random.Generator, held_out: bool) -> Parameters:
    def arm() -> float:
        return _from(rng, "arm", _FIGURE, held_out)

    return {
        "arm": arm(),  # degrees above the horizontal, left
        "arm_right": arm(),
        "elbow": float(rng.uniform(-60, 60)),
        "stride": _from(rng, "stride", _FIGURE, held_out),
        "girth": float(rng.uniform(0.18, 0.3)),
        "limb": float(rng.uniform(0.07, 0.13)),
        "head": float(rng.uniform(0.16, 0.26)),
        "legs": float(rng.uniform(0.6, 1.0)),
    }


def _figure(p: Parameters) -> Solid:
    def capsule(start: np.ndarray, end: np.ndarray, r: float, s: float) -> Solid:
        ends = [Solid.sphere(radius, 20).translate(at) for at, radius in ((start, r), (end, s))]
        return Solid.batch_hull(ends)

    hip, neck = np.array([0, 0, 0.0]), np.array([0, 0.7, 0.0])
    girth, limb = p["girth"], p["limb"]
    parts = [
        capsule(hip, neck, girth, 0.85 * girth),
        Solid.sphere(p["head"], 28).translate(neck + [0, 0.85 * girth + 0.8 * p["head"], 0]),
    ]
    for side, lift in ((1, p["arm"]), (-1, p["arm_right"])):
        a, b = np.deg2rad(lift), np.deg2rad(lift + p["elbow"])
        shoulder = neck + [side * 0.8 * girth, 0, 0]
        elbow = shoulder + 0.42 * np.array([side * np.cos(a), np.sin(a), 0])
        hand = elbow + 0.38 * np.array([side * np.cos(b) * 0.8, np.sin(b), 0.6 * np.cos(b)])
        parts += [
            capsule(shoulder, elbow, limb, 0.9 * limb),
            capsule(elbow, hand, 0.9 * limb, 0.8 * limb),
        ]
        swing = np.deg2rad(side * p["stride"])
        socket = hip + [side * 0.6 * girth, -0.4 * girth, 0]
        foot = socket + p["legs"] * np.array([0.1 * side, -np.cos(swing), np.sin(swing)])
        parts += [
            capsule(socket, foot, 1.2 * limb, limb),
            capsule(foot, foot + [0, 0, 0.2], limb, 0.8 * limb),
        ]
    return Solid.batch_boolean(parts, manifold3d.OpType.Add)


FAMILIES: dict[str, Family] = {
    "superquadric": Family(_draw_superquadric, _superquadric, _SUPERQUADRIC),
    "csg": Family(_draw_csg, _csg, _CSG),
    "gear": Family(_draw_gear, _gear, _GEAR),
    "torus_knot": Family(_draw_knot, _knot, _KNOT),
    "extrusion": Family(_draw_extrusion, _extrusion, _EXTRUSION),
    "figure": Family(_draw_figure, _figure, _FIGURE),
}


def _solid(vertices: np.ndarray, faces: np.ndarray) -> Solid:
    """The solid that closed faces bound, whether all of them look outward or all inward."""
    points = np.ascontiguousarray(vertices, np.float64)
    solid = Solid(manifold3d.Mesh64(points, np.asarray(faces, np.uint64)))
    if solid.status() != manifold3d.Error.NoError:
        raise RuntimeError(f"a procedural shape is not a solid: {solid.status()}")
    return _solid(vertices, np.asarray(faces)[:, ::-1]) if solid.volume() < 0 else solid


def _largest(solid: Solid) -> Solid:
    return max(solid.decompose(), key=lambda part: part.volume())


def _colours(points_V3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks or smooth noise of two colours, by position; uint8 [V, 4]."""
    hue, pattern = rng.random(), rng.choice(["plain", "stripes", "checks", "noise"])
    first = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.3, 0.9), rng.uniform(0.6, 1.0)))
    other = np.array(
        colorsys.hsv_to_rgb(
            (hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.3, 0.9), rng.uniform(0.4, 0.9)
        )
    )
    rate, axis = rng.uniform(4, 8), rng.standard_normal(3)
    if pattern == "plain":
        mix = np.zeros(len(points_V3))
    elif pattern == "stripes":
        mix = np.sin(rate * points_V3 @ (axis / np.linalg.norm(axis))) > 0
    elif pattern == "checks":
        mix = np.sin(rate * points_V3 + 0.5).prod(1) > 0
    else:
        waves = np.sin(points_V3 @ rng.normal(0, 4, (3, 6)) + rng.uniform(0, 2 * np.pi, 6)).mean(1)
        mix = np.clip(0.5 + waves, 0, 1)
    colours = first + np.asarray(mix, float)[:, None] * (other - first)
    return np.concatenate(
        [np.round(255 * colours), np.full((len(colours), 1), 255)], axis=1
    ).astype(np.uint8)
