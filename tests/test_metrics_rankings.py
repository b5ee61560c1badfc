"""Measures of an order of examples, against hand-computed cases, scikit-learn and all orders of ties."""

import itertools

import helpers
import jax
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from helpers import relative_error
from hypothesis import given, strategies as st
from studies import SEEDS

import influence_jax as ij
from influence_jax import metrics


def over_orders(scores, measure):
    """Mean of a measure of an order of examples, best first, over all orders of ties."""
    orders = [o for o in itertools.permutations(range(len(scores))) if np.all(np.diff(scores[list(o)]) <= 0)]
    return np.mean([measure(list(order)) for order in orders], axis=0)


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
