"""Pictures show the numbers they are given, on whatever axes, and change nothing else."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

import influence_jax as ij
from influence_jax import plot
from influence_jax._drawing import BLUE, COLOURS, GREY, VERMILION

mpl.use("agg")
import matplotlib.pyplot as plt

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 5, 4))
SCORES = np.array([0.5, -2.0, 0.0, 1.5, -0.25, 1e-3])
TEXTS = [f"passage number {i}" for i in range(6)]
RITZ = ij.spectrum(ij.Diagonal({"w": jnp.array([1e-3, 1e-2, 0.1, 1.0])}), 4, key=jax.random.key(0), probes=2)
SWEEP = (np.array([1e-3, 1.0, 1e-2]), np.array([0.7, 0.1, 0.9]))


def axes_of_a_figure():
    return Figure().subplots()


def row_of_axes(k):
    return Figure(figsize=(12, 2)).subplots(1, 1 + 2 * k)


# Every function with data that it accepts: name -> function of the axes.
DRAWINGS = {
    "images": lambda ax: plot.images(
        IMAGES[0], 7, IMAGES, range(6), SCORES, axes=None if ax is None else row_of_axes(5)
    ),
    "texts": lambda ax: plot.texts("asked", None, TEXTS, None, SCORES, ax=ax),
    "score_histogram": lambda ax: plot.score_histogram(SCORES, ax=ax),
    "lds_bars": lambda ax: plot.lds_bars({"ours": (0.9, 0.8, 0.95)}, ceiling=0.97, ax=ax),
    "predicted_against_actual": lambda ax: plot.predicted_against_actual(SCORES, 2 * SCORES, ax=ax),
    "spectrum": lambda ax: plot.spectrum(RITZ, damping=0.1, ax=ax),
    "damping_sweep": lambda ax: plot.damping_sweep(*SWEEP, ax=ax),
    "discovery_curve": lambda ax: plot.discovery_curve({"ours": ([0.5, 1], [0.9, 1])}, wrong=0.1, ax=ax),
}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def written(ax):
    return [text.get_text() for text in ax.texts]


def drawn(ax):
    """Draw the whole figure; what measures the extents of its parts."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return canvas.get_renderer()


def hex_of(color):
    return to_hex(color).upper()


def figure_of(axes):
    return np.ravel(np.asarray(axes, object))[0].figure


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWINGS)
class TestEveryPicture:
    def test_is_drawn_on_the_axes_given_without_pyplot(self, name):
        ax = axes_of_a_figure()
        returned = DRAWINGS[name](ax)
        assert name == "images" or returned is ax
        figure_of(returned).savefig("/dev/null", format="png")
        assert plt.get_fignums() == []

    def test_makes_one_figure_of_its_own_that_holds_all_it_draws(self, name):
        figure = figure_of(DRAWINGS[name](None))
        assert plt.get_fignums() == [figure.number]
        figure.savefig("/dev/null", format="png", dpi=100)
        drawn, page = figure.get_tightbbox(), figure.bbox_inches
        slack = 0.03  # inches
        assert drawn.x0 > -slack
        assert drawn.y0 > -slack
        assert drawn.x1 < page.x1 + slack
        assert drawn.y1 < page.y1 + slack

    def test_leaves_settings_alone_and_shows_nothing(self, name, monkeypatch):
        monkeypatch.setattr(plt, "show", lambda *args, **options: pytest.fail("shown"))
        monkeypatch.setattr(Figure, "show", lambda *args, **options: pytest.fail("shown"))
        before = dict(mpl.rcParams)
        figure_of(DRAWINGS[name](None)).savefig("/dev/null", format="png")
        assert dict(mpl.rcParams) == before

    def test_says_how_to_get_matplotlib(self, name, monkeypatch):
        for module in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'influence-jax\[plot\]'"):
            DRAWINGS[name](None)


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, influence_jax.plot; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


class TestImages:
    def test_helpful_and_harmful_come_with_scores_labels_and_colours(self):
        axes = plot.images(IMAGES[2], "q", IMAGES, [f"class {i}" for i in range(6)], SCORES, k=2, axes=row_of_axes(2))
        assert [ax.get_title() for ax in axes] == [
            "query: q",
            "class 3\n+1.5",
            "class 0\n+0.5",
            "class 1\n-2",
            "class 4\n-0.25",
        ]
        for ax, place in zip(axes, (2, 3, 0, 1, 4), strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), IMAGES[place])
            assert ax.images[0].get_clim() == (0, 1)
        assert [hex_of(ax.spines["left"].get_edgecolor()) for ax in axes[1:]] == [BLUE, BLUE, VERMILION, VERMILION]
        assert [ax.get_ylabel() for ax in axes] == ["", "helpful (+)", "", "harmful (-)", ""]

    def test_no_example_is_shown_under_the_wrong_sign(self):
        """All three helped: no column is made up, and nothing is called harmful."""
        axes = plot.images(IMAGES[0], None, IMAGES[:3], None, np.array([0.1, 0.3, 0.2]))
        assert [ax.get_title() for ax in axes] == ["query", "+0.3", "+0.2", "+0.1", "", "", ""]
        assert [len(ax.images) for ax in axes] == [1, 1, 1, 1, 0, 0, 0]
        assert written(axes[4]) == ["none"]

    def test_unused_axes_stay_empty(self):
        axes = plot.images(IMAGES[0], None, IMAGES, None, SCORES, k=5, axes=row_of_axes(5))
        assert [len(ax.images) for ax in axes] == [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]

    def test_ties_are_shown_in_the_order_of_the_data(self):
        axes = plot.images(IMAGES[0], None, IMAGES[:4], list("abcd"), np.array([-1.0, 1.0, -1.0, 1.0]))
        assert [ax.get_title() for ax in axes[1:]] == ["b\n+1", "d\n+1", "a\n-1", "c\n-1"]

    @pytest.mark.parametrize("make", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"])
    def test_arrays_of_any_kind(self, make):
        axes = plot.images(make(IMAGES[0]), jnp.int32(3), make(IMAGES), make(np.arange(6)), make(SCORES), k=1)
        assert [ax.get_title() for ax in axes] == ["query: 3", "3\n+1.5", "1\n-2"]
        np.testing.assert_allclose(axes[1].images[0].get_array(), IMAGES[3])

    def test_bfloat16(self):
        axes = plot.images(IMAGES[0], None, jnp.asarray(IMAGES, jnp.bfloat16), None, jnp.asarray(SCORES, jnp.bfloat16))
        np.testing.assert_allclose(axes[1].images[0].get_array(), IMAGES[3], rtol=1e-2)

    def test_one_channel_is_grey(self):
        axes = plot.images(IMAGES[0], None, IMAGES[..., None], None, SCORES, k=1, cmap="gray_r")
        assert axes[1].images[0].get_array().shape == (5, 4)
        assert axes[1].images[0].get_cmap().name == "gray_r"

    def test_colours_outside_zero_to_one_are_scaled_together(self):
        """Standardised images: the darkest and the brightest value of all that is shown are black and white."""
        colour = RNG.normal(size=(3, 4, 4, 3)) * np.array([1.0, 2.0, 3.0])[:, None, None, None]
        axes = plot.images(colour[0], None, colour, None, np.array([0.0, 1.0, -1.0]))
        low, high = colour.min(), colour.max()
        for ax, image in zip(axes, colour, strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), (image - low) / (high - low))

    def test_long_labels_are_cut_and_dollars_are_no_formulas(self):
        axes = plot.images(IMAGES[0], None, IMAGES, ["costs $5 or $6 or " + "very " * 40] * 6, SCORES)
        lines = axes[1].get_title().split("\n")
        assert len(lines) == 3
        assert lines[0].startswith("costs $5")
        assert lines[1].endswith("…")
        assert max(map(len, lines)) < 25
        assert not axes[1].title.get_parse_math()

    def test_numbers_as_labels_are_short(self):
        axes = plot.images(IMAGES[0], 1 / 3, IMAGES, np.full(6, 2 / 3), SCORES, k=1)
        assert [ax.get_title() for ax in axes[:2]] == ["query: 0.333", "0.667\n+1.5"]


class TestTexts:
    def test_helpful_then_harmful_each_with_its_score_and_colour(self):
        ax = plot.texts("asked", "topic", TEXTS, jnp.arange(6), SCORES, k=2, ax=axes_of_a_figure())
        assert written(ax) == [
            "query",
            "[topic] asked",
            "helpful (score > 0)",
            "+1.5",
            "[3] passage number 3",
            "+0.5",
            "[0] passage number 0",
            "harmful (score < 0)",
            "-2",
            "[1] passage number 1",
            "-0.25",
            "[4] passage number 4",
        ]
        colours = {text.get_text(): hex_of(text.get_color()) for text in ax.texts}
        assert (colours["+1.5"], colours["-2"], colours["query"]) == (BLUE, VERMILION, "#000000")

    def test_long_texts_are_wrapped_and_cut_to_fit_the_width(self):
        long = ["many words " * 200, "WWWW " * 200, "il " * 500]
        ax = plot.texts("short", None, long, None, np.array([3.0, 2.0, 1.0]), lines=3)
        shown = written(ax)
        first = shown.index("+3")
        assert shown[first + 3].endswith("…")
        assert shown[first + 4] == "+2"
        renderer = drawn(ax)
        edge = ax.get_window_extent().x1
        ends = [text.get_window_extent(renderer).x1 for text in ax.texts]
        assert max(ends) <= edge + 1
        assert max(ends) > 0.85 * edge

    @pytest.mark.parametrize("height", [1.5, 4, 12])
    def test_lines_do_not_overlap_whatever_the_height(self, height):
        long = ["many words " * 50] * 6
        ax = plot.texts("asked", None, long, None, SCORES, ax=Figure(figsize=(6, height)).subplots())
        renderer, inside = drawn(ax), ax.get_window_extent()
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert min(box.y0 for box in boxes) > inside.y0 - 2
        assert max(box.y1 for box in boxes) < inside.y1 + 2
        baselines = sorted({round(text.get_position()[1], 6) for text in ax.texts if text.get_text()})
        assert len(baselines) == 1 + 2 + 2 * 5  # the query, two headings, and two lines of each of five passages
        apart = np.min(np.diff(baselines)) * inside.height
        assert apart > 0.9 * max(text.get_fontsize() for text in ax.texts) * ax.figure.dpi / 72

    def test_no_letter_is_a_formula_or_a_control_character(self):
        ax = plot.texts("$5 and $6", None, ["a\tb\x00c\nd $x^$", ""], None, np.array([1.0, -1.0]))
        assert written(ax)[1] == "$5 and $6"
        assert "a b c d $x^$" in written(ax)
        assert written(ax)[-2:] == ["-1", ""]
        ax.figure.savefig("/dev/null", format="png")

    def test_nothing_harmful_is_said(self):
        ax = plot.texts("asked", None, TEXTS[:1], None, np.array([0.5]))
        assert written(ax)[-3:] == ["harmful (score < 0)", "", "none"]


class TestScoreHistogram:
    @staticmethod
    def counts(ax):
        """Count in each bin by label, and the edges."""
        drawn = {patch.get_label().split(":")[0]: patch.get_data() for patch in ax.patches}
        (edges,) = {tuple(data.edges) for data in drawn.values()}
        return {name: data.values for name, data in drawn.items()}, np.array(edges)

    @pytest.mark.parametrize(
        "scores",
        [
            RNG.normal(size=(4, 250)),
            RNG.standard_t(1, size=1000),
            np.append(RNG.normal(size=300), 1e6),
            1e-9 * RNG.standard_t(1.2, size=400),
            np.array([0.1, -0.2, 3.0]),
            np.append(np.zeros(900), RNG.normal(size=100)),
            np.array([-2.0]),
            np.array([7.0, 7.0]),
        ],
        ids=["normal", "Cauchy", "outlier", "tiny", "three", "mostly zero", "one", "equal"],
    )
    def test_every_score_is_in_the_bin_it_belongs_to(self, scores):
        ax = plot.score_histogram(scores, ax=axes_of_a_figure())
        counts, edges = self.counts(ax)
        assert np.all(np.diff(edges) > 0)
        assert 0.0 in edges
        parts = {"helpful": scores[scores > 0], "harmful": scores[scores < 0], "zero": scores[scores == 0]}
        assert set(counts) == {name for name, part in parts.items() if part.size}
        for name, found in counts.items():
            assert np.sum(found) == parts[name].size
            np.testing.assert_array_equal(found, np.histogram(parts[name], edges)[0])
        assert ax.get_xlim() == (edges[0], edges[-1])
        ax.figure.savefig("/dev/null", format="png")

    def test_light_tails_are_drawn_on_linear_axes(self):
        ax = plot.score_histogram(RNG.normal(size=1000), ax=axes_of_a_figure())
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
        widths = np.diff(self.counts(ax)[1])
        np.testing.assert_allclose(widths[1:-1], widths[1])

    def test_an_outlier_does_not_hide_the_rest(self):
        """The bulk keeps a good part of the width, in many bins, and the single outlier a visible bar."""
        bulk = RNG.normal(size=3000)
        ax = plot.score_histogram(np.append(bulk, 1e6), ax=axes_of_a_figure())
        counts, edges = self.counts(ax)
        low, middle, high = ax.transData.transform([(x, 1) for x in (edges[0], 3, edges[-1])])[:, 0]
        assert (middle - low) / (high - low) > 0.2
        assert np.count_nonzero(edges[np.abs(edges) < 3]) > 10
        assert (counts["helpful"][-1], ax.get_ylim()[0]) == (1, 0.5)

    def test_many_zeros_do_not_hide_the_rest(self):
        ax = plot.score_histogram(np.append(np.zeros(900), RNG.normal(size=100)), ax=axes_of_a_figure())
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")

    def test_rounding_loses_no_extreme(self):
        """Numbers whose last edge comes out a rounding error below the largest."""
        scores = [
            5.586767302661887e-05,
            0.00013999079825251443,
            0.000425437152891408,
            0.00313519943,
            0.01550263458479495,
        ]
        counts, _ = self.counts(plot.score_histogram(scores, bins=7, ax=axes_of_a_figure()))
        assert np.sum(counts["helpful"]) == 5

    def test_ticks_have_room(self):
        ax = plot.score_histogram(RNG.standard_t(1, size=5000), ax=Figure(figsize=(3, 2)).subplots())
        renderer = drawn(ax)
        low, high = ax.get_xlim()
        boxes = [t.label1.get_window_extent(renderer) for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        assert len(boxes) >= 3
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))

    def test_the_legend_covers_no_bar(self):
        for scores in (np.ones(50), RNG.normal(size=1000) * 0.01 + 1, RNG.standard_t(1, size=5000)):
            ax = plot.score_histogram(scores)
            renderer = drawn(ax)
            tallest = max(np.max(found) for found in self.counts(ax)[0].values())
            assert ax.transData.transform((0, tallest))[1] < ax.get_legend().get_window_extent(renderer).y0

    def test_groups_have_their_own_colours_and_common_bins(self):
        groups = {"as it was": RNG.random(20), "flipped": jnp.asarray(RNG.random(5) + 1)}
        ax = plot.score_histogram(groups, bins=10, ax=axes_of_a_figure())
        assert legend(ax) == ["as it was: 20", "flipped: 5"]
        assert [hex_of(patch.get_facecolor()) for patch in ax.patches] == list(COLOURS[:2])
        assert len(self.counts(ax)[1]) <= 12


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

    def test_in_single_precision(self, float32):
        ax = plot.predicted_against_actual(np.arange(5.0), np.arange(5.0) ** 3, ax=axes_of_a_figure())
        assert ax.get_title().endswith("Spearman 1.000, n = 5")

    @pytest.mark.parametrize("values", [[1.0], [0.0], [2.0, 2.0, 2.0], [-1.0, 1.0]])
    def test_too_little_for_a_correlation(self, values):
        ax = plot.predicted_against_actual(values, values)
        assert ax.get_title() == f"correlation undefined, n = {len(values)}"
        ax.figure.savefig("/dev/null", format="png")


def ritz_of(*values):
    """What Lanczos finds with a start that meets all eigenvectors alike."""
    values = jnp.asarray(values)[None]
    return ij.Spectrum(values, jnp.full_like(values, 1 / values.size), jnp.zeros_like(values), size=values.size)


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


def images(**changes):
    given = {"query_image": IMAGES[0], "query_label": 1, "train_images": IMAGES, "labels": range(6), "scores": SCORES}
    return plot.images(**(given | changes))


def texts(**changes):
    given = {"query_text": "q", "query_label": 1, "train_texts": TEXTS, "labels": range(6), "scores": SCORES}
    return plot.texts(**(given | changes))


def sweep(**changes):
    return plot.damping_sweep(**({"dampings": SWEEP[0], "values": SWEEP[1]} | changes))


def bars(*result, **options):
    return plot.lds_bars({"ours": result}, **options)


def curve(inspected, found, **options):
    return plot.discovery_curve({"ours": (inspected, found)}, **options)


# (id, call, error, words the message must hold)
MISTAKES = [
    ("scores of all queries", lambda: images(scores=np.ones((2, 6))), ValueError, ["scores", "(2, 6)", "scores[0]"]),
    ("scores not finite", lambda: images(scores=SCORES / 0), ValueError, ["scores", "6 of 6", "finite"]),
    ("scores of words", lambda: images(scores=TEXTS), TypeError, ["scores", "real numbers"]),
    ("scores complex", lambda: images(scores=SCORES * 1j), TypeError, ["scores", "real numbers"]),
    ("too few images", lambda: images(train_images=IMAGES[:5]), ValueError, ["train_images", "5", "6"]),
    ("too few labels", lambda: images(labels=[1, 2]), ValueError, ["labels", "2", "6"]),
    ("a word for labels", lambda: images(labels="labels"), TypeError, ["labels", "sequence"]),
    ("flat images", lambda: images(train_images=IMAGES.reshape(6, -1)), ValueError, ["train_images[3]", "reshape"]),
    (
        "channels first",
        lambda: images(query_image=np.ones((3, 8, 8))),
        ValueError,
        ["query_image", "(3, 8, 8)", "moveaxis"],
    ),
    ("image not finite", lambda: images(query_image=IMAGES[0] * np.nan), ValueError, ["query_image", "20 of 20"]),
    ("k of zero", lambda: images(k=0), ValueError, ["k", "0", "positive"]),
    ("k of a half", lambda: texts(k=0.5), TypeError, ["k", "0.5", "int"]),
    ("axes too few", lambda: images(axes=row_of_axes(1), k=2), ValueError, ["axes", "3", "1 + 2 k = 5"]),
    ("a figure for axes", lambda: images(axes=Figure()), TypeError, ["axes", "Figure", "subplots"]),
    ("query no text", lambda: texts(query_text=b"q"), TypeError, ["query_text", "bytes", "str"]),
    ("texts of tokens", lambda: texts(train_texts=np.ones((6, 3))), TypeError, ["train_texts[3]", "ndarray", "str"]),
    ("no lines", lambda: texts(lines=0), ValueError, ["lines", "0"]),
    ("axes for ax", lambda: texts(ax=row_of_axes(1)), TypeError, ["ax", "ndarray", "matplotlib axes"]),
    ("no scores", lambda: plot.score_histogram([]), ValueError, ["scores", "none"]),
    ("no groups", lambda: plot.score_histogram({}), ValueError, ["scores", "none"]),
    ("group not finite", lambda: plot.score_histogram({"a": [np.inf]}), ValueError, ["scores['a']", "1 of 1"]),
    ("bins of zero", lambda: plot.score_histogram(SCORES, bins=0), ValueError, ["bins", "0"]),
    ("ragged scores", lambda: plot.score_histogram([[1.0], [1.0, 2.0]]), TypeError, ["scores", "real numbers"]),
    ("results no mapping", lambda: plot.lds_bars([0.5, 0.6]), TypeError, ["results", "{name: (mean, low, high)}"]),
    ("no results", lambda: plot.lds_bars({}), TypeError, ["results", "{}"]),
    (
        "result without interval",
        lambda: plot.lds_bars({"ours": 0.5}),
        TypeError,
        ["results['ours']", "mean, low, high"],
    ),
    ("interval reversed", lambda: bars(0.5, 0.6, 0.4), ValueError, ["results['ours']", "0.6", "0.4", "low <= high"]),
    ("interval infinite", lambda: bars(0.5, -np.inf, 0.4), ValueError, ["results['ours']", "-inf", "finite"]),
    ("mean not finite", lambda: bars(np.nan, 0.1, 0.2), ValueError, ["results['ours'], mean", "finite"]),
    (
        "a summary whole",
        lambda: bars(0.5, ij.metrics.Interval(0.4, 0.6), ij.metrics.Interval(0.4, 0.6)),
        ValueError,
        ["results['ours']", "*summary.over_queries"],
    ),
    ("ceiling of each query", lambda: bars(0.5, 0.4, 0.6, ceiling=[0.9, 0.8]), ValueError, ["ceiling", "one number"]),
    (
        "shapes differ",
        lambda: plot.predicted_against_actual(np.ones((2, 3)), np.ones((3, 2))),
        ValueError,
        ["actual", "(3, 2)", "(2, 3)"],
    ),
    ("no predictions", lambda: plot.predicted_against_actual([], []), ValueError, ["predicted", "no values"]),
    (
        "an operator",
        lambda: plot.spectrum(ij.Identity({"w": jnp.ones(2)})),
        TypeError,
        ["ritz", "Identity", "spectrum("],
    ),
    ("damping zero", lambda: plot.spectrum(RITZ, damping=0), ValueError, ["damping", "0", "logarithmic"]),
    ("width of none", lambda: plot.spectrum(RITZ, width=-1), ValueError, ["width", "-1"]),
    (
        "nothing but zeros",
        lambda: plot.spectrum(ritz_of(0.0, 0.0)),
        ValueError,
        ["ritz", "zero"],
    ),
    ("damping of zero", lambda: sweep(dampings=[0.0, 1.0, 2.0]), ValueError, ["dampings", "0", "logarithmic"]),
    ("no dampings", lambda: sweep(dampings=[], values=[]), ValueError, ["dampings", "(0,)", "(D,)"]),
    ("values too few", lambda: sweep(values=[1.0]), ValueError, ["values", "(1,)", "(3,)"]),
    ("values not finite", lambda: sweep(values=[1.0, np.nan, 2.0]), ValueError, ["values", "1 of 3"]),
    ("best unknown", lambda: sweep(best="max"), ValueError, ["best", "'max'", "'highest'", "'lowest'"]),
    ("one end only", lambda: sweep(low=SWEEP[1]), ValueError, ["high", "None"]),
    ("ends reversed", lambda: sweep(low=SWEEP[1], high=SWEEP[1] - 1), ValueError, ["low", "low <= high"]),
    ("curves no mapping", lambda: plot.discovery_curve([1, 2]), TypeError, ["curves", "{name: (inspected, found)}"]),
    ("curve no pair", lambda: plot.discovery_curve({"a": "ab"}), TypeError, ["curves['a']", "inspected, found"]),
    ("counts", lambda: curve([1, 2], [1, 1]), ValueError, ["curves['ours']", "0 to 1", "divide"]),
    ("backwards", lambda: curve([0.5, 0.1], [0.5, 1]), ValueError, ["curves['ours']", "ascending"]),
    ("lengths differ", lambda: curve([0.5, 1], [1]), ValueError, ["curves['ours'], found", "(1,)", "(2,)"]),
    ("empty curve", lambda: curve([], []), ValueError, ["curves['ours']", "empty"]),
    ("wrong is a count", lambda: curve([1], [1], wrong=75), ValueError, ["wrong", "75", "share"]),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_mistakes_are_told_in_words_and_open_no_figure(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert plt.get_fignums() == []
