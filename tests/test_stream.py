"""Data that come in batches: the same scores as in memory, from any loader, and mistakes told in words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import OBJECTIVE, N, Q, cut, influence, problem
from helpers import relative_error

import influence_jax as ij
from influence_jax.stream.loaders import Blocks


class Sequence:
    """A loader as other frameworks have them: items on request, tensors that numpy can read, ragged at the end."""

    class Tensor:
        def __init__(self, values):
            self._values, self.shape, self.dtype = values, values.shape, values.dtype

        def __array__(self, dtype=None, copy=None):
            return self._values

    def __init__(self, data, size):
        self._batches = [jax.tree.map(self.Tensor, batch) for batch in cut(data, size)]

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return iter(self._batches)


class Reused:
    """A loader that fills the same arrays again and again."""

    def __init__(self, data, size):
        self._data, self._size = data, size

    def __iter__(self):
        held = jax.tree.map(lambda x: np.empty_like(x[: self._size]), self._data)
        for batch in cut(self._data, self._size):
            views = jax.tree.map(lambda whole, part: whole[: len(part)], held, batch)
            jax.tree.map(np.copyto, views, batch)
            yield views


def memory_mapped(data, folder):
    for name, leaf in data.items():
        np.save(folder / f"{name}.npy", leaf)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in data}


LOADERS = {
    "list": lambda data, _: cut(data, 20),
    "ragged": lambda data, _: [*cut(jax.tree.map(lambda x: x[:50], data), 7), jax.tree.map(lambda x: x[50:], data)],
    "function": lambda data, _: lambda: iter(cut(data, 20)),
    "tensors": lambda data, _: Sequence(data, 20),
    "arrays used again": lambda data, _: Reused(data, 20),
    "small arrays used again": lambda data, _: Reused(data, 3),
    "memory map": memory_mapped,
    "JAX arrays": lambda data, _: [jax.tree.map(jnp.asarray, batch) for batch in cut(data, 20)],
}


class TestLoaders:
    @pytest.mark.parametrize("name", LOADERS)
    def test_scores_are_those_in_memory(self, name, tmp_path):
        _, data, query = problem()
        loader = LOADERS[name](data, tmp_path)
        expected = influence().influences(query, data)
        scores = ij.stream.scores(influence(), query, loader)
        assert scores.shape == (Q, N)
        assert relative_error(scores, expected) < 1e-12
        again = ij.stream.scores(influence(), cut(query, 3), loader, batch_size=16)
        assert relative_error(again, expected) < 1e-12

    def test_top_k(self):
        _, data, query = problem()
        expected = influence().top_k(query, data, 9)
        for loader, size in ((cut(data, 20), None), (data, 8)):
            found = ij.stream.top_k(influence(), cut(query, 4), loader, 9, batch_size=size)
            np.testing.assert_array_equal(found.indices, expected.indices)
            assert relative_error(found.values, expected.values) < 1e-12

    def test_top_k_of_equal_scores_is_the_first(self):
        _, data, query = problem()
        same = jax.tree.map(lambda x: np.repeat(x[:1], 30, axis=0), data)
        found = ij.stream.top_k(influence(), query, cut(same, 7), 30)
        np.testing.assert_array_equal(found.indices, np.tile(np.arange(30), (Q, 1)))

    def test_self_influences_and_factors(self):
        _, data, query = problem()
        values = ij.stream.self_influences(influence(), cut(data, 20))
        assert relative_error(values, influence().self_influences(data)) < 1e-12
        factors = ij.stream.influence_factors(influence(), cut(query, 3))
        expected = influence().influence_factors(query)
        assert relative_error(factors["in"], expected["in"]) < 1e-12

    def test_a_second_pass_compiles_nothing(self, compilations):
        _, data, query = problem()
        ij.stream.scores(influence(), query, cut(data, 20))
        with compilations() as compiled:
            ij.stream.scores(influence(), query, cut(data, 20))
        assert compiled == []

    def test_batches_do_not_pile_up_on_the_device(self):
        params, data, query = problem()
        block = jax.tree.map(lambda x: x[:50], data)
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, [block], ij.BlockCG(0.1))
        streamed = inverse.op

        def most_alive(run, blocks):
            before, most = len(jax.live_arrays()), 0

            def loader():
                nonlocal most
                for _ in range(blocks):
                    most = max(most, len(jax.live_arrays()) - before)
                    yield block

            run(loader)
            return most

        for run in (
            lambda loader: ij.stream.top_k(influence(), query, loader, 5),
            lambda loader: ij.stream.ekfac(OBJECTIVE, params, loader),
            lambda loader: dataclasses.replace(streamed, source=Blocks(loader, "loader")).mv(params),
        ):
            run(lambda: iter([block]))
            assert most_alive(run, 60) <= most_alive(run, 6) + 5


class TestMistakes:
    @pytest.mark.parametrize(
        ("loader", "kind", "says"),
        [
            (lambda data: iter(cut(data, 20)), TypeError, "one-shot iterator .* lambda: generate"),
            (lambda data: [], ValueError, "loader: is empty"),
            (lambda data: 3, TypeError, "loader: got a int"),
            (lambda data: lambda: 3, TypeError, "returned a int, expected an iterator"),
            (lambda data: [data, {"x": data["x"]}], ValueError, "differ by more than their length"),
            (lambda data: [data, {**data, "x": data["x"][:, :2]}], ValueError, "differ by more than their length"),
            (lambda data: [{**data, "y": data["y"][:-1]}], ValueError, "leaves disagree in length"),
        ],
        ids=["iterator", "empty", "number", "function of no iterator", "leaves", "shapes", "lengths"],
    )
    def test_loaders(self, loader, kind, says):
        _, data, query = problem()
        with pytest.raises(kind, match=says):
            ij.stream.scores(influence(), query, loader(data))

    def test_a_loader_that_is_exhausted(self):
        _, data, query = problem()
        items = iter(cut(data, 20))
        with pytest.raises(ValueError, match=r"gave no batch when it was read again|not those of an earlier pass"):
            ij.stream.scores(influence(), cut(query, 3), lambda: items)

    def test_other_arguments(self):
        params, data, query = problem()
        loader = cut(data, 20)
        with pytest.raises(TypeError, match="influence: got a dict"):
            ij.stream.scores({}, query, loader)
        with pytest.raises(ValueError, match="batch_size: got 0"):
            ij.stream.scores(influence(), query, loader, batch_size=0)
        with pytest.raises(TypeError, match=r"sink: got .* influence_jax\.store\.ScoreStore\.create"):
            ij.stream.scores(influence(), query, loader, "scores")
        with pytest.raises(ValueError, match="k: got 104, expected between 1 and 103"):
            ij.stream.top_k(influence(), query, loader, 104)
        with pytest.raises(TypeError, match="sharding: got 'data'"):
            ij.stream.scores(influence(), query, loader, sharding="data")
        with pytest.raises(TypeError, match=r"curvature: got .* not called yet"):
            ij.stream.invert(ij.GGN(OBJECTIVE, params, data), OBJECTIVE, params, loader, ij.CG(0.1))
        with pytest.raises(TypeError, match="root"):
            ij.stream.invert(ij.GGN, OBJECTIVE, params, loader, ij.SampleSpace(0.1))

    def test_a_shuffled_loader(self):
        _, data, query = problem()
        draw = np.random.default_rng(1)

        def shuffled():
            order = draw.permutation(N)
            yield from cut(jax.tree.map(lambda x: x[order], data), 20)

        with pytest.raises(ValueError, match=r"not those of an earlier pass; .* shuffle=False"):
            ij.stream.scores(influence(), cut(query, 3), shuffled)

    def test_curvature_with_data_of_its_own(self):
        params, data, _ = problem()
        for size in (20, 7):
            fixed = ij.GGN(OBJECTIVE, params, jax.tree.map(lambda x, n=size: x[:n], data))
            with pytest.raises(ValueError, match=r"curvature: .* expected a function of the batch alone"):
                ij.stream.invert(lambda *a, c=fixed: ij.GGN(*a) + c, OBJECTIVE, params, cut(data, 20), ij.CG(0.1))

    def test_integers_that_do_not_fit(self, float32):
        params, data, query = jax.tree.map(lambda x: np.asarray(x, "f" if x.dtype.kind == "f" else "i8"), problem())
        identity = ij.Influence(OBJECTIVE, params, ij.Identity(params))
        with pytest.raises(TypeError, match="leaf 'y' holds integers beyond int32"):
            ij.stream.scores(identity, query, [{**data, "y": data["y"] + 2**40}])

    def test_layouts(self):
        _, data, query = problem()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        for spec in ((None, "data"), ("data", None), ()):
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            with pytest.raises(ValueError, match=r"sharding: .* the first axis"):
                ij.stream.scores(influence(), query, cut(data, 24), sharding=sharding)

    def test_inside_jit(self):
        params, data, query = problem()
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), ij.CG(0.1))
        with pytest.raises(TypeError, match="reads its data from a loader"):
            jax.jit(ij.Influence(OBJECTIVE, params, inverse).influences)(query, data)


class TestShares:
    def test_one_process_reads_everything(self):
        _, data, query = problem()
        loader = ij.stream.share(data, batch_size=20)
        assert relative_error(ij.stream.scores(influence(), query, loader), influence().influences(query, data)) < 1e-12
