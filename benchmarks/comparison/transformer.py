"""A small decoder-only transformer with random weights, and its answer in float64.

Plain jax, one sequence at a time.  The answer is the EK-FAC scores of the linear layers alone, which is what
kronfluence covers: embeddings and normalisations are fixed.  Labels are those of the data, the loss is summed over
positions, and damping is a tenth of each layer's mean eigenvalue.  Imported after 64-bit mode is switched on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import reference

BLOCKS, WIDTH, HEADS, VOCABULARY, LENGTH = 2, 64, 4, 256, 64
RELATIVE = 0.1  # damping
EPSILON = 1e-5  # of the normalisations


def linear_shapes():
    """(in, out) of each linear layer, by name."""
    square, shapes = (WIDTH, WIDTH), {}
    for i in range(BLOCKS):
        shapes |= {f"block{i}_{name}": square for name in "qkvo"}
        shapes |= {f"block{i}_up": (WIDTH, 4 * WIDTH), f"block{i}_down": (4 * WIDTH, WIDTH)}
    return shapes | {"head": (WIDTH, VOCABULARY)}


def make_weights(rng):
    """Arrays named LAYER.PART, float32."""
    weights = {
        "tokens.embedding": rng.normal(size=(VOCABULARY, WIDTH)),
        "positions.embedding": 0.3 * rng.normal(size=(LENGTH, WIDTH)),
    }
    for name, (fan_in, fan_out) in linear_shapes().items():
        weights[f"{name}.kernel"] = rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
        weights[f"{name}.bias"] = 0.1 * rng.normal(size=fan_out)
    for name in [f"block{i}_norm{j}" for i in range(BLOCKS) for j in (1, 2)] + ["norm"]:
        weights[f"{name}.scale"] = 1 + 0.1 * rng.normal(size=WIDTH)
        weights[f"{name}.bias"] = 0.1 * rng.normal(size=WIDTH)
    return {name: np.float32(value) for name, value in weights.items()}


def forward(weights, tokens, taps):
    """Logits `(T, V)` of one sequence, and each linear layer's input; `taps` are added to the outputs."""
    inputs = {}

    def linear(name, x):
        inputs[name] = x
        return x @ weights[f"{name}.kernel"] + weights[f"{name}.bias"] + taps[name]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)
        return x * weights[f"{name}.scale"] + weights[f"{name}.bias"]

    def attend(block, x):
        q, k, v = (linear(f"{block}_{name}", x).reshape(len(x), HEADS, -1) for name in "qkv")
        weight = jnp.einsum("shd,thd->hst", q, k) / jnp.sqrt(WIDTH / HEADS)
        weight = jnp.where(jnp.tril(jnp.ones_like(weight)) > 0, weight, -jnp.inf)
        mixed = jnp.einsum("hst,thd->shd", jax.nn.softmax(weight), v).reshape(len(x), WIDTH)
        return linear(f"{block}_o", mixed)

    x = weights["tokens.embedding"][tokens] + weights["positions.embedding"]
    for block in (f"block{i}" for i in range(BLOCKS)):
        x = x + attend(block, norm(f"{block}_norm1", x))
        hidden = jax.nn.gelu(linear(f"{block}_up", norm(f"{block}_norm2", x)), approximate=False)
        x = x + linear(f"{block}_down", hidden)
    return linear("head", norm("norm", x)), inputs


def layers(weights, x, y):
    """Inputs and output gradients of the linear layers, for labels of the data, and the logits."""
    zero = {name: jnp.zeros((LENGTH, fan_out)) for name, (_, fan_out) in linear_shapes().items()}

    def loss(taps, tokens, targets):
        logits, inputs = forward(weights, tokens, taps)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return -jnp.sum(chosen), (inputs, logits)

    one = lambda example: jax.grad(loss, has_aux=True)(zero, *example)
    outer, (inputs, logits) = jax.lax.map(one, (jnp.asarray(x), jnp.asarray(y)), batch_size=64)
    ones = np.ones((*x.shape, 1))
    pairs = [(np.concatenate([inputs[name], ones], axis=2), np.asarray(outer[name])[:, None]) for name in zero]
    return pairs, np.asarray(logits)


def make(count=512, queries=16):
    """Arrays of the problem: weights, data, logits of the queries and the answer."""
    rng = np.random.default_rng(0)
    weights = make_weights(rng)
    sequences = rng.integers(VOCABULARY, size=(count + queries, LENGTH + 1))
    x, y = np.int32(sequences[:, :-1]), np.int32(sequences[:, 1:])
    wide = {name: jnp.asarray(value, jnp.float64) for name, value in weights.items()}
    train, _ = layers(wide, x[:count], y[:count])
    query, logits = layers(wide, x[count:], y[count:])
    answer = reference.scores("ekfac", train, query, train, relative=RELATIVE)
    data = {"x": x[:count], "y": y[:count], "query_x": x[count:], "query_y": y[count:], "logits": logits}
    sizes = {"blocks": BLOCKS, "heads": HEADS, "epsilon": EPSILON, "relative": RELATIVE}
    return {"ekfac_empirical": answer, **sizes, **data, **weights}
