"""Mistakes with dampings, solvers, blocks and keys, and with what is asked of influences."""

from functools import partial

import helpers
import jax.numpy as jnp
import numpy as np
from small_classifier import BATCH, GGN, INFLUENCE, OBJECTIVE, PARAMS, STACK, kronecker

import influence_jax as ij
from influence_jax.stream.loaders import Blocks


def tokens():
    objective = ij.Objective(lambda p, z: p["table"][z.x].mean(0), helpers.cross_entropy)
    params = {"table": jnp.ones((7, 3))}
    batch = ij.Batch(jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, jnp.int32))
    return ij.Influence(objective, params, ij.Identity(params)).influences(batch, batch, "perturbation")


OTHER = {**PARAMS, "layer1": {**PARAMS["layer1"], "bias": PARAMS["layer1"]["bias"] + 0.5}}
CURVATURES = {
    "GGN": GGN,
    "Hessian": ij.Hessian(OBJECTIVE, PARAMS, BATCH),
    "EmpiricalFisher": ij.EmpiricalFisher(OBJECTIVE, PARAMS, BATCH),
    "a multiple": 2.0 * GGN,
    "a damped sum": GGN + 0.1 * ij.Identity(PARAMS),
    "a curvature over a loader": ij.stream.operator(ij.GGN, OBJECTIVE, PARAMS, Blocks([BATCH], "loader")),
    "Kronecker factors": kronecker(labels="empirical"),
}
CHOICES = ["a number >= 0", "RelativeDamping(0.1)", "0.0"]

SOLVERS = [
    ("negative damping", lambda: ij.CG(-1e-3), ValueError, ["damping", "-0.001", "non-negative"]),
    ("string damping", lambda: ij.Direct("auto"), TypeError, ["damping", "'auto'", "RelativeDamping"]),
    ("infinite damping", lambda: ij.Eigh(float("inf")), ValueError, ["damping", "inf"]),
    ("no damping", lambda: ij.CG(None), TypeError, ["damping", "None"]),
    *(
        (f"{solver.__name__} without damping", partial(solver, **options), TypeError, ["damping", *CHOICES])
        for solver, options in [
            *((solver, {}) for solver in (ij.Direct, ij.Eigh, ij.CG, ij.BlockCG, ij.LiSSA, ij.Jacobi)),
            *((solver, {}) for solver in (ij.SampleSpace, ij.HarmonicMean)),
            *((solver, {"rank": 2}) for solver in (ij.Arnoldi, ij.Nystrom)),
        ]
    ),
    ("vector damping", lambda: ij.CG(jnp.ones(3)), TypeError, ["damping"]),
    ("negative relative damping", lambda: ij.RelativeDamping(-0.1), ValueError, ["factor", "-0.1"]),
    ("negative damping later", lambda: ij.invert(GGN, ij.CG(1.0)).with_damping(-1.0), ValueError, ["damping", "-1.0"]),
    ("max_steps not an int", lambda: ij.CG(0.1, max_steps=1e3), TypeError, ["max_steps", "1000.0"]),
    ("max_steps zero", lambda: ij.CG(0.1, max_steps=0), ValueError, ["max_steps", "0"]),
    ("string tolerance", lambda: ij.CG(0.1, rtol="tight"), TypeError, ["rtol", "'tight'"]),
    ("preconditioner", lambda: ij.CG(0.1, preconditioner="jacobi"), TypeError, ["preconditioner", "'jacobi'"]),
    ("solver class", lambda: ij.invert(GGN, ij.CG), TypeError, ["solver", "CG(damping=1e-3)"]),
    ("solver string", lambda: ij.invert(GGN, "cg"), TypeError, ["solver", "'cg'"]),
    ("operator", lambda: ij.invert(jnp.eye(3), ij.CG(0.1)), TypeError, ["op", "LinearOperator"]),
    ("inverse", lambda: ij.Influence(OBJECTIVE, PARAMS, ij.CG(0.1)), TypeError, ["inverse", "CG", "invert"]),
    *(
        (
            f"{name} where its inverse is meant",
            lambda op=op: ij.Influence(OBJECTIVE, PARAMS, op),
            TypeError,
            ["inverse", "got a curvature", "invert(", "BlockCG(damping)"],
        )
        for name, op in CURVATURES.items()
    ),
    (
        "curvature as a preconditioner",
        lambda: ij.invert(GGN, ij.CG(0.1, preconditioner=GGN)),
        TypeError,
        ["preconditioner", "got a curvature", "invert(GGN"],
    ),
    (
        "inverse of an inverse",
        lambda: ij.Influence(OBJECTIVE, PARAMS, ij.invert(INFLUENCE.inverse, ij.CG(0.1))),
        TypeError,
        ["inverse", "got a curvature", "Inverse(Inverse(GGN", "what is inverted there once, Inverse(GGN"],
    ),
    (
        "inverse of other parameters",
        lambda: ij.Influence(OBJECTIVE, OTHER, INFLUENCE.inverse),
        ValueError,
        ["params", "'layer1/bias'", "5.0e-01", "fitted"],
    ),
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
]

BLOCKS = [
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
        "damping for blocks that are not there, later",
        lambda: ij.invert(GGN, ij.Blockwise(ij.Direct(0.1))).with_damping({"layer0": 0.2, "layer9": 0.1}),
        ValueError,
        ["damping", "layer9", "layer1"],
    ),
    (
        "damping for some parameters only",
        lambda: ij.invert(GGN, ij.CG({"layer0": 0.1})),
        ValueError,
        ["damping", "['layer0']", "every leaf once", "layer1/kernel"],
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
]
