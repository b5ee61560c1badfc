"""Scores, masks and outcomes of made-up studies, and what scipy says about them."""

import jax
import numpy as np
import scipy.stats
from hypothesis import strategies as st

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


def predictions(scores, masks, removal="mean"):
    """What leaving out predicts, written down; rounded, so that what is equal in exact numbers is."""
    removed = (~masks).astype(float)
    if removal == "sum":
        return removed @ scores.T / scores.shape[1]
    centred = scores - scores.mean(axis=1, keepdims=True)
    return np.round(removed @ centred.T / masks.sum(axis=1, keepdims=True), 13)


def by_scipy(scores, masks, outcomes, method="spearman", removal="mean"):
    """LDS of each query as it is written down."""
    outcomes = outcomes.mean(1) if outcomes.ndim == 3 else outcomes
    predicted = predictions(scores, masks, removal)
    return np.array([METHODS[method](p, o).statistic for p, o in zip(predicted.T, outcomes.T, strict=True)])
