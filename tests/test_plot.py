"""What all pictures have in common: they change nothing else, and mistakes are told in words."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pictures
import pytest
from matplotlib.figure import Figure
from pictures import IMAGES, RITZ, SCORES, SWEEP, TEXTS, axes_of_a_figure, ritz_of, row_of_axes

import influence_jax as ij
from influence_jax import plot

close = pictures.close  # the fixture


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


def figure_of(axes):
    return np.ravel(np.asarray(axes, object))[0].figure


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
    (
        "scores without masks",
        lambda: plot.predicted_against_actual(np.ones((2, 3)), np.ones((2, 3)), removal="sum"),
        ValueError,
        ["removal", "'sum'", "without masks"],
    ),
    (
        "removal unknown",
        lambda: plot.predicted_against_actual(SCORES, SCORES, masks=SCORES, removal="all"),
        ValueError,
        ["removal", "'all'", "'mean'", "'sum'"],
    ),
    (
        "masks of others",
        lambda: plot.predicted_against_actual(np.ones((2, 3)), np.ones((4, 2)), masks=np.ones((4, 5))),
        ValueError,
        ["masks", "(4, 5)", "(4, 3)"],
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
