"""influence_jax's side; see `measuring`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import influence_jax as ij

from . import arrays, measuring
from .measuring import Case


def cross_entropy(logits, example):
    """Summed over positions, where there are several."""
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, example.y))


class Transformer(nn.Module):
    blocks: int
    heads: int
    width: int
    vocabulary: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        dense = lambda name, size: nn.Dense(size, name=name)
        norm = lambda name: nn.LayerNorm(self.epsilon, name=name)
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(x)
        x = x + nn.Embed(x.shape[-2], self.width, name="positions")(jnp.arange(x.shape[-2]))
        for block in (f"block{i}" for i in range(self.blocks)):
            normed = norm(f"{block}_norm1")(x)
            q, k, v = (split(dense(f"{block}_{name}", self.width)(normed)) for name in "qkv")
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            x = x + dense(f"{block}_o", self.width)(mixed)
            hidden = dense(f"{block}_up", 4 * self.width)(norm(f"{block}_norm2")(x))
            x = x + dense(f"{block}_down", self.width)(nn.gelu(hidden, approximate=False))
        return dense("head", self.vocabulary)(norm("norm")(x))


def names(sizes):
    return [f"layers_{2 * i}" for i in range(len(sizes) - 1)]


def digits(problem):
    sizes = problem["sizes"].tolist()
    net = nn.Sequential([layer for size in sizes[1:] for layer in (nn.Dense(size), nn.tanh)][:-1])
    params = {
        name: {"kernel": jnp.asarray(problem[f"kernel{i}"]), "bias": jnp.asarray(problem[f"bias{i}"])}
        for i, name in enumerate(names(sizes))
    }
    return ij.from_linen(net, {"params": params}, cross_entropy)


def transformer(problem):
    """The linear layers are parameters and the rest constants, which is what the peer covers."""
    params, rest = {}, {}
    for name, value in problem.items():
        layer, _, part = name.partition(".")
        if part:
            kind = params if f"{layer}.kernel" in problem else rest
            kind.setdefault(layer, {})[part] = jnp.asarray(value)
    vocabulary, width = problem["tokens.embedding"].shape
    epsilon = float(problem["epsilon"])
    net = Transformer(int(problem["blocks"]), int(problem["heads"]), width, vocabulary, epsilon)
    predict = lambda linear, example, rest: net.apply({"params": linear | rest}, example.x[None])[0]
    return ij.Objective(predict, cross_entropy, constants=rest), params


def load(problem):
    """Objective, parameters, training data and queries."""
    objective, params = (transformer if "heads" in problem else digits)(problem)
    data = [jnp.asarray(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    train, query = ij.Batch(*data[:2]), ij.Batch(*data[2:])
    arrays.check(jax.vmap(objective.output, (None, 0))(params, query), problem)
    return objective, params, train, query


def in_order(problem):
    """How a stack of parameters is made an array."""
    layers = names(problem["sizes"].tolist())
    return lambda tree: arrays.flat([(tree[layer]["kernel"], tree[layer]["bias"]) for layer in layers])


def ready(run):
    """A stage that waits for its result."""
    return lambda *given: jax.block_until_ready(run(*given))


def gradients(problem):
    objective, params, train, _ = load(problem)
    return Case({"gradients": ready(lambda: ij.per_example_grads(objective, params, train))}, in_order(problem))


def from_factors(problem, mode):
    """Scores of the exact factors."""
    objective, params, train, _ = load(problem)
    sizes = problem["sizes"].tolist()
    layers = zip(names(sizes), arrays.unflat(problem["factors"], sizes), strict=True)
    factors = {name: {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)} for name, (kernel, bias) in layers}
    given = ij.Influence(objective, params, ij.Identity(params))
    return Case({"scores": ready(lambda: given.influences_from_factors(factors, train, mode=mode))})


def factors(problem, solver, curvature, **options):
    """Factors of the queries by a solver."""
    objective, params, train, query = load(problem)
    solver = getattr(ij, solver)(float(problem["damping"]), **options)

    def fit():
        return ij.invert(getattr(ij, curvature)(objective, params, train), solver, key=jax.random.key(0))

    def solve(inverse):
        return ij.Influence(objective, params, inverse).influence_factors(query)

    return Case({"fit": ready(fit), "factors": ready(solve)}, in_order(problem))


def structured(problem, kind, labels):
    """The objective, the data, and a function that inverts a structured curvature."""
    objective, params, train, query = load(problem)
    options = {"labels": labels}
    if labels == "sampled":
        objective = dataclasses.replace(objective, sample=ij.softmax_labels("y"))
        options["key"] = jax.random.key(0)
    relative = "relative" in problem
    damping = ij.RelativeDamping(float(problem["relative"])) if relative else float(problem["damping"])

    def fit():
        if kind == "identity":
            return ij.Identity(params)
        if kind == "diagonal":
            curvature = ij.Diagonal(ij.diagonal(ij.EmpiricalFisher(objective, params, train)))
        else:
            curvature = getattr(ij, kind)(objective, params, train, **options)
        return ij.invert(curvature, ij.Direct(damping))

    return objective, params, train, query, ready(fit)


def scores(problem, kind, labels):
    """Scores by a structured curvature."""
    objective, params, train, query, fit = structured(problem, kind, labels)
    score = lambda inverse: ij.Influence(objective, params, inverse).influences(query, train)
    return Case({"fit": fit, "scores": ready(score)})


def self_influence(problem, kind, labels):
    """Influence of the training examples on themselves."""
    objective, params, train, _, fit = structured(problem, kind, labels)
    score = lambda inverse: ij.Influence(objective, params, inverse).self_influences(train)
    return Case({"fit": fit, "scores": ready(score)})


if __name__ == "__main__":
    measuring.main(gradients, from_factors, factors, scores, self_influence)
