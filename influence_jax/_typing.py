"""Type aliases shared by the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.typing

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
Key: TypeAlias = jax.Array
LossFunction: TypeAlias = Callable[[PyTree, PyTree], Array]
