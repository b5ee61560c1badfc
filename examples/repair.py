# %% [markdown]
"""# Repair a model that was hurt by its data: remove the training images that harm it, and train again.

    python examples/repair.py

One of the people who labelled scikit-learn's digits mistakes some digits for others, so that the network learns wrong
rules.  A few images with checked labels tell, by influence, which training images to remove; test images that had no
part in it tell what the removal does, against removing as many by loss or at random, over several trainings.  Prints
accuracies and losses with intervals, and what the scores predicted; saves one picture: the counterfactuals, the scores,
the predictions, and two test images before and after.  Takes half a minute on a laptop CPU.
"""

# %% [markdown]
# ## Data: digits, some of them labelled by someone careless; a few checked images; test images

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
parser.add_argument("--train", type=int, default=1000, help="number of training images (at most 1200)")
parser.add_argument("--checked", type=int, default=150, help="number of images with checked labels")
parser.add_argument("--seeds", type=int, default=10, help="trainings of each kind")
parser.add_argument("--hidden", type=int, default=32, help="width of the network")
parser.add_argument("--damping", type=float, default=1e-2)
parser.add_argument("--picture", default="repair.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, truth = np.float32(digits.data[order] / 16), np.int32(digits.target[order])
mistakes = np.arange(10)
mistakes[[1, 3, 4, 5]] = 7, 8, 9, 6  # what the careless one writes
careless = np.random.default_rng(1).random(args.train) < 0.45
labels = np.where(careless, mistakes[truth[: args.train]], truth[: args.train]).astype(np.int32)
wrong = labels != truth[: args.train]
train = ij.Batch(images[: args.train], labels)
checked = ij.Batch(images[args.train : args.train + args.checked], truth[args.train : args.train + args.checked])
test = ij.Batch(images[-400:], truth[-400:])


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
optimizer = optax.sgd(0.1, momentum=0.9)
fit = ij.retrain.training(objective, optimizer, start, train, epochs=30, batch_size=50, penalty=1e-3)
keys = jax.random.split(jax.random.key(0), args.seeds)
params = fit(np.ones(args.train, bool), keys[0])
print(f"{args.train} training digits, {wrong.sum()} of them with a wrong label; {args.checked} checked ones.")

# %% [markdown]
# ## How much each training image helps the checked images, and how much the model disagrees with its label

# %%
inverse = ij.invert(ij.GGN(objective, params, train), ij.Direct(args.damping))
influence = ij.Influence(objective, params, inverse)
helps = jnp.mean(influence.influences(checked, train), axis=0)  # (N,), negative: harmful
loss = jax.vmap(objective, (None, 0))(params, train)

# %% [markdown]
# ## Counterfactuals: train without the most harmful, without the highest losses, without as many at random

# %%
began = time.perf_counter()
counts = [round(share * args.train) for share in (0.05, 0.1, 0.15, 0.2, 0.3)]
chance = np.random.default_rng(2).random(args.train, np.float32)
ways = {
    "most harmful": ij.metrics.removal_masks(helps, counts, remove="harmful"),
    "highest loss": ij.metrics.removal_masks(loss, counts),
    "at random": ij.metrics.removal_masks(chance, counts),
}
masks = np.concatenate([np.ones((1, args.train), bool), ~wrong[None], *ways.values()])


def measure(test: ij.Batch, checked: ij.Batch, params) -> dict[str, jax.Array]:
    """What is asked of every trained model."""
    right = jax.vmap(lambda example: jnp.argmax(predict(params, example)) == example.y)(test)
    of_test, of_checked = (jnp.mean(jax.vmap(objective, (None, 0))(params, batch)) for batch in (test, checked))
    return {"accuracy": jnp.mean(right), "loss": of_test, "checked": of_checked}


found = ij.retrain.retrain(fit, masks, keys, jax.tree_util.Partial(measure, test, checked), how="each")
nothing, oracle = ({what: values[i] for what, values in found.items()} for i in (0, 1))
results = {what: values[2:].reshape(len(ways), len(counts), -1) for what, values in found.items()}
print(f"{found['loss'].size} trainings: {time.perf_counter() - began:.0f} s.\n")


def described(runs: np.ndarray, form: str) -> str:
    """Mean over seeds, with its interval."""
    low, high = ij.metrics.bootstrap(runs, key=jax.random.key(1))
    return f"{runs.mean():{form}} ({low:{form}} to {high:{form}})"


def line(count: int, name: str, share: str, runs: dict[str, np.ndarray]) -> None:
    """A line of the table."""
    accuracy, losses = described(runs["accuracy"], ".1%"), described(runs["loss"], ".3f")
    print(f"{count:>7d}  {name:15s}{share:<7s}{accuracy}   {losses}")


print("removed  which          wrong  test accuracy (95 %)     test loss (95 %)")
line(0, "none", "", nothing)
for column, count in enumerate(counts):
    for row, (name, kept) in enumerate(ways.items()):
        share = wrong[~np.asarray(kept[column])].mean()
        line(count, name, f"{share:.0%}", {what: values[row, column] for what, values in results.items()})
line(wrong.sum(), "all wrong ones", "100%", oracle)
column = 3
gain = results["accuracy"][0, column] - results["accuracy"][1, column]  # of the same seeds
print(f"\nHarm against loss, {counts[column]} removed: {described(gain, '+.1%')} of accuracy.")

# %% [markdown]
# ## What the scores predicted: changes of the loss of the checked images, for a training on the mean of what is left

# %%
predicted = np.asarray(ij.metrics.predicted_changes(helps[None], masks))[:, 0]
actual = np.mean(found["checked"] - found["checked"][0], axis=1)  # of the same seeds
print("\nremoved  which          loss of the checked images: predicted to change by, changed by")
named = [("all wrong ones", wrong.sum()), *((name, count) for name in ways for count in counts)]
for (name, count), prediction, change in zip(named, predicted[1:], actual[1:], strict=True):
    print(f"{count:>7d}  {name:15s}{prediction:+.3f}  {change:+.3f}")

# %% [markdown]
# ## One picture

# %%
repaired = fit(ways["most harmful"][column], keys[0])
before, after = (jax.vmap(predict, (None, 0))(p, test) for p in (params, repaired))
eased = jax.vmap(cross_entropy)(before, test) - jax.vmap(cross_entropy)(after, test)
chosen = np.argsort(-np.asarray(eased))[:2]
asked = jax.tree.map(lambda x: x[chosen], test)
scores = ij.baselines.relative(influence, asked, train)  # relative, or a few strange images would come first everywhere
names = [f"{y} (wrong)" if bad else str(y) for y, bad in zip(labels, wrong, strict=True)]
figure = plt.figure(figsize=(15, 7.4), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1])
top.suptitle("The two test images that the repair helped most, and what had helped and harmed them")
pictures = train.x.reshape(-1, 8, 8)
for axes, place, row in zip(top.subplots(len(chosen), 9), chosen, scores, strict=True):
    title = f"taken for {before[place].argmax()}, now {after[place].argmax()}"
    ij.plot.images(test.x[place].reshape(8, 8), title, pictures, names, row, k=4, cmap="gray_r", axes=axes)
left, middle, right = bottom.subplots(1, 3)
for name, color, values in zip(ways, ("tab:red", "tab:purple", "tab:gray"), results["accuracy"], strict=True):
    runs = np.concatenate([nothing["accuracy"][None], values])  # (counts, seeds)
    low, high = ij.metrics.bootstrap(runs.T, key=jax.random.key(1))
    left.plot([0, *counts], runs.mean(axis=1), "o-", color=color, markersize=4, label=name)
    left.fill_between([0, *counts], low, high, color=color, alpha=0.2, linewidth=0)
left.axhline(oracle["accuracy"].mean(), color="black", linestyle=":", label="all wrong labels, and only those")
left.set(xlabel="training images removed", ylabel="test accuracy after training again")
left.set_title("Counterfactuals (95 % intervals over trainings)", fontsize="medium")
left.yaxis.set_major_formatter("{x:.0%}")
left.legend(title="removed")
groups = {"label right": np.asarray(helps)[~wrong], "label wrong": np.asarray(helps)[wrong]}
ij.plot.score_histogram(groups, ax=middle)
middle.set_title("What training images do to the checked ones", fontsize="medium")
ij.plot.predicted_against_actual(helps[None], actual[1:, None], masks=masks[1:], ax=right)
right.set_title(f"Loss of the checked images\n{right.get_title()}", fontsize="medium")
figure.savefig(args.picture, dpi=110)
print(f"Picture saved to {args.picture}")
