"""What all measures have in common: transformations change nothing, NaN shows, and mistakes are told in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from studies import KEY, by_scipy, study

from influence_jax import metrics

SCORES, MASKS, OUTCOMES = study(31, seeds=4)
FLIPPED = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0], bool)
RELEVANT = np.tile(FLIPPED, (3, 1))

# Of every measure: a function of arrays, and arrays.
MEASURES = {
    "correlation": (metrics.correlation, (OUTCOMES[:, 0], OUTCOMES[:, 1])),
    "predicted_changes": (metrics.predicted_changes, (SCORES, MASKS)),
    "lds": (metrics.lds, (SCORES, MASKS, OUTCOMES)),
    "lds_summary": (lambda *a: metrics.lds_summary(*a, key=KEY, resamples=20), (SCORES, MASKS, OUTCOMES)),
    "bootstrap": (lambda v: metrics.bootstrap(v, key=KEY, resamples=20), (SCORES,)),
    "seed_agreement": (lambda o: metrics.seed_agreement(o, key=KEY, splits=3), (OUTCOMES,)),
    "seed_ceiling": (lambda o: metrics.seed_ceiling(o, key=KEY, splits=3), (OUTCOMES,)),
    "auc": (metrics.auc, (SCORES[0], FLIPPED)),
    "precision_at_k": (lambda s, f: metrics.precision_at_k(s, f, 3), (SCORES[0], FLIPPED)),
    "discovery_curve": (metrics.discovery_curve, (SCORES[0], FLIPPED)),
    "removal_masks": (lambda s: metrics.removal_masks(s, (1, 3)), (SCORES,)),
    "own_outcomes": (metrics.own_outcomes, (OUTCOMES[:9],)),
    "brittleness": (lambda f: metrics.brittleness(f, range(10, 22)), (RELEVANT,)),
    "recall_at_k": (lambda s, r: metrics.recall_at_k(s, r, 3), (SCORES, RELEVANT)),
    "reciprocal_rank": (metrics.reciprocal_rank, (SCORES, RELEVANT)),
    "top_k_overlap": (lambda a, b: metrics.top_k_overlap(a, b, 3), (SCORES, SCORES[::-1])),
    "rank_stability": (metrics.rank_stability, (OUTCOMES,)),
}


class TestTransformations:
    def test_every_measure_is_here(self):
        classes = ("Interval", "Summary", "DiscoveryCurve")
        modules = ("checks", "intervals", "rankings", "ranks", "retraining")
        public = {name for name in dir(metrics) if not name.startswith("_")} - {*classes, *modules}
        assert public == set(MEASURES)

    @pytest.mark.parametrize("name", MEASURES)
    def test_jit_and_vmap_change_nothing(self, name):
        measure, arrays = MEASURES[name]
        alone = jax.tree.leaves(measure(*arrays))
        compiled = jax.tree.leaves(jax.jit(measure)(*arrays))
        twice = [np.stack([x, np.roll(x, 1, axis=-1)]) for x in arrays]
        mapped = [jax.tree.leaves(jax.vmap(measure)(*twice)), jax.tree.leaves(measure(*(x[1] for x in twice)))]
        for one, jitted, both, rolled in zip(alone, compiled, *mapped, strict=True):
            np.testing.assert_allclose(jitted, one, rtol=1e-12)
            np.testing.assert_allclose(both[0], one, rtol=1e-12)
            np.testing.assert_allclose(both[1], rolled, rtol=1e-12)

    @pytest.mark.parametrize("name", MEASURES)
    def test_nothing_is_compiled_twice(self, name, compilations):
        measure, arrays = MEASURES[name]
        measure(*arrays)
        with compilations() as names:
            measure(*(np.roll(x, 1, axis=-1) for x in arrays))
        assert names == []

    @pytest.mark.parametrize("name", sorted(set(MEASURES) - {"brittleness", "own_outcomes", "removal_masks"}))
    def test_nan_inside_of_jit_gives_nan(self, name):
        """Wherever it is: no measure takes it for a number."""
        measure, (first, *others) = MEASURES[name]
        for place in (0, 5, -1):
            spoilt = first.copy()
            spoilt.reshape(-1)[place] = np.nan
            got = jax.tree.leaves(jax.jit(measure)(spoilt, *others))
            assert any(np.isnan(leaf).any() for leaf in got)

    def test_gradients_of_predictions(self):
        """Predicted changes, and Pearson correlations, can be improved by gradient."""
        slope = jax.grad(lambda s: jnp.sum(metrics.lds(s, MASKS, OUTCOMES, method="pearson")))(jnp.asarray(SCORES))
        step = 1e-6 * np.random.default_rng(32).normal(size=SCORES.shape)
        ahead, behind = (np.sum(by_scipy(SCORES + s, MASKS, OUTCOMES, "pearson")) for s in (step, -step))
        assert relative_error(jnp.sum(slope * step), (ahead - behind) / 2) < 1e-5


def bad(measure, error, message, *args, **kwargs):
    return pytest.param(measure, error, message, args, kwargs, id=f"{measure.__name__}-{message[:40]}")


def spoilt(array, value=np.nan):
    array = np.array(array, float)
    array.reshape(-1)[1] = value
    return array


class TestMistakes:
    @pytest.mark.parametrize(
        ("measure", "error", "message", "args", "kwargs"),
        [
            bad(
                metrics.lds, ValueError, r"masks: got shape \(12, 10\), expected \(12, 12\)", SCORES, MASKS.T, OUTCOMES
            ),
            bad(metrics.lds, ValueError, r"scores: got shape \(12,\), expected \(Q, N\)", SCORES[0], MASKS, OUTCOMES),
            bad(
                metrics.lds, ValueError, r"outcomes: got shape \(10, 2\), .*\(10, 3\)", SCORES, MASKS, OUTCOMES[..., :2]
            ),
            bad(metrics.lds, ValueError, r"outcomes: .*\(S, Q\) or \(S, K, Q\)", SCORES, MASKS, OUTCOMES[0, 0]),
            bad(metrics.lds, ValueError, "masks: got entries such as 0.5, .*0 and 1", SCORES, MASKS * 0.5, OUTCOMES),
            bad(metrics.lds, ValueError, "masks: got entries such as nan", SCORES, spoilt(MASKS), OUTCOMES),
            bad(metrics.lds, ValueError, "masks: got 2 subsets, expected at least 3", SCORES, MASKS[:2], OUTCOMES[:2]),
            bad(metrics.lds, ValueError, "scores: got 1 entries of 36 that are NaN", spoilt(SCORES), MASKS, OUTCOMES),
            bad(metrics.lds, ValueError, "outcomes: got 1 .*diverged", SCORES, MASKS, spoilt(OUTCOMES, np.inf)),
            bad(metrics.lds, ValueError, "method: got 'kendall'", SCORES, MASKS, OUTCOMES, method="kendall"),
            bad(metrics.lds, TypeError, "scores: got a dict", {"scores": SCORES}, MASKS, OUTCOMES),
            bad(metrics.lds, TypeError, "scores: got a str", "scores", MASKS, OUTCOMES),
            bad(metrics.lds, TypeError, "scores: got dtype <U", SCORES.astype(str), MASKS, OUTCOMES),
            bad(metrics.lds, TypeError, "scores: got dtype object", SCORES.astype(object), MASKS, OUTCOMES),
            bad(metrics.lds, TypeError, "scores: got dtype complex", SCORES.astype(complex), MASKS, OUTCOMES),
            bad(metrics.lds, TypeError, "scores: got dtype key", jax.random.split(KEY, 3)[:, None], MASKS, OUTCOMES),
            bad(metrics.predicted_changes, ValueError, "scores: got shape", SCORES[:0], MASKS),
            bad(
                metrics.predicted_changes,
                ValueError,
                "removal: got 'avg', .*'mean', of training on the mean",
                SCORES,
                MASKS,
                removal="avg",
            ),
            bad(metrics.lds, ValueError, "removal: got None", SCORES, MASKS, OUTCOMES, removal=None),
            bad(metrics.lds_summary, ValueError, "removal: got 'N'", SCORES, MASKS, OUTCOMES, key=KEY, removal="N"),
            bad(
                metrics.predicted_changes,
                ValueError,
                "masks: got 10 subsets that keep no example",
                SCORES,
                MASKS & False,
            ),
            bad(
                metrics.lds,
                ValueError,
                "masks: got 1 subsets that keep no .* first of them 1",
                SCORES,
                MASKS & (np.arange(10) != 1)[:, None],
                OUTCOMES,
            ),
            bad(
                metrics.correlation, ValueError, r"measured: got shape \(9,\), expected \(8,\)", np.ones(8), np.ones(9)
            ),
            bad(metrics.correlation, ValueError, "predicted: got 2 rows", np.ones(2), np.ones(2)),
            bad(metrics.correlation, ValueError, r"predicted: got shape \(\)", 1.0, 1.0),
            bad(metrics.correlation, ValueError, "method: got 'tau'", np.ones(8), np.ones(8), method="tau"),
            bad(metrics.lds_summary, ValueError, "key: .*pass key=", SCORES, MASKS, OUTCOMES, key=None),
            bad(metrics.lds_summary, ValueError, "level: got 95", SCORES, MASKS, OUTCOMES, key=KEY, level=95),
            bad(metrics.lds_summary, ValueError, "level: got 1.0", SCORES, MASKS, OUTCOMES, key=KEY, level=1.0),
            bad(metrics.lds_summary, ValueError, "resamples: got 0", SCORES, MASKS, OUTCOMES, key=KEY, resamples=0),
            bad(metrics.lds_summary, ValueError, "method: got 'tau'", SCORES, MASKS, OUTCOMES, key=KEY, method="tau"),
            bad(metrics.bootstrap, ValueError, "values: got 1 rows, expected at least 2", np.ones(1), key=KEY),
            bad(metrics.bootstrap, ValueError, "values: .*disagree in length", (np.ones(3), np.ones(4)), key=KEY),
            bad(metrics.bootstrap, TypeError, "statistic: got 'mean'", np.ones(3), key=KEY, statistic="mean"),
            bad(metrics.bootstrap, TypeError, "resamples: got 9.5", np.ones(3), key=KEY, resamples=9.5),
            bad(metrics.bootstrap, TypeError, "key: .*got 0", np.ones(3), key=0),
            bad(metrics.seed_agreement, ValueError, r"outcomes: .*\(S, K, Q\)", OUTCOMES[:, 0], key=KEY),
            bad(
                metrics.seed_agreement,
                ValueError,
                "outcomes: got 1 seeds, expected at least 2",
                OUTCOMES[:, :1],
                key=KEY,
            ),
            bad(metrics.seed_agreement, ValueError, "outcomes: got 2 subsets", OUTCOMES[:2], key=KEY),
            bad(metrics.seed_agreement, ValueError, "splits: got 0", OUTCOMES, key=KEY, splits=0),
            bad(metrics.seed_agreement, ValueError, "key: ", OUTCOMES, key=None),
            bad(metrics.seed_ceiling, ValueError, "outcomes: got 1 seeds", OUTCOMES[:, :1], key=KEY),
            bad(metrics.seed_ceiling, ValueError, "method: got 'tau'", OUTCOMES, key=KEY, method="tau"),
            bad(metrics.auc, ValueError, r"flipped: got shape \(11,\), expected \(12,\)", SCORES[0], FLIPPED[1:]),
            bad(metrics.auc, ValueError, "flipped: got entries such as 2", SCORES[0], FLIPPED * 2),
            bad(metrics.auc, ValueError, r"suspicion: got shape \(3, 12\), expected \(N,\)", SCORES, FLIPPED),
            bad(metrics.auc, ValueError, "suspicion: got 1 entries", spoilt(SCORES[0]), FLIPPED),
            bad(metrics.precision_at_k, ValueError, "k: got 13, expected at most 12", SCORES[0], FLIPPED, 13),
            bad(metrics.precision_at_k, ValueError, "k: got 0", SCORES[0], FLIPPED, 0),
            bad(metrics.precision_at_k, TypeError, "k: got 0.5", SCORES[0], FLIPPED, 0.5),
            bad(metrics.discovery_curve, ValueError, "flipped: got shape", SCORES[0], FLIPPED[1:]),
            bad(metrics.removal_masks, ValueError, r"counts: got \[12\], expected 0 to 11", SCORES, [12]),
            bad(metrics.removal_masks, ValueError, r"counts: got \[-1\]", SCORES, [-1]),
            bad(metrics.removal_masks, ValueError, r"counts: got \[0.1\], expected a list of ints", SCORES, [0.1]),
            bad(metrics.removal_masks, ValueError, "counts: got 3, expected a list", SCORES, 3),
            bad(metrics.removal_masks, ValueError, "remove: got 'best'", SCORES, [3], remove="best"),
            bad(metrics.removal_masks, ValueError, "scores: got 1 entries", spoilt(SCORES), [3]),
            bad(metrics.own_outcomes, ValueError, "outcomes: got 10 subsets and 3 queries", OUTCOMES),
            bad(metrics.brittleness, ValueError, r"counts: got shape \(2,\), expected \(12,\)", RELEVANT, [1, 2]),
            bad(metrics.brittleness, ValueError, "flipped: got entries such as", SCORES, range(12)),
            bad(metrics.recall_at_k, ValueError, r"relevant: got shape \(12,\)", SCORES, FLIPPED, 3),
            bad(metrics.recall_at_k, ValueError, r"relevant: got shape \(2, 12\)", SCORES, RELEVANT[:2], 3),
            bad(metrics.recall_at_k, ValueError, "k: got 13", SCORES, RELEVANT, 13),
            bad(metrics.reciprocal_rank, ValueError, "relevant: got entries such as 3", SCORES, RELEVANT * 3),
            bad(
                metrics.top_k_overlap, ValueError, r"b: got shape \(2, 12\), expected \(3, 12\)", SCORES, SCORES[:2], 3
            ),
            bad(metrics.top_k_overlap, ValueError, "k: got 13", SCORES, SCORES, 13),
            bad(metrics.rank_stability, ValueError, "scores: got 1 runs, expected at least 2", OUTCOMES[:1]),
            bad(metrics.rank_stability, ValueError, "scores: got 2 examples", OUTCOMES[..., :2]),
            bad(metrics.rank_stability, ValueError, r"scores: got shape \(3, 12\)", SCORES),
        ],
    )
    def test_are_told_in_words(self, measure, error, message, args, kwargs):
        with pytest.raises(error, match=message):
            measure(*args, **kwargs)

    @pytest.mark.parametrize(
        "name", ["auc", "discovery_curve", "removal_masks", "recall_at_k", "reciprocal_rank", "top_k_overlap", "lds"]
    )
    def test_places_are_no_scores(self, name):
        """As in TopK.indices, or of a sort; whole numbers that are scores are cast."""
        measure, (scores, *others) = MEASURES[name]
        for places in (np.argsort(-scores), jnp.argsort(-scores), np.argsort(-scores).astype(np.uint8)):
            with pytest.raises(
                TypeError, match=r"got u?int(8|32|64)\[.*expected scores; integers are places.*TopK.indices"
            ):
                measure(places, *others)
        assert jax.tree.leaves(measure(np.argsort(-scores).astype(float), *others))

    def test_rankings_of_runs_are_no_scores(self):
        with pytest.raises(TypeError, match=r"scores: got int64\[.*cast them to float"):
            metrics.rank_stability(np.argsort(OUTCOMES, axis=-1))
        with pytest.raises(TypeError, match=r"b: got int64\[.*cast them to float"):
            metrics.top_k_overlap(SCORES, np.argsort(-SCORES), 3)

    def test_shapes_are_checked_under_jit(self):
        with pytest.raises(ValueError, match="masks: got shape"):
            jax.jit(metrics.lds)(SCORES, MASKS[:, 1:], OUTCOMES)

    def test_lists_will_do(self):
        assert metrics.auc([0.9, 0.1], [1, 0]) == 1
        assert metrics.correlation([1, 2, 3], [jnp.float32(1), jnp.float32(3), jnp.float32(4)], method="spearman") == 1

    def test_what_float32_cannot_hold_is_refused(self, float32):
        with pytest.raises(ValueError, match=r"scores: got numbers up to .*e\+40, which float32 cannot hold; divide"):
            metrics.lds(SCORES * 1e40, MASKS, OUTCOMES)


class TestSinglePrecision:
    """What was measured in float64 is compared where 64-bit mode is off, and loses nothing of the comparison."""

    @pytest.mark.parametrize("name", MEASURES)
    def test_every_measure_takes_double_precision(self, name, float32):
        measure, arrays = MEASURES[name]
        assert any(array.dtype in (np.float64, bool) for array in arrays)
        narrow = [array.astype(np.float32) for array in arrays]
        for got, cast in zip(jax.tree.leaves(measure(*arrays)), jax.tree.leaves(measure(*narrow)), strict=True):
            assert got.dtype in (jnp.float32, bool)
            np.testing.assert_allclose(got, cast, rtol=1e-5, atol=1e-6)

    def test_losses_that_differ_by_little(self, float32):
        """By 1e-9 of themselves: float32 would call them equal, and a constant has no correlation."""
        close = 7 + 1e-9 * OUTCOMES
        for got, expected in [
            (metrics.lds(SCORES, MASKS, close), by_scipy(SCORES, MASKS, OUTCOMES)),
            (metrics.lds(SCORES, MASKS, close, method="pearson"), by_scipy(SCORES, MASKS, OUTCOMES, "pearson")),
            (metrics.correlation(close[:, 0], close[:, 1]), metrics.correlation(OUTCOMES[:, 0], OUTCOMES[:, 1])),
            (metrics.seed_agreement(close, key=KEY), metrics.seed_agreement(OUTCOMES, key=KEY)),
            (metrics.lds_summary(SCORES, MASKS, close, key=KEY).mean, by_scipy(SCORES, MASKS, OUTCOMES).mean()),
        ]:
            assert relative_error(got, np.asarray(expected)) < 1e-4

    def test_orders_of_numbers_below_float32(self, float32):
        tiny = np.exp(-150 + SCORES)
        for measure in ("auc", "precision_at_k", "discovery_curve", "recall_at_k", "reciprocal_rank", "removal_masks"):
            function, (scores, *others) = MEASURES[measure]
            small = tiny[0] if scores.ndim == 1 else tiny
            for got, expected in zip(*(jax.tree.leaves(function(x, *others)) for x in (small, scores)), strict=True):
                np.testing.assert_array_equal(got, expected)

    def test_integers_of_any_width(self, float32):
        """As numbers whole, and as flags."""
        whole = np.array([2**40 + 2, 2**40 + 1, 2**40, 2**40 + 3])
        assert metrics.correlation(whole, np.array([3, 2, 1, 4], np.int8)) > 1 - 1e-6
        assert metrics.correlation(whole, np.array([3, 2, 1, 4.0]), method="pearson") > 1 - 1e-6
        assert metrics.auc(whole.astype(float), np.array([1, 0, 0, 1], np.uint64)) == 1
        for dtype in (bool, np.int8, np.int64, np.uint8, np.float64, np.float32):
            assert metrics.predicted_changes(np.eye(3), (~np.eye(3, dtype=bool)).astype(dtype)).shape == (3, 3)


class TestDebugNans:
    """With `jax_debug_nans`, every measure runs, and what there is no answer to is NaN as ever."""

    @pytest.fixture(autouse=True)
    def debug(self):
        with jax.debug_nans(True):
            yield

    @pytest.mark.parametrize("name", MEASURES)
    def test_runs(self, name):
        measure, arrays = MEASURES[name]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(measure(*arrays)))

    @pytest.mark.filterwarnings("ignore:outcomes. of 3 of 3 queries")
    def test_no_answer_is_nan(self):
        same, nobody = np.ones_like(OUTCOMES), np.zeros_like(FLIPPED)
        for got in [
            metrics.correlation(np.ones(5), np.arange(5.0)),
            metrics.lds(SCORES, MASKS, same),
            metrics.lds_summary(SCORES, MASKS, same, key=KEY, resamples=20).over_subsets.high,
            metrics.lds_summary(SCORES[:1], MASKS, OUTCOMES[..., :1], key=KEY, resamples=20).over_queries.low,
            metrics.seed_ceiling(same, key=KEY, splits=3),
            metrics.auc(SCORES[0], nobody),
            metrics.discovery_curve(SCORES[0], nobody).found,
            metrics.recall_at_k(SCORES, np.zeros_like(RELEVANT), 3),
            metrics.reciprocal_rank(SCORES, np.zeros_like(RELEVANT)),
            metrics.rank_stability(same),
        ]:
            assert np.isnan(got).all()
