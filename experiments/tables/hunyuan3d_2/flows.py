"""The transformers of the table of generation: trained, and asked for the shapes in images of held-out shapes."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.configs.hunyuan3d_2 import dit as dit_config
from experiments.tables.hunyuan3d_2 import alignment, generated, scores, vaes
from research.core import loop
from research.core.loop import LoopConfig
from research.hunyuan3d_2.data import families, shapes
from research.hunyuan3d_2.dit import checkpoint, latents, model, sampler, trainer
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.tower import load_tower
from research.hunyuan3d_2.render.shading import on_white
from research.hunyuan3d_2.vae import checkpoint as vae_checkpoint
from research.hunyuan3d_2.vae.evaluation import iou
from research.hunyuan3d_2.vae.grid import GridConfig, decode_grid
from research.hunyuan3d_2.vae.model import ShapeVAE


@dataclasses.dataclass(frozen=True)
class Settings:
    """config: of the arm `dit`. cross_depth: that makes the arm `cross` as large.

    views: of each shape, that are learned from: the front alone, or so many.
    ranges, family: how many shapes are scored of the trained families with held-out numbers, and of the
      held-out family.
    points: of a V-IoU. resolution: of meshes. steps, guidance: where nothing else is said.
    """

    config: trainer.Config
    cross_depth: int
    views: int
    ranges: int
    family: int
    points: int
    resolution: int
    steps: int
    guidance: float = 3.0
    guidances: tuple[float, ...] = (1.0, 3.0, 5.0)
    step_counts: tuple[int, ...] = (5, 10, 20, 50)


def _cpu() -> Settings:
    config = dataclasses.replace(
        dit_config.cpu(),
        mesh="data=1",  # the same on any machine
        model=DiTConfig(
            num_latents=32, latent_dim=16, cond_dim=128, hidden_size=128, num_heads=4, depth=2, single_depth=4,
        ),
        image_size=32,
        batch_size=16,
        ema_decay=0.995,
        optim=dataclasses.replace(dit_config.RECIPE, name="muon", lr=2e-3, warmup_steps=50),
        eval=trainer.EvalConfig(shapes=0, loss_shapes=64),
        loop=LoopConfig(steps=1500, log_every=10, checkpoint_every=500),
    )  # fmt: skip
    return Settings(
        config, cross_depth=8, views=1, ranges=40, family=24, points=2048, resolution=28, steps=10
    )


def _gpu() -> Settings:
    made = dit_config.gpu()
    config = dataclasses.replace(
        made,
        eval=trainer.EvalConfig(shapes=0, loss_shapes=200),
        loop=dataclasses.replace(made.loop, steps=50_000),
    )
    return Settings(
        config, cross_depth=32, views=8, ranges=167, family=33, points=8192, resolution=128, steps=50
    )  # fmt: skip


SCALES: Mapping[str, Settings] = {"cpu": _cpu(), "gpu": _gpu()}
ARMS = ("dit", "cross", "positions")


def configured(s: Settings, arm: str) -> trainer.Config:
    shape = s.config.model
    if arm == "cross":
        shape = dataclasses.replace(
            shape, architecture="cross_attention", depth=s.cross_depth, single_depth=0
        )
    elif arm == "positions":
        shape = dataclasses.replace(shape, positions="sincos")
    return dataclasses.replace(s.config, model=shape)


def scored(held: shapes.Shapes, s: Settings) -> tuple[list[shapes.Shape], list[str]]:
    """The held-out shapes that are scored, and their families: of each set the first ones.

    Raises ValueError if the held-out family is not there, or no other.
    """
    kinds: dict[bool, list[shapes.Shape]] = {False: [], True: []}
    for i in range(len(held)):
        kinds[_family(held[i]) == families.HELD_OUT].append(held[i])
    if not all(kinds.values()):
        raise ValueError(
            f"{vaes.data()} holds out no {families.HELD_OUT}s, or nothing else: build procedural shapes for this table"
        )
    chosen = kinds[False][: s.ranges] + kinds[True][: s.family]
    return chosen, [_family(shape) for shape in chosen]


def _family(shape: shapes.Shape) -> str:
    return shape.name.rsplit("-", 1)[0]


class _Views(Sequence):
    """Examples with the first views alone."""

    def __init__(self, examples: Sequence, views: int):
        self._examples, self._views = examples, views

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        example = self._examples[i]
        return {**example, "image": example["image"][: self._views]}


def measure(scale: str, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    del results
    s, vae = SCALES[scale], vaes.recipe(scale)
    config = dataclasses.replace(configured(s, arm), seed=seed, data=vaes.data(), vae=str(vae))
    train, held, _, _ = latents.load(config.data, config.vae, config.model)
    run = trainer.build(
        config, directory, examples=_Views(train, s.views), eval_examples=_Views(held, s.views)
    )
    loop.run(run, config.loop, directory, fingerprint_of=config, name=f"{arm} {seed}")
    maker = Maker(s, directory, vae, seed)
    ways = ("matched", "shuffled") + (("zero", "relative") if arm == "dit" else ())
    made = {way: maker.make(way) for way in ways}
    v_iou = {way: maker.v_iou(x) for way, x in made.items()}

    def at(way: str, **settings) -> list[float]:
        if all(value == getattr(s, name) for name, value in settings.items()):
            return v_iou[way]
        return maker.v_iou(maker.make(way, **settings))

    if arm == "dit":
        v_iou |= {f"{way}, guidance {g:g}": at(way, guidance=g)
                  for g in s.guidances for way in ("matched", "shuffled")}  # fmt: skip
        v_iou |= {f"matched, {n} steps": at("matched", steps=n) for n in s.step_counts}
    figures = {
        "family": maker.families,
        "flow": _held_out_loss(directory),
        "v_iou": {way: scores.packed(x) for way, x in v_iou.items()},
    }
    if arm == "dit":
        figures |= maker.surfaces(made, directory / "shapes.png", alignment.trained(scale))
    return figures


class Maker:
    """A trained transformer and the held-out shapes that it is asked for."""

    def __init__(self, s: Settings, run: pathlib.Path, vae: pathlib.Path, seed: int):
        self.s, self.seed = s, seed
        made, self.params = checkpoint.load_run(run)
        self.model, self.scale = model.build(made.model), made.scale_factor
        self.vae, self.vae_params = vae_checkpoint.load(vae)
        self.decode = latents.decoder(self.vae, self.vae_params)
        self.shapes, self.families = scored(vaes.heldout(), s)
        self.points_NQ4 = np.stack([shape["volume"][: s.points] for shape in self.shapes])
        self.images = on_white(np.stack([shape["views"][generated.FRONT] for shape in self.shapes]))
        tower = load_tower(made.tower, made.image_size)
        self.tokens_NTE = np.asarray(jax.jit(tower.apply)(self.params["tower"], self.images))
        self.other, self.relative = generated.others(self.families, seed)

    def make(self, way: str, steps: int | None = None, guidance: float | None = None) -> np.ndarray:
        """Latents of the VAE, from the same noise for the same shape: float32 [N, L, C]."""
        tokens = {
            "matched": self.tokens_NTE,
            "shuffled": self.tokens_NTE[self.other],
            "relative": self.tokens_NTE[self.relative],
            "zero": np.zeros_like(self.tokens_NTE),
        }[way]
        guidance = 1.0 if way == "zero" else guidance or self.s.guidance
        seeds = 1000 * self.seed + np.arange(len(tokens))
        made_NLC = sampler.generate(
            self.model, self.params["dit"], tokens, seeds=seeds.tolist(),
            steps=steps or self.s.steps, guidance=guidance,
        )  # fmt: skip
        return np.asarray(made_NLC) / self.scale

    def v_iou(self, latents_NLC: np.ndarray) -> list[float]:
        """Of the decoded fields with the shapes."""
        return [
            iou(points_Q4[:, 3] > 0, np.asarray(self.decode(x_LC[None], points_Q4[None, :, :3]))[0] > 0)
            for x_LC, points_Q4 in zip(latents_NLC, self.points_NQ4, strict=True)
        ]  # fmt: skip

    def surfaces(
        self, made: Mapping[str, np.ndarray], path: pathlib.Path, encoder: alignment.Scorer
    ) -> dict:
        """F-scores and silhouettes of what was made and of the nearest training shape, cosines with the image of what
        was made and of the shape itself; a picture of some.

        The V-IoU of what is retrieved is the training shape's own, and beside it that of its reconstruction. Cosines
        leave it out, which the encoder has learned. `found` says for each image whether its own shape's cosine is the
        highest of all.
        """
        known = shapes.open_split(vaes.data(), "train")
        found = [known[i] for i in generated.nearest(known, self.shapes)]
        kept_NLC, _ = latents.encode(
            self.vae, self.vae_params, found, self.model.config.num_latents
        )
        own_NLC, _ = latents.encode(
            self.vae, self.vae_params, self.shapes, self.model.config.num_latents
        )
        truth, retrieved = (list(map(generated.mesh_of, x)) for x in (self.shapes, found))
        meshes = {way: list(map(self._mesh, made[way])) for way in ("matched", "shuffled")}
        meshes["retrieved"] = retrieved
        shown = [i for i, family in enumerate(self.families) if self.families[:i].count(family) < 2]
        rows = [
            (
                self.shapes[i]["views"][generated.FRONT],
                (truth[i], meshes["matched"][i], retrieved[i]),
            )
            for i in sorted(shown, key=self.families.__getitem__)
        ]
        generated.picture(path, rows)
        extra = {
            "retrieved": [
                generated.v_iou(mesh, points)
                for mesh, points in zip(retrieved, self.points_NQ4, strict=True)
            ],
            "retrieved, reconstructed": self.v_iou(kept_NLC),
            "reconstructed": self.v_iou(own_NLC),
        }
        compared = {
            "f_score": partial(generated.f_score, seed=self.seed),
            "silhouette": generated.silhouette_iou,
        }
        figures = {"v_iou of others": {way: scores.packed(x) for way, x in extra.items()}} | {
            name: {
                way: scores.packed([score(a, b) for a, b in zip(of, truth, strict=True)])
                for way, of in meshes.items()
            }
            for name, score in compared.items()
        }
        unseen = {way: meshes[way] for way in ("matched", "shuffled")} | {"truth": truth}
        cosines = {way: encoder.cosines(self.images, of, self.seed) for way, of in unseen.items()}
        own = np.arange(len(truth))
        return figures | {
            "alignment": {way: scores.packed(np.diag(x_NN)) for way, x_NN in cosines.items()},
            "found": {
                way: scores.packed(np.argmax(cosines[way], axis=1) == own)
                for way in ("matched", "truth")
            },
        }

    def _mesh(self, latents_LC: np.ndarray):
        config = GridConfig(resolution=self.s.resolution, method="dense")
        made = decode_grid(ShapeVAE(self.vae), self.vae_params, latents_LC, config)
        return generated.extracted(made.field_XYZ, made.bound)


def _held_out_loss(run: pathlib.Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return round(rows[-1]["eval/flow"], 5)
