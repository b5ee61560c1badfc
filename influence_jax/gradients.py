r"""Derivatives of per-example losses.

Three of the four never hold an array of examples times parameters: a directional derivative
$\langle s, \nabla\ell_i\rangle$ is one forward-mode pass, a mixed one $\partial_x\langle s, \nabla\ell_i\rangle$ one
forward pass over a gradient with respect to the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from . import tree
from ._jaxpr_compat import uses
from ._mesh import compiled
from ._sound import tell
from ._typing import Array, LossFunction, PyTree
from .batching import as_batch, check_chunk, chunk_for, each, map_chunks, map_over, map_rows
from .objective import LossOnly, Objective, as_objective, get_field, replace_field


def per_example_grads(
    objective: Objective | LossFunction, params: PyTree, batch: PyTree, *, chunk: int | None = None
) -> PyTree:
    r"""Gradient of every example's loss, $g_i = \nabla_\theta \ell(\theta, z_i)$.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`.
      batch: Leaves `(N, ...)`.
      chunk: Examples differentiated at once; chosen from the sizes if None.

    Returns:
      Tree like `params`, leaves `(N, *leaf)`, float32 or wider.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z["x"] - z["y"]) ** 2
      >>> data = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([0.0, 1.0])}
      >>> ij.per_example_grads(f, {"w": jnp.array(1.0)}, data)["w"].tolist()
      [1.0, 2.0]

    Reference: Griewank & Walther 2008, Evaluating Derivatives, chapter 3.
    """
    check_chunk(chunk)
    losses, params, batch = as_objective(objective), tree.check_params(params), as_batch(batch, "batch")
    grads = _per_example_grads(losses, params, batch, chunk)
    tell(losses, params, batch, grads, "gradients")
    return grads


def jacobian_product(
    objective: Objective | LossFunction,
    params: PyTree,
    batch: PyTree,
    vectors: PyTree,
    *,
    chunk: int | None = None,
    rhs_chunk: int | None = None,
) -> Array:
    r"""Directional derivatives of every example's loss, $\langle v_k, \nabla_\theta\ell(\theta, z_i)\rangle$.

    Forward mode; no per-example gradient is formed.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`.
      batch: Leaves `(N, ...)`.
      vectors: Stack of directions, leaves `(K, *leaf)`.
      chunk: Examples at once.
      rhs_chunk: Directions at once.

    Returns:
      Array `(N, K)`, float32 or wider.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z["x"] - z["y"]) ** 2
      >>> data = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([0.0, 1.0])}
      >>> ij.jacobian_product(f, {"w": jnp.array(1.0)}, data, {"w": jnp.array([1.0, 10.0])}).tolist()
      [[1.0, 10.0], [2.0, 20.0]]

    Reference: Griewank & Walther 2008, Evaluating Derivatives, chapter 3.
    """
    check_chunk(chunk)
    check_chunk(rhs_chunk, "rhs_chunk")
    params = tree.check_params(params)
    tree.check_stack(vectors, params, "vectors")
    losses, batch = as_objective(objective), as_batch(batch, "batch")
    products = _jacobian_product(losses, params, batch, vectors, chunk, rhs_chunk)
    tell(losses, params, batch, products, "derivatives")
    return products


def mixed_grads(
    objective: Objective | LossFunction,
    params: PyTree,
    batch: PyTree,
    *,
    wrt: str | int = "x",
    chunk: int | None = None,
) -> PyTree:
    r"""Mixed derivatives of every example's loss, $\partial_{x_i} \nabla_\theta\ell(\theta, z_i)$.

    Holds examples times input size times parameters; `mixed_product` contracts it without forming it.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`.
      batch: Leaves `(M, ...)`.
      wrt: The part of the example to differentiate: key, attribute or tuple index; an array or a pytree.
      chunk: Examples at once.

    Returns:
      Tree like `params` with leaves `(M, *x.shape, *leaf)`; if the part is a pytree, that pytree of such trees.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the part is not floating.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z["x"]) ** 2
      >>> ij.mixed_grads(f, {"w": jnp.array(3.0)}, {"x": jnp.array([1.0, 2.0])})["w"].tolist()
      [6.0, 12.0]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 5; Griewank & Walther 2008, Evaluating Derivatives, chapter 5.
    """
    check_chunk(chunk)
    batch = as_batch(batch, "batch")
    check_wrt(batch, wrt)
    losses, params = as_objective(objective), tree.check_params(params)
    mixed = _mixed_grads(losses, params, batch, wrt, chunk)
    tell(losses, params, batch, mixed, "derivatives")
    return mixed


def mixed_product(
    objective: Objective | LossFunction,
    params: PyTree,
    batch: PyTree,
    vectors: PyTree,
    *,
    wrt: str | int = "x",
    chunk: int | None = None,
    rhs_chunk: int | None = None,
) -> PyTree:
    r"""Mixed derivatives along directions, $\partial_{x_i}\langle v_k, \nabla_\theta\ell(\theta, z_i)\rangle$.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`.
      batch: Leaves `(N, ...)`.
      vectors: Stack of directions, leaves `(K, *leaf)`.
      wrt: The part of the example to differentiate: key, attribute or tuple index; an array or a pytree.
      chunk: Examples at once.
      rhs_chunk: Directions at once.

    Returns:
      Array `(N, K, *x.shape)`, or a pytree of such arrays if the part is a pytree.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the part is not floating.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z["x"]) ** 2
      >>> ij.mixed_product(f, {"w": jnp.array(3.0)}, {"x": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0])}).tolist()
      [[6.0], [12.0]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 5; Griewank & Walther 2008, Evaluating Derivatives, chapter 5.
    """
    check_chunk(chunk)
    check_chunk(rhs_chunk, "rhs_chunk")
    params, batch = tree.check_params(params), as_batch(batch, "batch")
    tree.check_stack(vectors, params, "vectors")
    check_wrt(batch, wrt)
    losses = as_objective(objective)
    products = _mixed_product(losses, params, batch, vectors, wrt, chunk, rhs_chunk)
    tell(losses, params, batch, products, "derivatives")
    return products


def check_wrt(batch: PyTree, wrt: str | int) -> None:
    """Raise unless `wrt` names a floating part of the examples."""
    leaves = tree.named_leaves(get_field(batch, wrt, "wrt"))
    if not leaves:
        raise ValueError(f"wrt: part {wrt!r} of the examples is empty, expected a floating array or a tree of them")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"wrt: part {wrt!r}{f' (leaf {path})' if path else ''} is {leaf.dtype}, which has no derivative; for "
                "tokens or categories, embed them first and make the embeddings a floating part of the example"
            )


@partial(compiled, static_argnames="chunk")
def _per_example_grads(
    objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None = None
) -> PyTree:
    params = tree.promote(params)
    one_chunk = partial(grads_of_chunk, objective, params)
    return map_chunks(one_chunk, batch, chunk=chunk or chunk_for(tree.size(params)))


def grads_of_chunk(objective: Objective | LossOnly, params: PyTree, batch: PyTree) -> PyTree:
    """The gradient of every example, all at once."""

    def one(example: PyTree, loss: Objective | LossOnly, at: PyTree) -> PyTree:
        value, slope = jax.value_and_grad(loss)(at, example)
        return spoilt(slope, value)

    return each(one, batch, objective, params)


def spoilt(values: PyTree, loss: Array) -> PyTree:
    """Turn what was derived from a loss into NaN if the loss is not finite, its derivatives included.

    In JAX a loss may be NaN while its gradient is a finite number: the derivative of a look-up out of range is zero.
    """
    factor = jnp.where(jnp.isfinite(loss), 1, jnp.nan)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), values)


def all_or_nan(losses: Array) -> Array:
    """Return one if all losses are finite, else NaN: a factor for what is made of them together.

    A sum, which devices send together with those that it is a factor of.
    """
    return 1 + jnp.sum(jnp.where(jnp.isfinite(losses), 0, jnp.nan).astype(losses.dtype))


def directional(fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree) -> tuple[PyTree, PyTree]:
    """`fn(params)` and its derivative along a vector.

    Forward mode, or where a function decorated with `jax.custom_vjp` has none, the transpose of reverse mode.
    """
    forward = lambda p, v: jax.jvp(fn, (p,), (v,))
    if not uses(jax.make_jaxpr(forward)(params, vector), "custom_lin"):
        return forward(params, vector)
    value, pullback = jax.vjp(fn, params)
    return value, jax.vjp(pullback, jax.tree.map(jnp.zeros_like, value))[1]((vector,))[0]


@partial(compiled, static_argnames=("chunk", "rhs_chunk"))
def _jacobian_product(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    vectors: PyTree,
    chunk: int | None = None,
    rhs_chunk: int | None = None,
) -> Array:
    params, vectors = matching(params, tree.promote(vectors))

    def one(example: PyTree) -> Array:
        def along(vector: PyTree) -> Array:
            value, product = directional(lambda p: objective(p, example), params, vector)
            return spoilt(product, value)

        return map_rows(along, vectors, rhs_chunk)

    products = map_over(one, batch, chunk=chunk)
    return products.astype(tree.accumulation_dtype(products.dtype))


@partial(compiled, static_argnames=("wrt", "chunk"))
def _mixed_grads(
    objective: Objective | LossOnly, params: PyTree, batch: PyTree, wrt: str | int, chunk: int | None
) -> PyTree:
    params = tree.promote(params)

    def one(example: PyTree) -> PyTree:
        mixed, value = jax.jacfwd(partial(_input_gradient, objective, example, wrt), has_aux=True)(params)
        return spoilt(mixed, value)

    input_size = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(get_field(batch, wrt, "wrt")))
    return map_over(one, batch, chunk=chunk or chunk_for(tree.size(params) * input_size))


@partial(compiled, static_argnames=("wrt", "chunk", "rhs_chunk"))
def _mixed_product(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    vectors: PyTree,
    wrt: str | int,
    chunk: int | None = None,
    rhs_chunk: int | None = None,
) -> PyTree:
    params, vectors = matching(params, tree.promote(vectors))

    def one(example: PyTree) -> PyTree:
        def along(vector: PyTree) -> PyTree:
            slope = partial(_input_gradient, objective, example, wrt)
            (_, value), (product, _) = directional(slope, params, vector)
            return spoilt(product, value)

        return map_rows(along, vectors, rhs_chunk)

    return map_over(one, batch, chunk=chunk)


def _input_gradient(
    objective: Objective | LossOnly, example: PyTree, wrt: str | int, params: PyTree
) -> tuple[PyTree, Array]:
    """Gradient of the loss in a part of the example, float32 or wider, and the loss."""
    start = tree.promote(get_field(example, wrt, "wrt"))
    value, slope = jax.value_and_grad(lambda x: objective(params, replace_field(example, wrt, x)))(start)
    return slope, value


def matching(params: PyTree, vectors: PyTree) -> tuple[PyTree, PyTree]:
    """Cast parameters and (stacked) vectors, leaf by leaf, to the wider of the two dtypes.

    A float32 vector therefore gets derivatives taken in float32 even when the parameters are bfloat16.
    """
    params = jax.tree.map(lambda p, v: p.astype(tree.widest(p.dtype, v.dtype)), params, vectors)
    return params, tree.cast_like(vectors, params)
