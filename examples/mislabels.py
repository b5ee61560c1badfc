# %% [markdown]
"""# Which labels are wrong?  Three ways to rank suspects, and what speaks against the worst of them.

    python examples/mislabels.py

Flips a tenth of the labels of scikit-learn's digits, trains a small network on them, and ranks the training images by
self-influence, by the harm they do to a few images with checked labels, and by plain loss.  Prints which of the three
finds the flipped labels best, and saves one picture: how fast each finds them, and for the top suspects the training
images that contradict their labels.  Takes a quarter of a minute on a laptop CPU.

Plain loss finds them as well, and cheaper, while the network has not learnt the wrong labels by heart; where it has,
with `--epochs 200 --penalty 0`, self-influence does a little better.
"""

# %% [markdown]
# ## Data: digits, some with a wrong label, and a few that were checked by hand

# %%
import argparse
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import influence_jax as ij

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].lstrip("# "))
parser.add_argument("--train", type=int, default=1200, help="number of training images (at most 1600)")
parser.add_argument("--checked", type=int, default=100, help="number of images with checked labels")
parser.add_argument("--hidden", type=int, default=32, help="width of the network")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--penalty", type=float, default=1e-4, help="of the training, on the square of the parameters")
parser.add_argument("--damping", type=float, default=1e-2)
parser.add_argument("--picture", default="mislabels.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, truth = np.float32(digits.data[order] / 16), np.int32(digits.target[order])
rng = np.random.default_rng(1)
flipped = np.zeros(args.train, bool)
flipped[rng.choice(args.train, args.train // 10, replace=False)] = True
labels = truth.copy()
labels[: args.train][flipped] = (labels[: args.train][flipped] + rng.integers(1, 10, flipped.sum())) % 10
train = ij.Batch(images[: args.train], labels[: args.train])
checked = ij.Batch(images[-args.checked :], truth[-args.checked :])


# %% [markdown]
# ## Model: a function of the parameters and ONE image, and its loss


# %%
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
fit = ij.retrain.training(
    objective, optax.adam(3e-3), start, train, epochs=args.epochs, batch_size=50, penalty=args.penalty
)
params = fit(np.ones(args.train, bool), jax.random.key(0))
right = jax.vmap(lambda example: jnp.argmax(predict(params, example)) == example.y)
print(f"{args.train} training digits, {flipped.sum()} of them with a wrong label.")
print(f"Accuracy: {np.mean(right(train)):.1%} of these labels, {np.mean(right(checked)):.1%} of the checked ones.\n")

# %% [markdown]
# ## Three measures of suspicion, high where a label is likely to be wrong

# %%
inverse = ij.invert(ij.GGN(objective, params, train), ij.Direct(args.damping))
influence = ij.Influence(objective, params, inverse)
suspicion = {
    "self-influence": influence.self_influences(train),  # the model can explain it only by itself
    "harm to checked images": -jnp.mean(influence.influences(checked, train), axis=0),
    "loss": jax.vmap(objective, (None, 0))(params, train),  # the model disagrees; needs no influence at all
}
measures, flags = list(suspicion), jnp.asarray(flipped)


def areas(rows) -> jax.Array:
    """AUC of every measure: how often a flipped label ranks above another."""
    values, flags = rows
    return jnp.stack([ij.metrics.auc(column, flags) for column in values.T])


rows = jnp.stack(list(suspicion.values()), axis=1), flags  # (N, 3) and (N,)
area = np.asarray(areas(rows))
best, second, _ = np.argsort(-area)


def areas_and_lead(rows) -> jax.Array:
    """With the lead of the best, whose interval is narrower than those of the two, for both rank the same images."""
    found = areas(rows)
    return jnp.append(found, found[best] - found[second])


lows, highs = ij.metrics.bootstrap(rows, key=jax.random.key(1), statistic=areas_and_lead)
inspected = int(flipped.sum())
print(f"{'ranked by':24s}AUC (95 % interval)      wrong among the first {inspected}")
for name, middle, low, high in zip(measures, area, lows[:-1], highs[:-1], strict=True):
    precision = float(ij.metrics.precision_at_k(suspicion[name], flags, inspected))
    print(f"{name:24s}{middle:.3f} ({low:.3f} to {high:.3f})    {precision:.0%}")
print(f"Best here: {measures[best]}, by {lows[-1]:+.3f} to {highs[-1]:+.3f} before {measures[second]}.\n")

# %% [markdown]
# ## What speaks against the top suspects: the training images that their labels contradict

# %%
suspects = np.argsort(-np.asarray(suspicion["self-influence"]))[:4]
asked = jax.tree.map(lambda x: x[suspects], train)
scores = np.array(ij.baselines.relative(influence, asked, train))  # else other wrong labels would drown the rest
scores[np.arange(len(suspects)), suspects] = 0  # what each says for itself
for row, suspect in enumerate(suspects):
    against = labels[np.argsort(scores[row])[:5]]
    verdict = f"really a {truth[suspect]}" if flipped[suspect] else "which is right"
    print(f"#{suspect} is labelled {labels[suspect]}, {verdict}; harmed most by images labelled {against.tolist()}")

# %% [markdown]
# ## One picture

# %%
figure = plt.figure(figsize=(13, 9.2), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1])
top.suptitle("The highest self-influences, and which training images support or contradict their labels (RelatIF)")
axes = top.subplots(len(suspects), 9)
names = [f"{y} (wrong)" if wrong else str(y) for y, wrong in zip(train.y, flipped, strict=True)]
pictures = train.x.reshape(-1, 8, 8)
for row, suspect in enumerate(suspects):
    ij.plot.images(pictures[suspect], names[suspect], pictures, names, scores[row], k=4, cmap="gray_r", axes=axes[row])
left, right = bottom.subplots(1, 2)
values = np.asarray(suspicion["self-influence"])
ax = ij.plot.score_histogram({"label as it was": values[~flipped], "label flipped": values[flipped]}, ax=left)
ax.set(xlabel="self-influence", title="Wrong labels stand out")
curves = {
    f"{name} (AUC {middle:.3f})": ij.metrics.discovery_curve(suspicion[name], flags)
    for name, middle in zip(suspicion, area, strict=True)
}
ij.plot.discovery_curve(curves, wrong=flipped.mean(), ax=right).set(title="Finding them", xlim=(0, 0.5))
figure.savefig(args.picture, dpi=110)
print(f"\nPicture saved to {args.picture}")
