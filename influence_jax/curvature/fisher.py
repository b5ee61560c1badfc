r"""The Fisher matrix with labels drawn from the model, never from the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import tree
from .._pytree import dataclass, set_field, static
from .._typing import Array, Key, PyTree
from ..batching import as_batch, check_key, check_positive
from ..gradients import all_or_nan, directional
from ..objective import Objective, SoftmaxLabels, as_objective, floating_output
from .exact import OverData
from .labels import check_sample, checked_cotangent, softmax_cotangents
from .masks import Mask, Named, kept_output
from .outputs import flat_output, loss_square_root, require_split
from .parts import example_keys, is_first

# Larger outputs would need the square root of too large a matrix for every example.
MAX_OUTPUTS = 1024


class Keyed(NamedTuple):
    """Examples, and the random key of each: labels then do not depend on chunks, order or batch-mates."""

    example: PyTree
    key: Key


@dataclass
class Fisher(OverData):
    r"""Monte-Carlo Fisher matrix, $\hat F = \frac{1}{\sum w}\sum_i w_i \frac1S\sum_s J_i^\top u_{is}u_{is}^\top J_i$.

    $u_{is} = L_i\epsilon_{is}$ with $L_iL_i^\top = \nabla^2_{out}\ell_i$ and Rademacher $\epsilon_{is}$, so that its
    expectation is the GGN: for softmax cross-entropy, the average over labels drawn from the model.  Outputs of more
    than 1024 entries need an objective with `sample`, which gives $u_{is}$ itself.  Positive semi-definite; NaN where
    the loss is not convex in the output, or has no finite second derivative, and under tracing where `sample` is wrong.

    Args:
      objective: An `Objective`.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      chunk: Examples per chunk; at most 256 for each device if None.
      rhs_chunk: Stacked vectors multiplied at once; four on CPU if None.
      key: For the labels; needed.
      samples: How many draws S per example; static.
      right: Whether what is drawn is right, as is found out under tracing; None where it is known.  Set by the library.

    Raises:
      TypeError, ValueError: If an argument is not of that form, the key is missing, or what `sample` draws does not
        have the loss Hessian for its second moment.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: (p["w"] * z)[None], lambda out, z: 0.5 * jnp.sum(out) ** 2)
      >>> fisher = ij.Fisher(objective, {"w": jnp.array(1.0)}, jnp.array([1.0, 3.0]), key=jax.random.key(0))
      >>> fisher.mv({"w": jnp.array(1.0)})["w"].round(4).item()
      5.0

    Reference: Martens 2014, arXiv:1412.1193, sections 5 and 9; Kunstner et al. 2019, arXiv:1905.12558.
    """

    key: Key | None = dataclasses.field(default=None, kw_only=True)
    samples: int = static(default=1, kw_only=True)
    right: Array | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self.samples, "samples")
        given = False
        if self.key is not None or not isinstance(self.data, Keyed):
            key = check_key(self.key, "Fisher draws labels; in a recipe write functools.partial(Fisher, key=...)")
            examples = as_batch(self.data.example if isinstance(self.data, Keyed) else self.data, "data")
            set_field(self, "data", Keyed(examples, example_keys(key, 0, tree.count(examples))))
            given = True
        set_field(self, "key", None)
        OverData.__post_init__(self)
        objective = require_split(as_objective(self.objective), "Fisher")
        if given and is_first():
            set_field(self, "right", check_sample(objective, self.params, self.data.example, self.weights))

    @property
    def psd(self) -> bool:
        return True

    def loss(self, params: PyTree, example: Keyed) -> Array:
        """The loss of one example at `params`, with its own label."""
        return self.split(params, example.example)

    def rows(self, at: PyTree, example: Keyed) -> Callable[[PyTree], Array]:
        r"""$\theta \mapsto u_{is}^\top \mathrm{predict}(\theta) / \sqrt S$, `(S,)`, labels drawn at parameters `at`.

        Its gradients are the rows of the factor.

        Args:
          at: Parameters at which labels are drawn.
          example: One example and its key.
        """
        cotangents = self._cotangents(at, example)
        return lambda params: self._project(cotangents, params, example)

    def _project(self, cotangents: Array, params: PyTree, example: Keyed) -> Array:
        return jnp.matmul(cotangents, flat_output(self.split, params, example.example), precision=tree.HIGHEST)

    def _cotangents(self, params: PyTree, example: Keyed) -> Array:
        r"""$u_{is} / \sqrt S$, `(S, C)`."""
        out = floating_output(self.split, params, example.example)
        drawn = drawn_cotangents(self.split, out, example, self.samples)
        return drawn if self.right is None else drawn * jnp.where(self.right, 1, jnp.nan).astype(drawn.dtype)

    def sum_product(self, params: PyTree, batch: Keyed, weights: Array, v: PyTree) -> PyTree:
        cotangents = jax.vmap(self._cotangents, (None, 0))(params, batch)

        def rows(p: PyTree) -> Array:
            return jax.vmap(self._project, (0, None, 0))(cotangents, p, batch)

        values, tangent = directional(rows, params, v)
        product = jax.vjp(rows, params)[1](tangent * weights.astype(values.dtype)[:, None])[0]
        return tree.scale(all_or_nan(jax.vmap(partial(self.loss, params))(batch)), product)


def drawn_cotangents(
    objective: Objective, out: PyTree, example: Keyed, samples: int, mask: Mask | Named | None = None
) -> Array:
    r"""Loss gradients $u_s / \sqrt S$ in the output at labels drawn from the model, `(S, C)`.

    A `mask` says which rows of the output count, for a sample function that does not know.
    """
    scale, keys = samples**-0.5, jax.random.split(example.key, samples)
    if isinstance(objective.sample, SoftmaxLabels):
        return scale * softmax_cotangents(objective, objective.sample, out, example.example, keys)
    if objective.sample is not None:
        draw = lambda key: kept_output(mask, checked_cotangent(objective.sample, key, out), example.example)
        drawn = jax.vmap(draw)(keys)
        return scale * tree.flatten(tree.promote(drawn), out)
    half = vector_square_root(
        objective, out, example.example, "give Objective a sample, e.g. sample=influence_jax.softmax_labels('y')"
    )
    signs = jax.random.rademacher(example.key, (samples, half.shape[0]), half.dtype)
    return scale * jnp.matmul(signs, half.T, precision=tree.HIGHEST)


def vector_square_root(objective: Objective, out: PyTree, example: PyTree, otherwise: str) -> Array:
    """The square root of the loss Hessian in an output of few entries, `(C, C)`.

    Raises:
      ValueError: If it has too many, saying what to do otherwise.
    """
    if tree.size(out) > MAX_OUTPUTS:
        raise ValueError(
            f"objective: its output {jax.tree.map(jnp.shape, out)} has {tree.size(out)} entries, expected at most "
            f"{MAX_OUTPUTS}; {otherwise}"
        )
    return loss_square_root(objective, out, example)
