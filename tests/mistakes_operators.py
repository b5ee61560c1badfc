"""Mistakes with operators: their weights, factors and samples, what they cannot do, and trees of another shape."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from small_classifier import BATCH, GGN, INFLUENCE, OBJECTIVE, PARAMS, kronecker

import influence_jax as ij


def fisher(sample):
    objective = ij.Objective(helpers.mlp, helpers.cross_entropy, sample=sample)
    return ij.Fisher(objective, PARAMS, BATCH, key=jax.random.key(0)).mv(PARAMS)


OPERATORS = [
    (
        "weights of another length",
        lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=jnp.ones(8)),
        ValueError,
        ["weights", "(8,)", "(9,)"],
    ),
    (
        "weights that sum to zero",
        lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=jnp.zeros(9)),
        ValueError,
        ["weights", "zero"],
    ),
    ("chunk zero", lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, chunk=0), ValueError, ["chunk", "0"]),
    ("chunk not an int", lambda: ij.Influence(OBJECTIVE, PARAMS, GGN, chunk="big"), TypeError, ["chunk", "'big'"]),
    (
        "negative weights of a semi-definite operator",
        lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=jnp.ones(9).at[0].set(-1.0)),
        ValueError,
        ["weights", "-1.0", "non-negative", "Hessian"],
    ),
    (
        "basis not orthonormal",
        lambda: ij.LowRank({"w": 2.0 * jnp.eye(3)[:2]}, jnp.ones(2)),
        ValueError,
        ["basis", "Gram", "orthonormal", "QR"],
    ),
    ("factor not a number", lambda: GGN * "a", TypeError, ["factor", "'a'"]),
    ("factor a vector", lambda: GGN * jnp.ones(2), ValueError, ["factor", "(2,)", "scalar"]),
    ("python numbers as params", lambda: ij.Identity({"w": 1.0}), TypeError, ["params", "'w'", "float", "asarray"]),
    (
        "integer outputs",
        lambda: ij.GGN(ij.Objective(lambda p, z: z.y, lambda out, z: 1.0 * out), PARAMS, BATCH).mv(PARAMS),
        TypeError,
        ["predict", "int64", "GGN"],
    ),
    (
        "strings as constants",
        lambda: ij.Objective(helpers.mlp, helpers.cross_entropy, constants={"a": "x"}),
        TypeError,
        ["constants", "'a'", "'x'"],
    ),
    ("max_steps as rtol", lambda: ij.CG(0.1, rtol=100), ValueError, ["rtol", "100", "below 1"]),
    (
        "several keys",
        lambda: ij.invert(GGN, ij.CG(0.1), key=jax.random.split(jax.random.key(0))),
        ValueError,
        ["key", "[2]", "one random key"],
    ),
    (
        "sample of labels",
        lambda: fisher(lambda key, out: jnp.argmax(out)),
        ValueError,
        ["sample", "()", "(3,)", "softmax_labels"],
    ),
    (
        "sample of integers",
        lambda: fisher(lambda key, out: jnp.argsort(out)),
        TypeError,
        ["sample", "int64", "softmax_labels"],
    ),
    (
        "recipe without a key",
        lambda: ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, curvature=ij.Fisher).fit(BATCH, key=jax.random.key(0)),
        ValueError,
        ["key", "partial(Fisher"],
    ),
    (
        "recipe's solver",
        lambda: ij.InfluenceFunctionModel(OBJECTIVE, PARAMS, solver="cg"),
        TypeError,
        ["solver", "'cg'", "CG"],
    ),
]

WEIGHTS = [
    ("mask that returns nothing", lambda: kronecker(mask=lambda z: None), TypeError, ["mask", "NoneType", "(T,)"]),
    (
        "weights as a list",
        lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=[1.0] * 9),
        TypeError,
        ["weights", "[1.0", "(9,)", "asarray"],
    ),
    ("weights by name", lambda: kronecker(weights="balanced"), TypeError, ["weights", "'balanced'", "(9,)"]),
    (
        "coverage of words",
        lambda: ij.coverage(OBJECTIVE, PARAMS, {"x": jnp.ones(5), "y": "cat"}),
        TypeError,
        ["example", "'y'", "str", "array"],
    ),
    ("operator times NaN", lambda: float("nan") * GGN, ValueError, ["factor", "nan", "finite"]),
    (
        "complex weights",
        lambda: ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=np.ones(9) * 1j),
        TypeError,
        ["weights", "complex", "real"],
    ),
]

CAPABILITIES = [
    (
        "no root",
        lambda: ij.root(ij.Hessian(OBJECTIVE, PARAMS, BATCH)),
        TypeError,
        ["Hessian", "root", "GGN", "EmpiricalFisher"],
    ),
    ("no spectral", lambda: ij.spectral(GGN), TypeError, ["GGN", "spectral", "LowRank"]),
    (
        "no minibatch",
        lambda: ij.minibatch(INFLUENCE.inverse, jnp.array([0])),
        TypeError,
        ["Inverse", "minibatch", "LiSSA"],
    ),
    ("minibatch out of range", lambda: ij.minibatch(GGN, jnp.array([9])), ValueError, ["indices", "9"]),
    ("minibatch of floats", lambda: ij.minibatch(GGN, jnp.array([0.5])), TypeError, ["indices", "integers"]),
    (
        "unknown block",
        lambda: ij.restrict(GGN, ("layer9/kernel",)),
        ValueError,
        ["block", "layer9/kernel", "layer0/kernel"],
    ),
    ("block as a string", lambda: ij.restrict(GGN, "layer0/kernel"), TypeError, ["block", "('layer0/kernel',)"]),
    ("operators of two spaces", lambda: GGN + ij.Identity({"w": jnp.ones(2)}), ValueError, ["sum of operators"]),
    (
        "low rank of uneven length",
        lambda: ij.LowRank({"w": jnp.ones((2, 3))}, jnp.ones(3)),
        ValueError,
        ["values", "(3,)"],
    ),
    ("low rank too high", lambda: ij.LowRank({"w": jnp.ones((4, 3))}, jnp.ones(4)), ValueError, ["basis", "4", "3"]),
    (
        "variables without params",
        lambda: ij.from_linen(None, {"kernel": jnp.ones(2)}, helpers.cross_entropy),
        ValueError,
        ["variables", "['kernel']", "'params'"],
    ),
    (
        "rngs to flax",
        lambda: ij.from_linen(None, {"params": PARAMS}, helpers.cross_entropy, rngs=1),
        TypeError,
        ["rngs", "deterministic"],
    ),
    ("flatten another tree", lambda: ij.flatten({"w": jnp.ones(3)}, PARAMS), ValueError, ["tree", "missing"]),
    ("unflatten another length", lambda: ij.unflatten(jnp.ones(38), PARAMS), ValueError, ["array", "(38,)", "39"]),
]
