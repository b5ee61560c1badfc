"""Arrays of any container: each is the NumPy array that it holds, or is refused by the name of the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error
from jax.experimental import sparse

import influence_jax as ij

RNG = np.random.default_rng(0)
X, Y, W = RNG.normal(size=(6, 4)), RNG.normal(size=6), RNG.normal(size=4)
ONES = np.ones(6)
DATA, PARAMS = {"x": X, "y": Y}, {"w": W}
OBJECTIVE = ij.Objective(
    lambda p, z, c: c["scale"] * (z["x"] @ p["w"]), lambda out, z: 0.5 * (out - z["y"]) ** 2, constants={"scale": 1.0}
)


def loss(p, z):
    return 0.5 * (z["x"] @ p["w"] - z["y"]) ** 2


def scores(params=PARAMS, train=DATA):
    return ij.Influence(loss, params, ij.Identity(params)).influences(DATA, train)


SLOPES = (X @ W - Y)[:, None] * X
RIGHT = SLOPES @ SLOPES.T


class Array:
    """What stands for an array of another framework: `torch.Tensor`, `pandas.Series`, `xarray.DataArray`."""

    def __init__(self, entries, error=None):
        self.entries, self.error, self.shape, self.dtype = entries, error, entries.shape, "other.float64"

    def __array__(self, dtype=None, copy=None):
        if self.error is not None:
            raise self.error
        return self.entries

    def __getitem__(self, key):
        return type(self)(self.entries[key], self.error)

    def detach(self):
        return type(self)(self.entries)


class Frame:
    """What stands for a `pandas.DataFrame`: an iterable of its columns, of no one dtype."""

    def __init__(self, entries):
        self.entries, self.shape = entries, entries.shape

    def __array__(self, dtype=None, copy=None):
        return self.entries

    def __getitem__(self, rows):
        return Frame(self.entries[rows])

    def __iter__(self):
        return iter(range(self.shape[1]))


class OnDisk:
    """What stands for a dataset in a file that is read where it is indexed."""

    def __init__(self, entries):
        self.entries, self.shape, self.dtype = entries, entries.shape, entries.dtype

    def __getitem__(self, key):
        return self.entries[key]


class Compressed:
    """What stands for a matrix of `scipy.sparse`."""

    def __init__(self, entries):
        self.entries, self.shape, self.dtype = entries, entries.shape, entries.dtype

    def __len__(self):
        raise TypeError("sparse array length is ambiguous")

    def __iter__(self):
        return iter([Compressed(row) for row in self.entries])

    def __getitem__(self, key):
        return self if key is Ellipsis else Compressed(self.entries[key])

    def toarray(self):
        return self.entries


def hidden(x):
    return np.ma.masked_array(x, x > 0)


TAKEN = {
    "other framework": Array,
    "on disk": OnDisk,
    "nothing masked": lambda x: np.ma.masked_array(x, np.zeros_like(x, bool)),
    "big-endian": lambda x: x.astype(">f8"),
}
REFUSED = {
    "masked": (hidden, r"masked array with \d+ masked entries.*\.filled\(0\)"),
    "gradient": (
        lambda x: Array(x, RuntimeError("call detach() first")),
        r"Array that NumPy cannot read.*\.detach\(\)",
    ),
    "elsewhere": (lambda x: Array(x, TypeError("on another device")), r"NumPy cannot read \(on another device\)"),
    "sparse tensor": (lambda x: Array(x, TypeError("use to_dense()")), r"convert it, e.g. with \.to_dense\(\)"),
    "sparse": (Compressed, r"Compressed of shape \(.*\), of which NumPy reads shape \(\).*\.toarray\(\)"),
    "longdouble": (lambda x: x.astype(np.longdouble), "float128|float96|longdouble"),
    "objects": (lambda x: x.astype(object), "object"),
}
SPARSE = sparse.BCOO.fromdense(X), sparse.BCOO.fromdense(X, n_batch=1), sparse.BCSR.fromdense(X)


@pytest.mark.parametrize("kind", [*TAKEN, "frame"])
def test_what_is_taken_as_data(kind):
    made = {"frame": Frame, **TAKEN}[kind]
    given = {"x": made(X), "y": Y}
    assert relative_error(scores(train=given), RIGHT) < 1e-12
    assert ij.Batch(given["x"], Y).x is given["x"]
    influence = ij.Influence(loss, PARAMS, ij.Identity(PARAMS))
    for loader, rows in ((given, 4), ([given], None)):
        streamed = ij.stream.scores(influence, DATA, loader, batch_size=rows, progress=False)
        assert relative_error(streamed, RIGHT) < 1e-12


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_elsewhere(kind):
    made = TAKEN[kind]
    assert relative_error(scores({"w": made(W)}), RIGHT) < 1e-12
    op = ij.GGN(OBJECTIVE, PARAMS, DATA, weights=made(ONES))
    assert relative_error(ij.to_dense(op), X.T @ X / 6) < 1e-12
    scaled = ij.Objective(OBJECTIVE.predict, OBJECTIVE.loss, constants={"scale": made(np.array(2.0))})
    assert relative_error(scaled(PARAMS, {"x": X[0], "y": Y[0]}), 0.5 * (2 * X[0] @ W - Y[0]) ** 2) < 1e-12
    train = ij.retrain.training(loss, optax.sgd(0.1), {"w": made(W)}, {"x": made(X), "y": Y}, epochs=1)
    assert relative_error(train(made(ONES), jax.random.key(0))["w"], W - 0.1 * SLOPES.mean(0)) < 1e-12


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    made, words = REFUSED[kind]
    influence = ij.Influence(loss, PARAMS, ij.Identity(PARAMS))
    data = {"x": made(X), "y": Y}
    for name, call in {
        "train: leaf 'x'": lambda: scores(train=data),
        "query: leaf 'x'": lambda: influence.influences(data, DATA),
        "data: leaf 'x'": lambda: ij.GGN(OBJECTIVE, PARAMS, data),
        "loader: leaf 'x'": lambda: ij.stream.scores(influence, DATA, data, progress=False),
        "params: leaf 'w'": lambda: scores({"w": made(W)}),
        "weights": lambda: ij.GGN(OBJECTIVE, PARAMS, DATA, weights=made(ONES)),
        "constants: leaf 'scale'": lambda: ij.Objective(OBJECTIVE.predict, loss, constants={"scale": made(W)}),
        "v: leaf 'w'": lambda: ij.GGN(OBJECTIVE, PARAMS, DATA).mv({"w": made(W)}),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}.*({words})"):
            call()


@pytest.mark.parametrize("given", SPARSE)
def test_sparse_arrays_of_jax(given):
    """They are trees of their parts, which are as long as each other: none is an array of examples."""
    for call in (lambda: scores(train={"x": given, "y": Y}), lambda: ij.Hessian(loss, PARAMS, {"x": given})):
        with pytest.raises(TypeError, match=r"(train|data): leaf 'x': got a sparse BC.*\.todense\(\)"):
            call()
    with pytest.raises(TypeError, match=r"params: leaf 'w': got a sparse"):
        ij.Identity({"w": given})
    constant = ij.Objective(lambda p, z, c: c @ p["w"], lambda out, z: jnp.sum(out), constants=SPARSE[0])
    assert relative_error(constant(PARAMS, {}), np.sum(X @ W)) < 1e-12


def test_masks_of_numpy_are_not_dropped_elsewhere():
    masks = np.ma.masked_array(np.ones((2, 6), bool), np.eye(2, 6, dtype=bool))
    train = ij.retrain.training(loss, optax.sgd(0.1), PARAMS, DATA, epochs=1)
    with pytest.raises(TypeError, match="masks: got a masked array with 2 masked entries"):
        ij.retrain.retrain(train, masks, jax.random.key(0))
    with pytest.raises(TypeError, match="scores: got a masked array"):
        ij.metrics.predicted_changes(hidden(RIGHT), np.asarray(masks), removal="mean")
    with pytest.raises(TypeError, match=r"v: leaf 'w': got a .*Array of other.float64, expected an array of JAX"):
        ij.Identity(PARAMS).mv({"w": Array(W)})


def test_rows_of_several_lengths():
    ragged = np.array([np.ones(2), np.ones(3)], dtype=object)
    with pytest.raises(TypeError, match=r"train: leaf 'x' has dtype object.*padded"):
        scores(train={"x": ragged, "y": Y[:2]})
