"""What a loader may hold, and what it may not do: keys, mappings, masks that are infinite; another order each time."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import influence_jax as ij
from influence_jax.store import GradientStore, ScoreStore

N = 10
DRAW = np.random.default_rng(0)
PARAMS = {"w": DRAW.normal(size=3)}
DATA = {"x": DRAW.normal(size=(N, 3)), "y": DRAW.normal(size=N)}
KEYS = jax.random.split(jax.random.key(0), N)
KINDS = {"typed": KEYS, "raw": np.asarray(jax.random.key_data(KEYS))}


def part(data, i, j):
    return jax.tree.map(lambda x: x[i:j], data)


def cut(data, *ends):
    return [part(data, i, j) for i, j in zip((0, *ends), ends, strict=False)]


def noisy(params, z):
    key = z["key"] if jnp.issubdtype(z["key"].dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(z["key"])
    return ((z["x"] + jax.random.normal(key, (3,), z["x"].dtype)) @ params["w"] - z["y"]) ** 2


def squared(params, z):
    return 0.5 * (z["x"] @ params["w"] - z["y"]) ** 2


def influence(loss=squared):
    return ij.Influence(loss, PARAMS, ij.Identity(PARAMS))


class TestKeys:
    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_of_noisy_losses(self, kind, tmp_path):
        """Against the noise drawn one by one, in ragged batches, cut ones, and from a store."""
        data = {**DATA, "key": KINDS[kind]}
        x = DATA["x"] + np.stack([np.asarray(jax.random.normal(key, (3,), np.float64)) for key in KEYS])
        grads = 2 * (x @ PARAMS["w"] - DATA["y"])[:, None] * x
        expected = grads[:2] @ grads.T
        query, loaders = part(data, 0, 2), [(cut(data, 4, 8, 10), None), (cut(data, 7, 10), 4), (data, 4)]
        for loader, size in loaders:
            options = {"batch_size": size, "progress": False}
            assert relative_error(ij.stream.scores(influence(noisy), query, loader, **options), expected) < 1e-12
        found = ij.stream.top_k(influence(noisy), query, loaders[1][0], 3, batch_size=4, progress=False)
        np.testing.assert_array_equal(found.indices, np.argsort(-expected, axis=1)[:, :3])
        for _ in range(2):
            store = ScoreStore.create(tmp_path / "s")
            ij.stream.scores(influence(noisy), query, loaders[0][0], store, progress=False)
            assert relative_error(np.asarray(store), expected) < 1e-12
        other = {**data, "key": data["key"][::-1]}
        with pytest.raises(ValueError, match=r"query: .* in the store|examples 0 to 4 are not those"):
            ij.stream.scores(
                influence(noisy), query, cut(other, 4, 8, 10), ScoreStore.create(tmp_path / "s"), progress=False
            )

    def test_fits_and_sums(self, tmp_path):
        data = {**DATA, "key": KEYS}
        loader = cut(data, 4, 8, 10)
        whole = influence(noisy)
        own = ij.stream.self_influences(whole, loader, progress=False)
        assert relative_error(own, whole.self_influences(data)) < 1e-12
        inverse = ij.stream.invert(ij.Hessian, noisy, PARAMS, loader, ij.CG(1.0), progress=False)
        expected = ij.invert(ij.Hessian(noisy, PARAMS, data), ij.CG(1.0)).mv(PARAMS)
        assert relative_error(inverse.mv(PARAMS)["w"], expected["w"]) < 1e-6
        fitted = ij.stream.ekfac(noisy, PARAMS, loader, labels="empirical", progress=False)
        there = ij.ekfac(noisy, PARAMS, data, labels="empirical")
        assert relative_error(fitted.mv(PARAMS)["w"], there.mv(PARAMS)["w"]) < 1e-12
        mean = ij.stream.accumulate(lambda b: jnp.mean(jax.vmap(noisy, (None, 0))(PARAMS, b)), loader, progress=False)
        assert relative_error(mean, jnp.mean(jax.vmap(noisy, (None, 0))(PARAMS, data))) < 1e-12
        projection = ij.projections.rademacher(PARAMS, 2, jax.random.key(0))
        store = ij.stream.gradients(
            noisy, PARAMS, loader, projection, GradientStore.create(tmp_path / "g"), progress=False
        )
        rows = projection.project(ij.per_example_grads(noisy, PARAMS, data))
        assert relative_error(np.asarray(store), rows) < 1e-12


class Tensor:
    """An array of another framework, as far as NumPy and slices know it."""

    def __init__(self, entries):
        self.entries, self.shape, self.dtype = entries, entries.shape, "of the other framework"

    def __array__(self, dtype=None, copy=None):
        return self.entries if dtype is None else self.entries.astype(dtype)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        return Tensor(self.entries[key])


class Ids(collections.UserDict):
    """As tokenizers return."""


class TestMappings:
    @pytest.mark.parametrize("foreign", [False, True])
    def test_of_other_kinds_are_dicts(self, foreign):
        given = {name: Tensor(leaf) for name, leaf in DATA.items()} if foreign else DATA
        expected = influence().influences(part(DATA, 0, 2), DATA)
        for wrapped in (Ids(given), collections.ChainMap(dict(given))):
            for loader, size in (([Ids(part(given, 0, 6)), Ids(part(given, 6, N))], None), (wrapped, 4)):
                scores = ij.stream.scores(influence(), part(DATA, 0, 2), loader, progress=False, batch_size=size)
                assert relative_error(scores, expected) < 1e-12

    def test_within_others(self):
        nested = {"z": Ids(x=DATA["x"]), "y": DATA["y"]}
        loss = lambda params, z: squared(params, {"x": z["z"]["x"], "y": z["y"]})
        query = {"z": Ids(x=DATA["x"][:2]), "y": DATA["y"][:2]}
        scores = ij.stream.scores(influence(loss), query, [nested], progress=False)
        assert relative_error(scores, influence().influences(part(DATA, 0, 2), DATA)) < 1e-12

    def test_lists_in_them_are_told(self):
        with pytest.raises(TypeError, match=r"loader: leaf 'x/0' is a int, expected an array .* numpy\.asarray"):
            ij.stream.scores(influence(), part(DATA, 0, 2), Ids(x=[1, 2]), progress=False)


def masked(params, z):
    scores = jnp.where(jnp.arange(3) < 2, params["w"], 0) + z["bias"]
    return (jax.nn.softmax(scores) @ jnp.nan_to_num(z["x"]) - z["y"]) ** 2


def test_inputs_are_not_judged(tmp_path):
    """A mask of minus infinity and a NaN that the model leaves out are data, wherever a loader is read."""
    data = {**DATA, "x": DATA["x"].copy(), "bias": np.where(np.arange(3) == 2, -np.inf, np.zeros((N, 3)))}
    data["x"][3, 1] = np.nan
    clean = {**data, "x": np.nan_to_num(data["x"]), "bias": np.where(np.arange(3) == 2, -1e9, np.zeros((N, 3)))}
    query, expected = part(data, 0, 2), influence(masked).influences(part(clean, 0, 2), clean)
    store = ScoreStore.create(tmp_path / "s")
    ij.stream.scores(influence(masked), query, cut(data, 4, 8, 10), store, progress=False)
    assert relative_error(np.asarray(store), expected) < 1e-12
    inverse = ij.stream.invert(ij.Hessian, masked, PARAMS, cut(data, 4, 10), ij.CG(5.0), progress=False)
    there = ij.invert(ij.Hessian(masked, PARAMS, clean), ij.CG(5.0)).mv(PARAMS)
    assert relative_error(inverse.mv(PARAMS)["w"], there["w"]) < 1e-6


class Shuffling:
    def __init__(self, size):
        self.draw, self.size = np.random.default_rng(1), size

    def __iter__(self):
        order = self.draw.permutation(N)
        shuffled = jax.tree.map(lambda x: x[order], DATA)
        return iter(cut(shuffled, *range(self.size, N, self.size), N))


def augmented():
    yield {**DATA, "x": DATA["x"] + DRAW.normal(size=(N, 3))}


SHUFFLED = {
    "object": lambda: Shuffling(4),
    "one batch": lambda: Shuffling(N),
    "function": lambda: Shuffling(3).__iter__,
    "augmentation": lambda: augmented,
}
WORDS = r"its first examples are not those of an earlier pass; .* shuffle=False"
QUERY = part(DATA, 0, 2)
READERS = {
    "scores": lambda loader: ij.stream.scores(influence(), QUERY, loader, progress=False),
    "scores, cut": lambda loader: ij.stream.scores(influence(), QUERY, loader, progress=False, batch_size=2),
    "queries": lambda loader: ij.stream.scores(influence(), loader, [DATA], progress=False),
    "top_k": lambda loader: ij.stream.top_k(influence(), QUERY, loader, 2, progress=False, batch_size=5),
    "self_influences": lambda loader: ij.stream.self_influences(influence(), loader, progress=False),
    "factors": lambda loader: ij.stream.influence_factors(influence(), loader, progress=False),
    "accumulate": lambda loader: ij.stream.accumulate(lambda b: b["y"].mean(), loader, progress=False),
    "kfac": lambda loader: ij.stream.kfac(squared, PARAMS, loader, labels="empirical", progress=False),
    "invert": lambda loader: ij.stream.invert(ij.Hessian, squared, PARAMS, loader, ij.Direct(1.0), progress=False),
    "compute_influences": lambda loader: ij.compute_influences(
        squared, PARAMS, DATA, input_data=loader, hessian_regularization=1.0, progress=False
    ),
    "training_data": lambda loader: ij.compute_influence_factors(
        squared, PARAMS, loader, QUERY, "direct", hessian_perturbation=1.0, progress=False
    ),
}


class TestOrder:
    @pytest.mark.parametrize("reader", READERS)
    def test_one_pass_is_enough_to_find_a_loader_that_shuffles(self, reader):
        with pytest.raises(ValueError, match=WORDS):
            READERS[reader](SHUFFLED["object"]())

    @pytest.mark.parametrize("name", SHUFFLED)
    def test_shuffling_of_every_kind(self, name, tmp_path):
        with pytest.raises(ValueError, match=WORDS):
            READERS["scores"](SHUFFLED[name]())
        store = ScoreStore.create(tmp_path / "s")
        with pytest.raises(ValueError, match=WORDS):
            ij.stream.scores(influence(), QUERY, SHUFFLED[name](), store, progress=False, batch_size=5)
        assert not store.path.exists() or not store.complete

    def test_empty_batches_in_front_do_not_count(self):
        loader = [part(DATA, 0, 0), *cut(DATA, 4, 10), part(DATA, 0, 0)]
        expected = influence().influences(QUERY, DATA)
        assert relative_error(ij.stream.scores(influence(), QUERY, loader, progress=False), expected) < 1e-12

    def test_batches_padded_each_to_its_own_length(self):
        ids = lambda n, t: {"ids": np.ones((n, t), np.int32), "y": np.ones(n)}
        with pytest.raises(
            ValueError, match=r"leaf 'ids' of an example has shape \(9,\) after \(6,\).* pad .* to one length"
        ):
            ij.stream.scores(influence(), QUERY, [ids(2, 6), ids(2, 9)], progress=False)

    def test_an_empty_query_is_told(self):
        with pytest.raises(ValueError, match="query: got no examples"):
            ij.stream.scores(influence(), part(DATA, 0, 0), [DATA], progress=False)


class ShufflingBehind(Shuffling):
    """The first batch stays where it is."""

    def __iter__(self):
        order = np.concatenate([np.arange(self.size), self.size + self.draw.permutation(N - self.size)])
        return iter(cut(jax.tree.map(lambda x: x[order], DATA), *range(self.size, N, self.size), N))


def test_what_shuffles_behind_its_first_batch_is_refused_where_it_is_read_again():
    with pytest.raises(ValueError, match=r"its examples in batch [12] are not those of an earlier pass"):
        ij.stream.ekfac(squared, PARAMS, ShufflingBehind(4), labels="empirical", progress=False)
