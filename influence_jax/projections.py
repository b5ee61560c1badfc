r"""Random projections of gradients: inner products of vectors far shorter than the parameters, and right on average.

A projection is a linear map $\varphi(g) = R^\top g$ with $\mathbb{E}[R R^\top] = I$, so that
$\mathbb{E}\,\langle\varphi(a), \varphi(b)\rangle = \langle a, b\rangle$.  Its entries are functions of the key, the
place of the leaf and the block of rows alone: they are drawn when they are needed and never held together, and are the
same on every device, under every sharding and chunk size, with 64-bit mode on or off.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import tree
from ._pytree import dataclass, static
from ._typing import Array, Key, LossFunction, PyTree
from .batching import as_batch, check_chunk, check_key, check_positive, chunk_for, map_chunks
from .capture import Layer, LayerFactors, Plan, arrange, einsum, gradient, held_entries, layer_factors, rotate
from .capture.contract import Factors
from .objective import LossOnly, Objective, as_objective

KINDS = ("rademacher", "gaussian")
# Entries drawn at once: 16 MiB of float32. A part of the definition, for rows are numbered within blocks.
BLOCK_ENTRIES = 2**22
# Goes up when the same key stands for other entries.
DEFINITION = 1


@dataclass
class Projection(abc.ABC):
    """A random linear map from parameter-shaped trees to vectors; made by `rademacher`, `gaussian` and `two_sided`.

    Attributes:
      key: What the entries are drawn from.
      kind: Their distribution, `"rademacher"` or `"gaussian"`.
      dim: Length of projected vectors.
      structure: Of the parameters.
      shapes: Of their leaves.
    """

    key: Key
    kind: str = static()
    dim: int = static()
    structure: Any = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @property
    def space(self) -> PyTree:
        """Shapes of the parameters; the dtype says nothing."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes])

    def project(self, stack: PyTree) -> Array:
        """Project vectors that are there: per-example gradients, influence factors.

        Args:
          stack: Leaves `(N, *leaf)`.

        Returns:
          `(N, dim)`, float32 or wider.

        Raises:
          ValueError: If it is not a stack of parameter-shaped trees.
        """
        tree.check_stack(stack, self.space, "stack")
        return _project(self, stack)

    def project_grads(
        self,
        objective: Objective | LossFunction,
        params: PyTree,
        batch: PyTree,
        *,
        chunk: int | None = None,
    ) -> Array:
        r"""Project the gradient of every example's loss, $\varphi(\nabla_\theta\ell(\theta, z_i))$.

        The same map as `project` of `per_example_grads`, which are held for a chunk at most.

        Args:
          objective: Objective, or a bare `f(params, example) -> scalar`.
          params: Leaves `(*leaf)`.
          batch: Leaves `(N, ...)`.
          chunk: Examples at once; chosen from the sizes if None.

        Returns:
          `(N, dim)`, float32 or wider.

        Raises:
          TypeError, ValueError: If an argument is not of that form, or `params` are not those of the projection.
        """
        check_chunk(chunk)
        params = tree.check_params(params)
        tree.check_vector(params, self.space, "params, against the space of the projection")
        return _project_grads(self, as_objective(objective), params, as_batch(batch, "batch"), chunk)

    def manifest(self) -> dict[str, Any]:
        """What tells two projections apart, in JSON: equal manifests are equal maps.  The key is not in it."""
        drawn = jax.random.bits(self.key, (8,), jnp.uint32)  # of the key, and of how this jax draws
        layout = [name for name, _ in tree.named_leaves(self.space)], self.shapes, self._layout()
        return {
            "projection": type(self).__name__,
            "kind": self.kind,
            "dim": self.dim,
            "widths": list(self.widths),
            "definition": DEFINITION,
            "key": _digest(np.asarray(drawn).tobytes()),
            "layout": _digest(repr(layout).encode()),
        }

    @property
    def widths(self) -> tuple[int, ...]:
        """Lengths of the parts of a projected vector that belong to different layers."""
        return (self.dim,)

    def _layout(self) -> Any:
        """What else the map depends on, with a repr that tells it."""
        return ()

    @abc.abstractmethod
    def of_stack(self, stack: PyTree) -> Array:
        """The map, traced and unchecked."""

    def of_examples(self, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None) -> Array:
        """The map on gradients, traced and unchecked."""
        gradients = jax.vmap(partial(jax.grad(objective), tree.promote(params)))
        return map_chunks(
            lambda part: self.of_stack(gradients(part)), batch, chunk=chunk or chunk_for(tree.size(params))
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}, {tree.size(self.space):,} parameters to {self.dim:,})"


@dataclass
class OneSided(Projection):
    """A dense random matrix with independent entries, of which a block of rows exists at a time."""

    def of_stack(self, stack: PyTree) -> Array:
        parts = [
            _times_entries(self.kind, jax.random.fold_in(self.key, place), leaf.reshape(leaf.shape[0], -1), self.dim)
            for place, leaf in enumerate(jax.tree.leaves(tree.promote(stack)))
            if leaf.size
        ]
        return _scaled(_sum(parts), self.dim)


@dataclass
class TwoSided(Projection):
    r"""A projection of each layer's inputs and outputs, $G \mapsto P_{in}^\top G\, P_{out}$.

    Attributes:
      layers: How the parameters are arranged as matrices; static.
      sides: Length of a projected side, of inputs and of outputs; a side that is no longer is kept.
    """

    layers: tuple[Layer, ...] = static()
    sides: tuple[int, int] = static()

    def of_stack(self, stack: PyTree) -> Array:
        leaves = dict(tree.named_leaves(tree.promote(stack)))
        return _joined([self._of_matrix(place, layer.matrix(leaves)) for place, layer in enumerate(self.layers)])

    def of_examples(self, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None) -> Array:
        wide = tree.promote(params)
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        plan, layers = arrange(objective, wide, example)
        if _arrangement(layers) != _arrangement(self.layers):  # another model of the same parameters: the same map
            return Projection.of_examples(self, objective, params, batch, chunk)
        sides = [self._sides(place) for place in range(len(layers))]
        formed = [_forming_is_less(plan, layer, *pair) for layer, pair in zip(layers, sides, strict=True)]

        def one_chunk(part: PyTree) -> Array:
            found = layer_factors(plan, layers, wide, part, lambda loss, _: jnp.ones(1, loss.dtype))
            return _joined(
                [
                    self._of_matrix(place, gradient(layer, f)[:, 0])
                    if formed[place]
                    else gradient(layer, _turned(layer, f, *sides[place]))[:, 0].reshape(tree.count(part), -1)
                    for place, (layer, f) in enumerate(zip(layers, found, strict=True))
                ]
            )

        held = sum(held_entries(plan, layer, whole=form) for layer, form in zip(layers, formed, strict=True))
        return map_chunks(one_chunk, batch, chunk=chunk or chunk_for(held + self.dim))

    @property
    def widths(self) -> tuple[int, ...]:
        widths = [_width(layer, self.sides) for layer in self.layers]
        return tuple(
            width // layer.groups for width, layer in zip(widths, self.layers, strict=True) for _ in range(layer.groups)
        )

    def _layout(self) -> Any:
        return self.sides, _arrangement(self.layers)

    def _sides(self, place: int) -> tuple[Array | None, Array | None]:
        """Projections `(G, n, k)` of both sides of a layer's matrices; None for one that is kept."""
        layer, key = self.layers[place], jax.random.fold_in(self.key, place)
        drawn: list[Array | None] = []
        for which, (length, side) in enumerate(zip((layer.rows, layer.columns), self.sides, strict=True)):
            if length <= side:
                drawn.append(None)
                continue
            entries = _entries(self.kind, jax.random.fold_in(key, which), (layer.groups * length, side))
            drawn.append(_scaled(entries.reshape(layer.groups, length, side), side))
        return drawn[0], drawn[1]

    def _of_matrix(self, place: int, matrix: Array) -> Array:
        """Gradients `(K, G, I, O)` of a layer's matrices, projected, `(K, ...)`."""
        layer, flat = self.layers[place], matrix.reshape(matrix.shape[0], -1)
        if not layer.of_entries:
            return rotate(matrix, *self._sides(place)).reshape(matrix.shape[0], -1)
        width = _width(layer, self.sides)
        if width == flat.shape[1]:
            return flat
        return _scaled(_times_entries(self.kind, jax.random.fold_in(self.key, place), flat, width), width)


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
      >>> params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(30)}
      >>> gaussian(params, 64, jax.random.key(0))
      OneSided(gaussian, 630 parameters to 64)

    Reference: Johnson & Lindenstrauss 1984; Park et al. 2023, arXiv:2303.14186, section 3.2.
    """
    return _one_sided(params, dim, key, "gaussian")


def two_sided(
    objective: Objective | LossFunction,
    params: PyTree,
    example: PyTree,
    sides: int | tuple[int, int],
    key: Key,
    *,
    kind: str = "rademacher",
) -> TwoSided:
    r"""A projection of every layer's inputs and outputs.

    $P_{in}^\top G\, P_{out} = \sum_t (P_{in}^\top a_t) (P_{out}^\top s_t)^\top$ over positions t, with inputs a and
    output cotangents s of the layer: the gradient G need not be formed.  Layers are those that `coverage` lists; a bias
    is one more input.  Each side has its own scale, $1/\sqrt{k}$, so layers of all shapes count alike, and a side that
    is no longer than k is kept.  A leaf that is no matrix is kept if it has no more entries than a projected layer, and
    is projected to as many as that otherwise.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`; where the layers are found.
      params: The parameters, or their shapes; leaves `(*leaf)`.
      example: ONE example, without a batch axis, or its shapes.
      sides: Length k of projected inputs and outputs, or one of each.
      key: A threefry key, which `jax.random.key(seed)` makes.
      kind: `"rademacher"` or `"gaussian"`.

    Returns:
      A `Projection`; its `dim` is the number of entries of all projected layers.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> loss = lambda params, z: jnp.sum((z @ params["w"] + params["b"]) ** 2)
      >>> params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(30)}
      >>> projection = two_sided(loss, params, jnp.ones(20), 8, jax.random.key(0))
      >>> projection
      TwoSided(rademacher, 630 parameters to 64)
      >>> projection.project_grads(loss, params, jnp.ones((5, 20))).shape
      (5, 64)

    Reference: Choe et al. 2024 (LoGra), arXiv:2405.13954, section 3.1.
    """
    objective, shapes, key = as_objective(objective), _checked_params(params), _checked_key(key)
    pair = sides if isinstance(sides, tuple) else (sides, sides)
    if len(pair) != 2:
        raise ValueError(f"sides: got {sides!r}, expected one length, or a pair for inputs and outputs")
    for side in pair:
        check_positive(side, "sides")
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {list(KINDS)}")
    jax.eval_shape(objective, shapes, example)  # a batch in place of an example is found out here
    _, layers = arrange(objective, tree.promote_shapes(shapes), example)
    leaves, structure = jax.tree.flatten(shapes)
    dim = sum(_width(layer, pair) for layer in layers)
    return TwoSided(key, kind, dim, structure, tuple(leaf.shape for leaf in leaves), layers, pair)


def _one_sided(params: PyTree, dim: int, key: Key, kind: str) -> OneSided:
    leaves, structure = jax.tree.flatten(_checked_params(params))
    check_positive(dim, "dim")
    return OneSided(_checked_key(key), kind, int(dim), structure, tuple(leaf.shape for leaf in leaves))


def _checked_params(params: PyTree) -> PyTree:
    """Shapes of the parameters."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        params = tree.check_params(params)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def _checked_key(key: Any) -> Key:
    """A typed threefry key: other generators draw other numbers on other devices, or in other shapes."""
    key = check_key(key, "a projection draws its entries from it")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"key: got one of {jax.random.key_impl(key)}, whose numbers depend on the device; expected a threefry key, "
            "jax.random.key(seed, impl='threefry2x32')"
        )
    return key


@jax.jit
def _project(projection: Projection, stack: PyTree) -> Array:
    return projection.of_stack(stack)


@partial(jax.jit, static_argnames="chunk")
def _project_grads(
    projection: Projection, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None
) -> Array:
    return projection.of_examples(objective, params, batch, chunk)


def _entries(kind: str, key: Key, shape: tuple[int, int]) -> Array:
    """Independent entries with mean zero and variance one, in float32 whatever the mode: another dtype draws others."""
    if kind == "gaussian":
        return jax.random.normal(key, shape, jnp.float32)
    rows, columns = shape
    words = jax.random.bits(key, (rows, -(-columns // 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(jnp.float32)


def _times_entries(kind: str, key: Key, x: Array, columns: int) -> Array:
    """Vectors `(N, P)` times the `(P, columns)` entries of a key, one block of rows after the other."""
    rows = max(1, BLOCK_ENTRIES // columns)
    last = -(-x.shape[1] // rows) - 1

    def product(part: Array, number: Array | int) -> Array:
        entries = _entries(kind, jax.random.fold_in(key, number), (part.shape[1], columns))
        return jnp.matmul(part, entries.astype(part.dtype), precision=tree.HIGHEST)

    def step(total: Array, number: Array) -> tuple[Array, None]:
        return total + product(lax.dynamic_slice_in_dim(x, number * rows, rows, axis=1), number), None

    total = product(x[:, last * rows :], last)
    return total if last == 0 else lax.scan(step, total, jnp.arange(last, dtype=jnp.int32))[0]


def _scaled(x: Array, dim: int) -> Array:
    return x / jnp.sqrt(jnp.asarray(dim, x.dtype))


def _sum(parts: Sequence[Array]) -> Array:
    dtype = tree.accumulation_dtype(*(part.dtype for part in parts))
    return sum((part.astype(dtype) for part in parts[1:]), parts[0].astype(dtype))


def _joined(parts: Sequence[Array]) -> Array:
    dtype = tree.accumulation_dtype(*(part.dtype for part in parts))
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=1)


def _width(layer: Layer, sides: tuple[int, int]) -> int:
    """How many entries a layer is projected to."""
    if layer.of_entries:
        return layer.groups * min(layer.columns, sides[0] * sides[1])
    return layer.groups * min(layer.rows, sides[0]) * min(layer.columns, sides[1])


def _arrangement(layers: Sequence[Layer]) -> tuple:
    """Where the entries of the layers' matrices are, apart from what is done with them."""
    return tuple((layer.kernel, layer.view, layer.shape, layer.bias, layer.of_entries) for layer in layers)


def _forming_is_less(plan: Plan, layer: Layer, left: Array | None, right: Array | None) -> bool:
    """Whether to form a layer's gradients and project them, for less work than projecting each position's factors."""
    if layer.of_entries:
        return True
    rows, columns = layer.rows, layer.columns
    side_in, side_out = rows if left is None else left.shape[2], columns if right is None else right.shape[2]
    positions = sum(plan.uses[index].positions for index, _ in layer.uses)
    per_position = side_in * side_out + (rows * side_in if left is not None else 0)
    per_position += columns * side_out if right is not None else 0
    afterwards = (rows * side_in * columns if left is not None else 0) + (
        side_in * columns * side_out if right is not None else 0
    )
    return positions * rows * columns + afterwards < positions * per_position


def _turned(layer: Layer, factors: LayerFactors, left: Array | None, right: Array | None) -> LayerFactors:
    """The factors of `leftᵀ gradient right`; of a looked up row, that row of the projection."""
    uses = []
    for (_, exchanged), use in zip(layer.uses, factors.uses, strict=True):
        before, after = (right, left) if exchanged else (left, right)
        inputs, outputs = use.inputs, use.outputs
        if before is not None and use.looked_up:
            row = lambda table, numbers: table.at[numbers].get(mode="fill", fill_value=0)
            inputs = jax.vmap(row, (0, 1), 1)(before, inputs)
        elif before is not None:
            inputs = einsum("bgti,gij->bgtj", inputs, before)
        if after is not None:
            outputs = einsum("bkgto,gop->bkgtp", outputs, after)
        uses.append(Factors(inputs, outputs))
    return LayerFactors(uses, None if factors.rest is None else rotate(factors.rest, left, right))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
