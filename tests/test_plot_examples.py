"""Pictures of examples, and of how their scores are distributed, show the numbers they are given."""

import itertools

import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from matplotlib.figure import Figure
from pictures import IMAGES, RNG, SCORES, TEXTS, axes_of_a_figure, drawn, hex_of, legend, row_of_axes, written

from influence_jax import plot
from influence_jax._drawing import BLUE, COLOURS, VERMILION

close = pictures.close  # the fixture


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
