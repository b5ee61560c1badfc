# %% [markdown]
"""# Which training digits made this prediction, and which labels are wrong?

Trains a small flax network on scikit-learn's digits with 5 % of the labels flipped, then asks it two questions with
influence functions: which training images helped and hurt some test predictions, and which labels look wrong.  Runs in
under a minute on a laptop CPU and saves one picture.
"""

# %% [markdown]
# ## Data: digits, some with a wrong label

# %%
import argparse
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import influence_jax as ij

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].lstrip("# "))
parser.add_argument("--train", type=int, default=1500, help="number of training images (at most 1700)")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--picture", default="quickstart.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = (digits.data[order] / 16).astype(np.float32)
truth = digits.target[order].astype(np.int32)

rng = np.random.default_rng(1)
flipped = np.sort(rng.choice(args.train, args.train // 20, replace=False))
labels = truth.copy()
labels[flipped] = (labels[flipped] + rng.integers(1, 10, len(flipped))) % 10

train = ij.Batch(images[: args.train], labels[: args.train])
test = ij.Batch(images[args.train :], truth[args.train :])

# %% [markdown]
# ## Model: an ordinary flax network, trained with optax

# %%
net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)])
variables = jax.jit(net.init)(jax.random.key(0), train.x[:1])


cross_entropy = ij.losses.cross_entropy("y")  # the loss of ONE example: what influence is about


objective, params = ij.from_linen(net, variables, cross_entropy)
optimizer = optax.adamw(3e-3, weight_decay=1e-2)


@jax.jit
def fit_epoch(params, opt_state, key):
    """One pass over shuffled minibatches."""
    shuffled = jax.random.permutation(key, args.train)[: args.train // 50 * 50].reshape(-1, 50)

    def step(carry, rows):
        params, opt_state = carry
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], train)
        loss = lambda p: jnp.mean(jax.vmap(objective, (None, 0))(p, batch))
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), shuffled)[0]


started = time.perf_counter()
opt_state = optimizer.init(params)
for key in jax.random.split(jax.random.key(1), args.epochs):
    params, opt_state = fit_epoch(params, opt_state, key)
predicted = np.argmax(net.apply({"params": params}, test.x), axis=1)
accuracy = np.mean(predicted == test.y)
seconds = time.perf_counter() - started
print(f"Trained on {args.train} digits, {len(flipped)} of them with a wrong label, in {seconds:.1f} s.")
print(f"Test accuracy: {accuracy:.1%}\n")

# %% [markdown]
# ## Influence = objective + parameters + inverse curvature

# %%
started = time.perf_counter()
curvature = ij.GGN(objective, params, train)
influence = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(damping=1e-2)))
print(influence)

# %% [markdown]
# ## Which training images helped, and which hurt, these predictions?

# %%
# Two that the network gets wrong, if there are any, and two that it gets right.
wrong, right = np.flatnonzero(predicted != test.y), np.flatnonzero(predicted == test.y)
chosen = np.concatenate([wrong[:2], right])[:4]
query = jax.tree.map(lambda x: x[chosen], test)
scores = np.asarray(influence.influences(query, train))  # (4, N), positive: training on it lowers the query's loss
ranked = np.argsort(-scores, axis=1)
print(
    f"Influence of {args.train} training digits on {len(chosen)} test digits: {time.perf_counter() - started:.1f} s.\n"
)


def describe(index: int, score: float) -> str:
    """One training example in words."""
    note = f", really a {truth[index]}: WRONG LABEL" if labels[index] != truth[index] else ""
    return f"      #{index:<4d} labelled {labels[index]}{note} (score {score:+.2f})"


for row, place in enumerate(chosen):
    verdict = "correct" if predicted[place] == test.y[place] else "mistaken"
    print(f"Test digit {place}: a {test.y[place]}, predicted {predicted[place]} ({verdict})")
    for title, columns in (("most helpful", ranked[row, :3]), ("most harmful", ranked[row, ::-1][:3])):
        print(f"   {title}:")
        for column in columns:
            print(describe(column, scores[row, column]))

# %% [markdown]
# ## Which labels are wrong? Those that a model can only explain by themselves

# %%
started = time.perf_counter()
self_influence = np.asarray(influence.self_influences(train))
suspects = np.argsort(-self_influence)
print(f"\nSelf-influence of {args.train} training digits: {time.perf_counter() - started:.1f} s.")
print("Looking at the highest self-influence first:")
for inspected in (len(flipped), 2 * len(flipped)):
    found = np.isin(suspects[:inspected], flipped).sum()
    print(
        f"   top {inspected:3d} ({inspected / args.train:.0%} of the data): precision {found / inspected:.0%}, "
        f"recall {found / len(flipped):.0%} of the {len(flipped)} flipped labels"
    )

# %% [markdown]
# ## One picture of it all

# %%
figure = plt.figure(figsize=(13, 9.2), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1])
top.suptitle("Test digits, and the training digits that helped and hurt them most: label and score of each")
pictures = images.reshape(-1, 8, 8)
names = [f"{y} (wrong)" if y != t else str(y) for y, t in zip(labels, truth, strict=True)]
axes = top.subplots(len(chosen), 9)
for row, place in enumerate(chosen):
    title = f"a {test.y[place]}, predicted {predicted[place]}"
    shown = pictures[args.train + place], title, pictures[: args.train], names[: args.train], scores[row]
    ij.plot.images(*shown, k=4, cmap="gray_r", axes=axes[row])

left, right = bottom.subplots(1, 2)
is_flipped = np.isin(np.arange(args.train), flipped)
groups = {"label as it was": self_influence[~is_flipped], "label flipped": self_influence[is_flipped]}
ij.plot.score_histogram(groups, ax=left).set(xlabel="self-influence", title="Wrong labels stand out")
curves = {"self-influence": ij.metrics.discovery_curve(self_influence, is_flipped)}
ij.plot.discovery_curve(curves, wrong=is_flipped.mean(), ax=right).set(title="Finding them", xlim=(0, 0.5))
figure.savefig(args.picture, dpi=110)
print(f"\nPicture saved to {args.picture}")
