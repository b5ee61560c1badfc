"""influence_jax's side: `python ours.py PROBLEM CASE OPTIONS OUTPUT`."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import flat, report, unflat

import influence_jax as ij

SOLVERS = {
    "direct": ij.Direct,
    "cg": ij.CG,
    "block_cg": ij.BlockCG,
    "lissa": ij.LiSSA,
    "arnoldi": ij.Arnoldi,
    "nystroem": ij.Nystrom,
    "harmonic": ij.HarmonicMean,
}


def cross_entropy(logits, example):
    return optax.softmax_cross_entropy_with_integer_labels(logits, example.y)


def names(sizes):
    return [f"layers_{2 * i}" for i in range(len(sizes) - 1)]


def load(problem):
    """Objective, parameters, training data, queries, and the exact factors as a stack of parameters."""
    sizes = problem["sizes"].tolist()
    layers = [layer for size in sizes[1:] for layer in (nn.Dense(size), nn.tanh)][:-1]
    params = {
        name: {"kernel": jnp.asarray(problem[f"kernel{i}"]), "bias": jnp.asarray(problem[f"bias{i}"])}
        for i, name in enumerate(names(sizes))
    }
    objective, params = ij.from_linen(nn.Sequential(layers), {"params": params}, cross_entropy)
    data = [jnp.asarray(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    factors = {
        name: {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
        for name, (kernel, bias) in zip(names(sizes), unflat(problem["factors"], sizes), strict=True)
    }
    return objective, params, ij.Batch(*data[:2]), ij.Batch(*data[2:]), factors


def case(name, options, problem):
    """What is to be timed, and the function that brings its result into the common order."""
    objective, params, train, query, factors = load(problem)

    def common(tree):
        return flat([(tree[layer]["kernel"], tree[layer]["bias"]) for layer in names(problem["sizes"].tolist())])

    if name == "gradients":
        return lambda: ij.per_example_grads(objective, params, train), common
    if name in ("scores", "perturbation"):
        mode = {"scores": "up"}.get(name, name)
        given = ij.Influence(objective, params, ij.Identity(params))
        return lambda: given.influences_from_factors(factors, train, mode=mode), np.asarray
    curvature = ij.EmpiricalFisher if name == "harmonic" else ij.Hessian
    solver = SOLVERS[name](1e-2, **options)
    model = ij.InfluenceFunctionModel(objective, params, curvature=curvature, solver=solver)
    key = jax.random.key(0)
    return lambda: model.fit(train, key=key).influence_factors(query), common


if __name__ == "__main__":
    path, name, options, output = sys.argv[1:]
    run, common = case(name, json.loads(options), np.load(path))
    report(lambda: jax.block_until_ready(run()), output, common)
