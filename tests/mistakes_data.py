"""Mistakes with losses, data, parameters, vectors and objectives, and with examples that a model cannot take."""

from functools import partial

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from jax.experimental import sparse
from small_classifier import BATCH, GGN, INFLUENCE, OBJECTIVE, PARAMS, STACK

import influence_jax as ij

GGN_OF = partial(ij.GGN, OBJECTIVE, PARAMS)


def loader():
    yield BATCH


def whole_batch_loss(params, batch):
    return jnp.stack([OBJECTIVE(params, batch), OBJECTIVE(params, batch)])


class Centred(nn.Module):
    @nn.compact
    def __call__(self, x):
        out = nn.Dense(4)(x)
        return out - out.mean(0, keepdims=True)


def over_the_batch():
    variables = {"params": {"Dense_0": PARAMS["layer0"]}}
    objective, _ = ij.from_linen(Centred(), variables, lambda out, z: jnp.sum(out**2))
    return lambda params, z: objective({"Dense_0": params}, z)


def indexed(out, z):
    return -jax.nn.log_softmax(out)[z.y]


def broadcasting(params, z):
    return optax.softmax_cross_entropy(helpers.mlp(params, z), z.y.astype(float))


INDEXED = ij.Objective(helpers.mlp, indexed)

INPUTS = [
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
    (
        "masked array as data",
        lambda: INFLUENCE.influences(BATCH, ij.Batch(np.ma.masked_array(BATCH.x, BATCH.x > 0), BATCH.y)),
        TypeError,
        ["train: leaf 'x'", "masked entries", ".filled(0)"],
    ),
    (
        "sparse array as data",
        lambda: ij.GGN(OBJECTIVE, PARAMS, {"x": sparse.BCOO.fromdense(BATCH.x), "y": BATCH.y}),
        TypeError,
        ["data: leaf 'x'", "BCOO", ".todense()"],
    ),
    (
        "batch statistics among parameters",
        lambda: ij.GGN(OBJECTIVE, {"params": PARAMS, "batch_stats": {"mean": jnp.ones(2)}}, BATCH),
        TypeError,
        ["params", "'batch_stats'", "variables['params']", "constants="],
    ),
    (
        "model that computes over its batch",
        lambda: over_the_batch()(PARAMS["layer0"], jax.tree.map(lambda x: x[0], BATCH)),
        ValueError,
        ["module: Centred", "over the batch", "other rows of a batch of 8", "use_running_average=True"],
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
]

TRAIN_STATE = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.adam(0.1))


class OwnError(Exception):
    """A class that whoever raises it may wait for."""


def raising(error):
    def predict(params, z):
        raise error

    return ij.Objective(predict, helpers.cross_entropy)


def narrow(params, z):
    """A model that is bfloat16 throughout."""
    return jax.lax.mul(z["x"][0], params["w"])


STATES = [
    (
        "train state in place of params",
        lambda: ij.Influence(OBJECTIVE, TRAIN_STATE, INFLUENCE.inverse),
        TypeError,
        ["params", "TrainState", "pass state.params"],
    ),
    (
        "optimizer's state in place of params",
        lambda: ij.GGN(OBJECTIVE, TRAIN_STATE.opt_state, BATCH),
        TypeError,
        ["params", "state of an optimizer", "ScaleByAdamState", "state.params"],
    ),
    (
        "restored train state in place of params",
        lambda: ij.Identity({"step": np.array(3), "params": PARAMS, "opt_state": {}}),
        TypeError,
        ["params", "'step', 'opt_state'", "['params']"],
    ),
    (
        "nnx optimizer in place of params",
        lambda: ij.Identity(nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)),
        TypeError,
        ["params", "Optimizer", "nnx.state(model, nnx.Param)"],
    ),
    (
        "part of a tuple by name",
        lambda: ij.from_linen(nn.Dense(3), {"params": PARAMS["layer0"]}, helpers.cross_entropy)[0](
            PARAMS["layer0"], (BATCH.x[0], BATCH.y[0])
        ),
        ValueError,
        ["input", "'x'", "[0, 1]", "input=0"],
    ),
]

CLASSES = [
    (
        f"own error: {type(error).__name__}",
        lambda error=error: ij.per_example_grads(raising(error), PARAMS, BATCH),
        type(error),
        ["predict: raising.<locals>.predict failed at mistakes_data.py:", "x float64[5]", "ONE example"],
    )
    for error in (KeyError("kernel"), NotImplementedError("later"), ZeroDivisionError("zero"), OwnError("mine"))
] + [
    (
        "own error within another objective",
        lambda: ij.per_example_grads(lambda p, z: raising(OwnError("inner"))(p, z), PARAMS, BATCH),
        OwnError,
        ["predict: raising.<locals>.predict failed"],
    ),
    (
        "model that is bfloat16 throughout",
        lambda: ij.per_example_grads(
            ij.Objective(narrow, lambda out, z: jnp.sum(out.astype(jnp.float32))),
            {"w": jnp.ones(2, jnp.bfloat16)},
            {"x": jnp.ones((3, 4, 2), jnp.bfloat16)},
        ),
        TypeError,
        ["w float32[2]", "passed as bfloat16 arrive as float32", "astype(jnp.bfloat16)"],
    ),
]

EXAMPLES = [
    (
        "list of batches",
        lambda: ij.InfluenceFunctionModel(OBJECTIVE, PARAMS).fit([BATCH, BATCH]),
        ValueError,
        ["data: got a list of 2, each a Batch", "loader", "one batch", "influence_jax.stream", "numpy.concatenate"],
    ),
    (
        "list of batches as queries",
        lambda: INFLUENCE.influences([BATCH], BATCH),
        ValueError,
        ["query: got a list of 1, each a Batch", "loader", "influence_jax.stream"],
    ),
    (
        "a block of an inverse that has none",
        lambda: ij.Influence(OBJECTIVE, PARAMS, ij.Identity(PARAMS)).block("layers_9"),
        ValueError,
        ["name", "'layers_9'", "no blocks", "Blockwise", "blocks="],
    ),
    (
        "targets that are NaN",
        lambda: ij.invert(GGN_OF(ij.Batch(BATCH.x * np.nan, BATCH.y)), ij.CG(0.1)),
        ValueError,
        ["data: the loss of 9 of 9 examples", "first example 0 (nan)", "labels", "weight of zero"],
    ),
    (
        "class numbers from one",
        lambda: ij.Influence(INDEXED, PARAMS, ij.Identity(PARAMS)).influences(BATCH, ij.Batch(BATCH.x, BATCH.y + 1)),
        ValueError,
        [
            "train: the numbers of part 'y'",
            "(3)",
            "expected 0 to 2",
            "indexed",
            "cross_entropy(ignore=...)",
            "jnp.clip",
        ],
    ),
    (
        "padding that nobody masks",
        lambda: ij.ekfac(INDEXED, PARAMS, ij.Batch(BATCH.x, BATCH.y * 0 - 100)),
        ValueError,
        ["data: the numbers of part 'y'", "in 9 of 9 examples, the first example 0 (-100)", "mask"],
    ),
    (
        "a class number for a one-hot label in a bare function",
        lambda: ij.per_example_grads(broadcasting, PARAMS, BATCH),
        ValueError,
        ["objective: broadcasting", "integer part 'y'", "(3,) of a softmax", "jax.nn.one_hot"],
    ),
    (
        "arrays in a list for a model that wants a Batch",
        lambda: INFLUENCE.influences([BATCH.x, BATCH.y], BATCH),
        AttributeError,
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
        KeyError,
        ["predict", "with KeyError", "'kernel'", "params/layer0/kernel", "in the containers they were passed in"],
    ),
    (
        "model that wants a batch",
        lambda: ij.per_example_grads(lambda p, z: jnp.mean(z.x[:, 0] * p["w"]), {"w": jnp.ones(())}, BATCH),
        IndexError,
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
        jax.errors.TracerBoolConversionError,
        ["objective", "TracerBoolConversionError", "x float64[5]"],
    ),
    (
        "flax module in place of an objective",
        lambda: ij.GGN(nn.Dense(3), PARAMS, BATCH),
        TypeError,
        ["objective", "Dense", "from_linen(module, variables, loss)"],
    ),
]
