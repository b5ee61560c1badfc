"""Masks of subsets: how many examples they keep, how evenly, and which of them make no sense."""

import jax
import numpy as np
import pytest
from retrainings import EXAMPLES, MASKS

from influence_jax.retrain import leave_k_out, leave_one_out, subsets


class TestMasks:
    @pytest.mark.parametrize(("fraction", "kept"), [(0.5, 12), (0.1, 2), (1, 24), (np.float32(0.9), 22)])
    def test_subsets_have_exactly_so_many(self, fraction, kept):
        masks = subsets(EXAMPLES, fraction, 30, jax.random.key(0))
        assert (masks.shape, masks.dtype) == ((30, EXAMPLES), np.bool_)
        assert (masks.sum(axis=1) == kept).all()

    def test_more_subsets_keep_the_earlier_ones(self):
        few, many = (subsets(EXAMPLES, 0.5, count, jax.random.key(0)) for count in (7, 50))
        np.testing.assert_array_equal(few, many[:7])
        assert len(np.unique(many, axis=0)) == 50
        assert not (subsets(EXAMPLES, 0.5, 7, jax.random.key(1)) == few).all(axis=1).any()

    def test_examples_are_kept_alike_often_and_independently(self):
        """Frequencies, and those of pairs, within five standard deviations of what they are on average."""
        masks = subsets(10, 0.3, 2000, jax.random.key(0)).astype(float)
        pairs = masks.T @ masks / 2000
        assert np.abs(np.diagonal(pairs) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 2000)
        together = 3 * 2 / (10 * 9)
        assert np.abs(pairs[~np.eye(10, dtype=bool)] - together).max() < 5 * np.sqrt(together / 2000)

    def test_64_bit_mode_changes_no_mask(self):
        with jax.enable_x64(False):
            narrow = subsets(EXAMPLES, 0.5, 9, jax.random.key(4))
        np.testing.assert_array_equal(narrow, MASKS)

    def test_leave_one_out(self):
        np.testing.assert_array_equal(leave_one_out(5), ~np.eye(5, dtype=bool))
        np.testing.assert_array_equal(leave_one_out(5, [3, 0]), ~np.eye(5, dtype=bool)[[3, 0]])

    def test_leave_k_out(self):
        masks = leave_k_out(EXAMPLES, 5, 20, jax.random.key(0))
        assert ((~masks).sum(axis=1) == 5).all()
        np.testing.assert_array_equal(masks[:4], leave_k_out(EXAMPLES, 5, 4, jax.random.key(0)))

    @pytest.mark.parametrize(
        ("make", "error", "told"),
        [
            (lambda key: subsets(0, 0.5, 3, key), ValueError, "n: got 0"),
            (lambda key: subsets(9.0, 0.5, 3, key), TypeError, "n: got 9.0"),
            (lambda key: subsets(9, 0, 3, key), ValueError, "fraction: got 0 of 9 examples"),
            (lambda key: subsets(9, 0.01, 3, key), ValueError, "expected at least one of them"),
            (lambda key: subsets(9, 1.5, 3, key), ValueError, "fraction: got 1.5"),
            (lambda key: subsets(9, float("nan"), 3, key), ValueError, "fraction: got nan"),
            (lambda key: subsets(9, "half", 3, key), TypeError, "fraction: got 'half'"),
            (lambda key: subsets(9, 0.5, 0, key), ValueError, "count: got 0"),
            (lambda key: subsets(9, 0.5, 3, None), ValueError, "key: masks are drawn at random"),
            (lambda key: subsets(9, 0.5, 3, 17), TypeError, "expected one random key"),
            (lambda key: leave_k_out(9, 9, 3, key), ValueError, "k: got 9, expected less than the 9"),
            (lambda key: leave_k_out(9, 0, 3, key), ValueError, "k: got 0"),
            (lambda key: leave_one_out(1), ValueError, "something is left"),
            (lambda key: leave_one_out(9, [9]), ValueError, "from 0 to 8"),
            (lambda key: leave_one_out(9, [-1]), ValueError, "from 0 to 8"),
            (lambda key: leave_one_out(9, []), TypeError, "expected ints"),
            (lambda key: leave_one_out(9, np.ones(9, bool)), TypeError, r"numpy\.flatnonzero"),
        ],
    )
    def test_masks_of_no_sense(self, make, error, told):
        with pytest.raises(error, match=told):
            make(jax.random.key(0))
