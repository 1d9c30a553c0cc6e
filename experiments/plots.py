"""Figures from metrics, written as PNG without a display."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Curve = Sequence[tuple[float, float]]  # (step, value)


def curves(
    path: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    *,
    xlabel: str = "rollout",
    smooth: int = 5,
    columns: int = 2,
) -> None:
    """Writes a PNG with one panel for each metric, one line for each arm that has points.

    Args:
      panels: title → arm → curves of its seeds; several seeds are drawn as their mean and range, at the
        steps that all of them have.
      smooth: running mean over so many points.
    """
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, arms) in zip(axes.flat, panels.items(), strict=False):
        for arm, seeds in arms.items():
            by_step = [dict(curve) for curve in seeds]
            steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
            if not steps:
                continue
            values = np.array(
                [_running_mean([curve[step] for step in steps], smooth) for curve in by_step]
            )
            (line,) = axis.plot(steps, values.mean(axis=0), label=arm)
            if len(seeds) > 1:
                axis.fill_between(
                    steps,
                    values.min(axis=0),
                    values.max(axis=0),
                    color=line.get_color(),
                    alpha=0.15,
                )
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.tight_layout()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _running_mean(values: Sequence[float | None], width: int) -> np.ndarray:
    """Mean over the last `width` points (fewer at the start); None and NaN are gaps, and count in no mean."""
    values = np.array(values, float)
    known = np.isfinite(values)
    totals, counts = (
        np.cumsum(np.insert(x.astype(float), 0, 0.0)) for x in (np.where(known, values, 0.0), known)
    )
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    counts = counts[ends] - counts[starts]
    return (totals[ends] - totals[starts]) / np.where(counts, counts, np.nan)
