# %% [markdown]
"""# Score the training data from inside a training loop, and stop learning from what hurts.

Two in five of scikit-learn's digits get a wrong label.  A flax `TrainState` is trained on them with optax, twice: once
plainly, and once with a stop every few epochs to ask how much each training image helps the loss of a small held-out
set, at the current weights; images that have hurt so far sit out until asked again.  Takes half a minute on a laptop
CPU and saves one picture.
"""

# %% [markdown]
# ## Data: digits, many with a wrong label, and a small set that has been checked by hand

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
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import influence_jax as ij

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].lstrip("# "))
parser.add_argument("--train", type=int, default=1000, help="number of training images (at most 1400)")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--every", type=int, default=5, help="epochs between scorings")
parser.add_argument("--picture", default="training_loop.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, truth = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
rng = np.random.default_rng(1)
wrong = rng.random(args.train) < 0.4
labels = np.where(wrong, (truth[: args.train] + rng.integers(1, 10, args.train)) % 10, truth[: args.train])
train = ij.Batch(images[: args.train], labels.astype(np.int32))
held_out, test = ij.Batch(images[-397:-297], truth[-397:-297]), ij.Batch(images[-297:], truth[-297:])

# %% [markdown]
# ## Model and optimiser, as in any flax program

# %%
net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
variables = jax.jit(net.init)(jax.random.key(0), train.x[:1])


cross_entropy = ij.losses.cross_entropy("y")  # the loss of ONE example


objective, params = ij.from_linen(net, variables, cross_entropy)


def mean_loss(params, data: ij.Batch, weights: jax.Array) -> jax.Array:
    """Weighted mean over a batch: what is trained, and what is asked of the held-out set."""
    return jnp.average(jax.vmap(objective, (None, 0))(params, data), weights=weights + 1e-6)


@jax.jit
def train_step(state: TrainState, data: ij.Batch, weights: jax.Array) -> TrainState:
    """One optax step."""
    return state.apply_gradients(grads=jax.grad(mean_loss)(state.params, data, weights))


# %% [markdown]
# ## Influence at the weights of the moment: one jitted function of the TrainState


# %%
def held_out_loss(params, data: ij.Batch) -> jax.Array:
    """A measurement can be anything; here a query is a whole data set, so that one solve answers for all of it."""
    return mean_loss(params, data, jnp.ones(len(data)))


@jax.jit
def helpfulness(state: TrainState, train: ij.Batch, held_out: ij.Batch) -> tuple[jax.Array, ij.Info]:
    """How much training on each example lowers the held-out loss `(N,)`, and how the solve went."""
    inverse = ij.invert(ij.GGN(objective, state.params, train), ij.BlockCG(damping=0.1))
    asked = jax.tree.map(lambda x: x[None], jax.grad(held_out_loss)(state.params, held_out))
    factors, info = inverse.solve_many(asked)
    influence = ij.Influence(objective, state.params, inverse)
    return influence.influences_from_factors(factors, train)[0], info


def accuracy(state: TrainState) -> float:
    """On the test set."""
    return float(jnp.mean(jnp.argmax(state.apply_fn({"params": state.params}, test.x), axis=1) == test.y))


def run(curated: bool) -> list[float]:
    """Test accuracy after every epoch."""
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(3e-3))
    weights, total = np.ones(args.train, np.float32), np.zeros(args.train)
    curve, shuffle = [], np.random.default_rng(2)
    for epoch in range(args.epochs):
        if curated and epoch and epoch % args.every == 0:
            scores, info = helpfulness(state, train, held_out)
            # Later scores alone would chase the few held-out images that are still wrong; all so far have a vote.
            total += np.asarray(scores / jnp.mean(jnp.abs(scores)))
            out = total <= 0
            weights = np.where(out, 0, 1).astype(np.float32)
            print(
                f"   epoch {epoch:3d}: {out.sum():4d} images set aside, {wrong[out].mean():.0%} of them with a wrong "
                f"label ({int(info.steps[0])} CG steps, residual {float(info.residual[0]):.0e})"
            )
        for rows in shuffle.permutation(args.train)[: args.train // 50 * 50].reshape(-1, 50):
            state = train_step(state, ij.Batch(train.x[rows], train.y[rows]), weights[rows])
        curve.append(accuracy(state))
    return curve


# %% [markdown]
# ## Train twice

# %%
started = time.perf_counter()
print(f"{args.train} training digits, {wrong.sum()} with a wrong label; {len(held_out)} held-out digits.")
plain = run(curated=False)
print(f"Plain training: test accuracy {plain[-1]:.1%}")
print("Setting aside what hurts:")
curated = run(curated=True)
print(f"Curated training: test accuracy {curated[-1]:.1%} ({time.perf_counter() - started:.0f} s for both)")

# %% [markdown]
# ## One picture

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
epochs = np.arange(1, args.epochs + 1)
axis.plot(epochs, plain, color="tab:gray", label="all images")
axis.plot(epochs, curated, color="tab:blue", label="all but those that hurt the held-out loss")
for place in range(args.every, args.epochs, args.every):
    axis.axvline(place, color="tab:blue", alpha=0.15)
axis.yaxis.set_major_formatter("{x:.0%}")
axis.set(xlabel="epoch", ylabel="test accuracy")
axis.set_title(f"Training with {wrong.mean():.0%} wrong labels; images were scored at the vertical lines")
axis.legend(loc="lower right", title="trained on")
figure.savefig(args.picture, dpi=110)
print(f"Picture saved to {args.picture}")
