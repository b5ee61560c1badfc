"""Measures of attribution: pure functions of arrays, for `jax.jit` and `jax.vmap` alike.

Scores are `(Q, N)`, positive where training on the example lowers what is measured of the query; masks are `(S, N)`,
true where the example is kept; outcomes are `(S, Q)`, or `(S, K, Q)` with K seeds.

| question | functions |
|---|---|
| Do scores predict training on subsets? | `lds`, and `lds_summary` with intervals |
| Do they predict leaving out one example, or k? | `lds` with leave-one-out masks and `method="pearson"` |
| What would a perfect method reach? | `seed_ceiling`, from `seed_agreement` |
| What do they say that leaving examples out changes? | `predicted_changes`; `correlation` with what was measured |
| What if the most helpful, or harmful, are removed? | `removal_masks`, then `own_outcomes`, `brittleness` |
| Are mislabelled examples found? | `auc`, `precision_at_k`, `discovery_curve` |
| Are the examples that state a fact found? | `recall_at_k`, `reciprocal_rank` |
| Do methods, or runs, agree? | `top_k_overlap`, `rank_stability` |
| How sure is any of these? | `bootstrap` |

What leaving out does depends on what the training then minimises: `removal="mean"`, the default, is the mean over the
examples that are left, as in `retrain.training`; `removal="sum"` their sum, divided by the N of before.

Numbers that are known when a function is called are checked; inside of `jit`, scores that are NaN give NaN.  Measured
numbers are only compared, so float64 is taken whether 64-bit mode is on or not.
"""

from .intervals import (
    Interval,
    Summary,
    bootstrap,
    lds_summary,
)
from .rankings import (
    DiscoveryCurve,
    auc,
    discovery_curve,
    precision_at_k,
    rank_stability,
    recall_at_k,
    reciprocal_rank,
    top_k_overlap,
)
from .ranks import correlation
from .retraining import (
    brittleness,
    lds,
    own_outcomes,
    predicted_changes,
    removal_masks,
    seed_agreement,
    seed_ceiling,
)

__all__ = [
    "DiscoveryCurve",
    "Interval",
    "Summary",
    "auc",
    "bootstrap",
    "brittleness",
    "correlation",
    "discovery_curve",
    "lds",
    "lds_summary",
    "own_outcomes",
    "precision_at_k",
    "predicted_changes",
    "rank_stability",
    "recall_at_k",
    "reciprocal_rank",
    "removal_masks",
    "seed_agreement",
    "seed_ceiling",
    "top_k_overlap",
]
