"""Figures: a PNG whatever the curves are like, and running means that gaps do not spoil."""

import matplotlib.image
import numpy as np

from experiments import plots


def test_a_figure_of_many_kinds_of_curves(tmp_path):
    path = tmp_path / "new" / "curves.png"
    plots.curves(
        path,
        {
            "seeds": {"arm": [[(1, 0.1), (2, 0.2)], [(2, 0.4), (1, 0.3), (3, 0.5)]]},
            "gaps": {"arm": [[(1, None), (2, 1.0), (3, float("nan"))]], "empty": [[]]},
            "nothing": {},
        },
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300
    assert pixels.std() > 0.05  # something is drawn


def test_seeds_are_compared_at_the_steps_that_all_have(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.plt, "close", lambda figure: drawn.append(figure))
    curves = [[(0, 1.0), (10, 3.0), (20, 9.0)], [(10, 5.0), (20, 1.0), (30, 7.0)]]
    plots.curves(tmp_path / "a.png", {"panel": {"arm": curves}}, smooth=1)
    (line,) = drawn[0].axes[0].lines
    assert line.get_xdata().tolist() == [10, 20]
    assert line.get_ydata().tolist() == [4.0, 5.0]
    monkeypatch.undo()
    plots.plt.close("all")


def test_running_means():
    mean = plots._running_mean([1.0, 3.0, 5.0, 7.0], 2)
    np.testing.assert_allclose(mean, [1, 2, 4, 6])
    gaps = plots._running_mean([None, 2.0, float("nan"), 4.0, 6.0], 2)
    np.testing.assert_allclose(gaps, [np.nan, 2, 2, 4, 5])
    assert plots._running_mean([], 3).tolist() == []
