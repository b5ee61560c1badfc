r"""Projected gradients of the training examples on disk, and queries against them.

Of every example only $\varphi_i = R^\top \nabla\ell_i$ is kept, so that scores of any number of queries take one pass
over the disk: $\langle\varphi(v), \varphi_i\rangle$ is $\langle v, \nabla\ell_i\rangle$ on average, whatever v is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._typing import Array, PyTree
from ..batching import check_positive
from ..projections import Projection
from ..scoring import TopK
from .files import fingerprint
from .growing import GrowingStore, highest
from .manifests import differences
from .projected import ProjectedInverse, added_moments, check_damping


class GradientStore(GrowingStore):
    """Projected gradients `(N, dim)` on disk, which zarr and xarray read.

    An interrupted computation continues.  A chunk counts once it is written, durable and in the ledger with a
    checksum; whatever is missing or damaged is recomputed by a writer and refused to a reader.  Make one with `create`
    or `open`.

    Args:
      path: Its folder; nothing is created or read before `create` or `open`.

    Raises:
      ValueError: From `create`, if something else is there; from `open` and when reading, if the store is damaged.
      FileNotFoundError: From `open`, if there is no store.

    Example:
      >>> import tempfile
      >>> import influence_jax as ij
      >>> from influence_jax.projections import rademacher
      >>> params = {"w": jnp.ones(50)}
      >>> projection = rademacher(params, 8, jax.random.key(0))
      >>> gradients = {"w": jax.random.normal(jax.random.key(1), (3, 50))}
      >>> path = tempfile.mkdtemp() + "/gradients"
      >>> with GradientStore.create(path) as store:
      ...     store.begin({"objective": "loss"}, projection=projection, train_rows=4, dtype="float32")
      ...     rows = projection.project(gradients).astype(jnp.float32)
      ...     store.write(0, np.asarray(rows), data="fingerprint of the batch")
      ...     store.finish(3)
      >>> GradientStore.open(path).scores(gradients, projection).shape
      (3, 3)
    """

    holds: ClassVar[str] = "gradients"
    called: ClassVar[str] = "store of gradients"
    kind: ClassVar[dict[str, Any]] = {"kind": "gradients", "format": 2}
    dimensions: ClassVar[tuple[str, ...]] = ("train", "projected")

    def _shape(self, examples: int) -> tuple[int, ...]:
        return (examples, self._manifest["dim"])

    def _chunks(self) -> tuple[int, ...]:
        return (self._manifest["train_rows"], self._manifest["dim"])

    def begin(
        self,
        manifest: Mapping[str, Any],
        *,
        projection: Projection,
        train_rows: int,
        dtype: Any,
        process: int = 0,
    ) -> None:
        """Start to write, or continue; nobody else may write until `close`.

        Args:
          manifest: What is computed from what, values of JSON; a store is continued by the same only.  `"params"` is
            the `fingerprint` of the parameters.
          projection: What the gradients go through.
          train_rows: Training examples in a chunk.
          dtype: Of what is stored.
          process: Which process this is; 0 creates what is shared, the others come after it.

        Raises:
          BlockingIOError: If another process writes.
          TypeError: If the dtype is not floating, or an argument is of another kind.
          ValueError: If the store belongs to another computation or is damaged.
          OSError: If it cannot be written.
        """
        check_positive(train_rows, "train_rows")
        _check_projection(projection)
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise TypeError(f"dtype: got {jnp.dtype(dtype)}, expected a floating one")
        sizes = {"dim": projection.dim, "train_rows": train_rows, "dtype": jnp.dtype(dtype).name}
        self._begin({**manifest, "projection": projection.manifest(), **sizes}, process)

    def finished(self, train_block: int) -> str | None:
        """Fingerprint of the batch that a finished chunk was computed from; None if it is to be computed.

        Args:
          train_block: Which block of training examples.

        Raises:
          ValueError: If the store is not begun.
        """
        return self._finished((train_block, 0))

    def write(self, train_block: int, rows: np.ndarray, *, data: str) -> None:
        """Write a chunk; it is durable and counts as finished on return.

        Args:
          train_block: Which block of training examples.
          rows: Projected gradients `(train_rows, dim)`, or fewer in the last block.
          data: Fingerprint of the batch they were computed from.

        Raises:
          ValueError: If the shape or dtype is not that of the chunk, an entry is NaN or infinite, or the store is not
            begun.
          OSError: If it cannot be written.
        """
        self._require_writer()
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            first = train_block * self._manifest["train_rows"] + int(bad[0][0])
            raise ValueError(
                f"rows: the projected gradient of training example {first} is NaN or infinite in {rows.dtype}; look at "
                "the loss of that example, or store a wider dtype"
            )
        self._write((train_block, 0), rows, data)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The projected gradients chunk by chunk: places of the examples, and rows `(n, dim)`.

        Raises:
          ValueError: If a chunk is not finished, missing or damaged.
        """
        for (places, _), rows in self._blocks():
            yield places, rows

    def check_same(self, projection: Projection | None = None, params: PyTree = None) -> None:
        """Raise unless the gradients went through this projection, or were taken at these parameters.

        Args:
          projection: What they should have gone through; not compared if None.
          params: Where they should have been taken; not compared if None.

        Raises:
          ValueError: Saying what differs.
        """
        self._require_array()
        wanted: dict[str, Any] = {}
        if projection is not None:
            _check_projection(projection)
            wanted["projection"] = projection.manifest()
        if params is not None:
            wanted["params"] = fingerprint(params)
        told = differences({key: self._manifest.get(key) for key in wanted}, wanted, "given")
        if told:
            raise ValueError(
                f"{self.path}: holds gradients at other parameters or of another projection ({told}); their inner "
                "products would mean nothing: give those that the store was made with"
            )

    def project(self, vectors: PyTree, projection: Projection | None, params: PyTree = None) -> Array:
        """Vectors in the space of the store, `(Q, dim)`.

        Args:
          vectors: Stack of parameter-shaped trees, leaves `(Q, *leaf)`; without a projection, projected ones.
          projection: The one that the store was made with.
          params: The parameters at which the vectors were computed; checked if given.

        Raises:
          ValueError: If the projection or the parameters are not those of the store, or the vectors do not fit.
        """
        self.check_same(projection, params)
        if projection is not None:
            return projection.project(vectors)
        dim = self._manifest["dim"]
        if not isinstance(vectors, jax.Array | np.ndarray) or vectors.ndim != 2 or vectors.shape[1] != dim:
            got = getattr(vectors, "shape", type(vectors).__name__)
            raise ValueError(
                f"vectors: got {got} without a projection, expected projected vectors (Q, {dim}); pass the projection "
                "for trees shaped like the parameters"
            )
        return jnp.asarray(vectors)

    def scores(self, vectors: PyTree, projection: Projection | None = None, *, params: PyTree = None) -> np.ndarray:
        r"""Inner products of vectors with all training gradients, $\langle\varphi(v_q), \varphi_i\rangle$.

        For `Influence.influence_factors` of queries they are influences through its inverse, for gradients of queries
        gradient similarity; for what `inverse` makes of projected gradients, TRAK's scores.  The sign is that of
        `Influence`: positive if training on the example lowers the loss of the query.

        Args:
          vectors: Leaves `(Q, *leaf)`; without a projection, projected ones `(Q, dim)`.
          projection: The one that the store was made with.
          params: The parameters at which the vectors were computed, which vectors do not tell by themselves: give them,
            and others than those of the store are refused.

        Returns:
          NumPy array `(Q, N)`, float32 or wider; gradients are read chunk by chunk.

        Raises:
          ValueError: If the projection or the parameters are not those of the store, the vectors do not fit, or a
            chunk is not finished, missing or damaged.
        """
        projected = self.project(vectors, projection, params)
        dtype = tree.accumulation_dtype(projected.dtype, self.dtype)
        out = np.empty((projected.shape[0], len(self)), dtype)
        for columns, part in self._products(projected):
            out[:, columns] = part
        return out

    def top_k(self, vectors: PyTree, projection: Projection | None, k: int, *, params: PyTree = None) -> TopK:
        """The k training examples with the highest scores, merged chunk by chunk; ties go to the lower index.

        Args:
          vectors: As in `scores`.
          projection: As in `scores`.
          k: How many, `1 <= k <= N`.
          params: As in `scores`.

        Returns:
          Scores and places, NumPy arrays `(Q, k)`.

        Raises:
          TypeError: If k is not an int.
          ValueError: If k is not between 1 and N, or as `scores`.
        """
        self._check_k(k)
        return highest(self._products(self.project(vectors, projection, params)), k)

    def _rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """As `blocks`, all of the same shape: a last one has zeros for the rows it lacks, so one program is enough."""
        if tree.is_float64_lost(np.empty(0, self.dtype)):
            raise TypeError(
                f"{self.path}: holds float64 but 64-bit mode is off, so JAX would cut it to float32; run under "
                "jax.enable_x64(True)"
            )
        for places, rows in self.blocks():
            missing = self._manifest["train_rows"] - len(rows)
            yield places, np.pad(rows, ((0, missing), (0, 0))) if missing else rows

    def _products(self, projected: Array) -> Iterator[tuple[slice, np.ndarray]]:
        """Scores chunk by chunk, `(Q, n)`."""
        for columns, rows in self._rows():
            yield columns, np.asarray(_products(projected, rows))[:, : columns.stop - columns.start]

    def inverse(self, damping: float, *, by_layer: bool = False) -> ProjectedInverse:
        r"""The damped inverse of the projected empirical Fisher matrix, TRAK's kernel, in one pass over the disk.

        $\big(\frac1N\sum_i\varphi_i\varphi_i^\top + \lambda I\big)^{-1}$; what it makes of projected queries goes to
        `scores` without a projection: `store.scores(store.inverse(1e-3)(store.project(gradients, projection)))`.

        Args:
          damping: $\lambda$.
          by_layer: Only the diagonal blocks of the layers of a two-sided projection, as LoGra does; for a `dim` whose
            square does not fit in memory.

        Returns:
          A function of projected vectors `(Q, dim)`.

        Raises:
          ValueError: If the damping is negative or no number, the damped matrix is singular, or as `scores`.
        """
        check_damping(damping)
        examples = len(self)
        if examples == 0:
            raise ValueError(f"{self.path}: holds no gradients yet; run the computation first")
        widths = tuple(self._manifest["projection"]["widths"]) if by_layer else (self._manifest["dim"],)
        dtype = tree.accumulation_dtype(self.dtype)
        moments = tuple(jnp.zeros((width, width), dtype) for width in widths)
        for _, rows in self._rows():
            moments = added_moments(moments, rows)
        return ProjectedInverse.of(tuple(moment / examples for moment in moments), damping, examples)


@jax.jit
def _products(projected: Array, rows: Array) -> Array:
    return tree.gram(projected, rows)


def _check_projection(projection: Any) -> None:
    if not isinstance(projection, Projection):
        raise TypeError(
            f"projection: got a {type(projection).__name__}, expected a projection that rademacher, gaussian or "
            "two_sided made"
        )
