"""Prepares a directory of shapes to train on: procedural ones, or a folder of meshes.

python -m research.hunyuan3d_2.data.build --out=data/shapes --train=2000 --heldout=200 --workers=2
python -m research.hunyuan3d_2.data.build --out=data/mine --meshes=my/meshes --heldout_share=0.1
"""

import sys

from absl import app, flags

from research.hunyuan3d_2.data import shapes

_OUT = flags.DEFINE_string("out", None, "The data directory.", required=True)
_MESHES = flags.DEFINE_string("meshes", "", "A folder of meshes; without it, procedural shapes.")
_TRAIN = flags.DEFINE_integer("train", 2000, "How many procedural shapes to train on.")
_HELDOUT = flags.DEFINE_integer("heldout", 200, "How many procedural shapes to hold out.")
_SHARE = flags.DEFINE_float("heldout_share", 0.1, "The share of the folder's meshes to hold out.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: this one.")
_SEED = flags.DEFINE_integer("seed", 0, "Of points and views.")
_PAPER = flags.DEFINE_bool(
    "paper", False, "Pools and views of the paper's sizes (30 MB a shape and more)."
)
_OF = shapes.PoolConfig()
_POINTS = flags.DEFINE_integer("points", _OF.uniform, "Points of each pool.")
_VIEWS = flags.DEFINE_integer("views", _OF.views, "Rendered views of each shape.")
_VIEW_SIZE = flags.DEFINE_integer("view_size", _OF.view_size, "Pixels along a view's side.")


def main(_) -> None:
    try:
        prepare()
    except (ValueError, OSError) as error:  # MeshError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command goes on where it was.") from None


def prepare() -> None:
    """Both splits, as the flags say. Raises what `shapes.build` and its sources raise."""
    points = _POINTS.value
    config = shapes.PoolConfig(
        points, points, points, views=_VIEWS.value, view_size=_VIEW_SIZE.value
    )
    if _PAPER.value:
        config = shapes.PAPER
    for split, count in (("train", _TRAIN.value), ("heldout", _HELDOUT.value)):
        if _MESHES.value:
            source = shapes.FolderSource(_MESHES.value, split, _SHARE.value)
            count = len(source.names())
        else:
            source = shapes.FamilySource(split, count)
        if not count:
            print(f"{split}: no shapes")
            continue
        root = shapes.build(source, _OUT.value, config, workers=_WORKERS.value, seed=_SEED.value)
        held = shapes.open_split(_OUT.value, split)
        print(f"{root}: {len(held)} of {count} shapes")


if __name__ == "__main__":
    app.run(main)
