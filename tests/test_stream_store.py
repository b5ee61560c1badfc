"""Data that come in batches, to a store: it continues where it was interrupted, and refuses what is not the same."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import KEY, OBJECTIVE, N, cut, influence, loss, predict, problem
from helpers import relative_error

import influence_jax as ij

REPOSITORY = pathlib.Path(__file__).parent.parent


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
        assert manifest["inverse"]["about"]["solver"] == "Direct(damping=0.1)"
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
        at = jax.tree.map(lambda x: x + 1e-9, problem()[0])
        moved = ij.Influence(OBJECTIVE, at, ij.invert(ij.GGN(OBJECTIVE, at, data), ij.Direct(0.1)))
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
        with pytest.raises(ValueError, match=r"objective: .* float64\[\] 1.0 in the store, float64\[\] 2.0 now"):
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
        assert relative_error(store.scores(factors, projection, params=params), expected) < 1e-10
        trained_on = jax.tree.map(lambda x: x * 1.001, params)
        with pytest.raises(ValueError, match="holds gradients at other parameters"):
            store.scores(factors, projection, params=trained_on)

    @pytest.mark.thorough
    def test_kills(self):
        """Killed at any moment, the same command continues, and ends with the same bits."""
        script = REPOSITORY / "benchmarks" / "kills.py"
        subprocess.run([sys.executable, str(script), "--kills", "5", "--seconds", "240"], check=True, timeout=600)
