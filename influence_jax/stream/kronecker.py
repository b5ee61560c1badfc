r"""K-FAC and EK-FAC of data that are read batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial, reduce

import jax

from .. import tree
from .._memory import memory_errors
from .._mesh import compiled
from .._sound import Unsound, is_finite, refusal
from .._typing import Key, LossFunction, PyTree
from ..capture import MAX_SIDE
from ..curvature import EmpiricalFisher, Kronecker
from ..curvature.capabilities import wide_dtype
from ..curvature.kfac import as_recipe, check_drawn, check_fitted, keyed_fisher
from ..curvature.kronecker_fit import LayerMoments, Recipe, corrected, eigenbases, moment_sums, square_sums
from ..curvature.losses import check_classes, unsound
from ..curvature.masks import Mask, check_agreement
from ..curvature.unmasked import warn_of_padding
from ..objective import Objective
from .loaders import Block, Blocks, paced


@memory_errors("stream.kfac")
def kfac(
    objective: Objective | LossFunction,
    params: PyTree,
    loader: Iterable[PyTree],
    *,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | Mapping[str, Mask] | None = None,
    max_side: int = MAX_SIDE,
    chunk: int | None = None,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> Kronecker:
    r"""`influence_jax.kfac` of a loader, in one pass; memory does not grow with the number of examples.

    Args:
      objective: As there, and so are labels, key, mask, max_side and chunk.
      params: Leaves `(*leaf)`.
      loader: Re-iterable of batches, a function that makes an iterator of them, or arrays given whole.
      labels: `"exact"`, `"sampled"` or `"empirical"`.
      key: For `"sampled"`; a label depends on the example's place in the data, not on batches.
      mask: Which positions of an example count; one that names no layers is looked at in the first batch, and again
        in all at the end.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
      chunk: Examples captured at once.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go, e.g. `NamedSharding(mesh, PartitionSpec("data"))`.
      progress: Whether to show a bar.

    Returns:
      A `Kronecker` operator, to be inverted by `Direct`.

    Raises:
      TypeError, ValueError: As `influence_jax.kfac`, or if the loader is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: z["x"] @ p["w"], lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2))
      >>> params, loader = {"w": jnp.ones((2, 1))}, [{"x": jnp.eye(2)[i:][:1], "y": jnp.zeros((1, 1))} for i in (0, 1)]
      >>> ij.stream.kfac(objective, params, loader).mv({"w": jnp.array([[2.0], [4.0]])})["w"].round(4).tolist()
      [[1.0], [2.0]]

    Reference: Martens & Grosse 2015, arXiv:1503.05671.
    """
    fit = _Fit(objective, params, loader, as_recipe(objective, labels, mask, max_side), key, chunk)
    return fit.run(batch_size, sharding, "K-FAC" if progress else None, eigenvalues=False)


@memory_errors("stream.ekfac")
def ekfac(
    objective: Objective | LossFunction,
    params: PyTree,
    loader: Iterable[PyTree],
    *,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | Mapping[str, Mask] | None = None,
    max_side: int = MAX_SIDE,
    chunk: int | None = None,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> Kronecker:
    r"""`influence_jax.ekfac` of a loader, in two passes; memory does not grow with the number of examples.

    Args:
      objective: As there, and so are labels, key, mask, max_side and chunk.
      params: Leaves `(*leaf)`.
      loader: Re-iterable of batches, a function that makes an iterator of them, or arrays given whole.
      labels: `"exact"`, `"sampled"` or `"empirical"`.
      key: For `"sampled"`; a label depends on the example's place in the data, not on batches.
      mask: Which positions of an example count; one that names no layers is looked at in the first batch, and again
        in all at the end.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
      chunk: Examples captured at once.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go, e.g. `NamedSharding(mesh, PartitionSpec("data"))`.
      progress: Whether to show a bar for each pass.

    Returns:
      A `Kronecker` operator, to be inverted by `Direct`.

    Raises:
      TypeError, ValueError: As `influence_jax.ekfac`, or if the loader is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: z["x"] @ p["w"], lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2))
      >>> params, loader = {"w": jnp.ones((2, 1))}, [{"x": jnp.eye(2)[i:][:1], "y": jnp.zeros((1, 1))} for i in (0, 1)]
      >>> ij.stream.ekfac(objective, params, loader).mv({"w": jnp.array([[2.0], [4.0]])})["w"].round(4).tolist()
      [[1.0], [2.0]]

    Reference: George et al. 2018, arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296.
    """
    fit = _Fit(objective, params, loader, as_recipe(objective, labels, mask, max_side), key, chunk)
    return fit.run(batch_size, sharding, "EK-FAC" if progress else None, eigenvalues=True)


class _Fit:
    """The arguments of a fit, and its passes."""

    def __init__(
        self,
        objective: Objective | LossFunction,
        params: PyTree,
        loader: Iterable[PyTree],
        recipe: Recipe,
        key: Key | None,
        chunk: int | None,
    ) -> None:
        self.objective, self.params, self.loader = objective, tree.check_params(params), loader
        self.recipe, self.key, self.chunk = recipe, key, chunk

    def run(
        self,
        batch_size: int | None,
        sharding: jax.sharding.Sharding | None,
        bar: str | None,
        *,
        eigenvalues: bool,
    ) -> Kronecker:
        blocks = Blocks(self.loader, "loader", batch_size, sharding, bar)
        total = reduce(_added, paced(self._checked(blocks)))
        _check_mask(total)
        fitted = _eigenbases(self.params, total)
        if not is_finite([layer.values for layer in fitted.layers]):
            self._look(blocks)
        if eigenvalues:
            squares = reduce(_added, paced(_squares(self._fisher(block), self.recipe, fitted) for block in blocks))
            fitted = _corrected(fitted, *squares)
        check_fitted(fitted, self.recipe)
        return fitted

    def _checked(self, blocks: Blocks) -> Iterator[list[LayerMoments]]:
        """Yield the moments of each block, once the first has been looked at, so that no mistake costs a pass."""
        for number, block in enumerate(blocks):
            part = self._fisher(block)
            check_classes(part, block.start, blocks.name)
            if number == 0:
                check_drawn(part, self.recipe)
            summed = _moments(part, self.recipe)
            if number == 0:
                _check_mask(summed)
                warn_of_padding(part, self.recipe, [x.layer for x in summed], [x.silence for x in summed])
            yield summed

    def _look(self, blocks: Blocks) -> None:
        """Raise if losses are not finite, saying which."""
        found = reduce(Unsound.then, (unsound(self._fisher(block), block.start, name=blocks.name) for block in blocks))
        if found.losses:
            raise refusal(found, blocks.name)

    def _fisher(self, block: Block) -> EmpiricalFisher:
        weights = block.weights(wide_dtype(self.params))
        return keyed_fisher(
            self.objective, self.params, block.batch, weights, self.chunk, self.recipe, self.key, block.start
        )


def _check_mask(summed: list[LayerMoments]) -> None:
    check_agreement([x.layer for x in summed], [x.leaks for x in summed])


_moments = compiled(moment_sums, static_argnames="recipe")
_squares = compiled(square_sums, static_argnames="recipe")
_eigenbases = compiled(eigenbases)
_corrected = compiled(corrected)
_added = partial(jax.jit, donate_argnums=0)(tree.add)
