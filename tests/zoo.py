"""Small models that use their parameters in every way that capture has to see; each with data of three examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import cross_entropy

import influence_jax as ij

KEY = jax.random.key(0)
EXAMPLES, LENGTH, WIDTH, VOCABULARY, CLASSES = 3, 5, 8, 11, 4


class Case(NamedTuple):
    """A model, and data for it."""

    objective: Any
    params: Any
    data: Any


def normal(*shape: int, number: int = 0) -> np.ndarray:
    return np.multiply(0.5, helpers.normal(jax.random.fold_in(KEY, number), shape))


def squared(out: jax.Array, example: ij.Batch) -> jax.Array:
    return 0.5 * jnp.sum((out - jnp.sin(example.y + jnp.arange(out.size).reshape(out.shape))) ** 2)


def token_loss(logits: jax.Array, example: ij.Batch) -> jax.Array:
    """Summed over positions."""
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, example.y[:, None], axis=-1)[:, 0])


def classified(*shape: int) -> ij.Batch:
    return ij.Batch(normal(EXAMPLES, *shape, number=7), jnp.arange(EXAMPLES) % CLASSES)


def texts() -> ij.Batch:
    tokens = jax.random.randint(KEY, (EXAMPLES, LENGTH + 1), 0, VOCABULARY)
    return ij.Batch(tokens[:, :-1], tokens[:, 1:])


def linen(module: nn.Module, data: ij.Batch, loss: Callable) -> Case:
    variables = started(jax.eval_shape(module.init, KEY, data.x[:1]))
    return Case(*ij.from_linen(module, variables, loss), data)


def started(shapes: Any) -> Any:
    """About what flax starts from, without compiling its initialisers; no leaf is zero, or equal to another.

    Leaves are as wide as the mode has them, where flax makes float32.
    """

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        drawn = normal(*leaf.shape, number=sum(map(ord, name)))
        if "scale" in name:
            return jnp.asarray(1 + 0.2 * drawn)
        return jnp.asarray(0.2 * drawn if "bias" in name else 2 * drawn / np.sqrt(leaf.size / leaf.shape[-1]))

    return jax.tree_util.tree_map_with_path(one, shapes)


def plain(predict: Callable, params: Any, data: ij.Batch, loss: Callable = cross_entropy) -> Case:
    return Case(ij.Objective(predict, loss), params, data)


class MLP(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, use_bias=self.use_bias, dtype=x.dtype)(x))
        return nn.Dense(CLASSES, use_bias=self.use_bias, dtype=x.dtype)(x)


class Convolutional(nn.Module):
    window: tuple[int, ...]
    groups: int = 1
    strides: int = 1
    dilation: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        options = dict(strides=self.strides, kernel_dilation=self.dilation, padding=self.padding, dtype=x.dtype)
        x = jnp.tanh(nn.Conv(8, self.window, feature_group_count=self.groups, **options)(x))
        return nn.Dense(CLASSES, dtype=x.dtype)(x.reshape(x.shape[0], -1))


class Norm(nn.Module):
    """Layer norm; flax's own does not run under strict promotion."""

    @nn.compact
    def __call__(self, x):
        scale, bias = (
            self.param("scale", nn.initializers.ones, (WIDTH,)),
            self.param("bias", nn.initializers.zeros, (WIDTH,)),
        )
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-3)
        return normed * scale.astype(x.dtype)[None, None] + bias.astype(x.dtype)[None, None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = Norm()(x)
        q, k, v = (nn.DenseGeneral((2, WIDTH // 2), name=name, dtype=x.dtype)(h) for name in "qkv")
        weights = jnp.where(jnp.tri(LENGTH)[None, None] > 0, jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(weights, axis=-1), v)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out", dtype=x.dtype)(mixed)
        h = nn.gelu(nn.Dense(2 * WIDTH, dtype=x.dtype)(Norm()(x)))
        return x + nn.Dense(WIDTH, dtype=x.dtype)(h), None


class Transformer(nn.Module):
    """Tied embedding, learned positions; the blocks in a loop, or under a scan, checkpointed or not."""

    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        dtype = jnp.result_type(float)
        embed = nn.Embed(VOCABULARY, WIDTH, dtype=dtype)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH)).astype(dtype)[None]
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)
        else:
            for index in range(2):
                x, _ = block(name=f"block{index}")(x)
        return embed.attend(Norm()(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        cells = nn.LSTMCell(6, param_dtype=x.dtype, dtype=x.dtype), nn.GRUCell(5, param_dtype=x.dtype, dtype=x.dtype)
        for cell in cells:
            x = nn.RNN(cell)(x)
        return nn.Dense(CLASSES, dtype=x.dtype)(x[:, -1])


class Assorted(nnx.Module):
    """Layers of nnx that write their products in different ways."""

    def __init__(self):
        rngs, dtype = nnx.Rngs(0), jnp.result_type(float)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, param_dtype=dtype)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs, param_dtype=dtype)
        self.mixed = nnx.Einsum("btd,dk->btk", (WIDTH, WIDTH), (WIDTH,), rngs=rngs, param_dtype=dtype)
        self.heads = nnx.LinearGeneral((WIDTH,), (2, VOCABULARY), rngs=rngs, param_dtype=dtype)

    def __call__(self, tokens):
        return self.heads(jnp.tanh(self.mixed(self.conv(self.embed(tokens))))).sum(-2)


def assorted() -> Case:
    definition, shapes = nnx.split(nnx.eval_shape(Assorted))
    return Case(*ij.from_nnx(nnx.merge(definition, started(shapes)), token_loss), texts())


def rotary(params: dict, example: ij.Batch) -> jax.Array:
    """Attention with rotated queries and keys, fused projections, grouped heads."""
    x = params["table"][example.x]
    q, k, v = jnp.split((x @ params["qkv"]).reshape(LENGTH, 2, 12), 3, axis=-1)
    angles = jnp.arange(1.0 * LENGTH)[:, None, None] / jnp.array([[[1.0, 10.0]]])
    turn = lambda y: jnp.concatenate(
        [y[..., :2] * jnp.cos(angles) - y[..., 2:] * jnp.sin(angles), y[..., :2] * jnp.sin(angles) + y[..., 2:]], -1
    )
    weights = jnp.einsum("thd,shd->hts", turn(q), turn(k)) + jnp.where(jnp.tri(LENGTH) > 0, 0.0, -1e9)[None]
    mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(weights, axis=-1), v)
    mixed = jnp.einsum("thd,hde->the", mixed, params["per_head"])  # block-diagonal: a group per head
    return jnp.einsum("the,hev->tv", mixed, params["out"]) + params["out_bias"][None]


def odd(params: dict, example: ij.Batch) -> jax.Array:
    """Parameters that are sliced, stacked, normalised, shared, transposed, gated, unused."""
    x = example.x
    x = x @ params["halves"][:, :WIDTH] + jnp.tanh(x @ params["halves"][:, WIDTH:])
    for index in range(2):
        x = x + jnp.tanh(x @ params["stack"][index] + params["stack_bias"][index][None])
    x = jnp.tanh(x @ (params["normed"] / jnp.linalg.norm(params["normed"], axis=0, keepdims=True)))
    x = jnp.tanh(x @ params["shared"]) @ params["shared"].T
    x = jnp.tanh(x @ params["shared"] + params["bias"][None])
    x = x * jax.nn.sigmoid(params["gate"])[None]
    return x.sum(0) @ params["head"]


def looped(params: dict, example: ij.Batch) -> jax.Array:
    """A scan over layers inside which another one runs; weights closed over, carried, and in branches."""

    def outer(x, layer):
        def inner(y, weight):
            return jnp.tanh(y @ weight + y @ params["closed"] + params["closed_bias"][None]), None

        return jax.lax.scan(inner, x @ layer["first"] + layer["bias"][None], layer["nested"])

    x, _ = jax.lax.scan(outer, example.x, params["layers"], reverse=True)
    carry = lambda c, _: ((0.9 * c[0], jnp.tanh(c[1] @ c[0])), None)
    (_, x), _ = jax.lax.scan(carry, (params["carried"], x), None, length=2)
    x = jax.lax.cond(x.sum() > 0, lambda y: y @ params["branch"], lambda y: y, x)
    return jax.jit(lambda y, w: jax.checkpoint(jnp.matmul)(y, w).mean(0))(x, params["head"])


@jax.custom_vjp
def halved(x, w):
    return x @ w


halved.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, d: (0.5 * d @ saved[1].T, 0.5 * saved[0].T @ d))


@jax.custom_jvp
def softened(w):
    return jnp.tanh(w)


softened.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 0.25 * tangents[0]))


def customised(params: dict, example: ij.Batch) -> jax.Array:
    """Derivative rules of the model's own, which have to be kept."""
    x = halved(example.x, params["halved"])
    x = x @ softened(params["softened"])
    return jax.nn.silu(x @ params["plain"]).mean(0)


def promoted_product(x, w):
    """Of two dtypes, as most users' programs have it."""
    with jax.numpy_dtype_promotion("standard"):
        return x @ w


def square(number: int, *lead: int) -> jax.Array:
    return normal(*lead, WIDTH, WIDTH, number=number)


def convolutional(*window: int, **options: Any) -> Callable[[], Case]:
    shape = (6,) * len(window) if len(window) < 3 else (4,) * 3
    return lambda: linen(Convolutional(window, **options), classified(*shape, 4), cross_entropy)


ZOO: dict[str, Callable[[], Case]] = {
    "mlp": lambda: linen(MLP(), classified(WIDTH), cross_entropy),
    "no bias": lambda: linen(MLP(use_bias=False), classified(WIDTH), cross_entropy),
    "conv 1-D valid stride 2": convolutional(3, padding="VALID", strides=2),
    "conv 2-D same": convolutional(3, 3),
    "conv 2-D groups 2 dilated": convolutional(2, 3, groups=2, dilation=2),
    "conv 2-D groups 4 stride 2": convolutional(3, 2, groups=4, strides=2, padding="VALID"),
    "conv 3-D": convolutional(2, 2, 2),
    "transformer": lambda: linen(Transformer(), texts(), token_loss),
    "transformer, remat": lambda: linen(Transformer(remat=True), texts(), token_loss),
    "transformer, scan": lambda: linen(Transformer(scan=True), texts(), token_loss),
    "transformer, scan and remat": lambda: linen(Transformer(scan=True, remat=True), texts(), token_loss),
    "recurrent": lambda: linen(Recurrent(), classified(LENGTH, WIDTH), cross_entropy),
    "nnx": assorted,
    "rotary": lambda: plain(
        rotary,
        {
            "table": normal(VOCABULARY, WIDTH, number=1),
            "qkv": normal(WIDTH, 24, number=2),
            "per_head": normal(2, 4, 6, number=3),
            "out": normal(2, 6, VOCABULARY, number=4),
            "out_bias": normal(VOCABULARY, number=5),
        },
        texts(),
        token_loss,
    ),
    "odd": lambda: plain(
        odd,
        {
            "halves": normal(WIDTH, 2 * WIDTH, number=1),
            "stack": square(2, 2),
            "stack_bias": normal(2, WIDTH, number=3),
            "normed": square(4),
            "shared": square(5),
            "bias": normal(WIDTH, number=6),
            "gate": normal(WIDTH, number=7),
            "head": normal(WIDTH, CLASSES, number=8),
            "unused": normal(3),
            "scalar": normal(),
        },
        classified(LENGTH, WIDTH),
    ),
    "looped": lambda: plain(
        looped,
        {
            "layers": {"first": square(1, 2), "bias": normal(2, WIDTH, number=2), "nested": square(3, 2, 3)},
            "closed": square(4),
            "closed_bias": normal(WIDTH, number=5),
            "carried": square(6),
            "branch": square(7),
            "head": normal(WIDTH, CLASSES, number=8),
        },
        classified(LENGTH, WIDTH),
    ),
    "integers": lambda: plain(
        lambda p, z: jnp.tanh(promoted_product(z.x, p["w"])) @ p["v"],
        {"w": square(1), "v": normal(WIDTH, CLASSES, number=2)},
        ij.Batch(jnp.arange(EXAMPLES * WIDTH, dtype=jnp.uint8).reshape(EXAMPLES, WIDTH) % 5, jnp.arange(EXAMPLES)),
    ),
    "complex": lambda: plain(
        lambda p, z: jnp.abs(promoted_product(jax.lax.complex(z.x, 2 * z.x), p["w"])),
        {"w": normal(WIDTH, CLASSES, number=1)},
        classified(WIDTH),
    ),
    "nothing": lambda: plain(
        lambda p, z: (z.x @ p["w"]).sum(0) + (z.x[:0] @ p["w"] + p["b"][None]).sum(0) + (z.x @ p["e"]).sum(),
        {"w": normal(WIDTH, CLASSES, number=1), "b": normal(CLASSES), "e": normal(WIDTH, 0)},
        classified(LENGTH, WIDTH),
    ),
    "customised": lambda: plain(
        customised,
        {"halved": square(1), "softened": square(2), "plain": normal(WIDTH, CLASSES, number=3)},
        classified(LENGTH, WIDTH),
    ),
}


def compiled(cases: Iterable) -> list:
    """Cases to parametrize a test with, names of models in front; those with a convolution are compiled as users do."""
    cases = [case if isinstance(case, type(pytest.param())) else pytest.param(case) for case in cases]
    convolutional = lambda name: name.startswith("conv") or name == "nnx"
    return [
        pytest.param(*case.values, marks=[*case.marks, pytest.mark.as_users]) if convolutional(case.values[0]) else case
        for case in cases
    ]
