"""Models, references and measures shared by the tests."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import influence_jax as ij

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
    """Dense layers in the order of their names, tanh between them."""
    hidden = example.x
    layers = [params[name] for name in sorted(params)]
    for layer in layers[:-1]:
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ layers[-1]["kernel"] + layers[-1]["bias"]


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


def random_batch(key: jax.Array, count: int, inputs: int, outputs: int, *, classes: bool) -> ij.Batch:
    key_x, key_y = jax.random.split(key)
    x = jax.random.normal(key_x, (count, inputs))
    y = jax.random.randint(key_y, (count,), 0, outputs) if classes else jax.random.normal(key_y, (count, outputs))
    return ij.Batch(x, y)


def random_like(key: jax.Array, tree: Any, rows: int | None = None) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    lead = () if rows is None else (rows,)
    keys = jax.random.split(key, len(leaves))
    normals = [jax.random.normal(k, lead + x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(normals)


def random_mlp(key: jax.Array, sizes: tuple[int, ...] = (5, 4, 3)) -> dict:
    params = {}
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        key, key_kernel, key_bias = jax.random.split(key, 3)
        params[f"layer{index}"] = {
            "kernel": jax.random.normal(key_kernel, (fan_in, fan_out)) / np.sqrt(fan_in),
            "bias": 0.1 * jax.random.normal(key_bias, (fan_out,)),
        }
    return params


def flat_objective(objective: Any, params: Any):
    """The same loss as a function of a flat vector, for dense references by `jax.hessian`."""
    return lambda flat, example: objective(ij.unflatten(flat, params), example)


def dense_reference(kind: type, objective: ij.Objective, params: Any, data: Any, weights: Any = None) -> jax.Array:
    """The curvature matrix by `jax.hessian` and `jax.jacobian` on the flat vector, independent of the operators."""
    flat = ij.flatten(params, params)
    count = jax.tree.leaves(data)[0].shape[0]
    weights = jnp.ones(count) if weights is None else weights

    def of_one(example: Any) -> jax.Array:
        if kind is ij.Hessian:
            return jax.hessian(flat_objective(objective, params))(flat, example)
        if kind is ij.EmpiricalFisher:
            gradient = jax.grad(flat_objective(objective, params))(flat, example)
            return jnp.outer(gradient, gradient)
        out = objective.predict(params, example)
        jacobian = jax.jacobian(lambda f: objective.predict(ij.unflatten(f, params), example))(flat)
        return jacobian.T @ jax.hessian(lambda o: objective.loss(o, example))(out) @ jacobian

    return jnp.einsum("n,nij->ij", weights, jax.jit(jax.vmap(of_one))(data)) / jnp.sum(weights)


def tiny_mlp(loss: str) -> tuple[dict, ij.Objective, dict, ij.Batch, ij.Batch]:
    """The stored problem with pyDVL's direct results: arrays, objective, parameters, training data, queries."""
    stored = np.load(GOLDEN / "tiny_mlp_pydvl_direct.npz")
    arrays = {name.removeprefix(f"{loss}/"): stored[name] for name in stored.files if name.startswith(loss)}
    weights = {name.removeprefix("param/"): arrays[name] for name in arrays if name.startswith("param/")}
    params = jax.tree.map(jnp.asarray, torch_layers(weights, {"layer0": "0", "layer2": "2"}))
    objective = {"mse": REGRESSION, "ce": CLASSIFICATION}[loss]
    train, query = ij.Batch(arrays["x"], arrays["y"]), ij.Batch(arrays["x_test"], arrays["y_test"])
    return arrays, objective, params, train, query
