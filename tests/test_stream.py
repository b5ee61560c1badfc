"""Data that come in batches: the same numbers as in memory, from any loader, to memory or to a store."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import influence_jax as ij
from influence_jax._pytree import dataclass
from influence_jax.stream.loaders import Blocks

REPOSITORY = pathlib.Path(__file__).parent.parent
N, Q, INPUTS, HIDDEN, CLASSES = 103, 7, 6, 5, 3


def predict(params, example):
    return jnp.tanh(example["x"] @ params["in"]) @ params["out"] + params["bias"]


def loss(output, example):
    return jax.nn.logsumexp(output) - output[example["y"]]


OBJECTIVE = ij.Objective(predict, loss)
KEY = jax.random.key(0)


@functools.cache
def problem():
    draw = np.random.default_rng(0)
    shapes = {"in": (INPUTS, HIDDEN), "out": (HIDDEN, CLASSES), "bias": (CLASSES,)}
    params = {name: 0.5 * draw.normal(size=shape) for name, shape in shapes.items()}
    data = {"x": draw.normal(size=(N, INPUTS)), "y": draw.integers(0, CLASSES, N)}
    return params, data, jax.tree.map(lambda x: x[:Q], data)


def cut(data, size):
    return [jax.tree.map(lambda x, i=i: x[i : i + size], data) for i in range(0, len(data["y"]), size)]


@functools.cache
def influence():
    params, data, _ = problem()
    return ij.Influence(OBJECTIVE, params, ij.invert(ij.GGN(OBJECTIVE, params, data), ij.Direct(0.1)))


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
            (lambda data: [{**data, "x": data["x"] * np.nan}], ValueError, "leaf 'x' holds .* NaN"),
            (lambda data: [{**data, "y": data["y"][:-1]}], ValueError, "leaves disagree in length"),
        ],
        ids=["iterator", "empty", "number", "function of no iterator", "leaves", "shapes", "nan", "lengths"],
    )
    def test_loaders(self, loader, kind, says):
        _, data, query = problem()
        with pytest.raises(kind, match=says):
            ij.stream.scores(influence(), query, loader(data))

    def test_a_loader_that_is_exhausted(self):
        _, data, query = problem()
        items = iter(cut(data, 20))
        with pytest.raises(ValueError, match=r"is empty, expected|in an earlier one"):
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


def regularised(*arguments):
    return ij.Hessian(*arguments) + 0.5 * ij.Identity(arguments[1])


SOLVERS = {
    "CG": ij.CG(1.0, rtol=1e-12),
    "preconditioned CG": ij.CG(1.0, rtol=1e-12, preconditioner=ij.Nystrom(1.0, rank=8)),
    "BlockCG": ij.BlockCG(1.0, rtol=1e-12),
    "LiSSA": ij.LiSSA(1.0, rtol=1e-12),
    "Arnoldi": ij.Arnoldi(1.0, rank=8),
    "Nystrom": ij.Nystrom(1.0, rank=8),
    "Direct": ij.Direct(1.0),
    "Eigh": ij.Eigh(ij.RelativeDamping(1.0)),
    "Blockwise": ij.Blockwise(
        {"in": ij.BlockCG(1.0, rtol=1e-12), "out": ij.Direct(2.0)}, {"in": ["in"], "out": ["out", "bias"]}
    ),
}


class TestInverses:
    """A solver reading a loader runs the recurrence that it runs in memory."""

    @pytest.mark.parametrize("name", SOLVERS)
    def test_solutions_are_those_in_memory(self, name):
        self.check(ij.GGN, SOLVERS[name])

    @pytest.mark.parametrize(
        "curvature",
        [ij.Hessian, ij.EmpiricalFisher, functools.partial(ij.GGN, chunk=8), regularised],
        ids=["Hessian", "EmpiricalFisher", "partial", "sum"],
    )
    def test_every_curvature(self, curvature):
        self.check(curvature, SOLVERS["BlockCG"])

    def check(self, curvature, solver):
        params, data, query = problem()
        V = ij.per_example_grads(OBJECTIVE, params, query)
        expected, told = ij.invert(curvature(OBJECTIVE, params, data), solver, key=KEY).solve_many(V)
        inverse = ij.stream.invert(curvature, OBJECTIVE, params, cut(data, 20), solver, key=KEY)
        found, info = inverse.solve_many(V)
        assert relative_error(ij.flatten(found, params), ij.flatten(expected, params)) < 1e-9
        np.testing.assert_array_equal(info.converged, told.converged)
        np.testing.assert_array_equal(info.steps, told.steps)

    def test_all_right_hand_sides_share_a_pass(self):
        params, data, query = problem()
        passes = []

        class Counted:
            def __iter__(self):
                passes.append(None)
                return iter(cut(data, 20))

        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, Counted(), ij.CG(1.0))
        passes.clear()
        info = inverse.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[1]
        assert len(passes) == int(info.steps.max()) + 1  # the residual takes one

    def test_an_inverse_that_is_all_arrays_is_compiled(self):
        params, data, query = problem()
        for solver in (ij.Direct(0.1), ij.Nystrom(0.1, rank=8)):
            inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), solver, key=KEY)
            scores = ij.Influence(OBJECTIVE, params, inverse).influences
            assert relative_error(jax.jit(scores)(query, data), scores(query, data)) < 1e-12
        info = inverse.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[1]
        assert np.isnan(info.residual).all()  # nobody has read the data for it
        with pytest.raises(ValueError, match=r"RelativeDamping .* read once"):
            inverse.with_damping(ij.RelativeDamping(0.1))

    def test_influence_takes_an_inverse_that_reads_a_loader(self):
        params, data, query = problem()
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), ij.BlockCG(0.1, rtol=1e-12))
        streamed = ij.Influence(OBJECTIVE, params, inverse)
        assert relative_error(streamed.influences(query, data), influence().influences(query, data)) < 1e-9
        assert relative_error(streamed.influences(data, query), influence().influences(data, query)) < 1e-9
        expected = influence().self_influences(query)
        assert relative_error(streamed.self_influences(query), expected) < 1e-9
        assert relative_error(ij.stream.self_influences(streamed, query), expected) < 1e-9
        swept = inverse.with_damping(1.0).solve_many(ij.per_example_grads(OBJECTIVE, params, query))[0]
        direct = ij.invert(ij.GGN(OBJECTIVE, params, data), ij.Direct(1.0))
        expected = direct.solve_many(ij.per_example_grads(OBJECTIVE, params, query))[0]
        assert relative_error(ij.flatten(swept, params), ij.flatten(expected, params)) < 1e-9

    def test_bounds_of_an_inverse_that_reads_a_loader(self):
        params, data, query = problem()
        solver = ij.BlockCG(0.1, rtol=1e-2)
        inverse = ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(data, 20), solver)
        streamed = ij.score_bounds(ij.Influence(OBJECTIVE, params, inverse), query, data)
        memory = ij.Influence(OBJECTIVE, params, ij.invert(ij.GGN(OBJECTIVE, params, data), solver))
        for got, expected in zip(streamed[:2], ij.score_bounds(memory, query, data)[:2], strict=True):
            assert relative_error(got, expected) < 1e-6
        with pytest.raises(TypeError, match="preconditioner: got an Inverse that reads its data from a loader"):
            ij.invert(ij.GGN(OBJECTIVE, params, data), ij.CG(0.1, preconditioner=inverse))

    @pytest.mark.parametrize("solver", [ij.Direct(0.1), ij.BlockCG(0.1, rtol=1e-12)], ids=["direct", "block_cg"])
    def test_batches_without_weight(self, solver):
        params, data, _ = problem()
        weights = np.where(np.arange(N) // 20 == 2, 0.0, 1.0)
        weighted = lambda objective, params, batch: ij.GGN(objective, params, batch, weights=batch["w"])
        loader = cut({**data, "w": weights}, 20)
        x = ij.stream.invert(weighted, OBJECTIVE, params, loader, solver).solve(params)[0]
        expected = ij.invert(ij.GGN(OBJECTIVE, params, data, weights=weights), ij.Direct(0.1)).solve(params)[0]
        assert relative_error(ij.flatten(x, params), ij.flatten(expected, params)) < 1e-9
        # Of a Hessian some may be negative, and those of a batch cancel though the batch counts.
        weights = np.where(np.arange(N) == 5, -19.0, 1.0)
        hessian = lambda objective, params, batch: ij.Hessian(objective, params, batch, weights=batch["w"])
        op = ij.stream.operator(hessian, OBJECTIVE, params, Blocks(cut({**data, "w": weights}, 20), "loader"))
        expected = ij.to_dense(ij.Hessian(OBJECTIVE, params, data, weights=weights))
        assert relative_error(ij.to_dense(op), expected) < 1e-12
        loader = cut({**data, "w": 0 * weights}, 20)
        with pytest.raises(ValueError, match="weights: those of all batches of loader sum to 0"):
            ij.stream.invert(weighted, OBJECTIVE, params, loader, solver).solve(params)

    def test_fisher_draws_other_labels_in_every_batch(self):
        params, data, _ = problem()
        same = [jax.tree.map(lambda x: x[:20], data)] * 2
        op = ij.stream.operator(functools.partial(ij.Fisher, key=KEY), OBJECTIVE, params, Blocks(same, "loader"))
        (first, _), (second, _) = op.parts()
        v = jax.tree.map(jnp.ones_like, params)
        assert relative_error(first.mv(v)["in"], second.mv(v)["in"]) > 1e-3
        whole = ij.Fisher(OBJECTIVE, params, jax.tree.map(lambda *x: np.concatenate(x), *same), key=KEY)
        assert relative_error(op.mv(v)["in"], whole.mv(v)["in"]) < 1e-12  # by place, whatever the batches

    def test_a_curvature_of_ones_own(self):
        """An operator that knows nothing of weights meets the last batch at its own length."""
        params, data, _ = problem()

        def scatter(objective, params, batch):
            assert len(batch["y"]) in (20, 3)
            mean = jnp.mean(jnp.asarray(batch["x"]) ** 2)
            return Own(jax.tree.map(jnp.asarray, params), mean)

        op = ij.stream.operator(scatter, OBJECTIVE, params, Blocks(cut(data, 20), "loader"))
        v = jax.tree.map(jnp.ones_like, params)
        assert relative_error(op.mv(v)["bias"][0], np.mean(data["x"] ** 2)) < 1e-12

    def test_spectrum(self):
        params, data, _ = problem()
        op = ij.stream.operator(ij.GGN, OBJECTIVE, params, Blocks(cut(data, 20), "loader"))
        found = ij.spectrum(op, 10, key=KEY)
        assert relative_error(found.values, ij.spectrum(ij.GGN(OBJECTIVE, params, data), 10, key=KEY).values) < 1e-9


@dataclass
class Own(ij.LinearOperator):
    params: dict
    scale: jax.Array

    def mv(self, v):
        return jax.tree.map(lambda x: self.scale * x, v)

    @property
    def space(self):
        return self.params


class TestKronecker:
    @pytest.mark.parametrize("labels", ["exact", "empirical", "sampled"])
    @pytest.mark.parametrize(("fit", "streamed"), [(ij.kfac, ij.stream.kfac), (ij.ekfac, ij.stream.ekfac)])
    def test_fits_are_those_in_memory(self, fit, streamed, labels):
        params, data, query = problem()
        V = ij.per_example_grads(OBJECTIVE, params, query)
        expected = fit(OBJECTIVE, params, data, labels=labels, key=KEY).mm(V)
        found = streamed(OBJECTIVE, params, cut(data, 20), labels=labels, key=KEY).mm(V)
        assert relative_error(ij.flatten(found, params), ij.flatten(expected, params)) < 1e-10

    def test_invert_takes_it_as_curvature(self):
        params, data, query = problem()
        curvature = functools.partial(ij.ekfac, labels="empirical")
        inverse = ij.stream.invert(curvature, OBJECTIVE, params, cut(data, 20), ij.Direct(ij.RelativeDamping(0.1)))
        in_memory = ij.invert(curvature(OBJECTIVE, params, data), ij.Direct(ij.RelativeDamping(0.1)))
        V = ij.per_example_grads(OBJECTIVE, params, query)
        assert relative_error(inverse.solve_many(V)[0]["in"], in_memory.solve_many(V)[0]["in"]) < 1e-9


class TestStores:
    def scores(self, path, loader=None, query=None):
        _, data, whole = problem()
        query = cut(whole, 3) if query is None else query
        return ij.stream.scores(
            influence(), query, cut(data, 20) if loader is None else loader, ij.store.ScoreStore.create(path)
        )

    def test_it_holds_the_scores(self, tmp_path):
        _, data, query = problem()
        store = self.scores(tmp_path / "scores")
        assert store.complete
        np.testing.assert_array_equal(
            np.asarray(store), np.asarray(ij.stream.scores(influence(), cut(query, 3), cut(data, 20)))
        )
        manifest = ij.store.ScoreStore.open(tmp_path / "scores").manifest
        assert manifest["solver"] == "Direct(damping=0.1)"
        assert manifest["examples"] == N

    def test_interrupted_it_continues(self, tmp_path):
        _, data, _ = problem()
        whole = np.asarray(self.scores(tmp_path / "whole"))

        def broken():
            yield from cut(data, 20)[:4]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.scores(tmp_path / "scores", broken)
        read = []

        def counted():
            read.append(None)
            return iter(cut(data, 20))

        store = self.scores(tmp_path / "scores", counted)
        np.testing.assert_array_equal(np.asarray(store), whole)
        written = (tmp_path / "scores" / "ledger-0.jsonl").read_text().count('"entries"')
        assert written == 3 * 6  # each chunk once

    def test_other_data_are_refused(self, tmp_path):
        _, data, query = problem()
        self.scores(tmp_path / "scores")
        swapped = jax.tree.map(lambda x: np.concatenate([x[:20], x[20:40][::-1], x[40:]]), data)
        with pytest.raises(ValueError, match=r"loader: examples 20 to 40 are not those .* same order"):
            self.scores(tmp_path / "scores", cut(swapped, 20))
        with pytest.raises(ValueError, match=r"query: .* in the store"):
            self.scores(tmp_path / "scores", query=cut(jax.tree.map(lambda x: x + x, query), 3))
        params, *_ = problem()
        moved = ij.Influence(OBJECTIVE, jax.tree.map(lambda x: x + 1e-9, params), influence().inverse)
        with pytest.raises(ValueError, match=r"params: .* in the store"):
            ij.stream.scores(moved, cut(query, 3), cut(data, 20), ij.store.ScoreStore.create(tmp_path / "scores"))

    def test_data_that_grew_and_shrank(self, tmp_path):
        """Examples that came after those of before are added, from the middle of a chunk too; fewer are refused."""
        _, data, _ = problem()
        first = lambda count: cut(jax.tree.map(lambda x: x[:count], data), 10)
        self.scores(tmp_path / "scores", first(47))

        def broken():
            yield from first(N)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.scores(tmp_path / "scores", broken)
        assert ij.store.ScoreStore.open(tmp_path / "scores").shape[1] > 47
        assert not ij.store.ScoreStore.open(tmp_path / "scores").complete
        store = self.scores(tmp_path / "scores", first(N))
        assert store.complete
        np.testing.assert_array_equal(np.asarray(store), np.asarray(self.scores(tmp_path / "whole", first(N))))
        np.testing.assert_array_equal(store[:, 35:50], np.asarray(store)[:, 35:50])
        with pytest.raises(ValueError, match=r"examples: got 60, but .* holds scores of 103; give the data of before"):
            self.scores(tmp_path / "scores", first(60))
        with pytest.raises(ValueError, match=r"train_rows: 10 in the store, 30 now.*, batch_size among them"):
            self.scores(tmp_path / "scores", cut(data, 30))

    def test_another_computation_is_refused(self, tmp_path):
        """Whatever it differs in: data of the fit, keys, what functions close over."""
        params, data, query = problem()

        def stored(path, inverse, objective=OBJECTIVE):
            made = ij.Influence(objective, params, inverse)
            ij.stream.scores(made, query, cut(data, 20), ij.store.ScoreStore.create(tmp_path / path))

        half = jax.tree.map(lambda x: x[: N // 2], data)
        fits = [ij.invert(ij.ekfac(OBJECTIVE, params, part), ij.Direct(0.1)) for part in (data, half)]
        keys = [
            ij.invert(ij.GGN(OBJECTIVE, params, data), ij.Nystrom(0.1, rank=2), key=jax.random.key(k)) for k in (0, 1)
        ]
        loaders = [ij.stream.invert(ij.GGN, OBJECTIVE, params, cut(part, 7), ij.CG(0.1)) for part in (data, half)]
        loaders[1] = ij.stream.invert(
            ij.GGN, OBJECTIVE, params, cut(jax.tree.map(lambda x: x[7:], data), 7), ij.CG(0.1)
        )
        for name, (one, other) in {"fit": fits, "key": keys, "loader": loaders}.items():
            stored(name, one)
            stored(name, one)
            with pytest.raises(ValueError, match=r"inverse: .* in the store"):
                stored(name, other)
        losses = [ij.Objective(predict, lambda out, z, scale=scale: scale * loss(out, z)) for scale in (1.0, 2.0)]
        stored("losses", fits[0], losses[0])
        with pytest.raises(ValueError, match=r"losses: .* in the store"):
            stored("losses", fits[0], losses[1])

    def test_what_is_not_finite_is_not_kept(self, tmp_path):
        params, data, query = problem()
        inverse = ij.Diagonal(jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), params))
        broken = ij.Influence(OBJECTIVE, params, inverse)
        with pytest.raises(ValueError, match="scores: those of 20 examples are NaN"):
            ij.stream.scores(broken, query, cut(data, 20), ij.store.ScoreStore.create(tmp_path / "scores"))

    def test_stores_of_another_kind(self, tmp_path):
        _, data, query = problem()
        for sink in (ij.store.GradientStore.create(tmp_path / "x"), ij.store.ScoreStore):
            with pytest.raises(TypeError, match=r"sink: got .* influence_jax\.store\.ScoreStore\.create"):
                ij.stream.scores(influence(), query, cut(data, 20), sink)

    def test_a_damaged_chunk_is_computed_again(self, tmp_path):
        whole = np.asarray(self.scores(tmp_path / "scores"))
        chunk = tmp_path / "scores" / "scores" / "c" / "1" / "2"
        chunk.write_bytes(chunk.read_bytes()[:-7])
        with pytest.raises(ValueError, match="run the same command again"):
            np.asarray(ij.store.ScoreStore.open(tmp_path / "scores"))
        np.testing.assert_array_equal(np.asarray(self.scores(tmp_path / "scores")), whole)

    def test_self_influences(self, tmp_path):
        _, data, _ = problem()
        store = ij.stream.self_influences(influence(), cut(data, 20), ij.store.ScoreStore.create(tmp_path / "own"))
        np.testing.assert_array_equal(np.asarray(store)[0], ij.stream.self_influences(influence(), cut(data, 20)))

    def test_projected_gradients(self, tmp_path):
        params, data, query = problem()
        projection = ij.projections.rademacher(params, 16, KEY)
        store = ij.store.GradientStore.create(tmp_path / "gradients")
        ij.stream.gradients(OBJECTIVE, params, cut(data, 20), projection, store)
        factors = influence().influence_factors(query)
        grads = ij.per_example_grads(OBJECTIVE, params, data)
        expected = np.asarray(projection.project(factors)) @ np.asarray(projection.project(grads)).T
        assert relative_error(store.scores(factors, projection), expected) < 1e-10

    def test_kills(self):
        """Killed at any moment, the same command continues, and ends with the same bits."""
        script = REPOSITORY / "benchmarks" / "kills.py"
        subprocess.run([sys.executable, str(script), "--kills", "5", "--seconds", "240"], check=True, timeout=600)


class TestShares:
    def test_one_process_reads_everything(self):
        _, data, query = problem()
        loader = ij.stream.share(data, batch_size=20)
        assert relative_error(ij.stream.scores(influence(), query, loader), influence().influences(query, data)) < 1e-12
