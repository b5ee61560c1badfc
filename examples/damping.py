# %% [markdown]
"""# How much damping?  Choose it by what retraining did, with one eigendecomposition for the whole grid.

    python examples/damping.py

Trains a small network on random halves of scikit-learn's digits, and scores the training images at a grid of dampings,
all from one eigendecomposition of the curvature.  Half of the test images choose the damping whose scores predict best
what the halves did to them, the others judge the choice.  Prints the linear datamodeling score of each damping with an
interval, and saves one picture: the scores of the grid, and the spectrum with the chosen damping in it.  Takes half a
minute on a laptop CPU.
"""

# %% [markdown]
# ## Data, and a model: a function of the parameters and ONE image, and its loss

# %%
import argparse
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import influence_jax as ij

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].lstrip("# "))
parser.add_argument("--train", type=int, default=1000, help="number of training images (at most 1600)")
parser.add_argument("--queries", type=int, default=160, help="number of test images (at most 190)")
parser.add_argument("--subsets", type=int, default=50, help="random halves to train on")
parser.add_argument("--hidden", type=int, default=16, help="width of the network")
parser.add_argument("--penalty", type=float, default=1e-3, help="of the training, on the square of the parameters")
parser.add_argument("--picture", default="damping.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, labels = np.float32(digits.data[order] / 16), np.int32(digits.target[order])
train = ij.Batch(images[: args.train], labels[: args.train])
query = ij.Batch(images[-args.queries :], labels[-args.queries :])


def predict(params, example: ij.Batch) -> jax.Array:
    """Logits of a network with one hidden layer."""
    hidden = jnp.tanh(example.x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


cross_entropy = ij.losses.cross_entropy("y")  # the loss of one example


def start(key: jax.Array):
    """Random weights."""
    sizes, keys = {"first": (64, args.hidden), "last": (args.hidden, 10)}, jax.random.split(key)
    return {
        name: {"kernel": jax.random.normal(k, size) / jnp.sqrt(size[0]), "bias": jnp.zeros(size[1])}
        for (name, size), k in zip(sizes.items(), keys, strict=True)
    }


objective = ij.Objective(predict, cross_entropy)
optimizer = optax.sgd(0.1, momentum=0.9)
fit = ij.retrain.training(objective, optimizer, start, train, epochs=30, batch_size=50, penalty=args.penalty)

# %% [markdown]
# ## The truth: train on halves from three starts, and measure the loss of every query

# %%
began = time.perf_counter()
masks = ij.retrain.subsets(args.train, 0.5, args.subsets, jax.random.key(0))  # (S, N), True for kept
keys = jax.random.split(jax.random.key(1), 3)
measure = jax.tree_util.Partial(lambda query, params: jax.vmap(objective, (None, 0))(params, query), query)
outcomes = ij.retrain.retrain(fit, masks, keys, measure, how="each")  # (S, K, Q)
params = fit(np.ones(args.train, bool), keys[0])
print(
    f"Trained on {args.subsets} halves of {args.train} digits, three times each: {time.perf_counter() - began:.0f} s."
)

# %% [markdown]
# ## The scores: one eigendecomposition, and every damping then costs little more than the products with gradients

# %%
began = time.perf_counter()
curvature = ij.GGN(objective, params, train)
inverse = ij.invert(curvature, ij.Eigh(1e-2))
dampings = np.geomspace(1e-4, 1.0, 9)
scores = [ij.Influence(objective, params, inverse.with_damping(x)).influences(query, train) for x in dampings.tolist()]
print(f"One eigendecomposition and {len(scores)} dampings: {time.perf_counter() - began:.1f} s.\n")


def quality(rows: np.ndarray) -> np.ndarray:
    """Linear datamodeling score of some queries at every damping, and the ends of its interval, `(3, D)`."""
    key, measured = jax.random.key(2), outcomes[..., rows]
    found = [ij.metrics.lds_summary(x[rows], masks, measured, key=key) for x in scores]
    return np.array([(summary.mean, *summary.over_queries) for summary in found]).T


choosing, judging = np.arange(0, args.queries, 2), np.arange(1, args.queries, 2)
means, lows, highs = quality(choosing)
for damping, mean, low, high in zip(dampings, means, lows, highs, strict=True):
    print(f"damping {damping:7.1e}: LDS {mean:.3f} ({low:.3f} to {high:.3f})")
best = int(np.argmax(means))
others, lows_of_others, highs_of_others = quality(judging)
interval = f"{lows_of_others[best]:.3f} to {highs_of_others[best]:.3f}"
print(f"chosen {dampings[best]:.1e}; LDS of the other test images {others[best]:.3f} ({interval})")

# %% [markdown]
# ## One picture

# %%
ritz = ij.spectrum(curvature, 80, key=jax.random.key(3), probes=4)
dimension = float(ritz.effective_dimension(dampings[best].item())[0])
print(f"\nIt leaves an effective dimension of {dimension:.0f} of {ritz.size} parameters;", end=" ")
print(f"the penalty of the training was {args.penalty:.1e}.")
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
ij.plot.damping_sweep(dampings, means, low=lows, high=highs, name="test images that choose", ax=left)
ij.plot.damping_sweep(dampings, others, low=lows_of_others, high=highs_of_others, name="others", ax=left)
left.axvline(args.penalty, color="black", linestyle=":", label="penalty of the training")
left.set(ylabel="linear datamodeling score", title="What predicts training on halves (95 % intervals)")
left.legend(loc="lower left")
ij.plot.spectrum(ritz, damping=dampings[best].item(), ax=right)
right.set_title(f"Gauss-Newton matrix: {right.get_title()}")
figure.savefig(args.picture, dpi=110)
print(f"Picture saved to {args.picture}")
