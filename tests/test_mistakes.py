"""Mistakes are told in words: the argument, what it got, what was expected, and the way out.

`python tests/test_mistakes.py` prints all of them with their messages.
"""

import dataclasses
import pathlib
import traceback
from functools import partial

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence_jax as ij

PARAMS = helpers.random_mlp(jax.random.key(0))
BATCH = helpers.random_batch(jax.random.key(1), 9, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
GGN = ij.GGN(OBJECTIVE, PARAMS, BATCH)
INFLUENCE = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Direct(0.1)))
STACK = jax.tree.map(lambda x: x[None], PARAMS)
GGN_OF = partial(ij.GGN, OBJECTIVE, PARAMS)
PACKAGE = pathlib.Path(ij.__file__).parent


def loader():
    yield BATCH


def tokens():
    objective = ij.Objective(lambda p, z: p["table"][z.x].mean(0), helpers.cross_entropy)
    params = {"table": jnp.ones((7, 3))}
    batch = ij.Batch(jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, jnp.int32))
    return ij.Influence(objective, params, ij.Identity(params)).influences(batch, batch, "perturbation")


def fisher(sample):
    objective = ij.Objective(helpers.mlp, helpers.cross_entropy, sample=sample)
    return ij.Fisher(objective, PARAMS, BATCH, key=jax.random.key(0)).mv(PARAMS)


def whole_batch_loss(params, batch):
    return jnp.stack([OBJECTIVE(params, batch), OBJECTIVE(params, batch)])


def sequences(**options):
    """EK-FAC of a model whose output has an axis of positions."""
    objective = ij.Objective(lambda p, z: p["table"][z.x], lambda out, z: jnp.sum(out**2))
    params, batch = {"table": jnp.ones((7, 3))}, ij.Batch(jnp.zeros((4, 2), jnp.int32))
    return ij.ekfac(objective, params, batch, **options)


def kronecker(**options):
    return ij.kfac(OBJECTIVE, PARAMS, BATCH, **options)


def not_convex():
    return ij.ekfac(ij.Objective(helpers.mlp, lambda out, z: jnp.sum(jnp.cos(out))), PARAMS, BATCH)


# (id, call, error, words the message must hold)
MISTAKES = [
    (
        "labels unknown",
        lambda: kronecker(labels="true"),
        ValueError,
        ["labels", "'true'", "exact", "sampled", "empirical"],
    ),
    ("sampled labels without key", lambda: kronecker(labels="sampled"), ValueError, ["key", "sampled", "None"]),
    (
        "true labels of a bare function",
        lambda: ij.kfac(lambda p, z: OBJECTIVE(p, z), PARAMS, BATCH),
        TypeError,
        ["objective", "labels='exact'", "Objective(predict, loss)", "labels='empirical'"],
    ),
    (
        "exact labels of sequences",
        sequences,
        ValueError,
        ["objective", "(2, 3)", "1024", "labels='sampled'", "labels='empirical'"],
    ),
    (
        "sampled labels of sequences without sample",
        lambda: sequences(labels="sampled", key=jax.random.key(0)),
        ValueError,
        ["objective", "(2, 3)", "sample=influence_jax.softmax_sample"],
    ),
    (
        "exact labels of a loss that is not convex",
        not_convex,
        ValueError,
        ["not finite", "layer", "convex", "empirical"],
    ),
    ("mask not a function", lambda: kronecker(mask=jnp.ones(3)), TypeError, ["mask", "function", "(T,)"]),
    ("mask of two axes", lambda: kronecker(mask=lambda z: jnp.ones((2, 2))), ValueError, ["mask", "(2, 2)", "(T,)"]),
    ("mask of another length", lambda: kronecker(mask=lambda z: jnp.ones(17)), ValueError, ["mask", "17", "positions"]),
    ("max_side zero", lambda: kronecker(max_side=0), ValueError, ["max_side", "0", "positive"]),
    (
        "Kronecker weights negative",
        lambda: kronecker(weights=-jnp.ones(9)),
        ValueError,
        ["weights", "-1.0", "non-negative"],
    ),
    (
        "NaN in data for K-FAC",
        lambda: ij.kfac(OBJECTIVE, PARAMS, ij.Batch(jnp.asarray(BATCH.x).at[0, 0].set(jnp.nan), BATCH.y)),
        ValueError,
        ["data", "'x'", "NaN"],
    ),
    (
        "mask of a flat output",
        lambda: kronecker(mask=lambda z: jnp.ones(3)),
        ValueError,
        ["mask", "(3,)", "(3, 1)"],
    ),
    (
        "relative damping of blocks for a solver with one",
        lambda: ij.invert(kronecker(), ij.CG(ij.RelativeDamping(0.1))),
        ValueError,
        ["damping", "each block", "Direct", "Blockwise"],
    ),
    (
        "share of an unknown kind",
        lambda: ij.coverage(OBJECTIVE, PARAMS, jax.tree.map(lambda x: x[0], BATCH)).share("matrx"),
        ValueError,
        ["kinds", "matrx", "matrix"],
    ),
    (
        "coverage of a batch",
        lambda: ij.coverage(ij.Objective(helpers.linear, helpers.cross_entropy), PARAMS["layer0"], BATCH),
        (TypeError, ValueError),
        ["loss", "one example", "batch axis"],
    ),
    (
        "token influences of whole examples",
        lambda: INFLUENCE.token_influences(BATCH, BATCH),
        ValueError,
        ["output", "(3,)", "(T, C)", "influences"],
    ),
    (
        "token influences of two outputs",
        lambda: dataclasses.replace(
            INFLUENCE, objective=ij.Objective(lambda p, z: (z.x, z.x), lambda out, z: out[0].sum())
        ).token_influences(BATCH, BATCH),
        ValueError,
        ["output", "((5,), (5,))", "(T, C)"],
    ),
    (
        "token influences of a bare function",
        lambda: dataclasses.replace(INFLUENCE, objective=lambda p, z: OBJECTIVE(p, z)).token_influences(BATCH, BATCH),
        TypeError,
        ["objective", "token_influences", "Objective(predict, loss)"],
    ),
    (
        "loss not scalar",
        lambda: ij.Hessian(whole_batch_loss, PARAMS, BATCH).mv(PARAMS),
        ValueError,
        ["loss", "whole_batch_loss", "(2,)", "scalar", "reduce"],
    ),
    (
        "loss not floating",
        lambda: ij.Hessian(lambda p, z: z.y, PARAMS, BATCH).mv(PARAMS),
        TypeError,
        ["loss", "int64", "floating"],
    ),
    (
        "lengths disagree",
        lambda: ij.Batch(np.ones((4, 2)), np.ones(3)),
        ValueError,
        ["Batch", "'x': 4", "'y': 3", "same"],
    ),
    (
        "lengths disagree in a dict",
        lambda: ij.GGN(OBJECTIVE, PARAMS, {"x": np.ones((4, 2)), "y": np.ones(3)}),
        ValueError,
        ["data", "'x': 4", "'y': 3"],
    ),
    (
        "empty batch",
        lambda: INFLUENCE.influences(jax.tree.map(lambda x: x[:0], BATCH), BATCH),
        ValueError,
        ["query", "no examples", "at least one"],
    ),
    (
        "scalar leaf",
        lambda: ij.GGN(OBJECTIVE, PARAMS, {"x": np.float64(3.0)}),
        ValueError,
        ["data", "'x'", "scalar", "[None]"],
    ),
    ("no arrays", lambda: ij.GGN(OBJECTIVE, PARAMS, {}), ValueError, ["data", "without arrays"]),
    ("loader as data", lambda: ij.GGN(OBJECTIVE, PARAMS, loader()), TypeError, ["data", "generator", "concatenate"]),
    (
        "list of numbers as data",
        lambda: ij.per_example_grads(OBJECTIVE, PARAMS, {"x": [1.0, 2.0]}),
        TypeError,
        ["batch", "'x/0'", "float", "asarray"],
    ),
    (
        "strings as data",
        lambda: ij.GGN(OBJECTIVE, PARAMS, {"x": np.array(["a", "b"])}),
        TypeError,
        ["data", "'x'", "encode"],
    ),
    (
        "integer params",
        lambda: ij.Identity({"w": jnp.ones(2), "step": jnp.arange(2)}),
        TypeError,
        ["params", "'step'", "int64", "constants"],
    ),
    (
        "complex params",
        lambda: ij.Identity({"w": jnp.ones(2, jnp.complex128)}),
        TypeError,
        ["params", "'w'", "complex"],
    ),
    ("no params", lambda: ij.GGN(OBJECTIVE, {}, BATCH), ValueError, ["params", "without leaves"]),
    (
        "params that share a name",
        lambda: ij.Identity({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}),
        ValueError,
        ["params", "a/b", "rename"],
    ),
    (
        "vector of another structure",
        lambda: GGN.mv({"w": jnp.ones(3)}),
        ValueError,
        ["v", "missing", "unexpected", "'w'"],
    ),
    ("flat vector", lambda: GGN.mv(jnp.ones(39)), ValueError, ["v", "(39,)", "unflatten"]),
    (
        "vector of another shape",
        lambda: GGN.mv({**PARAMS, "layer0": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(4)}}),
        ValueError,
        ["v", "'layer0/kernel'", "(4, 5)", "(5, 4)"],
    ),
    (
        "integer vector",
        lambda: ij.Identity({"w": jnp.ones(2)}).mv({"w": jnp.arange(2)}),
        TypeError,
        ["v", "'w'", "floating"],
    ),
    ("vector for a stack", lambda: INFLUENCE.inverse.solve_many(PARAMS), ValueError, ["V", "'layer0/bias'"]),
    ("stack for a vector", lambda: INFLUENCE.inverse.solve(STACK), ValueError, ["v", "(1, 4)", "(4,)"]),
    (
        "flat factors",
        lambda: INFLUENCE.influences_from_factors(jnp.ones((2, 39)), BATCH),
        ValueError,
        ["factors", "unflatten"],
    ),
    (
        "uneven stack",
        lambda: GGN.mm({**STACK, "layer1": jax.tree.map(lambda x: jnp.ones((2, *x.shape)), PARAMS["layer1"])}),
        ValueError,
        ["V", "leading", "length"],
    ),
    (
        "GGN of a bare function",
        lambda: ij.GGN(lambda p, z: OBJECTIVE(p, z), PARAMS, BATCH),
        TypeError,
        ["objective", "GGN", "Objective(predict, loss)", "Hessian"],
    ),
    ("objective not callable", lambda: ij.Hessian("loss", PARAMS, BATCH), TypeError, ["objective", "str"]),
    (
        "predict not callable",
        lambda: ij.Objective(jnp.ones(3), helpers.cross_entropy),
        TypeError,
        ["predict", "function"],
    ),
    ("negative damping", lambda: ij.CG(-1e-3), ValueError, ["damping", "-0.001", "non-negative"]),
    ("string damping", lambda: ij.Direct("auto"), TypeError, ["damping", "'auto'", "RelativeDamping"]),
    ("infinite damping", lambda: ij.Eigh(float("inf")), ValueError, ["damping", "inf"]),
    ("no damping", lambda: ij.CG(None), TypeError, ["damping", "None"]),
    ("vector damping", lambda: ij.CG(jnp.ones(3)), TypeError, ["damping"]),
    ("negative relative damping", lambda: ij.RelativeDamping(-0.1), ValueError, ["factor", "-0.1"]),
    ("negative damping later", lambda: ij.invert(GGN, ij.CG(1.0)).with_damping(-1.0), ValueError, ["damping", "-1.0"]),
    ("max_steps not an int", lambda: ij.CG(max_steps=1e3), TypeError, ["max_steps", "1000.0"]),
    ("max_steps zero", lambda: ij.CG(max_steps=0), ValueError, ["max_steps", "0"]),
    ("string tolerance", lambda: ij.CG(rtol="tight"), TypeError, ["rtol", "'tight'"]),
    ("preconditioner", lambda: ij.CG(preconditioner="jacobi"), TypeError, ["preconditioner", "'jacobi'"]),
    ("solver class", lambda: ij.invert(GGN, ij.CG), TypeError, ["solver", "CG(damping=1e-3)"]),
    ("solver string", lambda: ij.invert(GGN, "cg"), TypeError, ["solver", "'cg'"]),
    ("operator", lambda: ij.invert(jnp.eye(3), ij.CG()), TypeError, ["op", "LinearOperator"]),
    ("inverse", lambda: ij.Influence(OBJECTIVE, PARAMS, ij.CG(0.1)), TypeError, ["inverse", "CG", "invert"]),
    (
        "inverse of another space",
        lambda: ij.Influence(OBJECTIVE, PARAMS, ij.Identity({"w": jnp.ones(2)})),
        ValueError,
        ["params", "inverse"],
    ),
    ("measurement", lambda: ij.Influence(OBJECTIVE, PARAMS, GGN, measurement=3), TypeError, ["measurement", "int"]),
    (
        "unknown mode",
        lambda: INFLUENCE.influences(BATCH, BATCH, "down"),
        ValueError,
        ["mode", "'down'", "'up'", "'perturbation'"],
    ),
    (
        "mode of factors",
        lambda: INFLUENCE.influences_from_factors(STACK, BATCH, "garbage"),
        ValueError,
        ["mode", "'garbage'"],
    ),
    ("mode not a string", lambda: INFLUENCE.influences(BATCH, BATCH, ["up"]), ValueError, ["mode", "['up']"]),
    (
        "bad wrt",
        lambda: INFLUENCE.influences(BATCH, BATCH, "perturbation", wrt="z"),
        ValueError,
        ["wrt", "'z'", "'x', 'y'"],
    ),
    (
        "wrt labels",
        lambda: INFLUENCE.influences(BATCH, BATCH, "perturbation", wrt="y"),
        TypeError,
        ["wrt", "'y'", "int64", "embed"],
    ),
    ("tokens", tokens, TypeError, ["wrt", "'x'", "int32", "embed"]),
    ("k > N", lambda: INFLUENCE.top_k(BATCH, BATCH, 10), ValueError, ["k", "10", "between 1 and 9"]),
    ("k = 0", lambda: INFLUENCE.top_k(BATCH, BATCH, 0), ValueError, ["k", "0"]),
    ("k not an int", lambda: INFLUENCE.top_k(BATCH, BATCH, 2.0), TypeError, ["k", "2.0", "int"]),
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
        ["sample", "()", "(3,)", "softmax_sample"],
    ),
    (
        "sample of integers",
        lambda: fisher(lambda key, out: jnp.argsort(out)),
        TypeError,
        ["sample", "int64", "softmax_sample"],
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
    (
        "list of batches",
        lambda: ij.InfluenceFunctionModel(OBJECTIVE, PARAMS).fit([BATCH, BATCH]),
        TypeError,
        ["predict", "at helpers.py:", "AttributeError", "0/x float64[5]", "ONE example"],
    ),
    (
        "arrays in a list for a model that wants a Batch",
        lambda: INFLUENCE.influences([BATCH.x, BATCH.y], BATCH),
        TypeError,
        ["predict", "mlp", "AttributeError", "example (0 float64[5], 1 int64[])", "ONE example"],
    ),
    (
        "inputs of another width",
        lambda: INFLUENCE.influences(ij.Batch(BATCH.x[:, :3], BATCH.y), BATCH),
        TypeError,
        ["predict", "mlp", "(3,) and (5,)", "layer0/kernel float64[5, 4]", "x float64[3]", "ONE example"],
    ),
    (
        "one-hot labels for a loss of integers",
        lambda: GGN_OF(ij.Batch(BATCH.x, jax.nn.one_hot(BATCH.y, 3))).mv(PARAMS),
        TypeError,
        ["loss", "cross_entropy", "integer", "y float64[3]"],
    ),
    (
        "variables in place of params",
        lambda: ij.GGN(OBJECTIVE, {"params": PARAMS}, BATCH).mv({"params": PARAMS}),
        ValueError,
        ["predict", "KeyError: 'kernel'", "params/layer0/kernel", "params as they were passed"],
    ),
    (
        "model that wants a batch",
        lambda: ij.per_example_grads(lambda p, z: jnp.mean(z.x[:, 0] * p["w"]), {"w": jnp.ones(())}, BATCH),
        ValueError,
        ["objective", "Too many indices", "x float64[5]", "without a batch axis"],
    ),
    (
        "function of params only",
        lambda: ij.per_example_grads(lambda params: 0.0, PARAMS, BATCH),
        TypeError,
        ["objective", "takes 1 positional argument but 2 were given", "example"],
    ),
    (
        "loss of nothing",
        lambda: ij.per_example_grads(lambda params, example: None, PARAMS, BATCH),
        TypeError,
        ["loss", "NoneType", "expected a scalar"],
    ),
    (
        "branch on a value",
        lambda: ij.per_example_grads(lambda p, z: p["w"] if z.x[0] > 0 else 0.0, {"w": jnp.ones(())}, BATCH),
        TypeError,
        ["objective", "TracerBoolConversionError", "x float64[5]"],
    ),
    (
        "flax module in place of an objective",
        lambda: ij.GGN(nn.Dense(3), PARAMS, BATCH),
        TypeError,
        ["objective", "Dense", "from_linen(module, variables, loss)"],
    ),
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
    ("block of a number", lambda: ij.Blockwise(ij.CG(0.1), {"a": 3}), TypeError, ["blocks", "'a': 3", "list"]),
    (
        "block of nothing",
        lambda: ij.Blockwise(ij.CG(0.1), {"a": [], "b": ["layer0"]}),
        TypeError,
        ["blocks", "'a': []"],
    ),
    (
        "empty block",
        lambda: ij.invert(ij.Diagonal({"a": jnp.ones(2), "e": jnp.ones(0)}), ij.Blockwise(ij.Direct(0.1))),
        ValueError,
        ["block 'e'", "no entries"],
    ),
    (
        "structured array",
        lambda: ij.GGN(OBJECTIVE, PARAMS, np.zeros(3, [("a", "f4")])),
        TypeError,
        ["data", "'a'", "numbers"],
    ),
    (
        "perturbing a bare array",
        lambda: ij.mixed_grads(lambda p, z: p["w"] @ z, {"w": jnp.ones(2)}, jnp.ones((3, 2))),
        ValueError,
        ["wrt", "'x'", "{'x': batch}"],
    ),
    (
        "relative damping in a preconditioner",
        lambda: ij.invert(
            ij.Diagonal({"a": -jnp.ones(2)}), ij.CG(3.0, preconditioner=ij.Direct(ij.RelativeDamping(0.1)))
        ),
        ValueError,
        ["damping", "mean eigenvalue", "absolute"],
    ),
    (
        "relative damping in a block",
        lambda: ij.invert(
            ij.Diagonal({"a": -jnp.ones(2), "b": jnp.ones(1)}), ij.Blockwise(ij.Direct(ij.RelativeDamping(0.1)))
        ),
        ValueError,
        ["damping", "block 'a'", "absolute"],
    ),
    (
        "Cholesky at another damping in a block",
        lambda: ij.invert(GGN, ij.Blockwise(ij.Direct(0.1))).with_damping(0.2),
        ValueError,
        ["damping", "Eigh", "block 'layer0'"],
    ),
    ("number as a key", lambda: ij.invert(GGN, ij.CG(0.1), key=0), TypeError, ["key", "0", "jax.random.key"]),
    (
        "mode as an array",
        lambda: INFLUENCE.influences(BATCH, BATCH, np.array(["up", "up"])),
        ValueError,
        ["mode", "expected"],
    ),
    (
        "wrt a part that is None",
        lambda: ij.mixed_grads(lambda p, z: jnp.sum(p["w"]), {"w": jnp.ones(2)}, ij.Batch(jnp.ones(3)), wrt="y"),
        ValueError,
        ["wrt", "'y'", "empty"],
    ),
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


@pytest.mark.parametrize(("call", "error", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistake(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert type(caught.value).__module__ in ("builtins", "influence_jax.curvature.capabilities")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert PACKAGE in pathlib.Path(last.filename).parents, f"the traceback ends in {last.filename}"


def test_float64_with_x64_off(float32):
    with pytest.raises(TypeError, match=r"params: leaf 'w' is float64 but 64-bit mode is off.*enable_x64"):
        ij.Identity({"w": np.ones(2)})
    with pytest.raises(TypeError, match=r"data: leaf 'x' is float64 but 64-bit mode is off.*astype"):
        ij.Hessian(OBJECTIVE, {"w": np.ones(2, np.float32)}, ij.Batch(np.ones((3, 2)), np.ones(3, np.int64)))


def test_checks_do_not_get_in_the_way_of_transformations():
    """Containers are rebuilt by JAX with stacked, traced and placeholder leaves; no check may see those."""
    assert jax.tree.map(lambda x: x.shape, BATCH).x == (9, 5)
    assert jax.vmap(lambda z: OBJECTIVE(PARAMS, z))(BATCH).shape == (9,)
    assert jax.tree.structure(jax.tree.map(lambda _: None, GGN)) is not None
    assert jax.jit(lambda damping: ij.CG(damping).damping * 2)(-1.0) == -2.0
    weights = jnp.ones((2, 9))
    assert jax.vmap(lambda w: ij.trace(ij.GGN(OBJECTIVE, PARAMS, BATCH, weights=w)))(weights).shape == (2,)
    assert len(jax.tree.leaves(jax.eval_shape(lambda op: op, GGN))) == len(jax.tree.leaves(GGN))


@pytest.mark.parametrize("solver", [ij.Direct, ij.CG])
def test_mistakes_are_found_before_any_long_computation(solver, compilations):
    """A bad mode, k or wrt is refused without compiling a solve."""
    influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, solver(0.1)))
    with compilations() as names:
        for call in (
            lambda: influence.influences(BATCH, BATCH, "down"),
            lambda: influence.influences(BATCH, BATCH, "perturbation", wrt="y"),
            lambda: influence.top_k(BATCH, BATCH, 100),
        ):
            with pytest.raises((ValueError, TypeError)):
                call()
    assert names == []


def test_reprs_say_what_a_thing_is():
    assert repr(GGN) == "GGN(39 parameters, 9 examples)"
    assert repr(INFLUENCE.inverse) == "Inverse(GGN(39 parameters, 9 examples), Direct(damping=0.1))"
    assert "Objective(mlp, cross_entropy)" in repr(INFLUENCE)
    assert repr(BATCH) == "Batch(float64[9, 5], int64[9])"
    assert repr(ij.CG(ij.RelativeDamping(0.1))).startswith("CG(damping=RelativeDamping(0.1)")


def listed() -> str:
    """Every mistake above and what it is told, for people to read: `python tests/test_mistakes.py`."""
    told = []
    for name, call, error, _ in MISTAKES:
        with pytest.raises(error) as caught:
            call()
        told.append(f"{name}\n    {type(caught.value).__name__}: {caught.value}\n")
    return f"{len(MISTAKES)} mistakes\n\n" + "\n".join(told)


if __name__ == "__main__":
    print(listed())
