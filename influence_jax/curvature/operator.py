"""Self-adjoint maps on parameter-shaped trees, their sums and multiples."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, tree
from .._mesh import compiled
from .._pytree import dataclass, set_field, static
from .._typing import Array, LossFunction, PyTree
from ..batching import map_rows
from ..gradients import mixed_product, per_example_grads
from ..objective import Objective
from .layout import Layout


@dataclass
class BilinearForm:
    r"""The bilinear form of an operator, $\langle u, v\rangle_A = u^\top A\, v$; made by `op.as_bilinear_form()`.

    The operator is applied to whichever side has fewer vectors.

    Example:
      >>> import influence_jax as ij
      >>> form = ij.Diagonal({"w": jnp.array([1.0, 2.0])}).as_bilinear_form()
      >>> form.inner_prod({"w": jnp.eye(2)}).tolist()
      [[1.0, 0.0], [0.0, 2.0]]
    """

    op: LinearOperator

    def inner_prod(self, left: PyTree, right: PyTree | None = None) -> Array:
        r"""All products $u_n^\top A\, v_m$.

        Args:
          left: Stack, leaves `(N, *leaf)`.
          right: Stack with any further axes, leaves `(M, *extra, *leaf)`; `left` if None.

        Returns:
          Array `(N, M, *extra)`.

        Raises:
          ValueError: If a side is not made of vectors of the operator's space.
        """
        right = left if right is None else right
        space = self.op.space
        tree.check_stack(left, space, "left")
        lead = _leading_axes(right, space)
        tree.check_vector(right, space, "right", lead=lead)
        rows = jax.tree.map(lambda x, s: x.reshape((-1, *s.shape)), right, space)
        left, rows = tree.promote(left), tree.promote(rows)
        if tree.count(left) <= tree.count(rows):
            products = inner_products(self.op.mm(left), rows)
        else:
            products = inner_products(left, self.op.mm(rows))
        return products.reshape((tree.count(left), *lead))

    def grads_inner_prod(
        self,
        left: PyTree,
        right: PyTree | None = None,
        *,
        objective: Objective | LossFunction,
        params: PyTree,
    ) -> Array:
        r"""Products of per-example gradients, $\nabla\ell_n^\top A\, \nabla\ell_m$.

        Args:
          left: Batch, leaves `(N, ...)`.
          right: Batch, leaves `(M, ...)`; `left` if None.
          objective: Loss of one example.
          params: Where the gradients are taken.

        Returns:
          Array `(N, M)`.
        """
        grads = per_example_grads(objective, params, left)
        return self.inner_prod(grads, None if right is None else per_example_grads(objective, params, right))

    def mixed_grads_inner_prod(
        self,
        left: PyTree,
        right: PyTree | None = None,
        *,
        objective: Objective | LossFunction,
        params: PyTree,
        wrt: str | int = "x",
    ) -> PyTree:
        r"""Products of gradients and mixed derivatives, $\nabla\ell_n^\top A\, \partial_{x_m}\nabla\ell_m$.

        Args:
          left: Batch, leaves `(N, ...)`.
          right: Batch, leaves `(M, ...)`; `left` if None.
          objective: Loss of one example.
          params: Where the derivatives are taken.
          wrt: The part of the right examples to differentiate.

        Returns:
          Array `(N, M, *x.shape)`, or a pytree of such arrays if the part is a pytree.
        """
        vectors = self.op.mm(per_example_grads(objective, params, left))
        products = mixed_product(objective, params, left if right is None else right, vectors, wrt=wrt)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), products)

    def __repr__(self) -> str:
        return _reprs.call(self, repr(self.op))


def _leading_axes(stack: PyTree, space: PyTree) -> tuple[int, ...]:
    """The axes in front of the parameters' own, taken from the first leaf."""
    leaves, like = jax.tree.leaves(stack), jax.tree.leaves(space)[0]
    return jnp.shape(leaves[0])[: jnp.ndim(leaves[0]) - len(like.shape)] if leaves else ()


inner_products = compiled(tree.gram)


class LinearOperator(abc.ABC):
    """A self-adjoint map on trees shaped like `space`.

    Subclasses define `mv` and `space`, and are pytrees if they are to be arguments of compiled programs; that suffices
    for all iterative solvers. `a + b`, `a - b`, `2.0 * a`, `a / 2` and `-a` are operators, too; what else one may offer
    is asked for by functions, such as `diagonal` and `spectral`.

    Example:
      >>> import dataclasses
      >>> import influence_jax as ij
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True, repr=False)
      ... class Doubled(ij.LinearOperator):
      ...     params: dict
      ...     space = property(lambda self: self.params)
      ...     mv = lambda self, v: jax.tree.map(lambda x: 2 * x, v)
      >>> doubled = Doubled({"w": jnp.ones(2)})
      >>> doubled, ij.invert(doubled, ij.CG(damping=1.0)).mv({"w": jnp.array([3.0, 6.0])})["w"].tolist()
      (Doubled(2 parameters), [1.0, 2.0])
    """

    @abc.abstractmethod
    def mv(self, v: PyTree) -> PyTree:
        """The product with one vector; the dtypes of `v` are kept."""

    @property
    @abc.abstractmethod
    def space(self) -> PyTree:
        """The parameters: structure, shapes and dtypes of the vectors this acts on."""

    @property
    def psd(self) -> bool:
        """Whether it is known to be positive semi-definite."""
        return False

    @property
    def symmetric(self) -> bool:
        """Whether it is self-adjoint to rounding; only inverses by randomised solvers are not."""
        return True

    @property
    def on_host(self) -> bool:
        """Whether its products read data from outside, so that they cannot be part of a compiled program."""
        return False

    @property
    def is_curvature(self) -> bool:
        """Whether it is a curvature of a loss, of which `Influence` takes the inverse."""
        return False

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        """The parameters it was computed at, trees like `space`, one for each part of it; none if it has none."""
        return ()

    @property
    def fitted_with(self) -> tuple[PyTree, ...]:
        """The constants of the objectives it was computed of, where it holds them and there are any."""
        return ()

    @property
    def at_hand(self) -> bool:
        """Whether its products can still be had; not those over data that were read once and are gone."""
        return True

    @property
    def layout(self) -> Layout:
        """How vectors are laid out on a mesh of devices, if there is one."""
        return Layout()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return tree.size(self.space)

    @property
    def rhs_chunk(self) -> int | None:
        """How many stacked vectors `mm` multiplies at once; None leaves it to the backend."""
        return None

    def mm(self, V: PyTree) -> PyTree:
        """The product with every row of the stack `V`, leaves `(K, *leaf)`."""
        tree.check_stack(V, self.space, "V")
        return _map_mv(self, V)

    def as_bilinear_form(self) -> BilinearForm:
        """The form `u, v -> uᵀ A v` on stacks, gradients and mixed derivatives."""
        return BilinearForm(self)

    def assume_psd(self) -> LinearOperator:
        """The same operator, which whoever asks for this vouches to be positive semi-definite."""
        return Scaled(self, 1.0, assumed=True)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum((self, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __radd__(self, other: int) -> LinearOperator:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum(operators) starts at 0

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | Array) -> LinearOperator:
        return NotImplemented if isinstance(factor, LinearOperator) else Scaled(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Array) -> LinearOperator:
        return NotImplemented if isinstance(divisor, LinearOperator) else self * (1 / _nonzero(divisor))

    __array_ufunc__ = None  # so that an array of NumPy leaves multiplying to the operator

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.parameters(self.space))


@compiled
def _map_mv(op: LinearOperator, V: PyTree) -> PyTree:
    return map_rows(op.mv, V, op.rhs_chunk)


def _nonzero(divisor: Any) -> Any:
    """Return a divisor, unless it is no number or known to be zero."""
    known = _reprs.numbers(divisor) if isinstance(divisor, int | float | np.ndarray | np.generic | jax.Array) else None
    is_traced = isinstance(divisor, jax.core.Tracer) and divisor.shape == ()
    if not is_traced and (known is None or known.shape != () or known == 0 or not np.isfinite(known)):
        raise ValueError(f"divisor: got {divisor!r}, expected a finite number other than zero")
    return divisor


class Wrapper(LinearOperator):
    """An operator made of others on the same space, which has the properties of its parts; abstract."""

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[LinearOperator, ...]:
        """What it is made of."""

    @property
    def space(self) -> PyTree:
        return self.parts[0].space

    @property
    def psd(self) -> bool:
        return all(part.psd for part in self.parts)

    @property
    def symmetric(self) -> bool:
        return all(part.symmetric for part in self.parts)

    @property
    def on_host(self) -> bool:
        return any(part.on_host for part in self.parts)

    @property
    def is_curvature(self) -> bool:
        return any(part.is_curvature for part in self.parts)

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return tuple(at for part in self.parts for at in part.fitted_at)

    @property
    def fitted_with(self) -> tuple[PyTree, ...]:
        return tuple(constants for part in self.parts for constants in part.fitted_with)

    @property
    def at_hand(self) -> bool:
        return all(part.at_hand for part in self.parts)

    @property
    def layout(self) -> Layout:
        return next((part.layout for part in self.parts if part.layout.params), Layout())

    @property
    def rhs_chunk(self) -> int | None:
        return min((part.rhs_chunk for part in self.parts if part.rhs_chunk is not None), default=None)


@dataclass
class Sum(Wrapper):
    """The sum of operators on one space; written `a + b`.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Identity({"w": jnp.ones(2)}) + 2.0 * ij.Identity({"w": jnp.ones(2)})
      >>> op.mv({"w": jnp.ones(2)})["w"].tolist()
      [3.0, 3.0]
    """

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        for term in self.terms[1:]:
            tree.check_vector(term.space, self.terms[0].space, "sum of operators")

    def mv(self, v: PyTree) -> PyTree:
        return tree.total([term.mv(v) for term in self.terms])

    def mm(self, V: PyTree) -> PyTree:
        return tree.total([term.mm(V) for term in self.terms])

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return self.terms

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


@dataclass
class Scaled(Wrapper):
    """A multiple of an operator; written `2.0 * op`, `-op` or `op / 2`.

    Positive semi-definite if the operator is, and the factor is known not to be negative: it may be an array, but not a
    traced one.  `op.assume_psd()` vouches for more.
    """

    op: LinearOperator
    factor: Array | float
    keeps_sign: bool = static(default=False)  # kept, for a factor is traced in compiled programs
    assumed: bool = static(default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float | np.ndarray | np.generic | jax.Array):
            raise TypeError(f"factor: got {self.factor!r}, expected a number")
        if jnp.shape(self.factor) != ():
            raise ValueError(f"factor: got shape {jnp.shape(self.factor)}, expected a scalar")
        known = _reprs.numbers(self.factor)
        if known is not None and not np.isfinite(known):
            raise ValueError(f"factor: got {self.factor}, expected a finite number")
        if known is not None:
            set_field(self, "keeps_sign", bool(known >= 0))

    def mv(self, v: PyTree) -> PyTree:
        return tree.scale(self.factor, self.op.mv(v))

    def mm(self, V: PyTree) -> PyTree:
        return tree.scale(self.factor, self.op.mm(V))

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.op,)

    @property
    def psd(self) -> bool:
        return self.assumed or (self.keeps_sign and self.op.psd)

    def __mul__(self, factor: float | Array) -> LinearOperator:
        if self.assumed or isinstance(factor, LinearOperator):
            return LinearOperator.__mul__(self, factor)
        return Scaled(self.op, factor * self.factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        inner = f"({self.op!r})" if isinstance(self.op, Sum) else repr(self.op)
        return f"{_reprs.value(self.factor)} * {inner}"
