r"""Influence: what each training example did to each query, through one linear operator.

$\mathrm{score}_{qi} = \nabla f_q^\top\, P\, \nabla\ell_i$ for up-weighting and $\nabla f_q^\top\, P\,
\partial_x\nabla\ell_i$ for perturbing inputs, with $P$ any linear operator on parameters: an inverse curvature for
influence functions, the identity for gradient similarity.  A positive score means that training on the example lowers
the query's loss.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp

from . import _reprs, tree
from ._memory import explain_memory_errors
from ._mesh import compiled
from ._pytree import dataclass, set_field, static
from ._sound import Seen, Watch, finite_gradients, look, number, warn_of_no_effect, warn_of_overflow
from ._typing import Array, LossFunction, PyTree
from .batching import as_batch, check_chunk, check_kinds, check_like, check_positive, map_chunks
from .blocks import Block, Blocks, is_by_block, join_whole, partition, select
from .curvature import Identity, LinearOperator, check_losses
from .curvature.fisher import Keyed
from .curvature.losses import check_products
from .curvature.outputs import require_split
from .gradients import _per_example_grads, check_wrt
from .objective import LossOnly, Objective, as_objective, constants_of, on_block
from .scoring import (
    InfluenceMode,
    Mode,
    TopK,
    UpMode,
    as_mode,
    by_position,
    check_positions,
    finite_or_nan,
    inner_products,
    inner_products_by_block,
    perturbed,
    squares_in_basis,
    top_k,
)
from .solvers import Info, Inverse, all_converged, inverted_layers, is_nan, report, rows_at_once, solve_with_info
from .solvers.base import check_inverse

CURVED = "the data of the curvature"


@explain_memory_errors(
    "influences", "influence_factors", "influences_from_factors", "self_influences", "token_influences", "top_k"
)
@dataclass
class Influence:
    r"""The interaction map between queries and training examples through an operator P.

    Scores have rows for queries and columns for training examples, $s_{qi} = \nabla f_q^\top P \nabla\ell_i$, in
    float32 or wider.  Positive: training on example i lowers the loss of query q (helpful).  No factor 1/N: where P
    inverts the curvature of the mean loss, penalty included, one more unit of weight on example i changes the loss of
    query q by about $-s_{qi}/N$ if the losses are summed and divided by N.  What leaving examples out does depends on
    what the training then minimises, which `metrics.predicted_changes` is told.  Solves that do not converge are a
    `ConvergenceWarning`, except under tracing.

    Args:
      objective: Loss of a training example: an `Objective` or a bare `f(params, example) -> scalar`.
      params: Where the derivatives are taken, leaves `(*leaf)`.
      inverse: The operator P, e.g. `invert(GGN(...), BlockCG(1e-3))` or `Identity(params)`.
      measurement: What is asked of a query, `f(params, example) -> scalar`, if not its loss; e.g. a logit margin.
        Scores are then the change of the measurement, with the sign of a loss.
      chunk: Training examples handled at once; chosen from the sizes if None.
      rhs_chunk: Factors handled at once in directional derivatives; four on CPU if None.
      throw: Raise a `ConvergenceError` where a solve does not converge, instead of warning.

    Raises:
      TypeError, ValueError: If an argument is not of that form, P does not act on `params`, is a curvature rather than
        its inverse, or was fitted at other parameters or with other constants.  Of traced ones nothing is raised: where
        they differ from those of the fit, factors and scores are NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: 0.5 * (out - z["y"]) ** 2)
      >>> params, data = {"w": jnp.array(1.0)}, {"x": jnp.array([1.0, 2.0]), "y": jnp.array([2.0, 1.0])}
      >>> influence = ij.Influence(objective, params, ij.invert(ij.GGN(objective, params, data), ij.Direct(0.0)))
      >>> [[round(x, 2) for x in row] for row in influence.influences(data, data).tolist()]
      [[0.4, -0.8], [-0.8, 1.6]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 2 and 5, with the opposite sign.
    """

    objective: Objective | LossOnly | LossFunction
    params: PyTree
    inverse: LinearOperator
    measurement: Objective | LossOnly | LossFunction | None = dataclasses.field(default=None, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)
    rhs_chunk: int | None = static(default=None, kw_only=True)
    throw: bool = static(default=False, kw_only=True)
    # Whether traced params are those that the inverse was fitted at; None where that is known.
    _fits: Array | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        set_field(self, "objective", as_objective(self.objective))
        set_field(self, "params", tree.check_params(self.params))
        if self.measurement is not None:
            set_field(self, "measurement", as_objective(self.measurement, "measurement"))
        if not isinstance(self.inverse, LinearOperator):
            raise TypeError(
                f"inverse: got a {type(self.inverse).__name__}, expected a LinearOperator such as "
                "influence_jax.invert(curvature, solver) or influence_jax.Identity(params)"
            )
        tree.check_vector(self.params, self.inverse.space, "params, against the space of inverse")
        check_chunk(self.chunk)
        check_chunk(self.rhs_chunk, "rhs_chunk")
        set_field(self, "_fits", check_inverse(self.inverse, self.params, constants_of(self.objective)))

    def check_query(self, query: PyTree, train: PyTree = None, of: str = "train") -> None:
        """Raise if `query` is one example without its leading axis, beside those of `train` or of the curvature.

        `of` says what these are.
        """
        if train is None:
            train, of = examples_of(self.inverse), CURVED
        else:
            self.check_train(train, of)
        if train is not None:
            check_like(query, train, "query", of, other_kind=self.measurement is not None)

    def check_train(self, train: PyTree, name: str = "train") -> None:
        """Raise if the examples `train`, the argument `name`, are not prepared as those of the curvature are."""
        others = examples_of(self.inverse)
        if others is not None:
            check_kinds(train, others, name, CURVED)

    def where_fitted(self, values: PyTree) -> PyTree:
        """Return `values` that the inverse had a part in; NaN where, under tracing, it was fitted elsewhere."""
        if self._fits is None:
            return values
        return jax.tree.map(lambda x: x * jnp.where(self._fits, 1, jnp.nan).astype(x.dtype), values)

    @property
    def holds(self) -> str:
        """What of the inverse takes most memory, in words, for errors that say that it ran out."""
        return self.inverse.holds if isinstance(self.inverse, Inverse) else ""

    @property
    def asked(self) -> Objective | LossOnly:
        """What is asked of a query: the measurement if there is one, else the objective."""
        return as_objective(self.objective if self.measurement is None else self.measurement)

    @overload
    def influences(self, query: PyTree, train: PyTree, mode: UpMode = "up", *, wrt: str | int = "x") -> Array: ...
    @overload
    def influences(self, query: PyTree, train: PyTree, mode: Mode, *, wrt: str | int = "x") -> PyTree: ...
    def influences(self, query: PyTree, train: PyTree, mode: Mode = "up", *, wrt: str | int = "x") -> PyTree:
        r"""Influence of every training example on every query.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`.
          mode: `"up"`: $\nabla f_q^\top P \nabla\ell_i$.  `"perturbation"`: its derivative in the input of example i.
            Moving that input by $\delta$ and training again on the mean loss lowers the loss of query q by
            $\langle s_{qi}, \delta\rangle / N$ to first order, so that positive is the direction that helps.
          wrt: The perturbed part of a training example: key, attribute or tuple index.

        Returns:
          `(Q, N)`, or `(Q, N, *x.shape)` for perturbation (a pytree of such arrays if the input is a pytree).

        Raises:
          ValueError: If the mode or `wrt` is unknown, or a batch is malformed.
          TypeError: If the perturbed part is not floating.
        """
        query, train, mode = as_batch(query, "query"), as_batch(train, "train"), as_mode(mode)
        self.check_query(query, train)
        if mode is InfluenceMode.Perturbation:
            check_wrt(train, wrt)
        scores = self._scores(query, train, mode, wrt)
        self.tell([scores], query, train, _moved(mode, wrt))
        return scores

    def _scores(self, query: PyTree, train: PyTree, mode: InfluenceMode, wrt: str | int) -> PyTree:
        """Compute `influences`, and warn about solves only."""
        fewer = tree.count(train) < tree.count(query) and self.inverse.symmetric and not self.inverse.on_host
        if fewer and mode is InfluenceMode.Up:
            scores, info = _up_from_train(self, query, train)
            self._report(info, as_objective(self.objective), train)
            return scores
        return self._from_factors(self.factors_untold(query), train, mode, wrt)

    def tell(self, scores: Sequence[PyTree], query: PyTree | None, train: PyTree, wrt: str | int | None = None) -> None:
        """Warn about losses of `query` and `train` behind `scores`, leaves `(Q, N, ...)`, those of blocks together.

        `wrt` is the part of an example that they are derivatives in, if they are.
        """
        told = False
        for watch, batch, axis in ((self.query_watch(), query, 0), (self.train_watch(), train, 1)):
            if batch is not None:
                watch.batch(look(scores, axis), batch)
                told |= watch.warn()
        if wrt is not None and not told and look(scores, 1).flat:
            warn_of_no_effect(wrt)
        warn_of_overflow(scores)

    def query_watch(self, made: str = "scores", name: str = "query") -> Watch:
        """Watch what is asked of queries, the argument `name`; `made` says what comes of it."""
        noun = "loss" if self.measurement is None else "measurement"
        return Watch(self.asked, self.params, name, noun=noun, made=made, chunk=self.chunk)

    def train_watch(self, name: str = "train") -> Watch:
        """Watch the losses of training examples, the argument `name`."""
        return Watch(as_objective(self.objective), self.params, name, chunk=self.chunk)

    def influence_factors(self, query: PyTree) -> PyTree:
        r"""Factors $P\,\nabla f_q$: one solve per query, reusable against any training data.

        Args:
          query: Leaves `(Q, ...)`.

        Returns:
          Tree like the parameters, leaves `(Q, *leaf)`, float32 or wider.
        """
        query = as_batch(query, "query")
        self.check_query(query)
        factors = self.factors_untold(query)
        self._tell_factors(factors, query)
        return factors

    def _tell_factors(self, factors: PyTree, query: PyTree) -> None:
        watch = self.query_watch("factors")
        watch.batch(look_at_factors(factors), query)
        watch.warn()

    def factors_untold(self, query: PyTree) -> PyTree:
        """Compute `influence_factors` of `query`, and warn about solves only."""
        factors, info = self.solved(query)
        self._report(info, self.asked, query)
        return factors

    def _report(self, info: Info | None, losses: Objective | LossOnly, batch: PyTree) -> None:
        report_sound(info, self.inverse, self.throw, losses, self.params, batch)

    def solved(self, query: PyTree) -> tuple[PyTree, Info | None]:
        """`influence_factors` of `query`, and how the solves went instead of warnings."""
        if not self.inverse.on_host:
            return _factors(self, query)
        losses = dataclasses.replace(self, inverse=Identity(self.params))
        return solve_with_info(self.inverse, _query_grads(losses, query))

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
        """Influence of every training example from factors; as `influences`, without the solves.

        Args:
          factors: What `influence_factors` or `influence_factors_by_block` returned, leaves `(Q, *leaf)`.
          train: Leaves `(N, ...)`.
          mode: `"up"` or `"perturbation"`.
          wrt: The perturbed part of a training example.

        Returns:
          `(Q, N)`, or `(Q, N, *x.shape)` for perturbation.

        Raises:
          ValueError: If the factors are not a stack of parameter-shaped trees, or as `influences`.
          TypeError: If the perturbed part is not floating.
        """
        train, mode = as_batch(train, "train"), as_mode(mode)
        self.check_train(train)
        scores = self.from_factors_untold(factors, train, mode, wrt)
        self.tell([scores], None, train, _moved(mode, wrt, factors))
        return scores

    def from_factors_untold(self, factors: PyTree, train: PyTree, mode: InfluenceMode, wrt: str | int) -> PyTree:
        """As `influences_from_factors`, of a batch of arrays and without warnings."""
        if is_by_block(factors, self.params):
            factors = join_whole(factors, self.params)
        tree.check_stack(factors, self.params, "factors")
        if mode is InfluenceMode.Perturbation:
            check_wrt(train, wrt)
        return self._from_factors(factors, train, mode, wrt)

    def _from_factors(self, factors: PyTree, train: PyTree, mode: InfluenceMode, wrt: str | int) -> PyTree:
        if mode is InfluenceMode.Up:
            return _up(self, factors, train)
        return perturbed(as_objective(self.objective), self.params, factors, train, wrt, self.chunk, self.rhs_chunk)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks that the inverse treats apart; `("",)` if it does not."""
        return tuple(self._parts)

    @property
    def _leaves_by_block(self) -> OrderedDict[str, Block]:
        """The names of the leaves in each block of the inverse; of all, where it has none."""
        if isinstance(self.inverse, Inverse):
            return self.inverse.blocks
        return OrderedDict({"": tuple(name for name, _ in tree.named_leaves(self.params))})

    @property
    def _parts(self) -> Mapping[str, LinearOperator]:
        return self.inverse.by_block if isinstance(self.inverse, Inverse) else {"": self.inverse}

    def block(self, name: str) -> Influence:
        r"""The influence that goes through one block of the inverse: one summand of the total, computed on its own.

        Raises:
          ValueError: If there is no block of that name.
        """
        if name not in self._parts:
            if self.block_names == ("",):
                raise ValueError(
                    f"name: got {name!r}, but this inverse has no blocks; make one that has, by Blockwise(solver) or "
                    "of ekfac, or pass blocks= to influences_by_block"
                )
            raise ValueError(f"name: got {name!r}, expected one of the blocks {list(self.block_names)}")
        part = self._parts[name]
        if part is self.inverse:
            return self
        return self._on(tuple(part.space), part)

    def _on(self, block: Block, inverse: LinearOperator | None = None) -> Influence:
        """The same losses as functions of a block; through the identity if no inverse is given."""
        objective, params = on_block(as_objective(self.objective), self.params, block)
        asked = None if self.measurement is None else on_block(self.asked, self.params, block)[0]
        inverse = Identity(params) if inverse is None else inverse
        return dataclasses.replace(self, objective=objective, params=params, inverse=inverse, measurement=asked)

    def influence_factors_by_block(self, query: PyTree, *, blocks: Blocks | None = None) -> OrderedDict[str, PyTree]:
        r"""Factors $(P\,\nabla f_q)_b$ of each block.

        Args:
          query: Leaves `(Q, ...)`.
          blocks: How to split; the inverse's own blocks if None.

        Returns:
          Block names in leaf order, to flat dicts `{leaf name: (Q, *leaf)}`.

        Raises:
          TypeError, ValueError: If `blocks` is not a partition of the parameters.
        """
        query = as_batch(query, "query")
        self.check_query(query)
        factors = self._factors_by_block(query, blocks)
        self._tell_factors(list(factors.values()), query)
        return factors

    def _factors_by_block(self, query: PyTree, blocks: Blocks | None) -> OrderedDict[str, PyTree]:
        groups = self._leaves_by_block if blocks is None else partition(self.params, blocks)
        factors = self.factors_untold(query)
        return OrderedDict((name, select(factors, block)) for name, block in groups.items())

    def influences_from_factors_by_block(
        self, factors: Mapping[str, PyTree], train: PyTree, mode: Mode = "up", *, wrt: str | int = "x"
    ) -> OrderedDict[str, PyTree]:
        """Each block's summand of the influence, from factors by block.

        Args:
          factors: What `influence_factors_by_block` returned.
          train: Leaves `(N, ...)`.
          mode: `"up"` or `"perturbation"`.
          wrt: The perturbed part of a training example.

        Returns:
          Block names to `(Q, N)`, or `(Q, N, *x.shape)` for perturbation; they sum to the total.

        Raises:
          TypeError: If the factors are not a dict by block.
          ValueError: As `influences_from_factors`.
        """
        join_whole(factors, self.params)
        train, mode = as_batch(train, "train"), as_mode(mode)
        self.check_train(train)
        scores = self._from_factors_by_block(factors, train, mode, wrt)
        self.tell(list(scores.values()), None, train, _moved(mode, wrt, dict(factors)))
        return scores

    def _from_factors_by_block(
        self, factors: Mapping[str, PyTree], train: PyTree, mode: InfluenceMode, wrt: str | int
    ) -> OrderedDict[str, PyTree]:
        for part in factors.values():
            tree.check_stack(dict(part), select(self.params, tuple(part)), "factors")
        if mode is InfluenceMode.Up:
            groups = tuple(map(tuple, factors.values()))
            return OrderedDict(
                zip(factors, _up_by_block(self, join_whole(factors, self.params), train, groups), strict=True)
            )
        if mode is InfluenceMode.Perturbation:
            check_wrt(train, wrt)
        parts = {name: self._on(tuple(part)) for name, part in factors.items()}
        return OrderedDict(
            (name, part._from_factors(dict(factors[name]), train, mode, wrt)) for name, part in parts.items()
        )

    def influences_by_block(
        self, query: PyTree, train: PyTree, mode: Mode = "up", *, wrt: str | int = "x", blocks: Blocks | None = None
    ) -> OrderedDict[str, PyTree]:
        r"""Each block's summand of the influence, $(P\,\nabla f_q)_b^\top\, (\nabla\ell_i)_b$; they sum to the total.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`.
          mode: `"up"` or `"perturbation"`.
          wrt: The perturbed part of a training example.
          blocks: How to split; the inverse's own blocks if None.

        Returns:
          Block names in leaf order, to `(Q, N)`, or `(Q, N, *x.shape)` for perturbation.

        Raises:
          TypeError, ValueError: As `influences`, or if `blocks` is not a partition of the parameters.
        """
        query, train, mode = as_batch(query, "query"), as_batch(train, "train"), as_mode(mode)
        self.check_query(query, train)
        if mode is InfluenceMode.Perturbation:
            check_wrt(train, wrt)
        scores = self._from_factors_by_block(self._factors_by_block(query, blocks), train, mode, wrt)
        self.tell(list(scores.values()), query, train, _moved(mode, wrt))
        return scores

    def self_influences(self, batch: PyTree) -> Array:
        r"""Influence of each example on itself, $\nabla\ell_i^\top P \nabla\ell_i$; high for mislabelled examples.

        Sign and unit are those of `influences`: one more unit of weight on example i lowers its own loss by about
        $s_{ii}/N$ at the optimum of the sum over N.

        Args:
          batch: Leaves `(N, ...)`.

        Returns:
          `(N,)`.
        """
        batch, others = as_batch(batch, "batch"), examples_of(self.inverse)
        if others is not None:
            check_like(batch, others, "batch", CURVED)
        values = self.self_influences_untold(batch)
        watch = self.train_watch("batch")
        watch.batch(look(values, 0), batch)
        watch.warn()
        return values

    def self_influences_untold(self, batch: PyTree) -> Array:
        """Compute `self_influences` of `batch`, and warn about solves only."""
        values, info = self_solved(self, batch)
        self._report(info, as_objective(self.objective), batch)
        return values

    def token_influences(self, query: PyTree, train: PyTree) -> Array:
        r"""Influence of every position of every training example on every query; they sum to `influences`.

        $s_{qit} = \langle\partial_{out_t}\ell_i,\, (J_i P\,\nabla f_q)_t\rangle$: what the loss at output position t
        contributes, through all parameters.  For a language model, what learning the next token at t does to the query.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`, for which the model's output is `(T, C)`.

        Returns:
          `(Q, N, T)`.

        Raises:
          TypeError: If the objective is not split into prediction and loss.
          ValueError: If the output is not one array `(T, C)`.
        """
        query, train = as_batch(query, "query"), as_batch(train, "train")
        self.check_query(query, train)
        objective = require_split(as_objective(self.objective), "token_influences")
        check_positions(objective, self.params, train)
        scores = by_position(objective, self.params, self.factors_untold(query), train, self.chunk, self.rhs_chunk)
        self.tell([scores], query, train)
        return scores

    def top_k(self, query: PyTree, train: PyTree, k: int) -> TopK:
        """The k most helpful training examples of each query.

        The most harmful are the most helpful to what rises with the loss: those of an `Influence` with
        `measurement=lambda params, z: -objective(params, z)`, whose values are the scores negated.

        Streams over the training data, so beyond the factors memory grows with `Q (k + chunk)`, not with `Q N`.  Ties
        go to the lower index.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`.
          k: How many, `1 <= k <= N`.

        Returns:
          `TopK(values, indices)`, each `(Q, k)`, descending.

        Raises:
          TypeError: If k is not an int.
          ValueError: If k is not between 1 and N.
        """
        query, train = as_batch(query, "query"), as_batch(train, "train")
        self.check_query(query, train)
        check_positive(k, "k")
        if k > tree.count(train):
            raise ValueError(f"k: got {k}, expected between 1 and {tree.count(train)}, the number of training examples")
        objective, factors = as_objective(self.objective), self.factors_untold(query)
        best, unsound = top_k(objective, self.params, factors, train, int(k), self.chunk, self.rhs_chunk)
        seen = look(best.values, 0)
        for watch, batch, found in (
            (self.query_watch(), query, seen),
            (self.train_watch(), train, seen._replace(unsound=number(unsound))),
        ):
            watch.batch(found, batch)
            watch.warn()
        return best

    def __repr__(self) -> str:
        asked = "" if self.measurement is None else f"measurement={self.measurement!r}"
        return _reprs.call(self, repr(self.objective), repr(self.inverse), asked)


def _moved(mode: InfluenceMode, wrt: str | int, factors: PyTree = None) -> str | int | None:
    """Return the part of an example that scores are derivatives in; None if they are none, or have to be zero."""
    zero = factors is not None and look(factors, 0).flat
    return wrt if mode is InfluenceMode.Perturbation and not zero else None


def examples_of(op: Any) -> PyTree | None:
    """Return examples that an operator is made of, None where it holds none."""
    data = getattr(op, "data", None)
    if data is not None:
        return data.example if isinstance(data, Keyed) else data
    parts = getattr(op, "terms", (op.op,) if hasattr(op, "op") else ())
    return next((found for part in parts if (found := examples_of(part)) is not None), None)


@compiled
def _factors(influence: Influence, query: PyTree) -> tuple[PyTree, Info | None]:
    factors, info = solve_with_info(influence.inverse, _query_grads(influence, query))
    return influence.where_fitted(factors), info


@compiled
def _query_grads(influence: Influence, query: PyTree) -> PyTree:
    return tree.promote(_per_example_grads(influence.asked, influence.params, query, influence.chunk))


@compiled
def _up(influence: Influence, factors: PyTree, train: PyTree) -> Array:
    objective = as_objective(influence.objective)
    return inner_products(objective, influence.params, factors, train, influence.chunk, influence.rhs_chunk).T


@partial(compiled, static_argnames="groups")
def _up_by_block(influence: Influence, factors: PyTree, train: PyTree, groups: tuple[Block, ...]) -> list[Array]:
    objective = as_objective(influence.objective)
    parts = inner_products_by_block(objective, influence.params, factors, train, groups, influence.chunk)
    return [part.T for part in parts]


@compiled
def _up_from_train(influence: Influence, query: PyTree, train: PyTree) -> tuple[Array, Info | None]:
    """Solve for the training examples, which are fewer than the queries; P is self-adjoint."""
    grads = tree.promote(_per_example_grads(influence.objective, influence.params, train, influence.chunk))
    factors, info = solve_with_info(influence.inverse, grads)
    factors, chunks = influence.where_fitted(factors), (influence.chunk, influence.rhs_chunk)
    return inner_products(influence.asked, influence.params, factors, query, *chunks), info


def look_at_factors(factors: PyTree) -> Seen:
    """Look at factors, of which a row is to be finite in all entries."""
    return look(factors, 0, entire=True)._replace(flat=False)


def report_sound(
    info: Info | None,
    inverse: LinearOperator,
    throw: bool,
    losses: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
) -> None:
    """Warn or raise about solves that did not converge, but for examples whose gradients are not finite."""
    if info is None or isinstance(info.converged, jax.core.Tracer) or all_converged(info):
        return
    sound = finite_gradients(losses, params, batch)
    info = info._replace(converged=info.converged | ~sound)
    if isinstance(inverse, Inverse) and not all_converged(info) and is_nan(info):
        check_losses(inverse.op, gradients=True)  # no knob of a solver would help
        check_products(inverse.op)
    report(info, inverse, throw)


def self_solved(influence: Influence, batch: PyTree) -> tuple[Array, Info | None]:
    """`self_influences`, and how the solves went instead of warnings."""
    if not influence.inverse.on_host:
        return _self_influences(influence, batch)
    grads = _query_grads(dataclasses.replace(influence, measurement=None, inverse=Identity(influence.params)), batch)
    solved, info = solve_with_info(influence.inverse, grads)
    return finite_or_nan(tree.dots(solved, grads)), info


@compiled
def _self_influences(influence: Influence, batch: PyTree) -> tuple[Array, Info | None]:
    closed = inverted_layers(influence.inverse)
    if closed is not None:
        layers, info = closed
        objective = as_objective(influence.objective)
        squares = squares_in_basis(objective, influence.params, layers, batch, influence.chunk)
        if squares is not None:
            info = jax.tree.map(lambda field: jnp.broadcast_to(field, squares.shape), info)
            return finite_or_nan(influence.where_fitted(squares)), info

    def one_chunk(part: PyTree) -> tuple[Array, Info | None]:
        grads = tree.promote(_per_example_grads(influence.objective, influence.params, part))
        solved, info = solve_with_info(influence.inverse, grads)
        return finite_or_nan(influence.where_fitted(tree.dots(solved, grads))), info

    return map_chunks(one_chunk, batch, chunk=influence.chunk or rows_at_once(influence.inverse))
