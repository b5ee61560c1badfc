# %% [markdown]
"""# Which texts put these words into a transformer's mouth, and which of their letters did it?

Trains a small decoder-only flax transformer, letter by letter, on software licences of four families, put together from
clauses.  Then asks, with EK-FAC influence functions, where it learned how "THE SOFTWARE IS PROVIDED" goes on: which
training sequences helped and hurt that completion, and which letters in them.  Two families go on with "AS IS", one of
them after it has named somebody; two say something else.  Takes two minutes on a laptop CPU and saves one picture.
"""

# %% [markdown]
# ## Data: licences put together from clauses, the same on every machine

# %%
import argparse
import dataclasses
import sys
import time
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import influence_jax as ij

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].lstrip("# "))
parser.add_argument("--sequences", type=int, default=800, help="number of training sequences, at most")
parser.add_argument("--licences", type=int, default=200, help="number of licences to cut sequences from")
parser.add_argument("--steps", type=int, default=400, help="training steps")
parser.add_argument("--batch", type=int, default=16, help="sequences of a training step")
parser.add_argument("--letters", type=int, default=96, help="length of a sequence (at least 60)")
parser.add_argument("--width", type=int, default=64, help="width of the transformer")
parser.add_argument("--blocks", type=int, default=2, help="blocks of the transformer")
parser.add_argument("--picture", default="transformer.png", help="where to save the picture")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line
LENGTH, VOCABULARY = args.letters, 128  # a token is an ASCII letter
PROMPT, COMPLETION = "THE SOFTWARE IS PROVIDED", ' "AS IS", WITHOUT WARRANTY OF ANY KIND'


WARRANTIES = {  # a family is known by how it goes on
    "brief": '{NAME} IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, NEITHER FOR ITS SALE NOR FOR ITS USE.',
    "academic": '{NAME} IS PROVIDED BY {HOLDER} "AS IS" AND ALL EXPRESS OR IMPLIED PROMISES ARE DISCLAIMED.',
    "reciprocal": "{NAME} IS PROVIDED IN THE HOPE THAT IT WILL BE USEFUL, AND NOBODY PROMISES THAT IT WILL BE.",
    "commercial": "{NAME} IS PROVIDED UNDER A WARRANTY OF {DAYS} DAYS, WHICH BEGIN WITH THE DATE OF ITS DELIVERY.",
}
NAMES = ["THE SOFTWARE"] * 3 + ["THIS SOFTWARE", "THE PROGRAM", "THIS LIBRARY"]
HOLDERS = ["the authors", "the contributors", "the copyright holders", "the university", "the foundation"]
GRANTS = [
    "Copyright {year} {holder}. Anybody may use, copy and change {name} for any purpose, with or without a fee.",
    "Copyright (c) {year} by {holder}. Permission is granted, free of charge, to run, share and sell {name}.",
    "{holder} own {name} since {year}. Its source code and its binary form may be passed on to others.",
]
TERMS = [
    "This notice has to be kept in all copies of {name}, or of parts of it that are worth a notice.",
    "Files that were changed have to say so, and by whom, so that nobody is blamed for the work of others.",
    "The names of {holder} may not be used to advertise {name} unless they have agreed in writing.",
    "Whoever passes on {name} passes on all of these rights, and the source code along with them.",
    "A copy may be installed on {days} machines at a time; more copies need the consent of {holder}.",
    "If a court finds that a part of this licence does not hold, the rest of it holds all the same.",
]
LIABILITIES = [
    "IN NO EVENT ARE {HOLDER} LIABLE FOR ANY CLAIM OR DAMAGES THAT ARISE FROM THE USE OF {NAME}.",
    "{HOLDER} ARE NOT LIABLE FOR LOSS OF DATA OR PROFITS, HOWEVER CAUSED, EVEN IF TOLD OF THE RISK.",
    "THE ENTIRE RISK OF THE USE OF {NAME}, AND THE COST OF ITS REPAIR, IS WITH WHOEVER USES IT.",
]


def write_licences(count: int) -> dict[str, str]:
    """Return licences, and to which family each belongs."""
    rng = np.random.default_rng(0)
    pick = lambda some: some[rng.integers(len(some))]
    licences = {}
    for number in range(count):
        family = list(WARRANTIES)[number % len(WARRANTIES)]
        terms = [TERMS[place] for place in rng.permutation(len(TERMS))[: rng.integers(1, 4)]]
        text = " ".join([pick(GRANTS), *terms, WARRANTIES[family], pick(LIABILITIES)])
        words = {"name": pick(NAMES), "holder": pick(HOLDERS), "days": str(rng.integers(2, 100))}
        words |= {word.upper(): value.upper() for word, value in words.items()}
        words["name"] = words["name"].lower()
        licences[text.format(year=rng.integers(1970, 2025), **words)] = f"{family} licence {number}"
    return licences


def encode(texts: list[str]) -> ij.Batch:
    """One sequence is ONE example: each letter is to be predicted from those before it."""
    tokens = np.array([list(text.encode("ascii")) for text in texts], np.int32)
    return ij.Batch(x=tokens[:, :-1], y=tokens[:, 1:])


licences = write_licences(args.licences)
sources = {  # a dict from sequence to licence, so that no sequence occurs twice
    text[start : start + LENGTH + 1]: name
    for text, name in licences.items()
    for start in range(0, len(text) - LENGTH, LENGTH)
}
shuffled = [list(sources)[place] for place in np.random.default_rng(0).permutation(len(sources))]
held_out, texts = shuffled[: len(shuffled) // 10], shuffled[len(shuffled) // 10 :][: args.sequences]
train, query = encode(texts), encode([PROMPT + COMPLETION])
print(f"{len(texts)} training sequences of {LENGTH} letters from {len(licences)} licences.")


# %% [markdown]
# ## Model: a decoder-only transformer in flax, trained with optax


# %%
class Transformer(nn.Module):
    """Tokens `(B, T)` to logits `(B, T, V)`."""

    width: int
    blocks: int
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, self.width, name="letters")(tokens)
        x += nn.Embed(LENGTH, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        for _ in range(self.blocks):
            mask = nn.make_causal_mask(tokens)
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm()(x))


cross_entropy = ij.losses.cross_entropy("y")  # the loss of one sequence: the SUM over its letters


net = Transformer(args.width, args.blocks)
variables = jax.jit(net.init)(jax.random.key(0), train.x[:1])
objective, params = ij.from_linen(net, variables, cross_entropy)
objective = dataclasses.replace(objective, sample=ij.softmax_sample)  # draws labels from the model; of a plain sum
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, args.steps // 10, args.steps), weight_decay=0.5)


@jax.jit
def loss_per_letter(params, data: ij.Batch) -> jax.Array:
    """Mean over sequences and letters, in nats."""
    return jnp.mean(jax.vmap(objective, (None, 0))(params, data)) / LENGTH


@jax.jit
def fit(params, train: ij.Batch):
    """AdamW on random minibatches."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, len(train), (args.batch,))
        grads = jax.grad(loss_per_letter)(params, jax.tree.map(lambda x: x[rows], train))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), args.steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


started = time.perf_counter()
params = jax.block_until_ready(fit(params, jax.tree.map(jnp.asarray, train)))
seconds = time.perf_counter() - started
seen, unseen = (loss_per_letter(params, encode(some)) for some in (texts[: len(held_out)], held_out))
print(f"Trained in {seconds:.0f} s: loss per letter {seen:.2f}, on held-out sequences {unseen:.2f}.")
written, read = PROMPT, jax.jit(lambda params, tokens: net.apply({"params": params}, tokens))
for _ in COMPLETION:
    logits = read(params, encode([written.ljust(LENGTH + 1)]).x)
    written += chr(np.argmax(logits[0, len(written) - 1]))
print(f"It writes:  {written}\nThe query:  {PROMPT + COMPLETION}\n")


# %% [markdown]
# ## Influence of the training sequences on the query, through an EK-FAC Fisher matrix


# %%
def letter_losses(params, example: ij.Batch) -> jax.Array:
    """The loss of each letter of the completion, given all before it."""
    losses = optax.softmax_cross_entropy_with_integer_labels(objective.output(params, example), example.y)
    return losses[-len(COMPLETION) :]


def completion_loss(params, example: ij.Batch) -> jax.Array:
    """What is asked of the query: how unlikely the model finds the completion."""
    return jnp.sum(letter_losses(params, example))


print(ij.coverage(objective, params, jax.tree.map(lambda x: x[0], train)))
started = time.perf_counter()
fisher = ij.ekfac(objective, params, train, labels="sampled", key=jax.random.key(2))
inverse = ij.invert(fisher, ij.Direct(ij.RelativeDamping(0.1)))
influence = ij.Influence(objective, params, inverse, measurement=completion_loss)
scores = np.asarray(influence.influences(query, train))[0]  # (N,), positive: training on it makes the query likelier
ranked = np.argsort(-scores)
print(f"\nInfluence of {len(texts)} sequences: {time.perf_counter() - started:.1f} s.")
for title, rows in (("helpful", ranked[:6]), ("harmful", ranked[::-1][:4])):
    print(f"Most {title}:")
    for row in rows:
        print(f"   {scores[row]:+7.0f}  {texts[row]}  ({sources[texts[row]]})")
alike = np.array(["AS IS" in text for text in texts])
families = [sources[texts[row]].split()[0] for row in (*ranked[:10], *ranked[-10:])]
for title, found in (("helpful", families[:10]), ("harmful", families[10:])):
    counts = ", ".join(f"{count} {family}" for family, count in Counter(found).most_common())
    print(f"The 10 most {title} are from these families: {counts}.")
print(f'"AS IS" is in {alike[ranked[:10]].sum()} of the 10 most helpful sequences, and in {alike.mean():.0%} of all.')

# %% [markdown]
# ## Which letters did it? What the loss of each training letter contributes to the score

# %%
chosen = ranked[[0, 1, 2, 3, -1, -2]]
contributions = influence.token_influences(query, jax.tree.map(lambda x: x[chosen], train))[0]  # (6, T)

# %% [markdown]
# ## One picture

# %%
figure, axes = plt.subplots(1 + len(chosen), figsize=(13, 6), layout="constrained")
figure.suptitle("Training sequences that helped and hurt the completion most, and the letters that did it")


def show(axis, text: str, values: np.ndarray, limit: float, colours: str, title: str, grey: int = 1):
    """Letters on the colour of their values; the first ones, which are given and not predicted, in grey."""
    cells = np.pad(values, (len(text) - len(values), 0))
    image = axis.imshow(cells[None], cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for place, letter in enumerate(text):
        color = "0.6" if place < grey else "white" if abs(cells[place]) > 0.6 * limit else "black"
        axis.text(place, 0, letter, family="monospace", fontsize=11, ha="center", va="center_baseline", color=color)
    axis.set(xlim=(-0.5, LENGTH + 0.5), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9, loc="left")
    return image


losses = np.asarray(jax.jit(letter_losses)(params, jax.tree.map(lambda x: x[0], query)))
title = f"query: how likely is this completion? Its loss is {losses.sum():.1f}; darker letters are less likely"
show(axes[0], PROMPT + COMPLETION, losses, losses.max(), "PuOr_r", title, grey=len(PROMPT))
limit = np.quantile(np.abs(contributions), 0.995)  # a few letters may stand out further
for axis, row, values in zip(axes[1:], chosen, contributions, strict=True):
    kind = "helpful" if scores[row] > 0 else "harmful"
    image = show(axis, texts[row], values, limit, "RdBu", f"{kind}: {sources[texts[row]]} (score {scores[row]:+.0f})")
figure.colorbar(
    image, ax=axes, aspect=40, extend="both", label="harmful          influence of a letter          helpful"
)
figure.savefig(args.picture, dpi=110)
print(f"Picture saved to {args.picture}")
