"""Models, references and measures shared by the tests."""

from __future__ import annotations

import itertools
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence_jax as ij
from influence_jax.objective import as_objective

GOLDEN = pathlib.Path(__file__).parent / "golden"


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference over the largest entry of what is expected; infinite if anything is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not np.all(np.isfinite(got)):
        return float("inf")
    return float(np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), np.finfo(np.float64).tiny))


def tree_error(got: Any, expected: Any) -> float:
    """`relative_error` of all leaves together."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, expected)]
    return relative_error(*flat)


def flat(tree: Any, like: Any) -> np.ndarray:
    """What `ij.flatten` does, `(*lead, P)`, by numpy."""
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    pairs = [(np.asarray(x), np.shape(y)) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)]
    assert all(x.shape[x.ndim - len(shape) :] == shape for x, shape in pairs)
    return np.concatenate([x.reshape(*x.shape[: x.ndim - len(shape)], -1) for x, shape in pairs], axis=-1)


def squared_loss(out: jax.Array, example: ij.Batch) -> jax.Array:
    return jnp.mean((out - example.y) ** 2)


def half_squared_loss(out: jax.Array, example: ij.Batch) -> jax.Array:
    return 0.5 * jnp.sum((out - example.y) ** 2)


def cross_entropy(logits: jax.Array, example: ij.Batch) -> jax.Array:
    return jax.nn.logsumexp(logits) - logits[example.y]


def affine(params: dict, example: ij.Batch) -> jax.Array:
    return example.x @ params["kernel"] + params["bias"]


def linear(params: dict, example: ij.Batch) -> jax.Array:
    return example.x @ params["kernel"]


def mlp(params: dict, example: ij.Batch) -> jax.Array:
    """Dense layers, with biases or without, in the order of their names; tanh between them."""
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"] if "bias" in layer else x @ layer["kernel"]
    *hidden, last = (params[name] for name in sorted(params))
    x = example.x
    for layer in hidden:
        x = jnp.tanh(dense(layer, x))
    return dense(last, x)


LINEAR = ij.Objective(affine, squared_loss)
REGRESSION = ij.Objective(mlp, squared_loss)
CLASSIFICATION = ij.Objective(mlp, cross_entropy)


def torch_layers(arrays: dict, names: dict[str, str]) -> dict:
    """Parameters of torch layers as flax would hold them; a torch weight is the transposed kernel."""
    return {
        ours: {"kernel": arrays[f"{theirs}.weight"].T, "bias": arrays[f"{theirs}.bias"]}
        for ours, theirs in names.items()
    }


def torch_flat(stack: dict) -> np.ndarray:
    """A stack of layered vectors `(N, ...)` in torch's flat order: weight `(out, in)`, then bias, layer by layer."""
    parts = []
    for name in sorted(stack):
        kernel, bias = np.asarray(stack[name]["kernel"]), np.asarray(stack[name]["bias"])
        parts += [np.swapaxes(kernel, -1, -2).reshape(len(kernel), -1), bias]
    return np.concatenate(parts, axis=-1)


def torch_order(params: dict) -> np.ndarray:
    """Places of torch's flat entries in `ij.flatten`'s order."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    places = ij.unflatten(jnp.arange(size), params)
    return torch_flat(jax.tree.map(lambda x: x[None], places))[0].astype(int)


# Random numbers of the tests are drawn this many at a time, for one program then serves all shapes: entry i of an
# array depends on the key and i only, so these are the numbers that `jax.random` gives array by array. They are numpy's
# arrays, which are cut and added without compiling a program for each shape.
DRAWN, KEYS = 1024, 16


@partial(jax.jit, static_argnames=("count", "dtype"))
def _normals(key: jax.Array, count: int, dtype: Any) -> jax.Array:
    return jax.random.normal(key, (count,), dtype)


@partial(jax.jit, static_argnames=("count", "dtype", "parts"))
def _normals_of_split(key: jax.Array, count: int, dtype: Any, parts: int = KEYS) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(key, parts)
    return keys, jax.vmap(lambda k: jax.random.normal(k, (count,), dtype))(keys)


@partial(jax.jit, static_argnames="count")
def _integers_of_split(key: jax.Array, limit: int, count: int) -> jax.Array:
    return jax.random.randint(jax.random.split(key)[1], (count,), 0, limit)


def _drawn(size: int) -> int:
    return max(DRAWN, 1 << (size - 1).bit_length() if size else 0)


def _cut(numbers: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(numbers)[: math.prod(shape)].reshape(shape)


def normal(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = float) -> np.ndarray:
    """`jax.random.normal`, number for number, without a program for each shape."""
    return _cut(_normals(key, _drawn(math.prod(shape)), jax.dtypes.canonicalize_dtype(dtype)), shape)


def split_normals(key: jax.Array, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """`normal` of each shape with the keys of `jax.random.split`."""
    count = _drawn(max(math.prod(shape) for shape in shapes))
    rows = _normals_of_split(key, count, jax.dtypes.canonicalize_dtype(float), max(KEYS, len(shapes)))[1]
    return [_cut(row, shape) for row, shape in zip(np.asarray(rows), shapes, strict=False)]


def random_batch(key: jax.Array, count: int, inputs: int, outputs: int, *, classes: bool) -> ij.Batch:
    x, y = split_normals(key, [(count, inputs), (count, outputs)])
    return ij.Batch(x, _cut(_integers_of_split(key, outputs, _drawn(count)), (count,)) if classes else y)


def random_like(key: jax.Array, tree: Any, rows: int | None = None) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    lead = () if rows is None else (rows,)
    normals = split_normals(key, [lead + x.shape for x in leaves])
    return structure.unflatten([n.astype(x.dtype) for n, x in zip(normals, leaves, strict=True)])


def random_mlp(key: jax.Array, sizes: tuple[int, ...] = (5, 4, 3), *, biases: bool = True) -> dict:
    """Parameters of `mlp`; without biases a program of them is quicker to compile."""
    params = {}
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        keys, rows = _normals_of_split(key, _drawn(fan_in * fan_out), jax.dtypes.canonicalize_dtype(float))
        kernel, bias = np.asarray(rows[1])[: fan_in * fan_out], np.asarray(rows[2])[:fan_out]
        params[f"layer{index}"] = {
            "kernel": jnp.asarray(kernel.reshape(fan_in, fan_out) / np.sqrt(fan_in, dtype=kernel.dtype)),
        }
        if biases:
            params[f"layer{index}"]["bias"] = jnp.asarray(0.1 * bias)
        key = keys[0]
    return params


def from_spectrum(values: np.ndarray) -> tuple[ij.LowRank, np.ndarray]:
    """A dense operator with those eigenvalues in a random basis, and its eigenvectors."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return ij.LowRank({"w": jnp.asarray(basis.T)}, jnp.asarray(values)), basis


def flat_objective(objective: Any, params: Any):
    """The same loss as a function of a flat vector, for dense references by `jax.hessian`."""
    return lambda flat, example: objective(ij.unflatten(flat, params), example)


def dense_reference(kind: type, objective: Any, params: Any, data: Any, weights: Any = None) -> np.ndarray:
    """The curvature matrix by `jax.hessian` and `jax.jacobian` on the flat vector, independent of the operators."""
    count = jax.tree.leaves(data)[0].shape[0]
    weights = np.ones(count) if weights is None else np.asarray(weights)
    matrices = np.asarray(_matrices(kind, as_objective(objective), params, data))
    return np.einsum("n,nij->ij", weights, matrices) / np.sum(weights)


@partial(jax.jit, static_argnames="kind")
def _matrices(kind: type, objective: Any, params: Any, data: Any) -> jax.Array:
    flat = ij.flatten(params, params)

    def of_one(example: Any) -> jax.Array:
        if kind is ij.Hessian:
            return jax.hessian(flat_objective(objective, params))(flat, example)
        if kind is ij.EmpiricalFisher:
            gradient = jax.grad(flat_objective(objective, params))(flat, example)
            return jnp.outer(gradient, gradient)
        out = objective.predict(params, example)
        jacobian = jax.jacobian(lambda f: objective.predict(ij.unflatten(f, params), example))(flat)
        return jacobian.T @ jax.hessian(lambda o: objective.loss(o, example))(out) @ jacobian

    return jax.vmap(of_one)(data)


def tiny_mlp(loss: str) -> tuple[dict, ij.Objective, dict, ij.Batch, ij.Batch]:
    """The stored problem with pyDVL's direct results: arrays, objective, parameters, training data, queries."""
    stored = np.load(GOLDEN / "tiny_mlp_pydvl_direct.npz")
    arrays = {name.removeprefix(f"{loss}/"): stored[name] for name in stored.files if name.startswith(loss)}
    weights = {name.removeprefix("param/"): arrays[name] for name in arrays if name.startswith("param/")}
    params = jax.tree.map(jnp.asarray, torch_layers(weights, {"layer0": "0", "layer2": "2"}))
    objective = {"mse": REGRESSION, "ce": CLASSIFICATION}[loss]
    train, query = ij.Batch(arrays["x"], arrays["y"]), ij.Batch(arrays["x_test"], arrays["y_test"])
    return arrays, objective, params, train, query


def mainly(cases: Any, *always: Any) -> list:
    """Cases to parametrize a test with; those beside `always`, the same law at more settings, are marked thorough.

    A tuple is a case of several arguments.
    """
    cases = list(cases)
    assert all(case in cases for case in always), always
    arguments = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if case in always else pytest.param(*arguments(case), marks=pytest.mark.thorough) for case in cases]
