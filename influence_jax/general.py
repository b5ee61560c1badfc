r"""One call each: influence factors, influences, and both at once, after pyDVL's functional interface.

Three roles of data are kept apart: training data define the curvature, test data are the queries, input data are the
examples whose influence is asked for.  Each is a batch, or a re-iterable of batches.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _reprs, tree
from ._progress import track
from ._sound import look
from ._typing import Array, Key, LossFunction, PyTree
from .curvature import Hessian, Identity, LinearOperator
from .influence import Influence, look_at_factors, report_sound
from .objective import LossOnly, Objective
from .scoring import InfluenceMode, as_mode
from .solvers import Arnoldi, BlockCG, Direct, Info, LiSSA, RelativeDamping, Solver, invert
from .solvers.base import check_solver
from .solvers.damping import CHOICES, check_damping
from .stream.loaders import batches, count_batches, gather

InfluenceType = InfluenceMode
Loss = Objective | LossOnly | LossFunction

# Eigenpairs that `InversionMethod.Arnoldi` asks for.
DEFAULT_RANK = 10


class InversionMethod(enum.StrEnum):
    """Which solver inverts the curvature, by name; a solver itself may be given instead.

    Example:
      >>> import influence_jax as ij
      >>> [str(method) for method in ij.InversionMethod]
      ['direct', 'cg', 'lissa', 'arnoldi']
    """

    Direct = "direct"
    Cg = "cg"
    Lissa = "lissa"
    Arnoldi = "arnoldi"


class InverseHvpResult(NamedTuple):
    """Influence factors, leaves `(Q, *leaf)`, and how their solves went.

    Attributes:
      x: The factors, leaves `(Q, *leaf)`.
      info: How each solve went, leaves `(Q,)`.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> data, query = jnp.array([1.0, 3.0]), jnp.array([1.0])
      >>> ij.compute_influence_factors(f, {"w": jnp.array(1.0)}, data, query, "direct", hessian_perturbation=0.0)
      InverseHvpResult(1 factor, Info(1 of 1 converged, steps 0, min_curvature 5))
    """

    x: PyTree
    info: Info

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.rows(self.x, "factor"), repr(self.info))


def compute_influence_factors(
    objective: Loss,
    params: PyTree,
    training_data: Any,
    test_data: Any,
    inversion_method: InversionMethod | str | Solver,
    *,
    hessian_perturbation: float | RelativeDamping | None = None,
    curvature: Callable[[Any, PyTree, PyTree], LinearOperator] = Hessian,
    key: Key | None = None,
    progress: bool = True,
    throw: bool = False,
) -> InverseHvpResult:
    r"""Factors $(C + \lambda I)^{-1} \nabla\ell_q$ for every test example.

    Args:
      objective: Loss of one example.
      params: Trained parameters.
      training_data: What the curvature is the mean over; gathered in memory.
      test_data: The queries; a loader is read batch by batch.
      inversion_method: An `InversionMethod`, or a solver that brings its own damping.
      hessian_perturbation: Damping $\lambda$ of a method given by name, which needs one: a number >= 0 or a
        `RelativeDamping`; unlike pyDVL's, it is not 0 unless told so.
      curvature: `(objective, params, data) -> LinearOperator`.
      key: For methods that draw random numbers (LiSSA's scale, Arnoldi).
      progress: Whether to show a bar over the batches of test data.
      throw: Raise a `ConvergenceError` where a solve does not converge, instead of warning.

    Returns:
      `InverseHvpResult(x, info)`, leaves `(Q, *leaf)` and `(Q,)`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; if a solver is given together with a perturbation.
      ConvergenceError: If asked for.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> data = jnp.array([1.0, 3.0])
      >>> params, method = {"w": jnp.array(1.0)}, ij.InversionMethod.Direct
      >>> result = ij.compute_influence_factors(f, params, data, data, method, hessian_perturbation=0.0)
      >>> [round(x, 2) for x in result.x["w"].tolist()]
      [0.2, 1.8]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 2.
    """
    solver = as_solver(inversion_method, hessian_perturbation, params, "hessian_perturbation")
    if not callable(curvature):
        raise TypeError(f"curvature: got {curvature!r}, expected a function such as influence_jax.GGN, not called yet")
    op = curvature(objective, params, gather(training_data, "training_data"))
    inverse = invert(op, solver, key=key)
    influence = Influence(objective, params, inverse)
    results, start, watch = [], 0, influence.query_watch("factors", "test_data")
    for query in track(batches(test_data, "test_data"), "factors", count_batches(test_data), show=progress):
        factors, info = influence.solved(query)
        report_sound(info, inverse, throw, influence.asked, influence.params, query)
        watch.batch(look_at_factors(factors), query, start)
        start += tree.count(query)
        results.append((factors, info))
    if not results:
        raise ValueError("test_data: is empty, expected at least one batch")
    watch.warn()
    return InverseHvpResult(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *results))


def compute_influences_up(
    objective: Loss, params: PyTree, input_data: Any, influence_factors: PyTree, *, progress: bool = True
) -> Array:
    r"""Influence of up-weighting every input example, $\langle x_q, \nabla\ell_i\rangle$.

    Args:
      objective: Loss of one example.
      params: Trained parameters.
      input_data: The examples asked about; a loader is read batch by batch.
      influence_factors: From `compute_influence_factors`, or their tree.
      progress: Whether to show a bar.

    Returns:
      `(Q, N)`, positive = helpful.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> data, factors = jnp.array([1.0, 3.0]), {"w": jnp.array([0.5])}
      >>> ij.compute_influences_up(f, {"w": jnp.array(1.0)}, data, factors).tolist()
      [[0.5, 4.5]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 2, with the opposite sign.
    """
    return _from_factors(objective, params, input_data, influence_factors, InfluenceMode.Up, "x", progress)


def compute_influences_pert(
    objective: Loss,
    params: PyTree,
    input_data: Any,
    influence_factors: PyTree,
    *,
    wrt: str | int = "x",
    progress: bool = True,
) -> PyTree:
    r"""Influence of perturbing every input example, $\partial_{x_i}\langle x_q, \nabla\ell_i\rangle$.

    To first order in a change of the input; positive: more of that input helps the test example.  Moving the input by
    $\delta$ lowers its loss by $\langle s, \delta\rangle / N$, if the factors are through the inverse curvature of the
    mean loss over N examples.

    Args:
      objective: Loss of one example.
      params: Trained parameters.
      input_data: The examples asked about; a loader is read batch by batch.
      influence_factors: From `compute_influence_factors`, or their tree.
      wrt: The perturbed part of an example.
      progress: Whether to show a bar.

    Returns:
      `(Q, N, *x.shape)`.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z["x"]) ** 2
      >>> data = {"x": jnp.array([1.0, 2.0])}
      >>> ij.compute_influences_pert(f, {"w": jnp.array(3.0)}, data, {"w": jnp.array([1.0])}).tolist()
      [[6.0, 12.0]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 5, with the opposite sign.
    """
    return _from_factors(objective, params, input_data, influence_factors, InfluenceMode.Perturbation, wrt, progress)


def compute_influences(
    objective: Loss,
    params: PyTree,
    training_data: Any,
    *,
    test_data: Any = None,
    input_data: Any = None,
    inversion_method: InversionMethod | str | Solver = InversionMethod.Direct,
    influence_type: InfluenceType | str = InfluenceType.Up,
    hessian_regularization: float | RelativeDamping | None = None,
    curvature: Callable[[Any, PyTree, PyTree], LinearOperator] = Hessian,
    wrt: str | int = "x",
    key: Key | None = None,
    progress: bool = True,
    throw: bool = False,
) -> PyTree:
    r"""Influence of every input example on every test example, in one call.

    $\nabla\ell_q^\top (C + \lambda I)^{-1} \nabla\ell_i$, or its derivative in $x_i$.

    Args:
      objective: Loss of one example.
      params: Trained parameters.
      training_data: What the curvature is the mean over.
      test_data: The queries; the training data if None.
      input_data: The examples asked about; the training data if None.
      inversion_method: An `InversionMethod`, or a solver that brings its own damping.
      influence_type: `"up"` or `"perturbation"`.
      hessian_regularization: Damping $\lambda$ of a method given by name, which needs one: a number >= 0 or a
        `RelativeDamping`; unlike pyDVL's, it is not 0 unless told so.
      curvature: `(objective, params, data) -> LinearOperator`.
      wrt: The perturbed part of an example.
      key: For methods that draw random numbers.
      progress: Whether to show bars.
      throw: Raise a `ConvergenceError` where a solve does not converge, instead of warning.

    Returns:
      `(Q, N)`, or `(Q, N, *x.shape)` for perturbation; positive = helpful.

    Raises:
      TypeError, ValueError: If an argument is not of that form.
      ConvergenceError: If asked for.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> data = jnp.array([1.0, 3.0])
      >>> scores = ij.compute_influences(f, {"w": jnp.array(1.0)}, data, hessian_regularization=0.0)
      >>> [[round(x, 2) for x in row] for row in scores.tolist()]
      [[0.2, 1.8], [1.8, 16.2]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 2 and 5, with the opposite sign.
    """
    influence_type = as_mode(influence_type)
    as_solver(inversion_method, hessian_regularization, params)
    factors = compute_influence_factors(
        objective,
        params,
        training_data,
        training_data if test_data is None else test_data,
        inversion_method,
        hessian_perturbation=hessian_regularization,
        curvature=curvature,
        key=key,
        progress=progress,
        throw=throw,
    )
    asked = training_data if input_data is None else input_data
    return _from_factors(objective, params, asked, factors, influence_type, wrt, progress)


def as_solver(
    method: InversionMethod | str | Solver,
    damping: float | RelativeDamping | None,
    params: PyTree,
    name: str = "hessian_regularization",
) -> Solver:
    """The solver for a method's name, or the solver itself.

    Raises:
      ValueError: If there is no such method, or a solver comes together with a damping.
      TypeError: If it is neither, or a method comes without a damping.
    """
    if damping is not None:
        check_damping(damping, name)
    if isinstance(method, str):
        makers = {
            InversionMethod.Direct: Direct,
            InversionMethod.Cg: BlockCG,
            InversionMethod.Lissa: LiSSA,
            InversionMethod.Arnoldi: lambda damping: Arnoldi(damping, rank=min(DEFAULT_RANK, tree.size(params))),
        }
        if method not in makers:
            raise ValueError(f"inversion_method: got {method!r}, expected one of {[str(m) for m in InversionMethod]}")
        if damping is None:
            raise TypeError(f"{name}: got none for the method {str(method)!r}, expected {CHOICES}")
        return makers[InversionMethod(method)](damping)
    check_solver(method)
    if damping is not None:
        raise ValueError(
            f"{name}: got {damping} together with {method!r}, which has a damping of its own; give it there"
        )
    return method


def _from_factors(
    objective: Loss,
    params: PyTree,
    input_data: Any,
    factors: PyTree,
    mode: InfluenceMode,
    wrt: str | int,
    progress: bool,
) -> PyTree:
    factors = factors.x if isinstance(factors, InverseHvpResult) else factors
    influence = Influence(objective, params, Identity(params))
    parts, start, watch = [], 0, influence.train_watch("input_data")
    for batch in track(batches(input_data, "input_data"), "influences", count_batches(input_data), show=progress):
        parts.append(influence.from_factors_untold(factors, batch, mode, wrt))
        watch.batch(look(parts[-1], 1), batch, start)
        start += tree.count(batch)
    if not parts:
        raise ValueError("input_data: is empty, expected at least one batch")
    watch.warn()
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
