"""Algebra on parameter-shaped trees, single or stacked along a leading axis.

A *vector* is a tree shaped like the parameters.  A *stack* is the same tree with one extra leading axis: per-example
gradients, right-hand sides, Krylov bases.  Inner products accumulate in at least float32 at the highest matmul
precision, because accelerators may otherwise multiply in bfloat16 or TF32.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._mesh import compiled
from ._typing import Array, PyTree

HIGHEST = lax.Precision.HIGHEST
# What flax keeps beside "params".
COLLECTIONS = ("batch_stats", "cache", "intermediates", "perturbations", "params_axes")


def path_name(path: tuple) -> str:
    """Slash-separated name of a leaf, e.g. `"encoder/0/kernel"`; the `value` of an nnx.Param is not part of it."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Array]]:
    """`(name, leaf)` pairs in leaf order.

    Raises:
      ValueError: If a dict has keys that cannot be sorted, such as 1 and "1".
    """
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_opaque)
    except ValueError as error:
        raise ValueError(
            f"a tree of arrays: got a dict whose keys cannot be sorted ({error}); let its keys be all strings, or all "
            "ints: 1 and '1' would be one name"
        ) from None
    return [(path_name(path), leaf) for path, leaf in leaves]


def is_loader(x: PyTree) -> bool:
    """Tell whether `x` is an iterable that JAX does not know as a container; it warns about those."""
    return isinstance(x, Iterable) and jax.tree_util.default_registry.flatten_one_level(x) is None


def is_opaque(x: PyTree) -> bool:
    """Tell whether `x` is to be seen as one leaf: a loader, or a sparse array, whose parts hold no examples."""
    return is_loader(x) or is_sparse(x)


def is_sparse(x: Any) -> bool:
    """Tell whether it is a sparse array of JAX, which is a tree of its parts."""
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(x, sparse.JAXSparse)


def is_foreign(x: Any) -> bool:
    """Tell whether it is an array of another framework, or on disk, that has shape and entries."""
    known = isinstance(x, np.ndarray | np.generic | jax.Array) or hasattr(x, "__jax_array__")
    return not known and hasattr(x, "shape") and (hasattr(x, "__array__") or _has_entries(x))


def _has_entries(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "__getitem__")


def read(x: Any, what: str) -> Any:
    """Return an array of another framework, on disk or of a special kind, as NumPy's; anything else as it is.

    Args:
      x: A leaf.
      what: What it is called in messages.

    Raises:
      TypeError: If NumPy cannot read it, or it is sparse, has masked entries or numbers that JAX has not.
    """
    if isinstance(x, np.ndarray):
        return _plain(x, what)
    if not is_foreign(x):
        return x
    try:
        entries = np.asarray(x if hasattr(x, "__array__") else x[...])
    except (TypeError, ValueError, RuntimeError) as error:
        way = ".to_dense()" if "to_dense" in str(error) else _conversion(x)
        raise TypeError(
            f"{what}: got a {_type_name(x)} that NumPy cannot read ({error}); convert it, e.g. with {way}"
        ) from error
    if entries.shape != tuple(x.shape):
        raise TypeError(
            f"{what}: got a {_type_name(x)} of shape {tuple(x.shape)}, of which NumPy reads shape {entries.shape}; "
            f"expected a dense array, so convert it, e.g. with {_conversion(x)}"
        )
    return _plain(entries, what)


def _plain(x: np.ndarray, what: str) -> np.ndarray:
    """Return it without a mask, as no subclass, and in the byte order of this machine."""
    check_unmasked(x, what)
    x = np.asarray(x)
    if x.dtype.kind in "fc" and np.finfo(x.dtype).bits > 64:
        raise TypeError(f"{what}: got {x.dtype}, which JAX has not; cast it, e.g. with .astype(numpy.float32)")
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def check_unmasked(x: Any, what: str) -> None:
    """Raise TypeError if entries are masked, for whatever reads it takes what is under the mask."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise TypeError(
            f"{what}: got a masked array with {np.ma.count_masked(x)} masked entries, but JAX knows no masks; expected "
            "a plain array: fill them, e.g. with .filled(0), and let the loss, or weights=, leave them out"
        )


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _conversion(x: Any) -> str:
    """Return how to make a dense array on the host of it."""
    ways = {"toarray": ".toarray()", "todense": ".todense()", "detach": ".detach().float().cpu()"}
    return next((way for name, way in ways.items() if hasattr(x, name)), "numpy.asarray or .detach().float().cpu()")


def readable(tree: PyTree, name: str) -> PyTree:
    """`read` of all leaves.

    Raises:
      TypeError: As `read`, or if there is a sparse array of JAX, whose parts would be taken for arrays of examples.
    """

    def leaf_read(path: tuple, x: Any) -> Any:
        what = f"{name}: leaf '{path_name(path)}'" if path else name
        if is_sparse(x):
            raise TypeError(f"{what}: got a sparse {type(x).__name__}, expected a dense array; use .todense()")
        return read(x, what)

    named_leaves(tree)  # refuses keys that cannot be sorted
    return jax.tree_util.tree_map_with_path(leaf_read, tree, is_leaf=is_opaque)


@dataclasses.dataclass(frozen=True)
class Form:
    """Names and shapes of a tree's leaves, hashable: what another tree is matched with, by path and not by position.

    Containers may differ: a key is its text, so that 2 and "2", an attribute and a dict's key, an item of a list and
    `"0"` are the same, and `value`, in which flax.nnx keeps the array of a variable, may be there or not.

    Attributes:
      structure: Of the tree.
      shapes: Of its leaves, in their order.
    """

    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> list[str]:
        """Names of the leaves, in their order."""
        return [path_name(path) for path, _ in self._places()]

    def matched(self, tree: PyTree, name: str, whose: str) -> PyTree:
        """`tree` in this structure, each leaf at its own path.

        Args:
          tree: Of the same leaves.
          name: What it is called in messages.
          whose: Whose form this is, e.g. `"the model"`.

        Raises:
          ValueError: If leaves are missing, unexpected, share a name or are of other shapes.
        """
        alike = jax.tree.structure(tree) == self.structure
        leaves = jax.tree.leaves(tree) if alike else self._in_order(tree, name, whose)
        for (path, _), leaf, shape in zip(self._places(), leaves, self.shapes, strict=True):
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{name}: leaf '{path_name(path)}' has shape {jnp.shape(leaf)}, but {whose} has {shape}; expected "
                    "arrays of the same sizes"
                )
        return tree if alike else self.structure.unflatten(leaves)

    def _places(self) -> list[tuple[tuple, int]]:
        """Paths of the leaves and their places."""
        return jax.tree_util.tree_leaves_with_path(self.structure.unflatten(range(self.structure.num_leaves)))

    def _in_order(self, tree: PyTree, name: str, whose: str) -> list[Array]:
        """The leaves of `tree` in the order of this form."""
        named_leaves(tree)  # refuses keys that cannot be sorted
        places, found, extra = _aliases([path for path, _ in self._places()]), {}, []
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            place = places.get(_texts(path))
            if place is None:
                extra.append("/".join(_texts(path)))
            elif place in found:
                twice = self.names[place]
                raise ValueError(f"{name}: two leaves are called '{twice}'; expected each leaf of {whose} once")
            else:
                found[place] = leaf
        missing = [path for place, path in enumerate(self.names) if place not in found]
        if missing or extra:
            raise ValueError(
                f"{name}: its leaves are not those of {whose}: {_listed('missing', missing)}, "
                f"{_listed('unexpected', extra)}; leaves are matched by their paths"
            )
        return [found[place] for place in range(len(found))]


def form(tree: PyTree) -> Form:
    """The form of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return Form(structure, tuple(jnp.shape(leaf) for leaf in leaves))


def _texts(path: tuple) -> tuple[str, ...]:
    """Return the keys of a path as text, those of flat dicts, "a/b" and ("a", "b"), taken apart."""
    keys = (getattr(key, "key", None) for key in path)
    parts = [map(str, key) if isinstance(key, tuple) else [_text(entry)] for key, entry in zip(keys, path, strict=True)]
    return tuple("/".join(itertools.chain.from_iterable(parts)).split("/")) if path else ()


def _text(key: jax.tree_util.KeyEntry) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _aliases(paths: Sequence[tuple]) -> dict[tuple[str, ...], int]:
    """Return where each path leads under all its names; a name that two paths could have belongs to none."""
    places: dict[tuple[str, ...], set[int]] = {}
    others: dict[tuple[str, ...], set[int]] = {}
    for place, path in enumerate(paths):
        texts, kept = _texts(path), tuple(key for key in path if key != jax.tree_util.GetAttrKey("value"))
        short = texts[:-1] if len(texts) > 1 and texts[-1] == "value" else texts
        places.setdefault(texts, set()).add(place)
        for other in ((*texts, "value"), _texts(kept), short):
            others.setdefault(other, set()).add(place)
    return {name: min(of) for name, of in {**others, **places}.items() if len(of) == 1}


def _listed(what: str, names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what} {', '.join(map(repr, names[:4]))}{more}" if names else f"nothing {what}"


def size(tree: PyTree) -> int:
    """Number of scalar entries."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count(stack: PyTree) -> int:
    """Length of the leading axis."""
    return jax.tree.leaves(stack)[0].shape[0]


def widest(*dtypes: np.dtype) -> np.dtype:
    """The floating dtype that holds all of the given ones."""
    widths = {jnp.dtype(dtype): jnp.finfo(dtype).bits for dtype in dtypes}
    top = [dtype for dtype, bits in widths.items() if bits == max(widths.values())]
    return top[0] if len(top) == 1 else jnp.dtype(jnp.float32)  # bfloat16 and float16 meet in float32


def accumulation_dtype(*dtypes: np.dtype) -> np.dtype:
    """The dtype sums are kept in: the widest given, float32 at least."""
    return widest(jnp.dtype(jnp.float32), *dtypes)


def promote(tree: PyTree) -> PyTree:
    """Cast narrow leaves (bfloat16, float16) to float32; wider leaves are untouched."""
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), tree)


def shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone, without where the leaves are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def promote_shapes(shapes: PyTree) -> PyTree:
    """`promote` for a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, accumulation_dtype(x.dtype)), shapes)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Cast each leaf to the dtype of its counterpart in `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def cast_space(space: PyTree, block_vector: dict[str, Array]) -> PyTree:
    """Shapes of `space` in the dtypes of the block vector's leaves, where it has them."""
    dtypes = {name: leaf.dtype for name, leaf in block_vector.items()}

    def recast(path: tuple, leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path_name(path), leaf.dtype))

    return jax.tree_util.tree_map_with_path(recast, space)


def add(a: PyTree, b: PyTree) -> PyTree:
    """Sum of two trees of equal structure."""
    return jax.tree.map(jnp.add, a, b)


def total(trees: Sequence[PyTree]) -> PyTree:
    """Return the sum of trees, of which there is at least one."""
    return jax.tree.map(lambda first, *rest: sum(rest, first), *trees)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """Difference of two trees of equal structure."""
    return jax.tree.map(jnp.subtract, a, b)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the same structure, shapes and dtypes; leaves may be `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def scale(factor: Array | float, tree: PyTree) -> PyTree:
    """Multiply every leaf by a scalar, keeping dtypes."""
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def stack_of_one(vector: PyTree) -> PyTree:
    """Add a leading axis of length one."""
    return jax.tree.map(lambda x: x[None], vector)


def only(stack: PyTree) -> PyTree:
    """Drop the leading axis of a stack of one."""
    return jax.tree.map(lambda x: x[0], stack)


def _per_row(coefficients: Array, leaf: Array) -> Array:
    return coefficients.astype(leaf.dtype).reshape(coefficients.shape + (1,) * (leaf.ndim - coefficients.ndim))


def scale_rows(coefficients: Array, stack: PyTree) -> PyTree:
    """Row k of the stack times `coefficients[k]`."""
    return jax.tree.map(lambda x: _per_row(coefficients, x) * x, stack)


def add_scaled_rows(a: PyTree, coefficients: Array, b: PyTree) -> PyTree:
    """`a[k] + coefficients[k] * b[k]` for each row k."""
    return jax.tree.map(lambda x, y: x + _per_row(coefficients, y) * y, a, b)


def where_rows(mask: Array, a: PyTree, b: PyTree) -> PyTree:
    """Row k of `a` where `mask[k]`, else row k of `b`."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y), a, b)


def dot(a: PyTree, b: PyTree) -> Array:
    """Inner product of two vectors, a scalar."""

    def leaf_dot(x: Array, y: Array) -> Array:
        dtype = accumulation_dtype(x.dtype, y.dtype)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    return _total([leaf_dot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])


def dots(a: PyTree, b: PyTree) -> Array:
    """Row-wise inner products of two stacks, `(K,)`."""
    return jax.vmap(dot)(a, b)


def norms(stack: PyTree) -> Array:
    """Row-wise Euclidean norms, `(K,)`, also where squares of the entries leave the range of their dtype."""
    rows = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(promote(stack))]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), axis=1, initial=0).astype(rows[0].dtype) for x in rows]), axis=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = [x / _per_row(unit, x) for x in rows]
    relative = jnp.sqrt(dots(scaled, scaled))
    return unit.astype(relative.dtype) * relative


def gram(a: PyTree, b: PyTree) -> Array:
    """All inner products between two stacks: `(M, ...)`, `(N, ...)` to `(M, N)`."""

    def leaf_gram(x: Array, y: Array) -> Array:
        dtype = accumulation_dtype(x.dtype, y.dtype)
        x, y = x.reshape(x.shape[0], -1).astype(dtype), y.reshape(y.shape[0], -1).astype(dtype)
        return jnp.matmul(x, y.T, precision=HIGHEST)

    return _total([leaf_gram(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])


def combine(coefficients: Array, stack: PyTree) -> PyTree:
    """Linear combinations of rows: `(M, K)`, `(K, ...)` to `(M, ...)`."""

    def leaf_combine(x: Array) -> Array:
        dtype = accumulation_dtype(x.dtype, coefficients.dtype)
        rows = x.reshape(x.shape[0], -1).astype(dtype)
        out = jnp.matmul(coefficients.astype(dtype), rows, precision=HIGHEST)
        return out.reshape((coefficients.shape[0], *x.shape[1:]))

    return jax.tree.map(leaf_combine, stack)


def orthonormal(stack: PyTree) -> tuple[PyTree, Array]:
    """QR decomposition of a stack, leaf by leaf and then of the small factors, so that no leaf is copied into another.

    Returns:
      Orthonormal rows, leaves `(S, *leaf)` with S the smaller of K and the number of parameters, whatever the rank of
      the stack; and `(S, K)`, the coefficients of the stack's rows in them.
    """
    leaves, structure = jax.tree.flatten(promote(stack))
    dtype = accumulation_dtype(*(leaf.dtype for leaf in leaves))
    parts = [jnp.linalg.qr(leaf.reshape(leaf.shape[0], -1).T.astype(dtype)) for leaf in leaves]
    q, r = jnp.linalg.qr(jnp.concatenate([part.R for part in parts]))
    ends = np.cumsum([part.R.shape[0] for part in parts])[:-1]
    rows = [
        jnp.matmul(part.Q, block, precision=HIGHEST).T.reshape((q.shape[1], *leaf.shape[1:])).astype(leaf.dtype)
        for part, block, leaf in zip(parts, jnp.split(q, ends), leaves, strict=True)
    ]
    return structure.unflatten(rows), r


def _total(parts: Sequence[Array]) -> Array:
    dtype = accumulation_dtype(*(part.dtype for part in parts))
    total = parts[0].astype(dtype)
    for part in parts[1:]:
        total = total + part.astype(dtype)
    return total


def flatten(tree: PyTree, like: PyTree) -> Array:
    """Concatenate leaves into the last axis: a vector to `(P,)`, a stack `(N, ...)` to `(N, P)`.

    Entries follow the leaf order of `like`, each leaf in C order, in the widest dtype among the leaves.

    Args:
      tree: Leaves `(*lead, *leaf)` with any leading axes in common.
      like: The parameters; leaves `(*leaf)`.

    Returns:
      Array `(*lead, P)`.

    Raises:
      ValueError: If the structure or a shape differs from `like`.

    Example:
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
      >>> ij.flatten(params, params).shape
      (9,)
    """
    leads = {
        x.shape[: x.ndim - len(y.shape)] for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=False)
    }
    lead = leads.pop() if len(leads) == 1 else ()
    check_vector(tree, like, "tree", lead=lead)
    dtype = widest(*(x.dtype for x in jax.tree.leaves(tree)))
    return _concatenated(jax.tree.leaves(tree), lead, dtype)


@partial(compiled, static_argnames=("lead", "dtype"))
def _concatenated(leaves: list[Array], lead: tuple[int, ...], dtype: np.dtype) -> Array:
    return jnp.concatenate([x.astype(dtype).reshape((*lead, -1)) for x in leaves], axis=-1)


def unflatten(array: Array, like: PyTree) -> PyTree:
    """Inverse of `flatten`: `(*lead, P)` to a tree with leaves `(*lead, *leaf)`, in the array's dtype.

    Args:
      array: Entries in the leaf order of `like`.
      like: The parameters.

    Returns:
      A tree of the structure of `like`.

    Raises:
      ValueError: If the last axis does not have as many entries as `like`.

    Example:
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
      >>> ij.unflatten(jnp.arange(9.0), params)["b"].tolist()
      [0.0, 1.0, 2.0]
    """
    array = jnp.asarray(array)
    if array.ndim == 0 or array.shape[-1] != size(like):
        raise ValueError(
            f"array: got shape {array.shape}, expected the last axis to have {size(like)} entries, one per parameter"
        )
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])[:-1]
    parts = jnp.split(array, ends, axis=-1)
    return structure.unflatten(
        [part.reshape(array.shape[:-1] + leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def basis_vector(index: Array, like: PyTree, dtype: np.dtype) -> PyTree:
    """Column `index` of the identity on the space of `like`."""
    return unflatten((jnp.arange(size(like)) == index).astype(dtype), like)


def is_number(dtype: np.dtype) -> bool:
    """Tell whether entries of that dtype of NumPy's are numbers or booleans."""
    return dtype.kind in "biufc" or jnp.issubdtype(dtype, np.number)  # the latter for bfloat16 and its kind


def is_float64_lost(leaf: Array | np.ndarray) -> bool:
    """Whether JAX would silently cut this leaf to single precision."""
    wide = np.dtype(leaf.dtype) in (np.dtype(np.float64), np.dtype(np.complex128)) if _has_numpy_dtype(leaf) else False
    return wide and jax.dtypes.canonicalize_dtype(np.float64) != np.dtype(np.float64)


def _has_numpy_dtype(leaf: Array | np.ndarray) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def check_params(params: PyTree, name: str = "params") -> PyTree:
    """Return `params` with JAX array leaves, or say which leaf cannot be differentiated and what to do.

    Raises:
      ValueError: If there are no leaves, or two leaves share a name.
      TypeError: If a leaf is not a real floating array, or is float64 while x64 is off, or if the tree is the state of
        a training.
    """
    named_leaves(params)  # refuses keys that cannot be sorted
    _check_not_a_state(params, name)
    check_only_params(params, name)
    params = readable(params, name)
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError(f"{name}: got a tree without leaves, expected at least one array of parameters")
    names = [leaf_name for leaf_name, _ in leaves]
    if len(set(names)) < len(names):
        twice = sorted({leaf_name for leaf_name in names if names.count(leaf_name) > 1})
        raise ValueError(f"{name}: leaves share the names {twice}; rename keys that contain '/'")
    for leaf_name, leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{name}: leaf '{leaf_name}' is a {type(leaf).__name__}, expected a floating array; use jnp.asarray"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            got = leaf.dtype
            raise TypeError(
                f"{name}: leaf '{leaf_name}' is {got}, expected a real floating array; move what is not trained "
                "(counters, keys, integer tables) into Objective(..., constants=...)"
            )
        if is_float64_lost(leaf):
            raise TypeError(
                f"{name}: leaf '{leaf_name}' is float64 but 64-bit mode is off, so JAX would cut it to float32; cast "
                "it to float32 or run under jax.enable_x64(True)"
            )
    return jax.tree.map(jnp.asarray, params)


def _check_not_a_state(params: PyTree, name: str) -> None:
    """Raise TypeError if what was given holds parameters and more, as the state of a training does."""
    if isinstance(params, Mapping):
        keys = [key for key in params if key in ("opt_state", "optimizer_state", "step")]
        if "params" in params and keys:
            raise TypeError(
                f"{name}: got a dict with 'params' and {keys}, expected the parameters; pass its ['params']"
            )
    elif hasattr(params, "opt_state"):
        has = hasattr(params, "params")
        way = "pass state.params" if has else "pass nnx.state(model, nnx.Param) of the model it updates"
        raise TypeError(f"{name}: got the training state {type(params).__name__}, expected the parameters; {way}")
    for part in jax.tree.leaves(params, is_leaf=_is_optax):
        if _is_optax(part):
            raise TypeError(
                f"{name}: got the state of an optimizer (it holds {type(part).__name__}), expected the parameters that "
                "it updates, e.g. state.params of a train state"
            )


def check_only_params(params: PyTree, name: str) -> None:
    """Raise TypeError if flax keeps part of it beside the parameters: it would be differentiated as if it were trained.

    Args:
      params: Any tree.
      name: What it is called in messages.
    """
    paths = [_texts(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_loader)]
    whole = {path[: i + 1] for path in paths for i in range(len(path))}
    found = {
        path[: i + 1]
        for path in paths
        for i, key in enumerate(path[:-1])
        if key == "batch_stats" or (key in COLLECTIONS and (*path[:i], "params") in whole)
    }
    kinds = dict.fromkeys("/".join(path) for path in sorted(found)) or _nnx_variables(params)
    if kinds:
        raise TypeError(
            f"{name}: got {', '.join(map(repr, kinds))} among the parameters, which no training differentiates; "
            "expected the parameters alone, e.g. variables['params'] or nnx.state(model, nnx.Param). Pass the rest as "
            "influence_jax.Objective(predict, loss, constants=...), which from_linen(module, variables, loss) and "
            "from_nnx(model, loss) do"
        )


def _nnx_variables(params: PyTree) -> list[str]:
    """Return which kinds of nnx variables that are no parameters are in it."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []
    kinds = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate)
    parts = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return sorted({type(part).__name__ for part in parts if isinstance(part, kinds)})


def _is_optax(part: PyTree) -> bool:
    return isinstance(part, tuple) and type(part).__module__.split(".")[0] == "optax"


def check_vector(vector: PyTree, like: PyTree, name: str, *, lead: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless `vector` has the structure of `like` and leaves `(*lead, *leaf)`."""
    if jax.tree.structure(vector) != jax.tree.structure(like):
        raise ValueError(f"{name}: {_structure_difference(vector, like)}")
    for (leaf_name, leaf), other in zip(named_leaves(vector), jax.tree.leaves(like), strict=True):
        _check_read(leaf, f"{name}: leaf '{leaf_name}'")
        expected = (*lead, *other.shape)
        if jnp.shape(leaf) != expected:
            raise ValueError(f"{name}: leaf '{leaf_name}' has shape {jnp.shape(leaf)}, expected {expected}")
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            got = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(f"{name}: leaf '{leaf_name}' is {got}, expected an array of a floating dtype")
        if is_float64_lost(leaf):
            raise TypeError(f"{name}: leaf '{leaf_name}' is float64 but 64-bit mode is off; cast it to float32")


def _check_read(leaf: Any, what: str) -> None:
    """Raise TypeError unless JAX takes it as it is."""
    found = read(leaf, what)
    if found is not leaf and (is_foreign(leaf) or found.dtype != leaf.dtype):
        got = f"{_type_name(leaf)} of {leaf.dtype}"
        raise TypeError(f"{what}: got a {got}, expected an array of JAX or NumPy in native byte order; convert it")


def check_stack(stack: PyTree, like: PyTree, name: str) -> int:
    """Check a stack as `check_vector` does, with one leading axis in common, and return its length."""
    leaves = named_leaves(stack)
    lengths = {leaf_name: jnp.shape(leaf)[:1] for leaf_name, leaf in leaves}
    same_structure = jax.tree.structure(stack) == jax.tree.structure(like)
    if same_structure and len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: leaves disagree in leading length, got {lengths}; a stack has one row per vector")
    (length,) = lengths[leaves[0][0]] if same_structure and lengths[leaves[0][0]] else (1,)
    check_vector(stack, like, name, lead=(length,))
    return length


def _structure_difference(vector: PyTree, like: PyTree) -> str:
    if isinstance(vector, jax.Array | np.ndarray):
        return (
            f"got one array of shape {vector.shape}, expected a tree shaped like the parameters; "
            "turn a flat array into one with influence_jax.unflatten(array, params)"
        )
    got = {leaf_name for leaf_name, _ in named_leaves(vector)}
    expected = {leaf_name for leaf_name, _ in named_leaves(like)}
    if got != expected:
        missing, extra = sorted(expected - got), sorted(got - expected)
        return f"its leaves differ from the parameters' ({_listed('missing', missing)}, {_listed('unexpected', extra)})"
    got, wanted = _containers(vector), _containers(like)
    if got == wanted:  # keys 0 and "0", or what a container keeps beside its leaves
        got, wanted = jax.tree.structure(vector), jax.tree.structure(like)
    return (
        f"its leaves have the names of the parameters', but in other containers: {got}, expected {wanted}; use one and "
        "the same tree of parameters everywhere"
    )


def _containers(tree: PyTree) -> str:
    """Return the types of a tree's containers."""
    kinds: dict[str, None] = {}

    def see(node: PyTree) -> bool:
        if not jax.tree_util.all_leaves([node]):
            kinds.setdefault(type(node).__name__)
        return False

    jax.tree.leaves(tree, is_leaf=see)
    return ", ".join(kinds) or "none"
