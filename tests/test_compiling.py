"""How tests compile: a convolution never in the quick mode, in which plain jax computes its gradients wrongly."""

import pathlib
import re

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICK, QuickConvolution

import influence_jax as ij

ROOT = pathlib.Path(__file__).parent.parent


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# A dilated, causal convolution over time, a scale and a shift, a relu, the maximum over time, a head.
PARAMS = {
    "kernel": random(1, 3, 2, 4),
    "scale": 1 + 0.1 * random(3, 4),
    "shift": 0.1 * random(4, 4),
    "head": random(5, 4, 3),
}
SERIES = random(6, 4, 6, 2)


def convolved(p, x):
    axes = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1,), [(4, 0)], rhs_dilation=(2,), dimension_numbers=axes
    )[0]


def maxima(p, x):
    h = convolved(p, x) * p["scale"][None] + p["shift"][None]
    return jnp.sum((jax.nn.relu(h).max(0) @ p["head"]) ** 2)


def gradients_by_hand():
    """In numpy, example by example."""
    p, found = PARAMS, {name: np.zeros((len(SERIES), *leaf.shape)) for name, leaf in PARAMS.items()}
    for n, x in enumerate(SERIES):
        padded = np.concatenate([np.zeros((4, 2)), x])
        windows = np.stack([padded[2 * k : 2 * k + 6] for k in range(3)], axis=1)  # (time, window, channel)
        y = np.einsum("twi,wio->to", windows, p["kernel"])
        h = np.maximum(y * p["scale"] + p["shift"], 0)
        best = h.argmax(0)
        top = h.max(0)
        d_out = 2 * top @ p["head"]
        d_h = (p["head"] @ d_out) * (top > 0)
        at_best = y[best, np.arange(4)]
        found["head"][n] = np.outer(top, d_out)
        found["scale"][n], found["shift"][n] = d_h * at_best, d_h
        found["kernel"][n] = np.einsum("owi,o->wio", windows[best], d_h * p["scale"])
    return found


@pytest.mark.as_users
class TestConvolutionsAsUsersCompileThem:
    @pytest.mark.parametrize("compiled", [jax.jit, lambda fn: fn])
    def test_vmapped_gradients(self, compiled):
        grads = compiled(jax.vmap(jax.grad(maxima), (None, 0)))(PARAMS, SERIES)
        assert helpers.tree_error(grads, gradients_by_hand()) < 1e-12

    def test_of_this_library(self):
        expected = gradients_by_hand()
        assert helpers.tree_error(ij.per_example_grads(maxima, PARAMS, SERIES), expected) < 1e-12
        rows = np.concatenate([expected[name].reshape(len(SERIES), -1) for name in sorted(expected)], axis=1)
        fisher = ij.to_dense(ij.EmpiricalFisher(maxima, PARAMS, SERIES))
        assert helpers.relative_error(fisher, rows.T @ rows / len(SERIES)) < 1e-12


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, dtype=x.dtype)(nn.Conv(3, (2,), dtype=x.dtype)(x).mean(0))


QUICKLY = {
    "eagerly": lambda: convolved(PARAMS, SERIES[0]),
    "in a gradient": lambda: jax.jit(jax.grad(maxima))(PARAMS, SERIES[0]),
    "for each example": lambda: ij.per_example_grads(maxima, PARAMS, SERIES),
    "in a scan": lambda: jax.lax.scan(lambda c, x: (c + maxima(PARAMS, x), None), 0.0, SERIES),
    "in flax": lambda: jax.eval_shape(Network().init, jax.random.key(0), SERIES[0]),
    "in jax.numpy": lambda: jnp.convolve(jnp.ones(5), jnp.ones(2)),
}


@pytest.mark.parametrize("way", QUICKLY)
def test_convolutions_compiled_quickly_are_refused(way):
    with pytest.raises(QuickConvolution, match="as_users"):
        QUICKLY[way]()


def test_processes_that_compile_quickly_have_no_convolutions():
    """The README's code and the examples: one with a convolution has to be run without `compiling.QUICK`."""
    assert QUICK["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    code = re.findall(r"```python.*?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    programs = {"README.md": "\n".join(code)} | {path.name: path.read_text() for path in ROOT.glob("examples/*.py")}
    assert len(programs) >= 9
    found = [name for name, text in programs.items() if re.search(r"\b[Cc]onv(_|\b|olve|Local|Transpose)", text)]
    assert not found
