# %% [markdown]
"""# Does attribution predict what retraining does?  The linear datamodeling score of several methods.

    python examples/lds_study.py

Trains a small network on random halves of scikit-learn's digits, with several seeds each, and holds the losses of some
test images against what each method of attribution predicts from models trained on everything.  Prints each method's
score with a 95 % interval, and the ceiling that the noise of the seeds sets; saves one picture of the scores, and of
prediction against measurement for one test image.  Takes a minute on a laptop CPU.
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
parser.add_argument("--queries", type=int, default=100, help="number of test images (at most 190)")
parser.add_argument("--subsets", type=int, default=50, help="random halves to train on")
parser.add_argument("--seeds", type=int, default=4, help="trainings on each")
parser.add_argument("--hidden", type=int, default=32, help="width of the network")
parser.add_argument("--damping", type=float, default=1e-2, help="of all methods that have one; see damping.py")
parser.add_argument("--picture", default="lds_study.png", help="where to save the picture")
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
fit = ij.retrain.training(objective, optimizer, start, train, epochs=30, batch_size=50, penalty=1e-3)

# %% [markdown]
# ## The truth: train on halves, and measure the loss of every query

# %%
began = time.perf_counter()
masks = ij.retrain.subsets(args.train, 0.5, args.subsets, jax.random.key(0))  # (S, N), True for kept
keys = jax.random.split(jax.random.key(1), args.seeds)
measure = jax.tree_util.Partial(lambda query, params: jax.vmap(objective, (None, 0))(params, query), query)
outcomes = ij.retrain.retrain(fit, masks, keys, measure, how="each")  # (S, K, Q)
models = [fit(np.ones(args.train, bool), key) for key in keys]
print(f"{args.subsets} halves of {args.train} digits, {args.seeds} seeds: {time.perf_counter() - began:.0f} s.")

# %% [markdown]
# ## The predictions: scores (Q, N) of a model, as means over the models of all seeds

# %%
projection = ij.projections.rademacher(models[0], 256, jax.random.key(2))


def through(inverse):
    """Scores through an operator, which `inverse(params)` makes."""
    return lambda params: ij.Influence(objective, params, inverse(params)).influences(query, train)


negative_margin = lambda params, z: ij.baselines.negative_margin(objective.output(params, z), z.y)
exact = lambda params: ij.invert(ij.GGN(objective, params, train), ij.Direct(args.damping))
factored = lambda params: ij.invert(ij.ekfac(objective, params, train), ij.Direct(args.damping))
methods = {
    "exact Gauss-Newton": through(exact),
    "EK-FAC": through(factored),
    "TRAK-style, 256 dimensions": lambda params: ij.baselines.trak(
        objective, negative_margin, params, train, projection, args.damping
    ).influences(query, train),
    "gradient dot": through(ij.Identity),
}
bars, scores = {}, {}
ceiling = float(jnp.mean(ij.metrics.seed_ceiling(outcomes, key=jax.random.key(3))))
print(f"\n{'method':30s}LDS   95 % over queries, over subsets")
for name, method in methods.items():
    began = time.perf_counter()
    scores[name] = ij.baselines.over_checkpoints(method, models)
    mean, queries, subsets = ij.metrics.lds_summary(scores[name], masks, outcomes, key=jax.random.key(4))
    bars[name] = (mean, *queries)
    intervals = f"{queries.low:.3f} to {queries.high:.3f}, {subsets.low:.3f} to {subsets.high:.3f}"
    print(f"{name:30s}{mean:.3f} {intervals}   ({time.perf_counter() - began:.0f} s)")
print(f"{'ceiling of the seeds':30s}{ceiling:.3f}")

# %% [markdown]
# ## One picture: all methods, and the best of them on the query whose loss depends most on the half

# %%
best = max(bars, key=lambda name: float(bars[name][0]))
chosen = int(np.argmax(np.std(outcomes.mean(axis=1), axis=0)))
before = np.mean([measure(params)[chosen] for params in models])
asked = scores[best][chosen : chosen + 1]
predicted = np.asarray(ij.metrics.predicted_changes(asked, masks))[:, 0]  # of training on the mean of a half
actual = outcomes.mean(axis=1)[:, chosen] - before
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.9), layout="constrained", width_ratios=[1.5, 1])
ax = ij.plot.lds_bars(bars, ceiling=ceiling, sort=True, ax=left)
ax.set_xlabel("linear datamodeling score (higher is better; 95 % intervals over queries)")
figure.suptitle("How well each method ranks what training on halves does to the loss, and one test image")
ax = ij.plot.predicted_against_actual(asked, actual[:, None], masks=masks, ax=right)
ax.set_title(f"{best}, a test digit {query.y[chosen]}\n{ax.get_title()}", fontsize="medium")
figure.get_layout_engine().set(wspace=0.08)
figure.savefig(args.picture, dpi=110)
spread = np.std(predicted) / np.std(actual)
print(f"\nBest here: {best}. It ranks the halves; its sizes are for small changes, and half of the data is none:")
print(f"for the test digit of the picture, predictions spread over {spread:.0%} of what was measured.")
print(f"Picture saved to {args.picture}")
