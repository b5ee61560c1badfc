"""Bars, points and curves show the numbers they are given, on whatever axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from matplotlib.collections import LineCollection
from pictures import RITZ, RNG, SWEEP, axes_of_a_figure, drawn, hex_of, legend, ritz_of, written
from scipy import stats

import influence_jax as ij
from influence_jax import plot
from influence_jax._drawing import COLOURS, GREY

close = pictures.close  # the fixture
RESULTS = {"plain": (0.3, 0.2, 0.45), "best": (0.9, 0.85, 0.93), "random": (-0.02, -0.1, 0.05)}


class TestLdsBars:
    def test_bars_intervals_and_ceiling(self):
        ax = plot.lds_bars(RESULTS, ceiling=jnp.float32(0.95), ax=axes_of_a_figure())
        means, lows, highs = zip(*RESULTS.values(), strict=True)
        assert [bar.get_width() for bar in ax.patches] == list(means)
        np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in ax.patches], [0, 1, 2])
        (bars,) = [part for part in ax.collections if isinstance(part, LineCollection)]
        np.testing.assert_allclose([segment[:, 0] for segment in bars.get_segments()], np.transpose([lows, highs]))
        assert [label.get_text() for label in ax.get_yticklabels()] == list(RESULTS)
        assert written(ax) == ["0.30", "0.90", "-0.02"]
        (ceiling,) = [line for line in ax.lines if line.get_label() == "ceiling 0.95"]
        np.testing.assert_allclose(ceiling.get_xdata(), 0.95, rtol=1e-6)
        assert ceiling.get_linestyle() == "--"
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top

    def test_sorted(self):
        ax = plot.lds_bars(RESULTS, sort=True, ax=axes_of_a_figure())
        assert [label.get_text() for label in ax.get_yticklabels()] == ["best", "plain", "random"]
        assert [bar.get_width() for bar in ax.patches] == [0.9, 0.3, -0.02]

    def test_what_the_metrics_return(self):
        scores, masks = RNG.normal(size=(5, 20)), RNG.random((30, 20)) < 0.5
        outcomes = ij.metrics.predicted_changes(scores, masks) + 0.1 * RNG.normal(size=(30, 5))
        summary = ij.metrics.lds_summary(scores, masks, outcomes, key=jax.random.key(0), resamples=50)
        ax = plot.lds_bars({"ours": (summary.mean, *summary.over_queries)}, ax=axes_of_a_figure())
        assert ax.patches[0].get_width() == float(summary.mean)

    def test_no_interval_is_drawn_where_none_is_known(self):
        ax = plot.lds_bars({"one query": (0.5, np.nan, np.nan)})
        (bars,) = [part for part in ax.collections if isinstance(part, LineCollection)]
        assert np.size(bars.get_segments()) == 0
        assert ax.patches[0].get_width() == 0.5
        ax.figure.savefig("/dev/null", format="png")

    def test_thirty_long_names_do_not_overlap(self):
        names = {f"method {i} with a name that is much too long for one line": (i / 30, 0, 1) for i in range(30)}
        ax = plot.lds_bars(names)
        renderer = drawn(ax)
        boxes = [label.get_window_extent(renderer) for label in ax.get_yticklabels()]
        assert all(above.y0 > below.y1 - 2 for above, below in itertools.pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0


class TestPredictedAgainstActual:
    def test_points_line_and_scales(self):
        predicted, actual = RNG.normal(size=(2, 4, 5))
        ax = plot.predicted_against_actual(jnp.asarray(predicted), actual, ax=axes_of_a_figure())
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), np.stack([actual.ravel(), predicted.ravel()], 1))
        (line,) = ax.lines
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        assert ax.get_xlim() == ax.get_ylim() == tuple(line.get_xdata())
        assert ax.get_aspect() == 1
        low, high = ax.get_xlim()
        assert low < min(predicted.min(), actual.min())
        assert high > max(predicted.max(), actual.max())

    def test_correlations_are_those_of_scipy(self):
        predicted, actual = np.round(RNG.normal(size=(2, 30)), 1) + np.linspace(0, 2, 30)
        ax = plot.predicted_against_actual(predicted, actual, ax=axes_of_a_figure())
        pearson, spearman = stats.pearsonr(predicted, actual)[0], stats.spearmanr(predicted, actual)[0]
        assert ax.get_title() == f"Pearson {pearson:.3f}, Spearman {spearman:.3f}, n = 30"

    @pytest.mark.parametrize("removal", ["mean", "sum"])
    def test_of_scores_and_masks(self, removal):
        """What they predict, with its formula on the axis."""
        scores, masks, actual = RNG.normal(size=(3, 8)), ~np.eye(8, dtype=bool)[:5], RNG.normal(size=(5, 3))
        masks[0, 2:5] = False
        ax = plot.predicted_against_actual(scores, actual, masks=masks, removal=removal, ax=axes_of_a_figure())
        predicted = np.asarray(ij.metrics.predicted_changes(scores, masks, removal=removal))
        points = np.stack([actual.ravel(), predicted.ravel()], 1)
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), points)
        assert ("(N - m)" in ax.get_ylabel()) == (removal == "mean")
        assert ax.get_ylabel().startswith("predicted change of the loss when left out\n$")
        assert "bar{s}" not in plot.predicted_against_actual([1.0], [1.0], ax=axes_of_a_figure()).get_ylabel()
        drawn(ax)

    def test_in_single_precision(self, float32):
        ax = plot.predicted_against_actual(np.arange(5.0), np.arange(5.0) ** 3, ax=axes_of_a_figure())
        assert ax.get_title().endswith("Spearman 1.000, n = 5")

    @pytest.mark.parametrize("values", [[1.0], [0.0], [2.0, 2.0, 2.0], [-1.0, 1.0]])
    def test_too_little_for_a_correlation(self, values):
        ax = plot.predicted_against_actual(values, values)
        assert ax.get_title() == f"correlation undefined, n = {len(values)}"
        ax.figure.savefig("/dev/null", format="png")


class TestSpectrum:
    @staticmethod
    def curve(collection):
        """Abscissas and heights of a filled curve."""
        points = collection.get_paths()[0].vertices
        upper = points[points[:, 1] > 0]
        return upper[:, 0], upper[:, 1]

    def test_heights_are_eigenvalues_per_decade(self):
        """An independent sum of a Gaussian for each eigenvalue in the logarithm."""
        ax = plot.spectrum(ritz_of(1e-4, 1e-2, 1e-2, 1.0, 30.0), width=0.2, ax=axes_of_a_figure())
        x, y = self.curve(ax.collections[0])
        exponents = np.log10([1e-4, 1e-2, 1e-2, 1.0, 30.0])
        bumps = np.exp(-0.5 * ((np.log10(x)[:, None] - exponents) / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(y, np.sum(bumps, axis=1), rtol=1e-6)
        np.testing.assert_allclose(np.trapezoid(y, np.log10(x)), 5, rtol=1e-3)
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert ax.get_title() == "5 eigenvalues"

    def test_probes_are_averaged(self):
        ax = plot.spectrum(RITZ, ax=axes_of_a_figure())
        x, y = self.curve(ax.collections[0])
        np.testing.assert_allclose(np.trapezoid(y, np.log10(x)), 4, rtol=1e-3)

    def test_damping_is_marked_with_the_effective_dimension(self):
        ax = plot.spectrum(ritz_of(1.0, 3.0), damping=jnp.float32(1), ax=axes_of_a_figure())
        (mark,) = ax.lines
        np.testing.assert_array_equal(mark.get_xdata(), [1, 1])
        assert legend(ax) == ["positive", "damping 1: effective dimension 1.2"]  # 1/2 + 3/4

    def test_a_damping_far_from_all_eigenvalues_is_in_sight(self):
        ax = plot.spectrum(RITZ, damping=1e-9, ax=axes_of_a_figure())
        low, high = ax.get_xlim()
        assert low < 1e-9
        assert high > 1
        assert " ± " in legend(ax)[1]  # of two probes

    def test_negative_eigenvalues_are_drawn_by_magnitude(self):
        ax = plot.spectrum(ritz_of(-0.5, 1.0, 2.0), damping=0.1, ax=axes_of_a_figure())
        assert legend(ax) == ["positive", "negative, magnitude", "damping 0.1: indefinite"]
        x, y = self.curve(ax.collections[1])
        np.testing.assert_allclose(x[np.argmax(y)], 0.5, rtol=0.02)
        np.testing.assert_allclose(np.trapezoid(y, np.log10(x)), 1, rtol=1e-3)

    def test_zeros_are_counted_in_the_title(self):
        ax = plot.spectrum(ritz_of(0.0, -1e-17, 1e-17, 1.0), ax=axes_of_a_figure())
        assert ax.get_title() == "4 eigenvalues, 75% of them zero to rounding (below 2e-15)"
        assert len(ax.collections) == 1

    def test_the_legend_covers_no_curve(self):
        ax = plot.spectrum(RITZ, damping=0.1)
        renderer = drawn(ax)
        top = max(self.curve(ax.collections[0])[1])
        assert ax.transData.transform((1, top))[1] < ax.get_legend().get_window_extent(renderer).y0

    def test_in_single_precision(self, float32):
        drawn(plot.spectrum(ritz_of(*np.array([1.0, 2.0], np.float32)), damping=0.1, ax=axes_of_a_figure()))


class TestDampingSweep:
    def test_line_band_and_best_in_order_of_damping(self):
        dampings, values = SWEEP
        ax = plot.damping_sweep(
            jnp.asarray(dampings), values, low=values - 0.1, high=values + 0.2, name="GGN", ax=axes_of_a_figure()
        )
        (line,) = ax.lines
        np.testing.assert_array_equal(line.get_xdata(), [1e-3, 1e-2, 1.0])
        np.testing.assert_array_equal(line.get_ydata(), [0.7, 0.9, 0.1])
        band, star = ax.collections
        corners = {tuple(point) for point in np.round(band.get_paths()[0].vertices, 9).tolist()}
        assert {(1e-3, 0.6), (1e-2, 0.8), (1.0, 0.0), (1e-3, 0.9), (1e-2, 1.1), (1.0, 0.3)} <= corners
        np.testing.assert_array_equal(star.get_offsets(), [[1e-2, 0.9]])
        assert legend(ax) == ["GGN, best: 0.9 at 0.01"]
        assert ax.get_xscale() == "log"

    def test_lowest_is_best_for_a_loss(self):
        ax = plot.damping_sweep(*SWEEP, best="lowest", ax=axes_of_a_figure())
        np.testing.assert_array_equal(ax.collections[-1].get_offsets(), [[1.0, 0.1]])

    def test_a_second_method_on_the_same_axes_has_another_colour(self):
        ax = plot.damping_sweep(*SWEEP, name="a", ax=axes_of_a_figure())
        plot.damping_sweep(*SWEEP, name="b", ax=ax)
        assert [line.get_color() for line in ax.lines] == list(COLOURS[:2])
        assert len(legend(ax)) == 2

    def test_a_single_damping(self):
        drawn(plot.damping_sweep([0.1], [0.5]))


class TestDiscoveryCurve:
    def test_curves_ideal_and_random_lines(self):
        curves = {"a": ([0.2, 0.6, 1.0], [0.5, 0.9, 1.0]), "b": (jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))}
        ax = plot.discovery_curve(curves, wrong=0.25, ax=axes_of_a_figure())
        ideal, a, b, chance = ax.lines
        np.testing.assert_array_equal(ideal.get_xydata(), [[0, 0], [0.25, 1], [1, 1]])
        np.testing.assert_array_equal(a.get_xydata(), [[0, 0], [0.2, 0.5], [0.6, 0.9], [1, 1]])
        np.testing.assert_array_equal(b.get_xydata(), [[0, 0], [1, 1]])
        np.testing.assert_array_equal(chance.get_xydata(), [[0, 0], [1, 1]])
        assert legend(ax) == ["ideal", "a", "b", "at random"]
        assert [hex_of(line.get_color()) for line in ax.lines] == [GREY, *COLOURS[:2], GREY]

    def test_what_the_metrics_return(self, float32):
        suspicion, flipped = RNG.random(33).astype(np.float32), RNG.random(33) < 0.3
        curve = ij.metrics.discovery_curve(suspicion, flipped)
        ax = plot.discovery_curve({"ours": curve}, wrong=flipped.mean(), ax=axes_of_a_figure())
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), curve.found)
        np.testing.assert_array_equal(ax.lines[1].get_xdata(), curve.inspected)

    def test_thirty_curves_can_be_told_apart_and_fit_the_page(self):
        ax = plot.discovery_curve({f"method {i}": ([0.5, 1.0], [0.5 + i / 60, 1.0]) for i in range(30)})
        looks = {(line.get_color(), str(line._dash_pattern)) for line in ax.lines[:30]}
        assert len(looks) == 30
        renderer = drawn(ax)
        page, box = ax.figure.bbox, ax.get_legend().get_window_extent(renderer)
        assert box.y0 >= 0
        assert box.y1 <= page.y1
        assert box.x1 <= page.x1
        assert box.x0 >= ax.get_window_extent().x1
