"""Stores of projected gradients: scores from them are exact, they continue, and damage is found."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import CLASSIFICATION, random_like, relative_error
from projected import KEY, classifier, of_layers

import influence_jax as ij
from influence_jax.projections import gaussian, rademacher
from influence_jax.store.files import fingerprint
from influence_jax.store.gradients import GradientStore


def fill(path, projection, rows, *, params="none", train_rows=4, dtype=None, only=None):
    """Write rows to a store as a host loop would, and finish it unless only some blocks are wanted."""
    rows = np.asarray(rows).astype(jnp.dtype(dtype or rows.dtype))
    with GradientStore.create(path) as store:
        store.begin({"params": params}, projection=projection, train_rows=train_rows, dtype=rows.dtype)
        for block, start in enumerate(range(0, len(rows), train_rows)):
            if (only is None or block in only) and store.finished(block) != f"batch {block}":
                store.write(block, rows[start : start + train_rows], data=f"batch {block}")
        if only is None:
            store.finish(len(rows))
    return GradientStore.open(path)


@pytest.fixture
def stored(tmp_path):
    """A classifier, projected gradients of its 11 examples, and where to store them."""
    params, data = classifier(11)
    projection = rademacher(params, 16, KEY)
    return params, data, projection, projection.project_grads(CLASSIFICATION, params, data), tmp_path / "gradients"


class TestScoresFromAStore:
    @pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-15), ("float32", 1e-6), ("bfloat16", 2e-2)])
    @pytest.mark.parametrize("train_rows", [4, 11, 20])
    def test_are_inner_products(self, stored, dtype, rounding, train_rows):
        params, _, projection, rows, path = stored
        store = fill(path, projection, rows, dtype=dtype, train_rows=train_rows)
        vectors = random_like(KEY, params, 3)
        scores = store.scores(vectors, projection)
        expected = np.asarray(projection.project(vectors)) @ np.asarray(rows).T
        assert relative_error(scores, expected) < 10 * rounding
        held = np.asarray(store).astype(np.float64)
        assert relative_error(held, rows) < rounding
        assert relative_error(scores, np.asarray(projection.project(vectors)) @ held.T) < 1e-12
        top = store.top_k(vectors, projection, 5)
        assert np.array_equal(top.indices, np.argsort(-scores, axis=1, kind="stable")[:, :5])
        assert np.array_equal(top.values, np.take_along_axis(scores, top.indices, axis=1))

    def test_in_single_precision(self, stored, float32):
        params, data = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else np.asarray(x), stored[:2])
        projection = rademacher(params, 16, KEY)
        rows = projection.project_grads(CLASSIFICATION, params, data)
        store = fill(stored[4], projection, rows)
        scores = store.scores(ij.per_example_grads(CLASSIFICATION, params, data), projection, params=None)
        assert scores.dtype == np.float32
        assert relative_error(scores, np.float64(rows) @ np.float64(rows).T) < 1e-6
        inverse = store.inverse(1e-3)
        solved = inverse(rows)
        assert solved.dtype == jnp.float32
        moment = np.float64(rows).T @ np.float64(rows) / 11 + 1e-3 * np.eye(16)
        assert relative_error(solved, np.linalg.solve(moment, np.float64(rows).T).T) < 1e-3  # condition times rounding

    def test_ties_go_to_the_lower_index(self, stored):
        *_, projection, rows, path = stored
        store = fill(path, projection, jnp.ones_like(rows), train_rows=2)
        assert store.top_k(jnp.ones((1, 16)), None, 11).indices.tolist() == [list(range(11))]

    def test_through_an_orthogonal_map_are_influences(self, stored):
        """Long sides keep every entry, so scores are exact: of factors, of gradients, through a kernel, by layer."""
        params, data, *_, path = stored
        projection = of_layers(zoo.Case(CLASSIFICATION, params, data), 100)
        store = fill(path, projection, projection.project_grads(CLASSIFICATION, params, data))
        query = jax.tree.map(lambda x: x[:3], data)
        grads = ij.per_example_grads(CLASSIFICATION, params, query)
        fisher = ij.EmpiricalFisher(CLASSIFICATION, params, data)
        through = lambda inverse: ij.Influence(CLASSIFICATION, params, inverse)
        exact = through(ij.invert(fisher, ij.Direct(1e-2)))
        expected = exact.influences(query, data)
        assert relative_error(store.scores(exact.influence_factors(query), projection), expected) < 1e-10
        similar = through(ij.Identity(params)).influences(query, data)
        assert relative_error(store.scores(grads, projection), similar) < 1e-12
        inverse = store.inverse(0.3)
        assert (
            relative_error(store.scores(inverse.with_damping(1e-2)(store.project(grads, projection))), expected) < 1e-10
        )
        by_layer = through(ij.invert(fisher, ij.Blockwise(ij.Direct(1e-2), ij.by_layer))).influences(query, data)
        blocks = store.inverse(1e-2, by_layer=True)
        assert repr(blocks) == "ProjectedInverse(35 + 24, 11 examples, damping=0.01)"
        assert relative_error(store.scores(blocks(store.project(grads, projection))), by_layer) < 1e-10
        assert relative_error(by_layer, expected) > 1e-2

    def test_singular_systems_are_named(self, stored):
        *_, projection, rows, path = stored
        store = fill(path, projection, rows)
        with pytest.raises(ValueError, match=r"damping: with 0 the projected Fisher .* singular \(16 x 16 from 11 "):
            store.inverse(0)
        with pytest.raises(ValueError, match=r"damping: with 1e-18 .* singular .*raise the damping, e.g. to"):
            store.inverse(1e-18)
        with pytest.raises(ValueError, match="damping: got -1"):
            store.inverse(1.0).with_damping(-1)
        with pytest.raises(TypeError, match="damping: got None, expected a number"):
            store.inverse(None)
        few = rademacher(stored[0], 5, KEY)
        store = fill(path.parent / "few", few, rows[:, :5])
        moment = np.asarray(rows[:, :5].T @ rows[:, :5]) / 11
        assert relative_error(store.inverse(0)(jnp.eye(5)), np.linalg.inv(moment)) < 1e-10
        with pytest.raises(ValueError, match="every gradient in it is zero"):
            fill(path.parent / "zero", few, jnp.zeros((11, 5))).inverse(0)


class TestStoresContinueAndFindDamage:
    def test_on_disk_as_zarr(self, stored):
        *_, projection, rows, path = stored
        fill(path, projection, rows, dtype="float32")
        group = json.loads((path / "zarr.json").read_text())
        assert (group["zarr_format"], group["node_type"]) == (3, "group")
        array = json.loads((path / "gradients" / "zarr.json").read_text())
        assert array["shape"] == [11, 16]
        assert array["dimension_names"] == ["train", "projected"]
        assert array["chunk_grid"]["configuration"]["chunk_shape"] == [4, 16]
        assert [codec["name"] for codec in array["codecs"]] == ["bytes", "crc32c"]

    def test_continued(self, stored):
        """What is finished is not computed again; a store that is not complete says so."""
        *_, projection, rows, path = stored
        store = fill(path, projection, rows, only=[0, 2])
        assert not store.complete
        assert repr(store).endswith("11 x 16 float64, 2 of 3 chunks so far)")
        with pytest.raises(ValueError, match="gradients/c/1/0: this chunk is not finished; run the same command again"):
            np.asarray(store)
        with GradientStore.create(path) as store:
            store.begin({"params": "none"}, projection=projection, train_rows=4, dtype="float64")
            assert [store.finished(block) for block in range(4)] == ["batch 0", None, "batch 2", None]
            with pytest.raises(ValueError, match=r"examples: got 11, .* lack \[\(1, 0\)\]"):
                store.finish(11)
        store = fill(path, projection, rows)
        assert store.complete
        assert np.array_equal(store, rows)
        assert np.array_equal(fill(path, projection, rows), rows)  # nothing to do

    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another", "description"])
    def test_damage_is_refused_and_repaired(self, stored, damage):
        *_, projection, rows, path = stored
        fill(path, projection, rows)
        file = path / "gradients" / "c" / "1" / "0"
        content = bytearray(file.read_bytes())
        content[7] ^= 4
        if damage == "gone":
            file.unlink()
        elif damage == "description":
            (path / "gradients" / "zarr.json").write_text("{}")
        else:
            other = (path / "gradients" / "c" / "0" / "0").read_bytes()
            file.write_bytes({"flipped": bytes(content), "cut": content[:-9], "another": other}[damage])
        with pytest.raises(ValueError, match=r"missing|damaged|holds other gradients"):
            GradientStore.open(path).scores(jnp.ones((1, 16)))
        with GradientStore.create(path) as store:
            store.begin({"params": "none"}, projection=projection, train_rows=4, dtype="float64")
            assert (store.finished(1) is None) == (damage != "description")
            assert store.finished(0) == "batch 0"
        assert np.array_equal(fill(path, projection, rows), rows)

    def test_an_interrupted_ledger(self, stored):
        *_, projection, rows, path = stored
        fill(path, projection, rows)
        ledger = path / "ledger-0.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-5])
        with pytest.raises(ValueError, match="gradients/c/2/0: this chunk is not finished"):
            np.asarray(GradientStore.open(path))
        assert np.array_equal(fill(path, projection, rows), rows)

    def test_one_writer_at_a_time_and_several_processes(self, stored):
        *_, projection, rows, path = stored
        rows = np.asarray(rows)
        begin = lambda store, process: store.begin(
            {}, projection=projection, train_rows=4, dtype="float64", process=process
        )
        with GradientStore.create(path) as first, GradientStore.create(path) as second:
            begin(first, 0)
            with pytest.raises(BlockingIOError, match="is being written by"):
                begin(GradientStore.create(path), 0)
            begin(second, 1)
            second.write(1, rows[4:8], data="b")
            first.write(0, rows[:4], data="a")
            second.write(2, rows[8:], data="c")
            first.finish(11)
        assert np.array_equal(GradientStore.open(path), rows)

    def test_other_computations_are_refused(self, stored):
        params, _, projection, rows, path = stored
        fill(path, projection, rows, params=fingerprint(params))
        with pytest.raises(ValueError, match=r'another computation .*params: .* in the store, "other" now'):
            fill(path, projection, rows, params="other")
        with pytest.raises(ValueError, match="train_rows: 4 in the store, 5 now"):
            fill(path, projection, rows, params=fingerprint(params), train_rows=5)
        store, vectors = GradientStore.open(path), jax.tree.map(lambda x: x[None], params)
        store.scores(vectors, projection, params=params)
        moved = jax.tree.map(lambda x: x + 1, params)
        with pytest.raises(ValueError, match=r"gradients at other parameters or of another projection \(params: "):
            store.scores(vectors, projection, params=moved)
        for other, what in [
            (rademacher(params, 16, jax.random.key(4)), "projection key: "),
            (rademacher(params, 8, KEY), "projection dim: 16 in the store, 8 given"),
            (gaussian(params, 16, KEY), 'projection kind: "rademacher" in the store, "gaussian" given'),
        ]:
            with pytest.raises(ValueError, match=f"of another projection .*{what}"):
                store.top_k(vectors, other, 1)
        with pytest.raises(ValueError, match=r"holds gradients of another computation .*projection key"):
            fill(path, rademacher(params, 16, jax.random.key(4)), rows, params=fingerprint(params))


class TestMistakes:
    def test_with_stores_in_words(self, stored):
        params, _, projection, rows, path = stored
        store, rows = GradientStore.create(path), np.asarray(rows)
        with pytest.raises(ValueError, match="nothing is written yet"):
            store.scores(jnp.ones((1, 16)))
        with pytest.raises(ValueError, match=r"is not being written; give GradientStore.create\(path\)"):
            store.write(0, rows[:4], data="")
        with pytest.raises(TypeError, match="dtype: got int32"):
            store.begin({}, projection=projection, train_rows=4, dtype="int32")
        with pytest.raises(TypeError, match="projection: got a NoneType, expected a projection"):
            store.begin({}, projection=None, train_rows=4, dtype="float64")
        with store:
            store.begin({}, projection=projection, train_rows=4, dtype="float64")
            with pytest.raises(ValueError, match="holds no gradients yet"):
                store.inverse(1.0)
            for wrong in (rows[:5], rows[:0], rows[:4, :3], np.float32(rows[:4]), rows[0]):
                with pytest.raises(ValueError, match=r"gradients: got .* for chunk \(0, 0\), expected float64"):
                    store.write(0, wrong, data="")
            with pytest.raises(ValueError, match="gradient of training example 6 is NaN or infinite in float64"):
                store.write(1, np.where(np.arange(4)[:, None] == 2, np.inf, rows[:4]), data="")
            store.write(0, rows[:4], data="")
        with pytest.raises(ValueError, match="k: got 5, expected between 1 and 4"):
            store.top_k(rows, None, 5)
        with pytest.raises(ValueError, match=r"vectors: got dict without a projection, expected .* \(Q, 16\)"):
            store.scores(params)
        with pytest.raises(ValueError, match="vectors: got shape"):
            store.inverse(1.0)(jnp.ones(16))
        with pytest.raises(FileNotFoundError, match="there is no manifest of a store of gradients"):
            GradientStore.open(path.parent / "nothing")
        (path.parent / "file").write_text("")
        with pytest.raises(ValueError, match="is a file, expected a folder for a store of gradients"):
            GradientStore.create(path.parent / "file")
        with pytest.raises(
            ValueError, match=r"is a folder with .* in it and without the manifest of a store of gradients"
        ):
            GradientStore.create(path.parent)
