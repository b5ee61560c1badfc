"""Arrays on disk in the zarr 3 format, each chunk a file with a checksum, written as a whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax.numpy as jnp
import numpy as np

from .files import RESTORE, raw_bytes, read_json, sealed, sync_folder, unsealed, write_json, writing

# The attribute of a group that holds what the package knows about it.
ATTRIBUTE = "influence_jax"
RECOMPUTE = "run the same command again to recompute it"
_CHUNK_BYTES = 1 << 26  # of a leaf of a tree; a chunk is copied in memory when it is written


def write_group(path: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Make a folder a zarr group, with the manifest among its attributes.

    Raises:
      OSError: If it cannot be written.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: sealed(manifest)}}
    write_json(Path(path) / "zarr.json", group)


def read_group(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """The manifest that `write_group` wrote.

    Args:
      path: The folder.
      what: What it is, e.g. "score store".

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is damaged, or the group is another program's.
    """
    file = Path(path) / "zarr.json"
    group = read_json(file, f"manifest of a {what}")
    attributes = group.get("attributes") if isinstance(group, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE not in attributes:
        raise ValueError(f"{file}: is a zarr file of another program, expected a {what}; give another path")
    manifest = unsealed(attributes[ATTRIBUTE])
    if manifest is None:
        raise ValueError(f"{file}: the manifest of a {what} is damaged (its checksum does not fit); {RESTORE}")
    return manifest


def create_array(
    path: str | os.PathLike,
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    names: Sequence[str] | None = None,
) -> Any:
    """A new array; what is not written reads as NaN, or zero where the dtype has none.

    Args:
      path: Its folder.
      shape: Of the array.
      dtype: Of numbers or truth values, bfloat16 too.
      chunks: Shape of a chunk.
      names: Of the dimensions.

    Returns:
      A `tensorstore.TensorStore`.

    Raises:
      OSError: If it cannot be written, or is there already.
    """
    kind = jnp.dtype(dtype)
    fill: Any = False if kind == np.bool_ else 0
    if jnp.issubdtype(kind, jnp.inexact):
        fill = ["NaN", "NaN"] if jnp.issubdtype(kind, jnp.complexfloating) else "NaN"
    metadata = {
        "shape": list(shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunks]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": fill,
    }
    if names is not None:
        metadata["dimension_names"] = list(names)
    if (Path(path) / "zarr.json").exists():
        raise FileExistsError(errno.EEXIST, "there is an array already", os.fspath(path))
    with writing("an array", path):
        return _open(path, {"metadata": metadata, "create": True})


def open_array(path: str | os.PathLike) -> Any:
    """An array that is there.

    Returns:
      A `tensorstore.TensorStore`.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If its description is damaged.
    """
    file = Path(path) / "zarr.json"
    read_json(file, "description of an array")
    try:
        return _open(path, {"open": True})
    except ValueError as error:
        raise ValueError(f"{file}: the description of an array is damaged ({_reason(error)}); {RESTORE}") from None


def _open(path: str | os.PathLike, options: dict[str, Any]) -> Any:
    import tensorstore  # flax brings it; the core does without

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": os.fspath(Path(path).absolute())},
        # Without this a chunk of nothing but NaN is no file, and cannot be told from one that was lost.
        "store_data_equal_to_fill_value": True,
        **options,
    }
    return tensorstore.open(spec).result()


def _reason(error: BaseException) -> str:
    """What is wrong, without the file's name before it and the specification after it."""
    return str(error).split(" [")[0].split('": ')[-1]


def grow(path: str | os.PathLike, array: Any, shape: Sequence[int]) -> Any:
    """The array, with every dimension at least as long as asked; other processes may grow it at the same time.

    Args:
      path: Its folder.
      array: The array, as opened.
      shape: The least length of each dimension.

    Returns:
      The array as it is now.

    Raises:
      OSError: If its description cannot be written.
    """
    while any(have < want for have, want in zip(array.shape, shape, strict=True)):
        array = open_array(path)
        wanted = [max(have, want) for have, want in zip(array.shape, shape, strict=True)]
        try:
            with writing("the shape of an array", path):
                array = array.resize(exclusive_max=wanted, resize_metadata_only=True, expand_only=True).result()
        except ValueError as error:
            if "FAILED_PRECONDITION" not in str(error):  # another process was faster: look again
                raise
    return array


def chunk_file(path: str | os.PathLike, index: Sequence[int]) -> Path:
    """The file of a chunk.

    Example:
      >>> str(chunk_file("scores", (0, 3)))
      'scores/c/0/3'
    """
    return Path(path, "c", *map(str, index))


def write_chunk(path: str | os.PathLike, array: Any, index: Sequence[int], values: np.ndarray) -> None:
    """Write one chunk, or what of it lies inside the array; it is durable on return.

    Args:
      path: Folder of the array.
      array: The array, as opened.
      index: Of the chunk along each dimension.
      values: Its entries, in the array's dtype.

    Raises:
      ValueError: If the values do not fill what of the chunk lies inside the array.
      OSError: If it cannot be written.
    """
    sizes = chunk_shape(array)
    bounds = [
        (min(i * size, length), min((i + 1) * size, length))
        for i, size, length in zip(index, sizes, array.shape, strict=True)
    ]
    expected = tuple(stop - start for start, stop in bounds)
    if values.shape != expected:
        raise ValueError(f"values: got shape {values.shape} for chunk {tuple(index)} of {path}, expected {expected}")
    file = chunk_file(path, index)
    with writing("a chunk", file):
        if expected != sizes:  # the file would be read first, and may be damaged
            file.unlink(missing_ok=True)
        array[tuple(slice(*bound) for bound in bounds)].write(values).result()


def read_region(path: str | os.PathLike, array: Any, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Part of an array, from chunks that are all there and intact.

    Args:
      path: Folder of the array.
      array: The array, as opened.
      bounds: `(start, stop)` along each dimension.

    Raises:
      ValueError: If the file of a chunk is missing or damaged.
    """
    sizes = chunk_shape(array)
    touched = (range(start // size, -(-stop // size)) for (start, stop), size in zip(bounds, sizes, strict=True))
    for index in itertools.product(*touched):
        if not chunk_file(path, index).is_file():
            raise ValueError(f"{chunk_file(path, index)}: this chunk is missing; {RECOMPUTE}")
    try:
        return np.asarray(array[tuple(slice(*bound) for bound in bounds)].read().result())
    except ValueError as error:
        file = re.search(r'local file "([^"]+)"', str(error))
        raise ValueError(
            f"{file.group(1) if file else path}: this chunk is damaged ({_reason(error)}); {RECOMPUTE}"
        ) from None


def chunk_shape(array: Any) -> tuple[int, ...]:
    """Shape of an array's chunks."""
    return tuple(array.chunk_layout.write_chunk.shape or ())


def checksum(values: np.ndarray) -> str:
    """CRC-32 of the entries in C order: tells a chunk from another one that is intact too.

    Example:
      >>> checksum(np.arange(3, dtype=np.int32))
      '1d760e7a'
    """
    return f"{zlib.crc32(raw_bytes(values)):08x}"


def write_tree(folder: str | os.PathLike, leaves: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, in folders of folders where names have slashes; what was in the folder before goes.

    The list of names is written last, so a tree is complete or does not read.

    Args:
      folder: Where.
      leaves: Names to arrays.

    Raises:
      OSError: If they cannot be written.
    """
    folder = Path(folder)
    with writing("arrays", folder):
        if folder.exists():
            (folder / "zarr.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    described = {}
    for name, leaf in leaves.items():
        path = leaf_folder(folder, name)
        rows = max(1, _CHUNK_BYTES // max(1, leaf[:1].nbytes)) if leaf.ndim else 1
        chunks = (min(rows, leaf.shape[0]), *leaf.shape[1:]) if leaf.ndim else ()
        array = create_array(path, leaf.shape, leaf.dtype, chunks)
        with writing("an array", path):
            array.write(leaf).result()
        described[name] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "entries": checksum(leaf)}
    write_group(folder, {"leaves": described})
    with writing("arrays", folder):
        sync_folder(folder.parent)


def read_tree(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays that `write_tree` wrote, by name.

    Raises:
      FileNotFoundError: If there is no complete tree.
      ValueError: If anything in it is missing or damaged.
    """
    leaves = {}
    for name, described in read_group(folder, "tree of arrays")["leaves"].items():
        path = leaf_folder(folder, name)
        array = open_array(path)
        leaf = read_region(path, array, [(0, length) for length in array.shape])
        found = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "entries": checksum(leaf)}
        if found != described:
            raise ValueError(f"{path}: is damaged: holds {found}, expected {described}; {RECOMPUTE}")
        leaves[name] = leaf
    return leaves


def leaf_folder(folder: str | os.PathLike, name: str) -> Path:
    """Folder of a leaf, whatever characters are in its name.

    Example:
      >>> str(leaf_folder("factors", "dense/kernel"))
      'factors/dense/kernel'
    """
    parts = (
        f"%{part}" if part in ("", ".", "..", "c", "zarr.json") else quote(part, safe="") for part in name.split("/")
    )
    return Path(folder, *parts)
