"""influence_jax's side: `python ours.py PROBLEM KIND LABELS STAGE OPTIONS OUTPUT`; options go to the fit."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import stages

import influence_jax as ij


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


def digits(problem):
    sizes = problem["sizes"].tolist()
    net = nn.Sequential([layer for size in sizes[1:] for layer in (nn.Dense(size), nn.tanh)][:-1])
    params = {
        f"layers_{2 * i}": {"kernel": jnp.asarray(problem[f"kernel{i}"]), "bias": jnp.asarray(problem[f"bias{i}"])}
        for i in range(len(sizes) - 1)
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


def case(problem, kind, labels, options):
    """Fit, and scores."""
    objective, params = (transformer if "heads" in problem else digits)(problem)
    data = [jnp.asarray(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    train, query = ij.Batch(*data[:2]), ij.Batch(*data[2:])
    stages.check(jax.vmap(objective.output, (None, 0))(params, query), problem)
    if labels == "sampled":
        objective = dataclasses.replace(objective, sample=ij.softmax_sample)
        options = options | {"key": jax.random.key(0)}
    relative = "relative" in problem
    damping = ij.RelativeDamping(float(problem["relative"])) if relative else float(problem["damping"])

    def fit():
        curvature = getattr(ij, kind)(objective, params, train, labels=labels, **options)
        return jax.block_until_ready(ij.invert(curvature, ij.Direct(damping)))

    def score(inverse):
        return jax.block_until_ready(ij.Influence(objective, params, inverse).influences(query, train))

    return fit, score


if __name__ == "__main__":
    path, kind, labels, stage, options, output = sys.argv[1:]
    stages.measure(stage, *case(dict(np.load(path)), kind, labels, json.loads(options)), output)
