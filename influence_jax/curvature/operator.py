"""Self-adjoint maps on parameter-shaped trees, their sums and multiples."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, PyTree
from ..batching import map_over, rhs_chunk_or_default


class LinearOperator(abc.ABC):
    """A self-adjoint map on trees shaped like `space`."""

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
    def size(self) -> int:
        """Number of parameters."""
        return tree.size(self.space)

    @property
    def rhs_chunk(self) -> int | None:
        """How many stacked vectors `mm` multiplies at once; None leaves it to the backend."""
        return None

    def mm(self, V: PyTree) -> PyTree:
        """The product with every row of a stack, leaves `(K, *leaf)`."""
        tree.check_stack(V, self.space, "V")
        return _map_mv(self, V)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum((self, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | Array) -> LinearOperator:
        if isinstance(factor, LinearOperator):
            return NotImplemented
        return Scaled(self, factor, isinstance(factor, int | float) and bool(factor >= 0))

    def __radd__(self, other: int) -> LinearOperator:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum(operators) starts at 0

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:,} parameters)"


@jax.jit
def _map_mv(op: LinearOperator, V: PyTree) -> PyTree:
    return map_over(op.mv, V, chunk=rhs_chunk_or_default(op.rhs_chunk))


@dataclass
class Sum(LinearOperator):
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
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *(term.mv(v) for term in self.terms))

    def mm(self, V: PyTree) -> PyTree:
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *(term.mm(V) for term in self.terms))

    @property
    def space(self) -> PyTree:
        return self.terms[0].space

    @property
    def psd(self) -> bool:
        return all(term.psd for term in self.terms)

    @property
    def symmetric(self) -> bool:
        return all(term.symmetric for term in self.terms)

    @property
    def rhs_chunk(self) -> int | None:
        chunks = [term.rhs_chunk for term in self.terms if term.rhs_chunk is not None]
        return min(chunks, default=None)


@dataclass
class Scaled(LinearOperator):
    """A multiple of an operator; written `2.0 * op`.

    It counts as positive semi-definite only if the operator does and the factor is a non-negative Python number.
    """

    op: LinearOperator
    factor: Array | float
    keeps_sign: bool = static(default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float | np.ndarray | np.generic | jax.Array):
            raise TypeError(f"factor: got {self.factor!r}, expected a number")
        if jnp.shape(self.factor) != ():
            raise ValueError(f"factor: got shape {jnp.shape(self.factor)}, expected a scalar")

    def mv(self, v: PyTree) -> PyTree:
        return tree.scale(self.factor, self.op.mv(v))

    def mm(self, V: PyTree) -> PyTree:
        return tree.scale(self.factor, self.op.mm(V))

    @property
    def space(self) -> PyTree:
        return self.op.space

    @property
    def psd(self) -> bool:
        return self.op.psd and self.keeps_sign

    @property
    def symmetric(self) -> bool:
        return self.op.symmetric

    @property
    def rhs_chunk(self) -> int | None:
        return self.op.rhs_chunk
