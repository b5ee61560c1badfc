"""pyDVL's interface: a recipe that is fitted to training data and then asked for influences."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, overload

import jax

from . import _reprs, tree
from ._pytree import dataclass, set_field, static
from ._typing import Array, Key, LossFunction, PyTree
from ._words import name_of
from .batching import Batch, as_batch, check_finite
from .blocks import Blocks, as_blocks, full
from .curvature import GGN, LinearOperator
from .influence import Influence
from .objective import LossOnly, Objective, as_objective
from .scoring import Mode, TopK, UpMode
from .solvers import BlockCG, Blockwise, Solver, invert
from .solvers.base import check_solver


class NotFittedError(ValueError):
    """A model was asked for influences before it was fitted.

    Example:
      >>> import influence_jax as ij
      >>> import jax.numpy as jnp
      >>> ij.InfluenceFunctionModel(lambda params, z: params["w"] * z, {"w": jnp.array(1.0)}).influence
      Traceback (most recent call last):
      ...
      influence_jax.model.NotFittedError: ...
    """


@dataclass
class InfluenceFunctionModel:
    r"""A recipe for influence: objective, parameters, curvature, solver and blocks.

    `fit` returns a new, fitted model and leaves this one as it is, so a model can be shared between threads.
    Everything it does is done by the `Influence` it holds: same sign (positive is helpful), units (no 1/N) and shapes
    `(n_query, n_train)`.

    Args:
      objective: Loss of one example, an `Objective` or a bare `f(params, example) -> scalar`.
      params: Trained parameters, leaves `(*leaf)`.
      curvature: `(objective, params, data) -> LinearOperator`, e.g. `GGN`, `Hessian`, `partial(GGN, chunk=64)`; static.
      solver: How the curvature is inverted, damping included.  For a first look only, `BlockCG(1e-3)`: positive, for a
        network's curvature is singular, but no damping is right for all, as it has the units of the loss.
      blocks: Which parameters interact: `full`, `by_layer`, `by_parameter`, a function from leaf name to block name,
        or a dict from block names to prefixes.
      measurement: What is asked of a query, if not its loss.
      throw: Raise a `ConvergenceError` where a solve does not converge, instead of warning.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or both `solver` and `blocks` define blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: p["w"] * z.x, lambda out, z: 0.5 * (out - z.y) ** 2)
      >>> data = ij.Batch(jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0]))
      >>> model = ij.InfluenceFunctionModel(objective, {"w": jnp.array(1.0)}, solver=ij.Direct(0.0))
      >>> [[round(x, 2) for x in row] for row in model.fit(data).influences(data).tolist()]
      [[0.4, -0.8], [-0.8, 1.6]]
    """

    objective: Objective | LossOnly | LossFunction
    params: PyTree
    curvature: Callable[[Any, PyTree, PyTree], LinearOperator] = static(default=GGN, kw_only=True)
    solver: Solver = dataclasses.field(default_factory=lambda: BlockCG(1e-3), kw_only=True)
    blocks: Any = static(default=full, kw_only=True)
    measurement: Objective | LossOnly | LossFunction | None = dataclasses.field(default=None, kw_only=True)
    throw: bool = static(default=False, kw_only=True)
    fitted: Influence | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        set_field(self, "objective", as_objective(self.objective))
        set_field(self, "params", tree.check_params(self.params))
        if self.measurement is not None:
            set_field(self, "measurement", as_objective(self.measurement, "measurement"))
        if not callable(self.curvature):
            raise TypeError(
                f"curvature: got {self.curvature!r}, expected a function (objective, params, data) -> operator such as "
                "influence_jax.GGN; fit supplies the data"
            )
        check_solver(self.solver)
        if isinstance(self.solver, Blockwise) and self.blocks is not full:
            raise ValueError("blocks: given together with a Blockwise solver, expected one or the other; drop blocks")
        set_field(self, "blocks", as_blocks(self.blocks))

    def fit(self, data: PyTree, *, key: Key | None = None) -> InfluenceFunctionModel:
        """Invert the curvature of the training data.

        Args:
          data: Leaves `(N, ...)`.
          key: For solvers and dampings that draw random numbers; a curvature that does, e.g. `Fisher`, brings its own.

        Returns:
          A fitted model; this one is unchanged.

        Raises:
          ValueError: If parameters or losses are NaN or infinite, or the objective fails on an example of such shapes.
        """
        data = as_batch(_labelled(data, "data"), "data")
        check_finite(self.params, "params")
        _check_loss(as_objective(self.objective), self.params, data)
        op = self.curvature(self.objective, self.params, data)
        solver = self.solver if self.blocks is full else Blockwise(self.solver, self.blocks)
        inverse = invert(op, solver, key=key)
        influence = Influence(self.objective, self.params, inverse, measurement=self.measurement, throw=self.throw)
        fitted = copy.copy(self)  # not dataclasses.replace, which makes an unfitted model: its fields may have changed
        set_field(fitted, "fitted", influence)
        return fitted

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been called to make this model."""
        return self.fitted is not None

    @property
    def influence(self) -> Influence:
        """The influence this model was fitted to.

        Raises:
          NotFittedError: If it was not.
        """
        if self.fitted is None:
            raise NotFittedError(
                "InfluenceFunctionModel is not fitted, so there is no curvature to work with; call "
                "fitted = model.fit(training_data), which returns a new model"
            )
        return self.fitted

    @property
    def n_parameters(self) -> int:
        """Number of parameters."""
        return tree.size(self.params)

    @property
    def is_thread_safe(self) -> bool:
        """Always: nothing here is ever changed."""
        return True

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, in leaf order."""
        return self.influence.block_names

    @overload
    def influences(
        self, query: PyTree, train: PyTree | None = None, mode: UpMode = "up", *, wrt: str | int = "x"
    ) -> Array: ...
    @overload
    def influences(
        self, query: PyTree, train: PyTree | None = None, mode: Mode = ..., *, wrt: str | int = "x"
    ) -> PyTree: ...
    def influences(
        self, query: PyTree, train: PyTree | None = None, mode: Mode = "up", *, wrt: str | int = "x"
    ) -> PyTree:
        """As `Influence.influences`; `train=None` means the queries themselves."""
        return self.influence.influences(*_sides(query, train), mode, wrt=wrt)

    def influence_factors(self, query: PyTree) -> PyTree:
        """As `Influence.influence_factors`."""
        return self.influence.influence_factors(_labelled(query, "query"))

    @overload
    def influences_from_factors(
        self, factors: PyTree, train: PyTree, mode: UpMode = "up", *, wrt: str | int = "x"
    ) -> Array: ...
    @overload
    def influences_from_factors(
        self, factors: PyTree, train: PyTree, mode: Mode, *, wrt: str | int = "x"
    ) -> PyTree: ...
    def influences_from_factors(
        self, factors: PyTree, train: PyTree, mode: Mode = "up", *, wrt: str | int = "x"
    ) -> PyTree:
        """As `Influence.influences_from_factors`."""
        return self.influence.influences_from_factors(factors, _labelled(train, "train"), mode, wrt=wrt)

    def influences_by_block(
        self,
        query: PyTree,
        train: PyTree | None = None,
        mode: Mode = "up",
        *,
        wrt: str | int = "x",
        blocks: Blocks | None = None,
    ) -> OrderedDict[str, PyTree]:
        """As `Influence.influences_by_block`; `train=None` means the queries themselves."""
        return self.influence.influences_by_block(*_sides(query, train), mode, wrt=wrt, blocks=blocks)

    def influence_factors_by_block(self, query: PyTree, *, blocks: Blocks | None = None) -> OrderedDict[str, PyTree]:
        """As `Influence.influence_factors_by_block`."""
        return self.influence.influence_factors_by_block(_labelled(query, "query"), blocks=blocks)

    def influences_from_factors_by_block(
        self, factors: Mapping[str, PyTree], train: PyTree, mode: Mode = "up", *, wrt: str | int = "x"
    ) -> OrderedDict[str, PyTree]:
        """As `Influence.influences_from_factors_by_block`."""
        return self.influence.influences_from_factors_by_block(factors, _labelled(train, "train"), mode, wrt=wrt)

    def self_influences(self, batch: PyTree) -> Array:
        """As `Influence.self_influences`."""
        return self.influence.self_influences(_labelled(batch, "batch"))

    def top_k(self, query: PyTree, train: PyTree, k: int) -> TopK:
        """As `Influence.top_k`."""
        return self.influence.top_k(_labelled(query, "query"), _labelled(train, "train"), k)

    def __repr__(self) -> str:
        if self.is_fitted:
            return _reprs.call(self, repr(self.influence))
        curvature = f"{name_of(self.curvature)} of {_reprs.parameters(self.params)}"
        blocks = "" if self.blocks is full else f"blocks={name_of(self.blocks)}"
        return _reprs.call(self, curvature, repr(self.solver), blocks, "not fitted")


def _sides(query: PyTree, train: PyTree | None) -> tuple[PyTree, PyTree]:
    return _labelled(query, "query"), _labelled(query, "query") if train is None else _labelled(train, "train")


def _labelled(batch: PyTree, name: str) -> PyTree:
    """The batch, refused if it is inputs without labels."""
    if isinstance(batch, Batch) and batch.y is None and batch.x is not None:
        raise ValueError(f"{name}: got a Batch with x but without y, expected both; pass Batch(x, y)")
    if isinstance(batch, Batch) and batch.x is None:
        raise ValueError(f"{name}: got a Batch with y but without x, expected both; pass Batch(x, y)")
    return batch


def _check_loss(objective: Objective | LossOnly, params: PyTree, data: PyTree) -> None:
    """Try the objective on the shapes of one example, before anything long begins."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data)
    jax.eval_shape(objective, tree.shapes(params), example)
