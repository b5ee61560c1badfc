"""Correlations, LDS and what seeds allow, against hand-computed cases and scipy; ties and constants included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import relative_error
from hypothesis import given, strategies as st
from studies import KEY, METHODS, SEEDS, by_scipy, predictions, study

import influence_jax as ij
from influence_jax import metrics


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
        """Means -1/4 and 1/2; four, three and two examples are left."""
        scores = np.array([[1.0, 2.0, -4.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
        masks = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]])
        of_sums = np.array([[0, 0], [0.25, 0], [-0.5, 0.25]])
        of_means = np.array([[0, 0], [1.25 / 3, -0.5 / 3], [-0.75, 0]])
        assert relative_error(metrics.predicted_changes(scores, masks, removal="sum"), of_sums) < 1e-12
        assert relative_error(metrics.predicted_changes(scores, masks, removal="mean"), of_means) < 1e-12
        assert relative_error(metrics.predicted_changes(scores, masks), of_means) < 1e-12

    @pytest.mark.parametrize("removal", ["mean", "sum"])
    def test_equals_what_is_written_down(self, removal):
        scores, masks, _ = study(41, queries=7, examples=33, subsets=20)
        got = metrics.predicted_changes(scores + 3, masks, removal=removal)
        assert relative_error(got, predictions(scores + 3, masks, removal)) < 1e-11

    def test_few_examples_left_out_of_many(self, float32):
        """The sum over kept examples is 10^7 times as large as the differences between subsets."""
        scores = np.ones((1, 4096), np.float32)
        scores[0, :3] += np.array([1, 2, 3], np.float32) * 2**-12
        masks = ~np.eye(3, 4096, dtype=bool)
        got = metrics.predicted_changes(scores, masks, removal="sum")
        assert relative_error(got[:, 0] * 4096 - 1, np.array([1, 2, 3]) * 2.0**-12) < 1e-6
        expected = (np.array([1, 2, 3]) - 6 / 4096) * 2.0**-12 / 4095
        assert relative_error(metrics.predicted_changes(scores, masks)[:, 0], expected) < 1e-6

    def test_equal_scores_predict_nothing(self, float32):
        """A mean that does not change when any of equal examples is left out; to the last bit, whatever the sizes."""
        scores = np.float32([[0.1] * 11, [-7.7] * 11])
        masks = study(42, examples=11, subsets=30)[1] | (np.arange(11) == 3)
        assert not np.any(metrics.predicted_changes(scores, masks))
        assert np.all(np.isnan(metrics.lds(scores, masks, study(42, queries=2, subsets=30)[2])))

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("single", [False, True])
    def test_subsets_of_one_size_rank_as_ever(self, ties, single):
        """By the sum over the removed, ties included: what is taken off and divided by is the same for all of them."""
        rng = np.random.default_rng(43)
        scores = rng.standard_cauchy(size=(6, 40)) + rng.normal(size=(6, 1))
        masks = np.argsort(rng.random((25, 40)), axis=1) < 22
        scores = np.round(scores) if ties else scores
        with jax.enable_x64(not single):
            got = np.asarray(metrics.predicted_changes(scores.astype(np.float32 if single else float), masks))
        expected = scipy.stats.rankdata((~masks).astype(float) @ scores.T, axis=0)
        assert ties == (len(np.unique(expected[:, 0])) < 25)
        np.testing.assert_array_equal(scipy.stats.rankdata(got, axis=0), expected)

    def test_is_what_leaving_out_does(self):
        """Of a mean, whose retraining is known: scores of `Influence`, to order 1/N, and LDS 1."""
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

    @given(SEEDS)
    def test_laws(self, seed):
        """A constant on all scores of a query changes nothing; nothing left out, nothing changes."""
        scores, masks, _ = study(seed)
        masks[:, 3], masks[4] = True, True
        got = metrics.predicted_changes(scores, masks)
        assert relative_error(metrics.predicted_changes(scores + 5, masks), got) < 1e-11
        assert not np.any(got[4])

    def test_undefined_under_tracing(self):
        """The mean over none, and a NaN among the scores, which is one in every subset."""
        scores, masks, _ = study(44)
        masks[:, 2], masks[5] = True, False
        got = jax.jit(metrics.predicted_changes)(scores, masks)
        assert np.isnan(got).all(axis=1).tolist() == [row == 5 for row in range(10)]
        scores[1, 2] = np.nan
        got = jax.jit(metrics.predicted_changes)(scores, masks | (np.arange(12) == 2))
        assert np.isnan(got).all(axis=0).tolist() == [False, True, False]
        assert np.isfinite(
            jax.jit(lambda s, m: metrics.predicted_changes(s, m, removal="sum"))(scores[:1], masks)
        ).all()


class TestLds:
    def test_by_hand(self):
        """Kept sums 3, 5, 4 predict -3, -5, -4 and a constant: the middle loss lowest, the last one in between."""
        scores, masks = np.array([[1.0, 2.0, 3.0]]), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
        losses = np.array([[0.9, 0.5, 0.7], [0.5, 0.9, 0.7], [0.9, 0.7, 0.5]])
        for loss, expected in zip(losses, [1.0, -1.0, 0.5], strict=True):
            assert relative_error(metrics.lds(scores, masks, loss[:, None]), np.array([expected])) < 1e-12

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("seeds", [None, 4])
    @pytest.mark.parametrize("ties", [False, True])
    def test_equals_scipy(self, method, seeds, ties):
        """Of subsets of any size."""
        arrays = study(5, queries=6, examples=30, subsets=40, seeds=seeds, ties=ties)
        assert relative_error(metrics.lds(*arrays, method=method), by_scipy(*arrays, method)) < 1e-12
        of_sums = by_scipy(*arrays, method, "sum")
        assert relative_error(metrics.lds(*arrays, method=method, removal="sum"), of_sums) < 1e-12
        assert np.max(np.abs(of_sums - metrics.lds(*arrays, method=method))) > 1e-3

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
        masks[:, 0], masks[:, 1] = True, False  # so that what is kept and what is not are never empty
        expected = -metrics.lds(scores, masks, outcomes, method=method)
        assert relative_error(metrics.lds(-scores, masks, outcomes, method=method), expected) < 1e-12
        of_sums = -metrics.lds(scores, masks, outcomes, method=method, removal="sum")
        assert relative_error(metrics.lds(scores, ~masks, outcomes, method=method, removal="sum"), of_sums) < 1e-12
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
