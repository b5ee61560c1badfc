"""Class numbers and tokens that do not fit: told where JAX reads something else in silence, and the loss depends on it.

Everything that is meant, masked or not read stays quiet: the suite turns warnings into errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import influence_jax as ij

RNG = np.random.default_rng(0)
N, D, C, T, V = 6, 3, 4, 5, 7
PARAMS = {"w": jnp.asarray(RNG.normal(size=(D, C))), "table": jnp.asarray(RNG.normal(size=(V, C)))}
X, Y = RNG.normal(size=(N, D)), RNG.integers(0, C, N)
TOKENS, TARGETS = RNG.integers(0, V, (N, T)), RNG.integers(0, C, (N, T))
BAD = [2, 5]
SOFT = jax.nn.log_softmax


@pytest.fixture(autouse=True)
def broadcasting():
    """Let arrays of different ranks and dtypes meet, as users' programs do."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def outer(p, z):
    return z["x"] @ p["w"]


def embedded(p, z):
    """Logits of a model that looks tokens up, normalises them, and leaves out padding."""
    rows = p["table"][z["t"]]
    rows = rows - rows.mean(-1, keepdims=True)
    seen = jnp.where(z["t"] >= 0, rows @ rows.T, -jnp.inf)
    return rows + jax.nn.softmax(seen) @ rows


def bare(predict, loss):
    return lambda p, z: loss(predict(p, z), z)


def influences(objective, batch):
    """Scores among the examples of a batch, through the identity."""
    return ij.Influence(objective, PARAMS, ij.Identity(PARAMS)).influences(batch, batch)


def spoilt(labels, value, at=BAD):
    return np.where(np.isin(np.arange(N), at).reshape((-1,) + (1,) * (labels.ndim - 1)), value, labels)


def positions(out, z):
    """The negative log-likelihood of every position, `(T,)`."""
    return -SOFT(out)[jnp.arange(T), z["y"]]


ONE = {
    "index": lambda o, z: -SOFT(o)[z["y"]],
    "along axis": lambda o, z: -jnp.take_along_axis(SOFT(o), z["y"][None], axis=-1, mode="clip")[0],
    "identity matrix": lambda o, z: -jnp.sum(jnp.eye(C)[z["y"]] * SOFT(o)),
    "function": lambda o, z: jax.lax.switch(z["y"], [lambda o, i=i: -SOFT(o)[i] for i in range(C)], o),
    "case": lambda o, z: -jax.lax.select_n(z["y"], *SOFT(o)),
    "branch": lambda o, z: jax.lax.cond(z["y"] != 1, lambda: -SOFT(o)[z["y"]], lambda: -SOFT(o)[1]),
    "written": lambda o, z: -jnp.sum(jnp.zeros(C).at[z["y"]].add(1.0, mode="clip") * SOFT(o)),
    "float": lambda o, z: jax.nn.logsumexp(o) - o[z["y"].astype(float).astype(int)],
}
# Losses of T positions.
MANY = {
    "positions": lambda o, z: jnp.sum(positions(o, z)),
    "map": lambda o, z: -jnp.sum(jax.lax.map(lambda each: each[0][each[1]], (SOFT(o), z["y"]))),
    "vmap": lambda o, z: -jnp.mean(jax.vmap(lambda row, y: row[y])(SOFT(o), z["y"])),
    "functions": lambda o, z: (
        -jnp.sum(
            jax.vmap(lambda row, y: jax.lax.switch(y, [lambda r, i=i: r[i] for i in range(C)], row))(SOFT(o), z["y"])
        )
    ),
    "remat": jax.checkpoint(lambda o, z: jnp.sum(positions(o, z))),
    "next": lambda o, z: jnp.sum(positions(o, {"y": jnp.roll(z["y"], -1)})[:-1]),
    "class weights": lambda o, z: jnp.sum(jnp.arange(1.0, C + 1)[z["y"]] * jnp.sum(o**2, axis=-1)),
}


@pytest.mark.parametrize("value", [C, -1])
@pytest.mark.parametrize("name", ONE)
def test_class_numbers_out_of_range_are_refused(name, value):
    match = rf"train|query: the numbers of part 'y' are out of range in 2 of 6 examples, .* 2 \({value}\); .* 0 to 3"
    data = {"x": X, "y": spoilt(Y, value)}
    for objective in (ij.Objective(outer, ONE[name]), bare(outer, ONE[name])):
        with pytest.raises(ValueError, match=match):
            influences(objective, data)


@pytest.mark.parametrize("name", MANY)
def test_of_positions(name):
    labels = TARGETS.copy()
    labels[BAD, 2] = [C, -1]
    with pytest.raises(ValueError, match=r"query: the numbers of part 'y' .* in 2 of 6 examples, .* 2 \(4\)"):
        influences(ij.Objective(embedded, MANY[name]), {"t": TOKENS, "y": labels})


def test_tokens():
    tokens = TOKENS.copy()
    tokens[BAD, 1] = V
    with pytest.raises(ValueError, match=r"query: the numbers of part 't' .* in 2 of 6 .* 2 \(7\); expected 0 to 6"):
        influences(ij.Objective(embedded, MANY["positions"]), {"t": tokens, "y": TARGETS})


def test_a_label_that_optax_counts_from_the_end():
    """Others make it NaN, which `LossWarning` tells; -1 is the last class."""
    loss = lambda o, z: optax.softmax_cross_entropy_with_integer_labels(o, z["y"])
    with pytest.raises(ValueError, match=r"the numbers of part 'y' are out of range in 2 of 6"):
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, -1)})
    with pytest.warns(ij.LossWarning, match="the loss of 2 of 6 examples is NaN"):
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, C)})


def test_numbers_made_of_a_part():
    loss = lambda o, z: -SOFT(o)[z["y"] - 1]
    influences(ij.Objective(outer, loss), {"x": X, "y": Y + 1})
    with pytest.raises(ValueError, match=r"the numbers made of part 'y' are out of range in \d of 6 .*\(-1\)"):
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, 0)})


MASKED = {
    "where": lambda o, z: jnp.sum(jnp.where(z["y"] >= 0, positions(o, z), 0)),
    "factor": lambda o, z: jnp.sum(positions(o, z) * (z["y"] >= 0)) / jnp.maximum(jnp.sum(z["y"] >= 0), 1),
    "jitted": jax.jit(lambda o, z: jnp.sum(jnp.where(z["y"] >= 0, positions(o, z), 0))),
    "safe": lambda o, z: jnp.sum(jnp.where(z["y"] >= 0, positions(o, {"y": jnp.where(z["y"] < 0, 0, z["y"])}), 0)),
    "map": lambda o, z: -jnp.sum(jax.lax.map(lambda e: jnp.where(e[1] < 0, 0, e[0][e[1]]), (SOFT(o), z["y"]))),
    "branch": lambda o, z: (
        -jnp.sum(jax.vmap(lambda row, y: jax.lax.cond(y >= 0, lambda: row[y], lambda: 0.0 * row[0]))(SOFT(o), z["y"]))
    ),
    "its own": ij.losses.cross_entropy("y", ignore=-1),
    "its own, jitted": jax.jit(ij.losses.cross_entropy("y", ignore=-1)),
}


@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_may_be_anything(name):
    """Labels of -1, and tokens of -1 that are neither attended to nor scored; scores are as without them."""
    tokens, labels = TOKENS.copy(), TARGETS.copy()
    tokens[BAD, 3:], labels[BAD, 3:] = -1, -1
    scores = influences(ij.Objective(embedded, MASKED[name]), {"t": tokens, "y": labels})
    assert np.isfinite(scores).all()
    if name in ("where", "factor", "jitted"):
        labels[0, 0] = C
        with pytest.raises(
            ValueError, match=r"part 'y' are out of range in 1 of 6 examples, the first example 0 \(4\)"
        ):
            influences(ij.Objective(embedded, MASKED[name]), {"t": TOKENS, "y": labels})


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, z: jnp.sum(o * z["v"][z["y"]]),
        lambda o, z: -SOFT(o)[jnp.clip(z["y"], 0, C - 1)],
        lambda o, z: -SOFT(o)[jax.lax.clamp(0, z["y"], C - 1)],
        lambda o, z: jax.lax.switch(jnp.clip(z["y"], 0, 1), [lambda o, i=i: -SOFT(o)[i] for i in range(2)], o),
        lambda o, z: -jnp.sum(jnp.zeros(C).at[jnp.clip(z["y"], 0, C - 1)].set(1.0) * SOFT(o)),
        lambda o, z: -jnp.take(SOFT(o), jnp.maximum(0, jnp.minimum(z["y"], C - 1))),
    ],
)
def test_what_is_of_the_example_itself_or_clipped_is_meant(loss):
    data = {"x": X, "y": np.where(Y == 0, -1, C), "v": X}
    assert np.isfinite(influences(ij.Objective(outer, loss), data)).all()


def test_one_hot():
    told = r"query: the numbers of part 'y' are out of range in 2 of 6 examples, .* 2 \(4\); .* the row is zero"
    loss = lambda o, z: optax.softmax_cross_entropy(o, jax.nn.one_hot(z["y"], C))
    with pytest.warns(UserWarning, match=told) as caught:
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, C)})
    assert [each.filename for each in caught] == [__file__]
    compared = bare(outer, lambda o, z: -jnp.sum((jnp.arange(C) == z["y"]) * SOFT(o)))
    with pytest.warns(UserWarning, match=told):
        influences(compared, {"x": X, "y": spoilt(Y, C)})
    influences(compared, {"x": X, "y": spoilt(Y, C)})  # once of each loss
    masked = lambda o, z: loss(o, z) * (z["y"] < C)
    for objective, value in ((masked, C), (loss, -1), (loss, 0)):
        influences(ij.Objective(outer, objective), {"x": X, "y": spoilt(Y, value)})


@pytest.mark.parametrize(
    "hot", [lambda y: jnp.zeros(C).at[y].set(1.0), lambda y: jnp.zeros((1, C)).at[jnp.arange(1), y].add(1.0)[0]]
)
def test_what_is_written_out_of_range_is_left_out(hot):
    loss = lambda o, z: -jnp.sum(hot(z["y"]) * SOFT(o))
    with pytest.warns(UserWarning, match=r"query: .* 2 \(4\); expected 0 to 3, for .* writes .* are left out"):
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, C)})
    with pytest.raises(ValueError, match=r"'y' are out of range in 2 of 6 .* 2 \(-1\); .* writes to an axis"):
        influences(ij.Objective(outer, loss), {"x": X, "y": spoilt(Y, -1)})
    masked = lambda o, z: loss(o, z) * (z["y"] < C)
    influences(ij.Objective(outer, masked), {"x": X, "y": spoilt(Y, C)})


FIXED = {
    "one": (lambda o, z: o[5], 5),
    "negative": (lambda o, z: SOFT(o)[-5], -5),
    "several": (lambda o, z: jnp.sum(o[jnp.array([0, 4])]), 4),
    "numpy": (lambda o, z: jnp.sum(o[np.array([-7, 0])]), -7),
    "of the example": (lambda o, z: jnp.sum(o) * z["x"][3], 3),
    "in a loop": (lambda o, z: jnp.sum(jax.lax.map(lambda a: a * o[4], o)), 4),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_places_out_of_range_are_refused(name):
    measured, place = FIXED[name]
    objective = ij.Objective(outer, ONE["index"])
    influence = ij.Influence(objective, PARAMS, ij.Identity(PARAMS), measurement=bare(outer, measured))
    with pytest.raises(ValueError, match=rf"query: the loss of .* of length \d at a fixed place, {place}, that"):
        influence.influences({"x": X, "y": Y}, {"x": X, "y": Y})


def test_other_fixed_places_are_meant():
    table, mask = jnp.array([[0, -1], [2, C]]), jnp.array([[1, 1], [1, 0]])
    loss = lambda o, z: jnp.sum(o[table] * mask) + o[-1] + o[np.array([0, -C])].sum() + jnp.take(o, 9, mode="wrap")
    assert np.isfinite(influences(ij.Objective(outer, loss), {"x": X, "y": Y})).all()


HOT = np.eye(C, dtype=int)[Y]
ROWS = {
    "index": lambda o, z: -jnp.sum(SOFT(o)[z["y"]]),
    "mean": lambda o, z: -jnp.mean(jnp.take(SOFT(o), z["y"], mode="clip")),
    "float": lambda o, z: -jnp.sum(SOFT(o)[z["y"].astype(int)]),
    "one hot": lambda o, z: jnp.sum(optax.softmax_cross_entropy(o, jax.nn.one_hot(z["y"], C))),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_hot_rows_taken_for_class_numbers(name):
    labels = HOT.astype(float) if name == "float" else HOT
    with pytest.warns(UserWarning, match=r"query: .* takes part 'y' .* for class numbers 0 to 3, .*argmax"):
        influences(ij.Objective(outer, lambda o, z: ROWS[name](o, z)), {"x": X, "y": labels})
    quiet = ij.Objective(outer, lambda o, z: ROWS[name](o, z))
    for numbers in (np.roll(labels, 1, 1) + labels, np.where(np.arange(N)[:, None] == 2, 1, labels)):
        influences(quiet, {"x": X, "y": numbers})
    influences(ij.Objective(outer, lambda o, z: -jnp.sum(SOFT(o) * z["y"])), {"x": X, "y": labels})


COLUMNS = {
    "squares": lambda o, z: jnp.mean((o - z["y"]) ** 2),
    "Huber": lambda o, z: jnp.sum(optax.huber_loss(o, 2.0 * z["y"])),
    "binary": lambda o, z: jnp.mean(optax.sigmoid_binary_cross_entropy(o, z["y"])),
    "jitted": jax.jit(lambda o, z: jnp.mean(jnp.square(z["y"] - jnp.tanh(o)))),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_and_a_row_that_make_a_square(name):
    column = lambda p, z: outer(p, z)[:, None]
    fresh = lambda predict: ij.Objective(predict, lambda o, z: COLUMNS[name](o, z))
    row = HOT if name == "binary" else HOT * 0.5
    for predict, labels in ((column, row), (outer, row[..., None])):
        with pytest.warns(UserWarning, match=r"broadcasts part 'y' .* with the output .* to \(4, 4\).*squeeze"):
            influences(fresh(predict), {"x": X, "y": labels})
    for predict, labels in ((column, row[..., None]), (outer, row)):
        influences(fresh(predict), {"x": X, "y": labels})


def test_pairs_of_outputs_are_meant():
    pairs = lambda o: (o - o.T) if o.ndim == 2 else o[:, None] - o[None]
    loss = lambda o, z: jnp.sum(jax.nn.softplus(-pairs(o) * jnp.sign(z["y"][:, None] - z["y"][None])))
    for predict in (outer, lambda p, z: outer(p, z)[:, None]):
        influences(ij.Objective(predict, loss), {"x": X, "y": HOT * 0.5})


COLUMN_MASKS = {
    "times": lambda losses, mask: jnp.sum(losses * mask) / jnp.sum(mask),
    "where": lambda losses, mask: jnp.sum(jnp.where(mask > 0, losses, 0.0)),
}


@pytest.mark.parametrize("name", COLUMN_MASKS)
def test_a_column_that_masks_losses_of_positions(name):
    """The mask of a loader `(T, 1)`, the losses `(T,)`: every loss with every entry of the mask."""
    tokens = lambda p, z: jnp.tile(outer(p, z)[None], (3, 1)) * jnp.arange(1.0, 4.0)[:, None]
    losses = lambda o, z: optax.softmax_cross_entropy_with_integer_labels(o, z["y"])
    fresh = lambda: ij.Objective(tokens, lambda o, z: COLUMN_MASKS[name](losses(o, z), z["m"]))
    labels, mask = np.stack([Y] * 3, axis=1), np.tile([1.0, 1.0, 0.0], (N, 1))
    with pytest.warns(UserWarning, match=r"broadcasts part 'm' of the example, \(3, 1\), .* to \(3, 3\)"):
        influences(fresh(), {"x": X, "y": labels, "m": mask[..., None]})
    influences(fresh(), {"x": X, "y": labels, "m": mask})


def test_probabilities_where_logits_are_meant():
    for last, loss, wanted in (
        (jax.nn.softmax, ij.losses.cross_entropy("y"), "softmax"),
        (lambda o: jnp.exp(o) / jnp.sum(jnp.exp(o)), ij.losses.cross_entropy("y"), "softmax"),
        (lambda o: jax.nn.sigmoid(o[0]), ij.losses.binary_cross_entropy("b"), "sigmoid"),
    ):
        objective = ij.Objective(lambda p, z, last=last: last(outer(p, z)), loss)
        with pytest.warns(UserWarning, match=f"the model ends in a {wanted}, and .*cross_entropy.* applies one itself"):
            influences(objective, {"x": X, "y": Y, "b": Y > 1})
    for last in (jax.nn.log_softmax, lambda o: jax.nn.softmax(o) * 2.0, jax.nn.sigmoid):
        predict = lambda p, z, last=last: last(outer(p, z))
        influences(ij.Objective(predict, ij.losses.cross_entropy("y")), {"x": X, "y": Y})


def test_entries_dropped_by_a_key_of_the_model():
    def dropout(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)

    loss, key = ij.losses.cross_entropy("y"), jax.random.key(0)
    fixed = lambda p, z: dropout(outer(p, z), key)
    with pytest.warns(UserWarning, match=r"drops entries at random by a key of its own.*train=False"):
        influences(ij.Objective(fixed, loss), {"x": X, "y": Y})
    own = lambda p, z: dropout(outer(p, z), z["key"])
    influences(ij.Objective(own, loss), {"x": X, "y": Y, "key": jax.random.split(key, N)})
    features = lambda p, z: outer(p, z) + jnp.cos(jax.random.normal(key, (C,))) * z["x"][0]
    influences(ij.Objective(features, loss), {"x": X, "y": Y})


def test_who_reads_is_named():
    """A lookup of a model is not the loss's."""
    predict = lambda p, z: p["table"][z["t"]].mean(0)
    objective = ij.Objective(predict, ij.losses.cross_entropy("y"))
    with pytest.raises(ValueError, match=r"part 't' .* where predict \(test_who.*lambda>\) reads an axis of length 7"):
        influences(objective, {"t": np.where(TOKENS > 2, V, TOKENS), "y": Y})
    with pytest.raises(ValueError, match=r"where the loss of .* reads .*jnp.clip\(number, 0, 3\), whatever the mode"):
        influences(ij.Objective(outer, ONE["along axis"]), {"x": X, "y": spoilt(Y, C)})


def places(data):
    """Every way into the library, on data with bad class numbers, and what they are called there."""
    objective = ij.Objective(outer, ONE["index"])
    params = {"w": PARAMS["w"]}
    influence, good = ij.Influence(objective, params, ij.Identity(params)), {"x": X, "y": Y}
    batches = [jax.tree.map(lambda a, i=i: a[i : i + 4], data) for i in (0, 4)]
    stream = {"progress": False, "batch_size": 4}
    return {
        "top_k": ("train", lambda: influence.top_k(good, data, 2)),
        "query": ("query", lambda: influence.influences(data, good)),
        "factors": ("query", lambda: influence.influence_factors(data)),
        "self": ("batch", lambda: influence.self_influences(data)),
        "gradients": ("batch", lambda: ij.per_example_grads(objective, params, data)),
        "cosine": ("train", lambda: ij.baselines.cosine(influence, good, data)),
        "tracin": ("train", lambda: ij.baselines.tracin(objective, [params], [0.1], good, data)),
        "invert": ("data", lambda: ij.invert(ij.GGN(objective, params, data), ij.CG(0.1))),
        "trace": ("data", lambda: ij.trace(ij.Hessian(objective, params, data))),
        "kfac": ("data", lambda: ij.kfac(objective, params, data)),
        "ekfac": ("data", lambda: ij.ekfac(objective, params, data, labels="empirical")),
        "stream scores": ("loader", lambda: ij.stream.scores(influence, good, data, **stream)),
        "stream top_k": ("loader", lambda: ij.stream.top_k(influence, good, data, 2, **stream)),
        "stream ekfac": ("loader", lambda: ij.stream.ekfac(objective, params, batches, progress=False)),
        "stream invert": (
            "loader",
            lambda: ij.stream.invert(ij.GGN, objective, params, batches, ij.Direct(0.1), progress=False),
        ),
    }


@pytest.mark.parametrize("way", places({"x": X, "y": Y}))
def test_wherever_losses_are_looked_at(way):
    name, call = places({"x": X, "y": spoilt(Y, C, [5])})[way]
    match = rf"{name}: the numbers of part 'y' are out of range in 1 of \d examples, the first example 5 \(4\)"
    with pytest.raises(ValueError, match=match):
        call()


def test_stores(tmp_path):
    params = {"w": PARAMS["w"]}
    influence = ij.Influence(ij.Objective(outer, ONE["index"]), params, ij.Identity(params))
    sink, data = ij.store.ScoreStore.create(tmp_path / "scores"), {"x": X, "y": spoilt(Y, C, [5])}
    with pytest.raises(ValueError, match=r"loader: the numbers of part 'y' .* the first example 5 \(4\)"):
        ij.stream.scores(influence, {"x": X, "y": Y}, data, sink, progress=False, batch_size=4)


def test_a_weight_of_zero_removes_an_example():
    params, weights = {"w": PARAMS["w"]}, np.where(np.isin(np.arange(N), BAD), 0.0, 1.0)
    objective, data = ij.Objective(outer, ONE["index"]), {"x": X, "y": spoilt(Y, C)}
    dense = ij.to_dense(ij.GGN(objective, params, data, weights=weights))
    good = jax.tree.map(lambda a: a[weights > 0], data)
    assert relative_error(dense, ij.to_dense(ij.GGN(objective, params, good))) < 1e-12
    assert np.isfinite(ij.trace(ij.kfac(objective, params, data, weights=weights)))


def test_under_tracing_nothing_is_said_of_what_is_traced():
    """What a program closes over is known, and looked at as ever."""
    data = {"x": X, "y": spoilt(Y, C)}
    objective = ij.Objective(outer, ONE["index"])
    assert np.isfinite(jax.jit(lambda batch: influences(objective, batch))(data)).all()
    for held in (data, jax.tree.map(jnp.asarray, data)):
        with pytest.raises(ValueError, match=r"the numbers of part 'y' are out of range in 2 of 6 examples"):
            jax.jit(lambda s, held=held: s * influences(objective, held))(1.0)
    assert np.isfinite(jax.jit(lambda s: s * influences(objective, {"x": X, "y": Y}))(1.0)).all()


def optax_of(label):
    return lambda o, z: optax.softmax_cross_entropy(o, z[label])


def stacked(out):
    """Logits of T positions."""
    return jnp.ones((T, 1)) * out


MEANT = {
    "mask": lambda o, z: -jnp.sum(z["m"] * SOFT(o) * z["hot"]),
    "mask before the label": lambda o, z: -(z["m"] * SOFT(o))[z["y"]],
    "weight": lambda o, z: z["m"] * optax.softmax_cross_entropy(o, z["hot"]),
    "weight of entries": lambda o, z: jnp.sum(z["m"] * (o - z["hot"]) ** 2),
    "temperature": lambda o, z: optax.softmax_cross_entropy(o * (1 + z["m"]), z["hot"]),
    "temperature before an index": lambda o, z: optax.softmax_cross_entropy_with_integer_labels(
        o * (1 + z["m"]), z["y"]
    ),
    "quantiles": lambda o, z: jnp.sum(jnp.abs(z["real"] - o)),
}


REFUSED = {
    "optax": lambda o, z: optax.softmax_cross_entropy(o, z["y"]),
    "Brier": lambda o, z: jnp.sum((jax.nn.softmax(o) - z["y"]) ** 2),
    "by hand": lambda o, z: -jnp.sum(z["y"] * (o - jax.nn.logsumexp(o))),
    "quotient": jax.jit(lambda o, z: -jnp.sum(z["y"] * jnp.log(jnp.exp(o) / jnp.sum(jnp.exp(o))))),
}


BARE = {
    "index": lambda o, z: -SOFT(o)[z["y"]],
    "one rate": lambda o, z: jnp.exp(o[0]) - z["y"] * o[0],
    "rates": lambda o, z: jnp.sum(jnp.exp(o) - z["y"] * o),
    "weight of a label": lambda o, z: z["y"] * optax.softmax_cross_entropy(o, z["hot"]),
    "weight of positions": lambda o, z: jnp.sum(z["y"] * (stacked(o)[:, 0] - jax.nn.logsumexp(stacked(o), axis=1))),
    "weight of labels": lambda o, z: -jnp.sum(z["y"] * (SOFT(o) * z["hot"])),
    "one hot": lambda o, z: optax.softmax_cross_entropy(o, jax.nn.one_hot(z["y"], C)),
    "scores": lambda o, z: jnp.sum(z["y"] * (jax.nn.softmax(jnp.outer(o, o)) @ o)),
}


class TestBroadcast:
    """Class numbers given to functions of one-hot labels, in numbers that are no integers, or in bare functions."""

    CROSS_ENTROPY = staticmethod(lambda o, z: z["w"] * optax.softmax_cross_entropy(o, z["y"]))

    @pytest.mark.parametrize(
        ("labels", "loss"),
        [
            (Y.astype(float), CROSS_ENTROPY),
            (Y.astype(float)[:, None], CROSS_ENTROPY),
            (Y > 1, lambda o, z: -jnp.sum(z["y"] * SOFT(o))),
            (Y.astype(float), lambda o, z: jnp.mean((z["y"] - jax.nn.softmax(o)) ** 2)),
        ],
    )
    def test_whole_numbers_and_booleans_are_told(self, labels, loss):
        data = {"x": X, "y": labels, "w": RNG.uniform(size=N)}
        fresh = lambda: ij.Objective(outer, lambda o, z: loss(o, z))
        objective = fresh()
        with pytest.warns(UserWarning, match=r"query: .*broadcasts part 'y' .* whole numbers from 0 to 3.*integers"):
            influences(objective, data)
        influences(objective, data)  # once of each loss
        quiet = fresh()
        for others in (labels + 0.5, 5.0 * labels, np.ones_like(labels, float)):
            influences(quiet, data | {"y": others})

    def test_of_a_bare_function(self):
        with pytest.warns(UserWarning, match=r"broadcasts part 'y' .* whole numbers from 0 to 3"):
            influences(bare(outer, optax_of("y")), {"x": X, "y": Y.astype(float)})

    @pytest.mark.parametrize("made", [ij.Objective, bare])
    @pytest.mark.parametrize("name", MEANT)
    def test_other_uses_are_meant(self, name, made):
        mask = (Y > 1).astype(float)
        data = {"x": X, "y": Y, "hot": np.eye(C)[Y], "m": mask, "real": RNG.normal(size=N)}
        for masks in (mask, mask > 0):
            assert np.isfinite(influences(made(outer, MEANT[name]), data | {"m": masks})).all()

    @pytest.mark.parametrize("name", REFUSED)
    def test_integers_of_bare_functions_are_refused(self, name):
        for labels in (Y, Y[:, None]):
            with pytest.raises(ValueError, match=r"objective: .* the integer part 'y' .* of a softmax.*cross_entropy"):
                ij.per_example_grads(bare(outer, REFUSED[name]), PARAMS, {"x": X, "y": labels})

    @pytest.mark.parametrize("name", BARE)
    def test_other_integers_are_meant(self, name):
        data = {"x": X, "y": Y, "hot": np.eye(C)[Y]}
        grads = ij.per_example_grads(bare(outer, BARE[name]), PARAMS, data)
        assert np.isfinite(grads["w"]).all()


def test_looking_costs_no_program(compilations):
    """Where all is in range, the smallest and the largest class number are all that is computed."""
    objective, data = ij.Objective(outer, lambda o, z: ONE["index"](o, z)), {"x": X, "y": Y}
    with compilations() as names:
        influences(objective, data)
    assert not [name for name in names if "range" in name or "matter" in name]
    with compilations() as names, pytest.raises(ValueError, match="out of range"):
        influences(objective, {"x": X, "y": spoilt(Y, C)})
    assert len([name for name in names if "range" in name or "matter" in name]) == 2, names
