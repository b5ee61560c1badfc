r"""Projections of all parameters at once."""

from __future__ import annotations

import jax

from .. import tree
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import check_positive
from .base import Projection, checked_key, checked_params, scaled, summed, times_entries


@dataclass
class OneSided(Projection):
    """A dense random matrix with independent entries, of which a block of rows exists at a time.

    Made by `rademacher` and `gaussian`.

    Example:
      >>> import jax.numpy as jnp
      >>> rademacher({"w": jnp.ones(30)}, 8, jax.random.key(0)).widths
      (8,)
    """

    def of_stack(self, stack: PyTree) -> Array:
        parts = [
            times_entries(self.kind, jax.random.fold_in(self.key, place), leaf.reshape(leaf.shape[0], -1), self.dim)
            for place, leaf in enumerate(jax.tree.leaves(tree.promote(stack)))
            if leaf.size
        ]
        return scaled(summed(parts), self.dim)


def rademacher(params: PyTree, dim: int, key: Key) -> OneSided:
    r"""A projection by random signs, $R_{pd} = \pm 1/\sqrt{\mathrm{dim}}$.

    $\mathrm{Var}\,\langle\varphi(a), \varphi(b)\rangle = \frac{1}{\mathrm{dim}} \big(\|a\|^2\|b\|^2 + \langle a,
    b\rangle^2 - 2\sum_p a_p^2 b_p^2\big)$: less than with Gaussian entries, and a 32nd of the random numbers.

    Args:
      params: The parameters, or their shapes; leaves `(*leaf)`.
      dim: Length of projected vectors.
      key: A threefry key, which `jax.random.key(seed)` makes.

    Returns:
      A `Projection`.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(30)}
      >>> projection = rademacher(params, 64, jax.random.key(0))
      >>> projection
      OneSided(rademacher, 630 parameters to 64)
      >>> projection.project(jax.tree.map(lambda x: jnp.ones((5, *x.shape)), params)).shape
      (5, 64)

    Reference: Achlioptas 2003; Park et al. 2023, arXiv:2303.14186, section 3.2.
    """
    return _one_sided(params, dim, key, "rademacher")


def gaussian(params: PyTree, dim: int, key: Key) -> OneSided:
    r"""A projection by independent normal entries, $R_{pd} \sim N(0, 1/\mathrm{dim})$.

    $\mathrm{Var}\,\langle\varphi(a), \varphi(b)\rangle = \frac{1}{\mathrm{dim}} \big(\|a\|^2\|b\|^2 + \langle a,
    b\rangle^2\big)$.

    Args:
      params: The parameters, or their shapes; leaves `(*leaf)`.
      dim: Length of projected vectors.
      key: A threefry key, which `jax.random.key(seed)` makes.  Entries of another make of device agree to rounding.

    Returns:
      A `Projection`.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(30)}
      >>> gaussian(params, 64, jax.random.key(0))
      OneSided(gaussian, 630 parameters to 64)

    Reference: Johnson & Lindenstrauss 1984; Park et al. 2023, arXiv:2303.14186, section 3.2.
    """
    return _one_sided(params, dim, key, "gaussian")


def _one_sided(params: PyTree, dim: int, key: Key, kind: str) -> OneSided:
    leaves, structure = jax.tree.flatten(checked_params(params))
    check_positive(dim, "dim")
    return OneSided(checked_key(key), kind, int(dim), structure, tuple(leaf.shape for leaf in leaves))
