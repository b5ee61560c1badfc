"""Measures against hand-computed cases, scipy, scikit-learn and brute force; ties, constants and mistakes included."""

import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from helpers import relative_error
from hypothesis import given, strategies as st

import influence_jax as ij
from influence_jax import metrics
from influence_jax.metrics.intervals import _lds_summary
from influence_jax.metrics.ranks import resampled_correlation

METHODS = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}
SEEDS = st.integers(0, 2**32 - 1)
KEY = jax.random.key(0)


def study(seed, queries=3, examples=12, subsets=10, seeds=None, ties=False):
    """Scores, masks and noisy outcomes; with ties, of few distinct values."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(queries, examples))
    masks = rng.random((subsets, examples)) < 0.5
    shape = (subsets, queries) if seeds is None else (subsets, seeds, queries)
    clean = -masks.astype(float) @ scores.T
    outcomes = (clean if seeds is None else clean[:, None]) + rng.normal(size=shape)
    return (np.round(scores), masks, np.round(outcomes)) if ties else (scores, masks, outcomes)


def by_scipy(scores, masks, outcomes, method="spearman"):
    """LDS of each query as it is written down."""
    outcomes = outcomes.mean(1) if outcomes.ndim == 3 else outcomes
    predicted = -masks.astype(float) @ scores.T
    return np.array([METHODS[method](p, o).statistic for p, o in zip(predicted.T, outcomes.T, strict=True)])


def over_orders(scores, measure):
    """Mean of a measure of an order of examples, best first, over all orders of ties."""
    orders = [o for o in itertools.permutations(range(len(scores))) if np.all(np.diff(scores[list(o)]) <= 0)]
    return np.mean([measure(list(order)) for order in orders], axis=0)


class TestCorrelation:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("ties", [False, True])
    def test_equals_scipy(self, method, ties):
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(2, 40, 6))
        if ties:
            x, y = np.round(x), np.round(2 * y)
            assert len(np.unique(x[:, 0])) < 10
        expected = [METHODS[method](a, b).statistic for a, b in zip(x.T, y.T, strict=True)]
        assert relative_error(metrics.correlation(x, y, method=method), np.array(expected)) < 1e-12

    def test_of_ranks_by_hand(self):
        """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 over the root of 4.5 times 5."""
        got = metrics.correlation([0.0, 7.0, 7.0, 9.0], [1.0, 2.0, 3.0, 4.0])
        assert relative_error(got, np.float64(4.5 / np.sqrt(4.5 * 5))) < 1e-12

    @pytest.mark.parametrize("method", METHODS)
    def test_of_a_constant_is_nan(self, method):
        x = np.stack([np.full(7, 0.1), np.arange(7.0)], axis=1)
        y = np.arange(7.0)[:, None] * np.array([1.0, -1.0])
        for got in (metrics.correlation(x, y, method=method), metrics.correlation(y, x, method=method)):
            assert np.isnan(got[0])
            assert abs(got[1] + 1) < 1e-12

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_squares_out_of_range(self, scale, float32):
        x = np.random.default_rng(2).normal(size=(30, 2)).astype(np.float32)
        expected = scipy.stats.pearsonr(x[:, 0], x[:, 1]).statistic
        got = metrics.correlation(x[:, 0] * np.float32(scale), x[:, 1], method="pearson")
        assert got.dtype == jnp.float32
        assert abs(got - expected) < 1e-5

    def test_any_trailing_axes(self):
        x, y = np.random.default_rng(3).normal(size=(2, 9, 2, 3))
        got = metrics.correlation(x, y)
        assert got.shape == (2, 3)
        assert relative_error(got[1, 2], np.float64(scipy.stats.spearmanr(x[:, 1, 2], y[:, 1, 2]).statistic)) < 1e-12

    def test_booleans_integers_and_mixed_precision(self):
        x, y = np.array([True, False, True, True]), np.array([3, 1, 2, 5], np.int32)
        expected = np.float64(scipy.stats.spearmanr(x, y).statistic)
        assert relative_error(metrics.correlation(x, y.astype(np.float32)), expected) < 1e-6
        narrow = metrics.correlation(jnp.asarray(y, jnp.bfloat16), jnp.asarray(x))
        assert narrow.dtype == jnp.float64
        assert relative_error(narrow, expected) < 1e-6


class TestPredictedChanges:
    def test_by_hand(self):
        scores = np.array([[1.0, 2.0, -4.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
        masks = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]])
        expected = np.array([[0, 0], [0.25, 0], [-0.5, 0.25]])
        assert relative_error(metrics.predicted_changes(scores, masks), expected) < 1e-12

    def test_few_examples_left_out_of_many(self, float32):
        """The sum over kept examples is 10^7 times as large as the differences between subsets."""
        scores = np.ones((1, 4096), np.float32)
        scores[0, :3] += np.array([1, 2, 3], np.float32) * 2**-12
        masks = ~np.eye(3, 4096, dtype=bool)
        got = metrics.predicted_changes(scores, masks)
        assert relative_error(got[:, 0] * 4096 - 1, np.array([1, 2, 3]) * 2.0**-12) < 1e-6

    def test_is_what_leaving_out_does(self):
        """Of a mean, whose retraining is known: scores of `Influence` over N, to order 1/N, and LDS 1."""
        y = np.random.default_rng(4).normal(size=(200, 1))
        loss = ij.Objective(lambda p, z: p, lambda out, z: 0.5 * jnp.sum((out - z) ** 2))
        fitted, queries = jnp.asarray(y.mean(0)), y[:7] + 1
        inverse = ij.invert(ij.GGN(loss, fitted, y), ij.Direct(0.0))
        scores = ij.Influence(loss, fitted, inverse).influences(queries, y)
        masks = ~np.eye(200, dtype=bool)
        retrained = (masks @ y) / 199
        outcomes = 0.5 * (retrained - queries.T) ** 2
        changes = outcomes - 0.5 * (y.mean(0) - queries.T) ** 2
        assert relative_error(metrics.predicted_changes(scores, masks), changes) < 2e-2
        assert np.all(metrics.lds(scores, masks, outcomes) > 0.999)
        assert np.all(metrics.lds(scores, masks, outcomes, method="pearson") > 0.999)


class TestLds:
    def test_by_hand(self):
        """Kept sums 3, 5, 4 predict -3, -5, -4: the middle loss lowest, the last one in between."""
        scores, masks = np.array([[1.0, 2.0, 3.0]]), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
        losses = np.array([[0.9, 0.5, 0.7], [0.5, 0.9, 0.7], [0.9, 0.7, 0.5]])
        for loss, expected in zip(losses, [1.0, -1.0, 0.5], strict=True):
            assert relative_error(metrics.lds(scores, masks, loss[:, None]), np.array([expected])) < 1e-12

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("seeds", [None, 4])
    @pytest.mark.parametrize("ties", [False, True])
    def test_equals_scipy(self, method, seeds, ties):
        arrays = study(5, queries=6, examples=30, subsets=40, seeds=seeds, ties=ties)
        assert relative_error(metrics.lds(*arrays, method=method), by_scipy(*arrays, method)) < 1e-12

    def test_leave_one_out(self):
        """With Pearson, the correlation of scores with changes, whatever the outcome without removal."""
        rng = np.random.default_rng(6)
        scores, changes = rng.normal(size=(4, 25)), rng.normal(size=(25, 4))
        got = metrics.lds(scores, ~np.eye(25, dtype=bool), 5 + changes, method="pearson")
        expected = [scipy.stats.pearsonr(s, c).statistic for s, c in zip(scores, changes.T, strict=True)]
        assert relative_error(got, np.array(expected)) < 1e-12

    def test_constant_predictions_and_outcomes_are_nan(self):
        scores, masks, outcomes = study(7)
        scores[0], outcomes[:, 1] = 0, 0.1
        got = metrics.lds(scores, masks, outcomes)
        assert np.isnan(got).tolist() == [True, True, False]

    @given(SEEDS)
    def test_monotone_changes_of_outcomes_change_nothing(self, seed):
        scores, masks, outcomes = study(seed, ties=seed % 2 == 0)
        got = metrics.lds(scores, masks, np.exp(outcomes / 4) * np.array([1.0, 2.0, 3.0]) - 5)
        assert relative_error(got, metrics.lds(scores, masks, outcomes)) < 1e-12

    @given(SEEDS, st.sampled_from(sorted(METHODS)))
    def test_flipped_signs_flip_it(self, seed, method):
        scores, masks, outcomes = study(seed)
        expected = -metrics.lds(scores, masks, outcomes, method=method)
        assert relative_error(metrics.lds(-scores, masks, outcomes, method=method), expected) < 1e-12
        assert relative_error(metrics.lds(scores, ~masks, outcomes, method=method), expected) < 1e-12
        assert relative_error(metrics.lds(scores, masks, -outcomes, method=method), expected) < 1e-12

    @given(SEEDS, st.sampled_from(sorted(METHODS)))
    def test_order_does_not_matter(self, seed, method):
        scores, masks, outcomes = study(seed, seeds=2)
        rng = np.random.default_rng(seed)
        q, n, s = (rng.permutation(count) for count in (3, 12, 10))
        got = metrics.lds(scores[q][:, n], masks[s][:, n], outcomes[s][:, :, q], method=method)
        assert relative_error(got, metrics.lds(scores, masks, outcomes, method=method)[q]) < 1e-12

    def test_single_precision(self, float32):
        scores, masks, outcomes = study(8, subsets=60)
        got = metrics.lds(scores.astype(np.float32), masks, outcomes.astype(np.float32))
        assert got.dtype == jnp.float32
        assert relative_error(got, by_scipy(scores, masks, outcomes)) < 1e-6


class TestSeeds:
    def test_two_seeds_have_one_split(self):
        outcomes = study(9, seeds=2)[2]
        expected = [scipy.stats.spearmanr(*outcomes[:, :, q].T).statistic for q in range(3)]
        assert relative_error(metrics.seed_agreement(outcomes, key=KEY), np.array(expected)) < 1e-12

    def test_averages_over_splits_into_disjoint_halves(self):
        """Of three seeds, one against one, the third left out: three pairs, equally often."""
        outcomes = study(10, seeds=3)[2]
        pairs = [outcomes[:, [i, j]] for i, j in [(0, 1), (0, 2), (1, 2)]]
        each = np.array([[scipy.stats.pearsonr(*pair[:, :, q].T).statistic for q in range(3)] for pair in pairs])
        got = metrics.seed_agreement(outcomes, key=KEY, splits=2000, method="pearson")
        assert np.max(np.abs(got - each.mean(0))) < 4 * np.max(each.std(0)) / np.sqrt(2000)  # four standard errors

    @pytest.mark.parametrize("seeds", [2, 3, 8])
    def test_ceiling_is_what_a_perfect_method_reaches(self, seeds):
        """True values plus noise: their correlation with the mean over seeds, to sampling error."""
        rng = np.random.default_rng(11)
        truth = rng.normal(size=(4000, 3))
        outcomes = truth[:, None] + 2 * rng.normal(size=(4000, seeds, 3))
        reached = metrics.correlation(truth, outcomes.mean(1), method="pearson")
        ceiling = metrics.seed_ceiling(outcomes, key=KEY, method="pearson")
        assert np.max(np.abs(ceiling - reached)) < 0.06  # about three standard errors of the worst, K = 2
        assert np.max(np.abs(ceiling - np.sqrt(seeds / (seeds + 4)))) < 0.06
        assert np.all(metrics.seed_agreement(outcomes, key=KEY) < ceiling - 0.06)

    def test_without_noise_and_without_signal(self):
        clean = np.tile(np.random.default_rng(12).normal(size=(30, 1, 2)), (1, 5, 1))
        assert relative_error(metrics.seed_ceiling(clean, key=KEY), np.ones(2)) < 1e-12
        opposed = np.stack([clean[:, 0], -clean[:, 0]], axis=1)
        assert metrics.seed_agreement(opposed, key=KEY).round(9).tolist() == [-1, -1]
        assert metrics.seed_ceiling(opposed, key=KEY).tolist() == [0, 0]

    def test_key_decides(self):
        outcomes = study(13, seeds=6)[2]
        first, again, other = (metrics.seed_agreement(outcomes, key=jax.random.key(k), splits=3) for k in (0, 0, 1))
        assert first.tolist() == again.tolist() != other.tolist()


class TestBootstrap:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("ties", [False, True])
    def test_resampled_correlation_is_that_of_repeated_rows(self, method, ties):
        rng = np.random.default_rng(14)
        x, y = np.round(rng.normal(size=(2, 12)), 0 if ties else 9)
        rows = rng.integers(0, 12, size=(12, 50))
        rows[:, 0] = 3
        counts = np.stack([np.bincount(column, minlength=12) for column in rows.T], axis=1).astype(float)
        got = resampled_correlation(jnp.asarray(x), jnp.asarray(y), jnp.asarray(counts), method)
        assert np.isnan(got[0])
        expected = [METHODS[method](x[column], y[column]).statistic for column in rows.T[1:]]
        assert relative_error(got[1:], np.array(expected)) < 1e-12

    def test_resamples_of_equal_values_have_no_correlation(self):
        """Whatever rounding leaves of three equal numbers less their mean."""
        values = np.random.default_rng(33).normal(size=50)
        x = jnp.asarray(np.stack([values, values, values, np.full(50, 5.0)]))
        counts = jnp.array([[5.0, 4.0], [4.0, 4.0], [3.0, 3.0], [0.0, 1.0]])
        correlations = jax.vmap(lambda x: resampled_correlation(x, jnp.arange(4.0), counts, "pearson"), in_axes=1)
        assert np.isnan(correlations(x)).tolist() == [[True, False]] * 50

    def test_of_a_mean_is_the_normal_interval(self):
        values = np.random.default_rng(15).normal(size=(400, 2))
        low, high = metrics.bootstrap(values, key=KEY, resamples=4000, level=0.9)
        assert low.shape == (2,)
        error = 1.6449 * values.std(0) / 20
        assert relative_error((high - low) / 2, error) < 0.06  # Monte Carlo error of quantiles, about two percent
        assert np.max(np.abs((high + low) / 2 - values.mean(0))) < 0.1 * np.max(error)

    def test_statistics_of_rows(self):
        """A pair of arrays, resampled together."""
        rng = np.random.default_rng(16)
        flipped = rng.random(200) < 0.3
        suspicion = flipped + rng.normal(size=200)
        low, high = metrics.bootstrap((suspicion, flipped), key=KEY, statistic=lambda rows: metrics.auc(*rows))
        area = metrics.auc(suspicion, flipped)
        assert low < area < high
        assert 0.05 < high - low < 0.3

    def test_integers_and_nan(self):
        low, high = metrics.bootstrap(jnp.arange(9), key=KEY, statistic=lambda rows: jnp.max(rows))
        assert low.dtype == jnp.float64
        assert (5 <= low <= high) & (high == 8)
        values = jnp.arange(20.0).at[4].set(jnp.nan)
        assert np.isnan(metrics.bootstrap(values, key=KEY).low)
        assert np.isfinite(metrics.bootstrap(values, key=KEY, statistic=jnp.nanmedian).low)

    def test_key_decides(self):
        values = jnp.arange(20.0) ** 2
        first, again, other = (metrics.bootstrap(values, key=jax.random.key(k)) for k in (0, 0, 1))
        assert first == again != other

    def test_covers_as_often_as_it_says(self):
        """400 samples of 60: the share covered within four standard errors, and below by what percentiles miss."""
        values = jax.random.normal(jax.random.key(1), (400, 60))
        interval = jax.vmap(lambda v, key: metrics.bootstrap(v, key=key, resamples=400, level=0.9))
        low, high = interval(values, jax.random.split(KEY, 400))
        covered = np.mean(np.asarray((low < 0) & (high > 0)))
        assert 0.9 - 4 * np.sqrt(0.09 / 400) < covered < 0.9 + 4 * np.sqrt(0.09 / 400)


class TestSummary:
    @pytest.mark.parametrize("method", METHODS)
    def test_equals_a_loop_over_resamples(self, method):
        """Of queries, and of rows of masks and outcomes; Monte Carlo error of the ends is a tenth of the width."""
        scores, masks, outcomes = study(17, queries=8, subsets=30, ties=True)
        summary = metrics.lds_summary(scores, masks, outcomes, key=KEY, method=method)
        by_query = by_scipy(scores, masks, outcomes, method)
        assert relative_error(summary.mean, by_query.mean()) < 1e-12
        rng = np.random.default_rng(18)
        of_queries = by_query[rng.integers(0, 8, size=(5000, 8))].mean(1)
        draws = rng.integers(0, 30, size=(400, 30))
        of_subsets = [np.mean(by_scipy(scores, masks[rows], outcomes[rows], method)) for rows in draws]
        for got, means in [(summary.over_queries, of_queries), (summary.over_subsets, of_subsets)]:
            low, high = np.quantile(means, [0.025, 0.975])
            assert max(abs(got.low - low), abs(got.high - high)) < 0.15 * (high - low)

    def test_covers_the_lds_of_all_subsets(self):
        """200 studies of 40 subsets: the interval holds what infinitely many subsets would give."""

        def outcome(key, subsets, scores):
            keys = jax.random.split(key)
            masks = jax.random.bernoulli(keys[0], 0.5, (subsets, 12))
            noise = 0.5 * jax.random.normal(keys[1], (subsets, 4))
            return masks, metrics.predicted_changes(scores, masks) * 12 + noise

        scores = jax.random.normal(jax.random.key(2), (4, 12))
        truth = jnp.mean(metrics.lds(scores, *outcome(jax.random.key(3), 20_000, scores), method="pearson"))

        def covered(key):
            masks, outcomes = outcome(key, 40, scores)
            low, high = metrics.lds_summary(
                scores, masks, outcomes, key=key, method="pearson", resamples=300, level=0.9
            ).over_subsets
            return (low < truth) & (truth < high)

        share = jnp.mean(jax.vmap(covered)(jax.random.split(KEY, 200)))
        assert 0.78 < share < 0.97  # 0.9 but for 0.08, four standard errors, and percentiles that miss a little

    def test_a_single_query_says_nothing_about_others(self):
        summary = metrics.lds_summary(*study(19, queries=1), key=KEY, method="pearson")
        assert np.isnan(summary.over_queries.low)
        assert np.isnan(summary.over_queries.high)
        assert summary.over_subsets.low < summary.over_subsets.high

    def test_undefined_queries_show(self):
        scores, masks, outcomes = study(20, queries=8, subsets=30)
        outcomes[:, 1] = 1
        assert all(
            np.isnan(number) for number in jax.tree.leaves(metrics.lds_summary(scores, masks, outcomes, key=KEY))
        )

    def test_few_subsets_give_numbers(self):
        """Of three subsets, a resample in nine is three times the same."""
        summary = metrics.lds_summary(*study(21, subsets=3), key=KEY, method="pearson")
        assert np.isfinite(summary.over_subsets.low)

    def test_key_decides(self):
        arrays = study(22, queries=8, subsets=30)
        first, again, other = (metrics.lds_summary(*arrays, key=jax.random.key(k)) for k in (0, 0, 1))
        assert first == again
        assert first.mean == other.mean
        assert first.over_subsets != other.over_subsets

    def test_holds_little_at_once(self):
        """A thousand resamples of 100 subsets and 500 queries would be 400 MB."""
        numbers = jax.ShapeDtypeStruct((100, 500), jnp.float64)
        lowered = _lds_summary.lower(numbers, numbers, KEY, "spearman", 1000, 0.95)
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 40e6


class TestMislabelled:
    def test_auc_by_hand(self):
        """Of six pairs, three are in order and two are tied."""
        suspicion, flipped = np.array([3.0, 1.0, 1.0, 1.0, 2.0]), np.array([1, 1, 0, 0, 0])
        assert metrics.auc(suspicion, flipped) == 4 / 6

    @given(SEEDS)
    def test_auc_equals_scikit_learn(self, seed):
        rng = np.random.default_rng(seed)
        suspicion = np.round(rng.normal(size=30), 1)
        flipped = rng.random(30) < 0.4
        flipped[:2] = [True, False]
        expected = sklearn.metrics.roc_auc_score(flipped, suspicion)
        assert relative_error(metrics.auc(suspicion, flipped), expected) < 1e-12
        assert relative_error(metrics.auc(np.exp(suspicion), flipped), expected) < 1e-12
        assert abs(metrics.auc(-suspicion, flipped) + expected - 1) < 1e-12
        ratio = scipy.stats.mannwhitneyu(suspicion[flipped], suspicion[~flipped]).statistic
        assert relative_error(metrics.auc(suspicion, flipped), ratio / (flipped.sum() * (~flipped).sum())) < 1e-12

    def test_none_or_all_flipped_is_nan(self):
        for flipped in (np.zeros(4, bool), np.ones(4, bool)):
            assert np.isnan(metrics.auc(np.arange(4.0), flipped))
        assert np.isnan(metrics.discovery_curve(np.arange(4.0), np.zeros(4, bool)).found[1:]).all()

    @pytest.mark.parametrize("suspicion", [[5, 3, 3, 3, 2, 2, 0], [0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1, 1]])
    def test_ties_are_means_over_orders(self, suspicion):
        suspicion, flipped = np.array(suspicion, float), np.array([1, 0, 1, 0, 0, 1, 0], bool)
        expected = np.append(0, over_orders(suspicion, lambda order: np.cumsum(flipped[order])))
        curve = metrics.discovery_curve(suspicion, flipped)
        assert relative_error(curve.found, expected / 3) < 1e-12
        assert relative_error(curve.inspected, np.arange(8) / 7) < 1e-12
        precision = [metrics.precision_at_k(suspicion, flipped, k) for k in range(1, 8)]
        assert relative_error(precision, expected[1:] / np.arange(1, 8)) < 1e-12

    @given(SEEDS)
    def test_area_under_the_discovery_curve(self, seed):
        """It is the AUC of the others, and half of the flipped themselves."""
        rng = np.random.default_rng(seed)
        suspicion, flipped = np.round(rng.normal(size=30), 1), rng.random(30) < 0.4
        flipped[:2] = [True, False]
        area = np.trapezoid(*metrics.discovery_curve(suspicion, flipped)[::-1])
        expected = metrics.auc(suspicion, flipped) * np.mean(~flipped) + np.mean(flipped) / 2
        assert relative_error(area, expected) < 1e-12

    def test_many_examples_in_single_precision(self, float32):
        rng = np.random.default_rng(23)
        flipped = rng.random(200_001) < 0.1
        suspicion = (flipped + rng.normal(size=200_001)).astype(np.float32)
        expected = sklearn.metrics.roc_auc_score(flipped, suspicion)
        assert relative_error(metrics.auc(suspicion, flipped), expected) < 1e-5
        assert np.isnan(metrics.auc(suspicion, np.ones_like(flipped)))


class TestRemoval:
    def test_masks_by_hand(self):
        scores = np.array([[0.1, 3.0, -2.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
        helpful = metrics.removal_masks(scores, [0, 1, 3])
        assert helpful.astype(int).tolist() == [
            [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]],
            [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]],
        ]
        harmful = metrics.removal_masks(scores[0], [2], remove="harmful")
        assert harmful.astype(int).tolist() == [[0, 1, 0, 1]]

    @given(SEEDS)
    def test_removes_so_many_and_no_better_one_stays(self, seed):
        scores = np.round(np.random.default_rng(seed).normal(size=(4, 15)), 1)
        masks = np.asarray(metrics.removal_masks(scores, [5, 1, 14]))
        assert (~masks).sum(-1).tolist() == [[5, 1, 14]] * 4
        for row, of_query in zip(scores, masks, strict=True):
            assert all(row[~mask].min() >= row[mask].max() for mask in of_query)

    def test_removal_agrees_with_top_k(self):
        params = helpers.random_mlp(jax.random.key(0))
        train = helpers.random_batch(jax.random.key(1), 12, 5, 3, classes=True)
        influence = ij.Influence(helpers.CLASSIFICATION, params, ij.Identity(params))
        scores, best = influence.influences(train, train), influence.top_k(train, train, 4).indices
        removed = ~np.asarray(metrics.removal_masks(scores, [4]))[:, 0]
        assert [np.flatnonzero(row).tolist() for row in removed] == np.sort(best, axis=1).tolist()

    @pytest.mark.parametrize("seeds", [None, 3])
    def test_own_outcomes_follow_the_masks(self, seeds):
        """What is measured of query q tells which mask it was measured with."""
        scores = np.random.default_rng(24).normal(size=(3, 8))
        masks = np.asarray(metrics.removal_masks(scores, [1, 2, 5, 7]))
        measured = -masks.reshape(-1, 8).astype(float) @ scores.T
        if seeds:
            noise = np.random.default_rng(25).normal(size=(12, seeds, 3))
            measured = measured[:, None] + noise - noise.mean(1, keepdims=True)
        expected = -np.einsum("qcn,qn->qc", masks.astype(float), scores)
        assert relative_error(metrics.own_outcomes(measured), expected) < 1e-12

    def test_brittleness_by_hand(self):
        flipped = np.array([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
        assert metrics.brittleness(flipped, [40, 10, 30, 20]).tolist() == [20, 40, np.inf, 10]


class TestRetrieval:
    @given(SEEDS, st.integers(1, 7))
    def test_recall_is_a_mean_over_orders_of_ties(self, seed, k):
        rng = np.random.default_rng(seed)
        scores, relevant = rng.integers(0, 4, size=7).astype(float), rng.random(7) < 0.5
        relevant[0] = True
        expected = over_orders(scores, lambda order: relevant[order[:k]].sum() / relevant.sum())
        assert abs(metrics.recall_at_k(scores[None], relevant[None], k)[0] - expected) < 1e-12

    def test_recall_equals_scikit_learn_without_ties(self):
        rng = np.random.default_rng(26)
        scores, relevant = rng.normal(size=(5, 40)), rng.random((5, 40)) < 0.3
        got = metrics.recall_at_k(scores, relevant, 10)
        chosen = scores >= np.sort(scores)[:, [-10]]
        expected = [sklearn.metrics.recall_score(r, c) for r, c in zip(relevant, chosen, strict=True)]
        assert relative_error(got, np.array(expected)) < 1e-12

    def test_reciprocal_rank_by_hand(self):
        scores = np.array([[5.0, 4, 3, 2], [5.0, 4, 3, 2], [5.0, 4, 4, 4], [1.0, 1, 1, 1], [1.0, 2, 3, 4]])
        relevant = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
        got = metrics.reciprocal_rank(scores, relevant)
        assert relative_error(got[:4], np.array([1 / 3, 1, 1 / 3, 1 / 4])) < 1e-12
        assert np.isnan(got[4])
        assert np.isnan(metrics.recall_at_k(scores, relevant, 2)[4])

    def test_reciprocal_rank_is_that_of_the_worst_order_of_ties(self):
        rng = np.random.default_rng(27)
        scores, relevant = rng.integers(0, 5, size=(40, 9)).astype(float), rng.random((40, 9)) < 0.4
        relevant[:, 0] = True
        order = np.lexsort((relevant, -scores), axis=1)
        first = np.argmax(np.take_along_axis(relevant, order, axis=1), axis=1)
        assert relative_error(metrics.reciprocal_rank(scores, relevant), 1 / (1 + first)) < 1e-12


class TestAgreement:
    def test_overlap_counts_common_examples(self):
        rng = np.random.default_rng(28)
        a, b = rng.normal(size=(2, 6, 30))
        top = lambda x: [set(row) for row in np.argsort(-x, axis=1)[:, :10]]
        expected = [len(x & y) / 10 for x, y in zip(top(a), top(b), strict=True)]
        assert relative_error(metrics.top_k_overlap(a, b, 10), np.array(expected)) < 1e-12
        assert metrics.top_k_overlap(a, a, 10).tolist() == [1] * 6
        assert metrics.top_k_overlap(a, b, 30).tolist() == [1] * 6

    def test_ties_are_no_agreement(self):
        """One score in common and the rest zero: the other two places of ten are taken at random."""
        a, b = np.zeros((1, 11)), np.zeros((1, 11))
        a[0, 3] = b[0, 3] = 1
        assert relative_error(metrics.top_k_overlap(a, b, 3), np.array([(1 + 10 * 0.2**2) / 3])) < 1e-12

    def test_stability_is_the_mean_over_pairs_of_runs(self):
        scores = np.round(np.random.default_rng(29).normal(size=(4, 3, 20)), 1)
        pairs = itertools.combinations(scores, 2)
        each = [[scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)] for a, b in pairs]
        assert relative_error(metrics.rank_stability(scores), np.mean(each, axis=0)) < 1e-12

    def test_constant_scores_have_no_stability(self):
        scores = np.random.default_rng(30).normal(size=(3, 2, 9))
        scores[1, 0] = 0.1
        assert np.isnan(metrics.rank_stability(scores)).tolist() == [True, False]

    @given(SEEDS)
    def test_order_of_examples_and_queries_does_not_matter(self, seed):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 6, size=(3, 4, 10)).astype(float)
        relevant = rng.random((4, 10)) < 0.5
        relevant[:, 0] = True
        q, n = rng.permutation(4), rng.permutation(10)
        moved = scores[:, q][:, :, n]
        for measure, arrays in [
            (lambda s: metrics.rank_stability(s), (scores, moved)),
            (lambda s: metrics.top_k_overlap(s[0], s[1], 3), (scores, moved)),
            (lambda s: metrics.recall_at_k(*s, 3), ((scores[0], relevant), (moved[0], relevant[q][:, n]))),
            (lambda s: metrics.reciprocal_rank(*s), ((scores[0], relevant), (moved[0], relevant[q][:, n]))),
        ]:
            before, after = (np.asarray(measure(a)) for a in arrays)
            np.testing.assert_allclose(after, before[q], atol=1e-12)


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

    def test_shapes_are_checked_under_jit(self):
        with pytest.raises(ValueError, match="masks: got shape"):
            jax.jit(metrics.lds)(SCORES, MASKS[:, 1:], OUTCOMES)

    def test_double_precision_lost_is_refused(self, float32):
        with pytest.raises(TypeError, match=r"scores: got float64 but 64-bit mode is off.*astype"):
            metrics.lds(SCORES, MASKS, OUTCOMES)

    def test_lists_will_do(self):
        assert metrics.auc([0.9, 0.1], [1, 0]) == 1
