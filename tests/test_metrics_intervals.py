"""Bootstrap intervals, of any statistic and of LDS, against loops over resamples and by how often they cover."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from studies import KEY, METHODS, by_scipy, study

from influence_jax import metrics
from influence_jax.metrics.intervals import _lds_summary
from influence_jax.metrics.ranks import resampled_correlation


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

    @pytest.mark.thorough
    def test_covers_the_lds_of_all_subsets(self):
        """200 studies of 40 subsets: the interval holds what infinitely many subsets would give."""

        def outcome(key, subsets, scores):
            keys = jax.random.split(key)
            masks = jax.random.bernoulli(keys[0], 0.5, (subsets, 12))
            noise = 0.5 * jax.random.normal(keys[1], (subsets, 4))
            return masks, metrics.predicted_changes(scores, masks, removal="sum") * 12 + noise

        scores = jax.random.normal(jax.random.key(2), (4, 12))
        options = {"method": "pearson", "removal": "sum"}  # of twelve examples, now and then none is kept
        truth = jnp.mean(metrics.lds(scores, *outcome(jax.random.key(3), 20_000, scores), **options))

        def covered(key):
            masks, outcomes = outcome(key, 40, scores)
            low, high = metrics.lds_summary(
                scores, masks, outcomes, key=key, resamples=300, level=0.9, **options
            ).over_subsets
            return (low < truth) & (truth < high)

        share = jnp.mean(jax.vmap(covered)(jax.random.split(KEY, 200)))
        assert 0.78 < share < 0.97  # 0.9 but for 0.08, four standard errors, and percentiles that miss a little

    def test_a_single_query_says_nothing_about_others(self):
        summary = metrics.lds_summary(*study(19, queries=1), key=KEY, method="pearson")
        assert np.isnan(summary.over_queries.low)
        assert np.isnan(summary.over_queries.high)
        assert summary.over_subsets.low < summary.over_subsets.high

    @pytest.mark.parametrize("method", METHODS)
    def test_queries_that_never_vary_are_left_out(self, method):
        """Everything is as if they had not been asked: the mean, and both intervals to Monte Carlo error."""
        scores, masks, outcomes = study(20, queries=8, subsets=30)
        outcomes[:, [1, 4]], scores[6] = np.array([1.0, 0.0]), 0.3
        told = [0, 2, 3, 5, 7]
        with pytest.warns(UserWarning, match="tell nothing and are left out") as caught:
            summary = metrics.lds_summary(scores, masks, outcomes, key=KEY, method=method)
        words = [str(warning.message) for warning in caught]
        assert [any(word in text for text in words) for word in ("of 2 of 8 queries (1, 4)", "of 1 of 8 queries (6)")]
        assert [text.split(":")[0] for text in words] == ["outcomes", "scores"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = metrics.lds_summary(scores[told], masks, outcomes[:, told], key=KEY, method=method)
            traced = jax.jit(lambda *a: metrics.lds_summary(*a, key=KEY, method=method))(scores, masks, outcomes)
        assert relative_error(summary.mean, expected.mean) < 1e-12
        assert relative_error(summary.mean, by_scipy(scores[told], masks, outcomes[:, told], method).mean()) < 1e-12
        assert relative_error(np.array(summary.over_subsets), np.array(expected.over_subsets)) < 1e-12
        width = expected.over_queries.high - expected.over_queries.low
        assert np.max(np.abs(np.array(summary.over_queries) - np.array(expected.over_queries))) < 0.15 * width
        for got, leaf in zip(jax.tree.leaves(traced), jax.tree.leaves(summary), strict=True):
            assert relative_error(got, leaf) < 1e-12

    def test_a_float32_loss_that_rounds_to_zero(self, float32):
        """Of confident queries: three of fifty, as after training a logistic regression."""
        scores, masks, outcomes = study(23, queries=50, subsets=30)
        outcomes = np.exp(outcomes).astype(np.float32)
        outcomes[:, [3, 10, 11]] = 0
        with pytest.warns(UserWarning, match=r"outcomes: of 3 of 50 queries \(3, 10, 11\)"):
            summary = metrics.lds_summary(scores.astype(np.float32), masks, outcomes, key=KEY, resamples=50)
        told = np.delete(np.arange(50), [3, 10, 11])
        assert abs(summary.mean - by_scipy(scores[told], masks, outcomes[:, told]).mean()) < 1e-5
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(summary))

    def test_a_query_that_moves_once(self):
        """In a third of the resamples it never moves, and is left out of those alone."""
        scores, masks, outcomes = study(24, queries=4, subsets=20)
        outcomes[:, 2] = np.arange(20) == 7
        summary = metrics.lds_summary(scores, masks, outcomes, key=KEY, method="pearson", resamples=4000)
        rng = np.random.default_rng(25)
        means = []
        for _ in range(2000):
            rows = rng.integers(0, 20, size=20)
            told = [0, 1, 2, 3] if 7 in rows else [0, 1, 3]
            means.append(np.mean(by_scipy(scores[told], masks[rows], outcomes[rows][:, told], "pearson")))
        low, high = np.quantile(means, [0.025, 0.975])
        assert max(abs(summary.over_subsets.low - low), abs(summary.over_subsets.high - high)) < 0.1 * (high - low)

    @pytest.mark.filterwarnings("ignore:outcomes. of")
    def test_nothing_told_is_nan_and_says_so(self):
        scores, masks, outcomes = study(20, queries=8, subsets=30)
        summary = metrics.lds_summary(scores, masks, outcomes * 0, key=KEY)
        assert all(np.isnan(number) for number in jax.tree.leaves(summary))
        nan = "Interval(low NaN, high NaN)"
        assert repr(summary) == f"Summary(mean NaN, over_queries {nan}, over_subsets {nan})"
        outcomes[:, 1:] = 1
        summary = metrics.lds_summary(scores, masks, outcomes, key=KEY)
        assert np.isnan(summary.over_queries.low)
        assert relative_error(summary.mean, by_scipy(scores[:1], masks, outcomes[:, :1])[0]) < 1e-12
        assert summary.over_subsets.low < summary.over_subsets.high

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
