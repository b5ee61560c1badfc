"""Mistakes with Kronecker factors, coverage and influences of tokens, and the words that each is told in."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
from small_classifier import BATCH, INFLUENCE, OBJECTIVE, PARAMS, kronecker

import influence_jax as ij


def sequences(**options):
    """EK-FAC of a model whose output has an axis of positions, and too many entries."""
    objective = ij.Objective(lambda p, z: p["table"][z.x], lambda out, z: jnp.sum(out**2))
    params, batch = {"table": jnp.ones((7, 3))}, ij.Batch(jnp.zeros((4, 400), jnp.int32))
    return ij.ekfac(objective, params, batch, **options)


def one_position(example):
    return jnp.ones(1)


SCALED = ij.Objective(lambda p, z: (z.x * p["s"]) @ p["w"], helpers.cross_entropy)


def not_convex():
    return ij.ekfac(ij.Objective(helpers.mlp, lambda out, z: jnp.sum(jnp.cos(out))), PARAMS, BATCH)


KRONECKER = [
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
        ["objective", "(400, 3)", "1200", "1024", "labels='sampled'", "labels='empirical'"],
    ),
    (
        "sampled labels of sequences without sample",
        lambda: sequences(labels="sampled", key=jax.random.key(0)),
        ValueError,
        ["objective", "(400, 3)", "sample=influence_jax.softmax_labels('y')"],
    ),
    (
        "exact labels of a loss that is not convex",
        not_convex,
        ValueError,
        ["labels='exact'", "layer", "convex", "example 0", "empirical"],
    ),
    ("mask not a function", lambda: kronecker(mask=jnp.ones(3)), TypeError, ["mask", "function", "(T,)"]),
    ("mask that names nothing", lambda: kronecker(mask={}), ValueError, ["mask", "empty", "prefix"]),
    ("mask of a name, no function", lambda: kronecker(mask={"layer0": jnp.ones(1)}), TypeError, ["mask", "'layer0'"]),
    (
        "mask of an unknown name",
        lambda: kronecker(mask={"layer9": one_position}),
        ValueError,
        ["mask", "['layer9']", "layer0/kernel"],
    ),
    (
        "mask of part of a name",
        lambda: kronecker(mask={"layer0/ker": one_position}),
        ValueError,
        ["mask", "['layer0/ker']", "layer0/kernel"],
    ),
    (
        "mask of a name twice",
        lambda: kronecker(mask={"": one_position, "layer0/bias": one_position}),
        ValueError,
        ["mask", "layer0/kernel", "['', 'layer0/bias']", "one"],
    ),
    (
        "mask of a named layer of another length",
        lambda: kronecker(mask={"layer0": lambda z: jnp.ones(4)}),
        ValueError,
        ["mask['layer0']", "4 entries", "'layer0/kernel'", "[1] positions"],
    ),
    (
        "mask of a parameter without positions",
        lambda: ij.kfac(SCALED, {"s": jnp.ones(5), "w": jnp.ones((5, 3))}, BATCH, mask={"s": one_position}),
        ValueError,
        ["mask", "'s'", "no layer", "['w']"],
    ),
    (
        "mask of something else of that length",
        lambda: ij.kfac(SCALED, {"s": jnp.ones(5), "w": jnp.ones((5, 3))}, BATCH, mask=lambda z: z.x[:1] > 0),
        ValueError,
        ["mask", "['w']", "depends", "mask={"],
    ),
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
        ["data", "the loss of 1 of 9 examples", "the first example 0 (nan)", "labels", "weight of zero"],
    ),
    (
        "mask of a flat output",
        lambda: kronecker(mask=lambda z: jnp.ones(3)),
        ValueError,
        ["mask", "(3,)", "(3, 1)"],
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
]
