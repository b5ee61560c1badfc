"""Every method of attribution as scores `(Q, N)` of a trained model."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import problems

import influence_jax as ij

OBJECTIVE = problems.OBJECTIVE
RANK, DIM = 100, 256


class Method(NamedTuple):
    """How it is called, its scores of models `(params, train, query, damping)`, and whether it has a damping."""

    name: str
    scores: Callable
    damped: bool = True


def through(solver, curvature=ij.GGN):
    """Influence with the inverse that a solver makes of a curvature."""

    def scores(params, train, query, damping):
        inverse = ij.invert(curvature(OBJECTIVE, params, train), solver(damping), key=jax.random.key(0))
        return ij.Influence(OBJECTIVE, params, inverse).influences(query, train)

    return scores


def simple(measure):
    """A measure of plain gradients."""

    def scores(params, train, query, damping):
        return measure(ij.Influence(OBJECTIVE, params, ij.Identity(params)), query, train)

    return scores


def relative(params, train, query, damping):
    inverse = ij.invert(ij.GGN(OBJECTIVE, params, train), ij.Direct(damping))
    return ij.baselines.relative(ij.Influence(OBJECTIVE, params, inverse), query, train)


def negative_margin(params, example):
    return ij.baselines.negative_margin(problems.predict(params, example), example["y"])


def trak(params, train, query, damping):
    projection = ij.projections.rademacher(params, DIM, jax.random.key(1))
    return ij.baselines.trak(OBJECTIVE, negative_margin, params, train, projection, damping).influences(query, train)


def harmonic(damping):
    return ij.Blockwise(ij.HarmonicMean(damping), ij.by_layer)


# At a single model.  The names of the field; DataInf is the harmonic mean by layer, with the empirical Fisher matrix.
METHODS = [
    Method("exact Hessian", through(ij.Eigh, ij.Hessian)),
    Method("exact Gauss-Newton", through(ij.Direct)),
    Method("block CG", through(partial(ij.BlockCG, rtol=1e-3))),
    Method("Nyström, rank 100", through(partial(ij.Nystrom, rank=RANK))),
    Method("Arnoldi, rank 100", through(partial(ij.Arnoldi, rank=RANK))),
    Method("EK-FAC", through(ij.Direct, ij.ekfac)),
    Method("K-FAC", through(ij.Direct, ij.kfac)),
    Method("DataInf", through(harmonic, ij.EmpiricalFisher)),
    Method("RelatIF", relative),
    Method("TRAK-style, 256 dimensions", trak),
    Method("gradient dot", simple(ij.Influence.influences), False),
    Method("gradient cosine", simple(ij.baselines.cosine), False),
]


def tracin(recipe, train, query, key, count=6):
    """TracIn over checkpoints of one training, as many epochs apart."""
    weights = jax.numpy.ones(problems.TRAIN)
    epochs = [round(recipe.epochs * (t + 1) / count) for t in range(count)]
    checkpoints = recipe.training(train).checkpoints(weights, key, epochs)
    return ij.baselines.tracin(OBJECTIVE, checkpoints, [problems.RATE] * count, query, train)


def ensemble(method, models, train, query, damping):
    """Mean of a method's scores over models of several seeds."""
    return ij.baselines.over_checkpoints(lambda params: method.scores(params, train, query, damping), models)
