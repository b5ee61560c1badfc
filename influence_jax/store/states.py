"""Fitted states on disk: any tree of arrays, sharded ones included, saved once and loaded in another process."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree as trees
from .._typing import PyTree
from .arrays import checksum
from .files import Lock, read_json, sealed, unsealed, write_json, writing

_DESCRIPTION = "state.json"
_SCALARS = {"bool": np.bool_, "int": np.integer, "float": np.floating}


def save(path: str | os.PathLike, tree: PyTree, *, overwrite: bool = False) -> None:
    """Save a fitted state: an `Inverse`, a `Kronecker` operator, factors, parameters, any tree of arrays.

    A save that is interrupted leaves nothing to load, or, when it overwrites, what was there before.  Functions and
    other static parts are not saved, only compared when loading.

    Args:
      path: Its folder.
      tree: Leaves are arrays (NumPy or JAX, sharded or not, typed keys included) or Python scalars.
      overwrite: Whether to replace a state that is there.

    Raises:
      TypeError: If a leaf is neither.
      ValueError: If something is there.
      OSError: If it cannot be written.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/params"
      >>> save(path, {"w": jnp.arange(3.0)})
      >>> load(path, {"w": jax.ShapeDtypeStruct((3,), jnp.arange(3.0).dtype)})["w"].tolist()
      [0.0, 1.0, 2.0]
    """
    path = Path(path).absolute()
    leaves = trees.named_leaves(tree)
    described = [_describe(name, leaf) for name, leaf in leaves]
    generation = _free_generation(path, overwrite)
    arrays, places = {}, {}
    for i, (_, leaf) in enumerate(leaves):  # an array that is there twice, as in an operator and a state, is kept once
        if described[i]["stored"] is not None:
            described[i]["stored"] = places.setdefault(id(leaf), f"{i:04d}")
            arrays[places[id(leaf)]] = _storable(leaf)
    first = jax.process_index() == 0
    if first:
        with writing("a state", path):
            path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path / "lock") if first else None
    try:
        if arrays:
            _write_arrays(path / f"arrays-{generation}", arrays)
        if first:
            record = {"format": 1, "generation": generation, "structure": _structure(tree), "leaves": described}
            write_json(path / _DESCRIPTION, sealed(record))
            for old in path.glob("arrays-*"):
                if old.name != f"arrays-{generation}":
                    shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            lock.close()
    if jax.process_count() > 1:  # nobody goes on to load before it is there
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("influence_jax.store.save")


def load(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Load what `save` saved.

    Args:
      path: Its folder.
      like: A tree of the same structure, leaves `(*leaf)` of the same shapes and dtypes, concrete or abstract (from
        `jax.eval_shape`).  Arrays come back with the shardings of its leaves, on the default device where they have
        none.

    Returns:
      The state, in the structure of `like`.

    Raises:
      FileNotFoundError: If no finished state is there.
      ValueError: If the state is damaged, or is not like `like`.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/factors"
      >>> factors = {"w": np.ones((2, 3), np.float32)}  # leaves (Q, *leaf)
      >>> save(path, factors)
      >>> load(path, factors)["w"].shape
      (2, 3)
    """
    path = Path(path).absolute()
    record = _read_description(path)
    expected = trees.named_leaves(like)
    _check_like(path, record, like, expected)
    first = {}
    for described, (_, wanted) in zip(record["leaves"], expected, strict=True):
        first.setdefault(described["stored"], (described, wanted))
    first.pop(None, None)
    arrays = _read_arrays(path / f"arrays-{record['generation']}", first)
    for key, (described, _) in first.items():
        if described["entries"] not in (None, _entries(arrays[key])):
            raise ValueError(f"{path}: leaf '{described['name']}' is damaged (its checksum does not fit); {_AGAIN}")
    leaves = [_restored(d, arrays, wanted) for d, (_, wanted) in zip(record["leaves"], expected, strict=True)]
    return jax.tree.structure(like).unflatten(leaves)


_AGAIN = "restore it from a copy, or fit and save it again"


def _free_generation(path: Path, overwrite: bool) -> int:
    """Number of the next save at a path; raise unless it may be saved there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"path: {path} is a file, expected a folder for a state; give another path")
    if (path / _DESCRIPTION).exists():
        if not overwrite:
            raise ValueError(
                f"path: a state is saved in {path} already; give another path, or overwrite=True to replace it"
            )
        try:
            return _read_description(path)["generation"] + 1
        except ValueError:  # damaged, and about to be replaced
            numbers = (re.match(r"arrays-(\d+)", old.name) for old in path.glob("arrays-*"))
            return 1 + max((int(number.group(1)) for number in numbers if number), default=-1)
    others = [entry.name for entry in path.iterdir()] if path.exists() else []
    # An interrupted save leaves these.
    others = sorted(name for name in others if not name.startswith(("lock", "arrays-", f".{_DESCRIPTION}")))
    if others:
        raise ValueError(f"path: {path} is a folder with {others[:3]} in it and no state; give another path")
    return 0


def _read_description(path: Path) -> dict[str, Any]:
    record = unsealed(read_json(path / _DESCRIPTION, "saved state"))
    if record is None or record.get("format") != 1:
        raise ValueError(f"{path / _DESCRIPTION}: the saved state is damaged (its checksum does not fit); {_AGAIN}")
    return record


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """What is said of a leaf beside its entries."""
    if type(leaf) in (bool, int, float):
        return {"name": name, "kind": type(leaf).__name__, "value": leaf, "shape": [], "dtype": None, "stored": None}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or leaf.dtype == object:
        raise TypeError(
            f"tree: leaf '{name}' is a {type(leaf).__name__}, expected an array or a Python bool, int or float"
        )
    about = {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "stored": "" if leaf.size else None}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        return {**about, "kind": "key", "value": str(jax.random.key_impl(leaf)), "entries": _entries(_storable(leaf))}
    kind = "jax" if isinstance(leaf, jax.Array) else "numpy" if isinstance(leaf, np.ndarray) else "numpy scalar"
    # A weak type decides what dtypes meet in, so it is part of the value.
    weak = isinstance(leaf, jax.Array) and leaf.weak_type and leaf.ndim == 0
    return {**about, "kind": kind, "value": "weak" if weak else None, "entries": _entries(leaf)}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    """A leaf as an array of numbers."""
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _entries(array: Any) -> str | None:
    """Checksum, unless other processes hold part of the array."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return None
    return checksum(np.asarray(array))


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp  # flax brings it; the core does without

    with writing("a state", folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays), force=True)


def _read_arrays(folder: Path, first: dict[str, tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """Stored arrays by key, given what is said of each and the leaf of `like`; NumPy unless that has a sharding."""
    import orbax.checkpoint as ocp

    def way(described: dict[str, Any], wanted: Any) -> Any:
        sharding = None if described["kind"] == "key" else _sharding(wanted)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        shape = tuple(described["shape"])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=jnp.dtype(described["dtype"]))

    if not first:
        return {}
    ways = {key: way(*about) for key, about in first.items()}
    how = ocp.args.PyTreeRestore(item=dict.fromkeys(ways, 0), restore_args=ways)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=how)
    except Exception as error:  # whatever damaged files make of it
        reason = (str(error).split(" [")[0].splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"{folder}: the saved state is damaged ({reason}); {_AGAIN}") from error


def _sharding(wanted: Any) -> Any:
    """Where `like` wants a leaf; None where JAX is free to place it.

    Arrays that nobody placed must stay so: those on one device do not mix with those on others.
    """
    if isinstance(wanted, jax.Array):
        return wanted.sharding if wanted.committed else None
    return wanted.sharding if isinstance(wanted, jax.ShapeDtypeStruct) else None


def _restored(described: dict[str, Any], arrays: dict[str, Any], wanted: Any) -> Any:
    """A leaf as it was saved, as a JAX or a NumPy array where `like` has one."""
    kind, value, key = described["kind"], described["value"], described["stored"]
    if kind in _SCALARS:
        return value
    if kind == "key":
        if key:
            keys = jax.random.wrap_key_data(jnp.asarray(arrays[key]), impl=value)
        else:
            keys = jax.random.split(jax.random.key(0, impl=value), 0).reshape(described["shape"])
        return _placed(keys, _sharding(wanted))
    array = arrays[key] if key else np.zeros(described["shape"], jnp.dtype(described["dtype"]))
    on_host = kind != "jax" if isinstance(wanted, jax.ShapeDtypeStruct) else not isinstance(wanted, jax.Array)
    if on_host:
        return np.asarray(array)[()] if kind == "numpy scalar" else np.asarray(array)
    if value == "weak" and jnp.asarray(array.item()).dtype == array.dtype:
        array = jnp.asarray(array.item())
    elif key and not isinstance(array, jax.Array):
        array = arrays[key] = jnp.asarray(array)  # once for all leaves that share it
    return _placed(jnp.asarray(array), _sharding(wanted))


def _placed(array: Any, sharding: Any) -> Any:
    return array if sharding is None or array.sharding == sharding else jax.device_put(array, sharding)


def _check_like(path: Path, record: dict[str, Any], like: PyTree, expected: list[tuple[str, Any]]) -> None:
    """Raise with the differences between what is saved and what is asked for."""
    saved, wanted = {leaf["name"]: leaf for leaf in record["leaves"]}, dict(expected)
    wrong = [f"leaf '{name}' is saved but not in like" for name in saved if name not in wanted]
    wrong += [f"leaf '{name}' is in like but not saved" for name in wanted if name not in saved]
    for name in wanted:
        if name in saved and not _fits(saved[name], wanted[name]):
            about = saved[name]
            have = f"{about['dtype']} {tuple(about['shape'])}" if about["dtype"] else f"a Python {about['kind']}"
            asked = wanted[name]
            got = f"{asked.dtype} {tuple(asked.shape)}" if hasattr(asked, "dtype") else f"a {type(asked).__name__}"
            wrong.append(f"leaf '{name}' is saved as {have}, like has {got}")
    if not wrong:
        have, got = dict.fromkeys(record["structure"]), dict.fromkeys(_structure(like))
        wrong = [f"saved is {line}" for line in have if line not in got]
        wrong += [f"like is {line}" for line in got if line not in have]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"like: differs from the state in {path}: {'; '.join(wrong[:5])}{more}; build it as when the state was "
            f"saved, e.g. by jax.eval_shape of the same call{_vouched(record, like)}"
        )
    for name, leaf in expected:
        if hasattr(leaf, "dtype") and saved[name]["kind"] == "jax" and trees.is_float64_lost(leaf):
            raise ValueError(f"like: leaf '{name}' is float64 but 64-bit mode is off; run under jax.enable_x64(True)")


def _vouched(record: dict[str, Any], like: PyTree) -> str:
    """Say what to do about a loss that was found to be convex where it had values, as it has not in `like`."""
    convex = any("GGN(" in line and "convex=True" in line for line in record["structure"])
    if not convex or not any("GGN(" in line and "convex=False" in line for line in _structure(like)):
        return ""
    return (
        ", but with GGN(...).assume_psd() in it: that the loss is convex in the output was found out from its values, "
        "of which an abstract like has none"
    )


def _fits(saved: dict[str, Any], wanted: Any) -> bool:
    if saved["kind"] not in _SCALARS:
        shape, dtype = getattr(wanted, "shape", None), str(getattr(wanted, "dtype", None))
        return (list(shape) if shape is not None else None, dtype) == (saved["shape"], saved["dtype"])
    if isinstance(wanted, jax.ShapeDtypeStruct):  # what eval_shape makes of a Python scalar
        return wanted.shape == () and jnp.issubdtype(wanted.dtype, _SCALARS[saved["kind"]])
    return type(wanted).__name__ == saved["kind"]


def _structure(tree: PyTree, name: str = "the tree") -> list[str]:
    """A line for each container: where it is, its type, and its static fields, without addresses in memory."""
    if jax.tree_util.all_leaves([tree]):
        return []
    fields = dataclasses.fields(tree) if dataclasses.is_dataclass(tree) else ()
    static = [f.name for f in fields if f.metadata.get("static") or f.metadata.get("pytree_node") is False]
    told = ", ".join(f"{field}={getattr(tree, field)!r}" for field in static)
    lines = [f"{name}: {type(tree).__qualname__}({re.sub(' at 0x[0-9a-f]+', '', told)})"]
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    for path, child in children:
        lines += _structure(child, f"{name}/{trees.path_name(path)}")
    return lines
