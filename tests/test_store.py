"""Scores on disk: what was written is read, what is finished is kept, what does not belong there is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import CHUNKS, DENSE, EXAMPLES, MANIFEST, QUERIES, continued, flip, part, written
from helpers import LINEAR

import influence_jax as ij
from influence_jax.store import ScoreStore, arrays


class TestScores:
    def test_what_was_written_is_read(self, tmp_path):
        store = ScoreStore.open(written(tmp_path / "s"))
        assert store.complete
        assert (store.shape, store.dtype, len(store)) == ((QUERIES, EXAMPLES), np.float32, QUERIES)
        np.testing.assert_array_equal(np.asarray(store), DENSE)
        assert np.asarray(store, np.float64).dtype == np.float64
        assert store.manifest["params"] == "aa11"
        assert store.manifest["examples"] == EXAMPLES
        assert repr(store).endswith("influences, 5 x 17 float32, complete)")

    @pytest.mark.parametrize(
        "key",
        [
            0,
            -1,
            np.s_[1, 2],
            np.s_[:, 5],
            np.s_[1:4, 3:11],
            np.s_[::-1, ::-3],
            np.s_[4:1:-2, -3:],
            np.s_[2:2, :],
            np.s_[[0, 3]],
            np.s_[1, [16, 2, 2]],
            ...,
        ],
    )
    def test_indices_are_those_of_numpy(self, tmp_path, key):
        store = ScoreStore.open(written(tmp_path / "s"))
        if key is ...:
            with pytest.raises(TypeError, match="expected ints or slices"):
                store[key]
            return
        got = store[key]
        assert np.shape(got) == DENSE[key].shape
        np.testing.assert_array_equal(got, DENSE[key])

    def test_places_beyond_the_end_are_refused(self, tmp_path):
        store = ScoreStore.open(written(tmp_path / "s"))
        with pytest.raises(IndexError):
            store[QUERIES]
        with pytest.raises(ValueError, match="copy: got False"):
            np.asarray(store, copy=False)

    def test_blocks_are_the_scores_chunk_by_chunk(self, tmp_path):
        whole = np.zeros_like(DENSE)
        for rows, columns, values in ScoreStore.open(written(tmp_path / "s")).blocks():
            assert values.size <= 8
            whole[rows, columns] += values
        np.testing.assert_array_equal(whole, DENSE)

    @pytest.mark.parametrize("k", [1, 3, 16, 17])
    def test_top_k_equals_the_dense_answer(self, tmp_path, k):
        """With ties within and across chunks, infinities and NaN, which comes last."""
        dense = np.round(DENSE * 2) / 2
        dense[1, [2, 3, 9]], dense[2, 5], dense[3, [0, 16]] = np.nan, np.inf, -np.inf
        store = ScoreStore.open(written(tmp_path / "s", dense=dense))
        top = store.top_k(k)
        for row in range(QUERIES):
            order = sorted(range(EXAMPLES), key=lambda i, row=row: (np.isnan(dense[row, i]), -dense[row, i], i))
            if np.isnan(dense[row]).any():
                order = sorted(order, key=lambda i, row=row: (np.isnan(dense[row, i]), order.index(i)))
            assert top.indices[row].tolist() == order[:k]
            np.testing.assert_array_equal(top.values[row], dense[row, order[:k]])

    def test_top_k_has_the_order_of_influence(self, tmp_path):
        """Of small whole numbers, so that scores are exact however they are summed, and ties are ties."""
        rng = np.random.default_rng(0)
        params = {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}
        train, query = (
            ij.Batch(rng.integers(-2, 3, (n, 3)).astype(float), rng.integers(-2, 3, (n, 1)).astype(float))
            for n in (EXAMPLES, QUERIES)
        )
        influence = ij.Influence(LINEAR, params, ij.Identity(params))
        dense = np.asarray(influence.influences(query, train))
        assert np.all(dense == np.round(dense))
        assert min(len(np.unique(row)) for row in dense) < EXAMPLES
        for k in (1, 6, EXAMPLES):
            expected = influence.top_k(query, train, k)
            path = tmp_path / str(k)
            got = ScoreStore.open(written(path, dense=dense, dtype="float64")).top_k(k)
            np.testing.assert_array_equal(got.values, expected.values)
            np.testing.assert_array_equal(got.indices, expected.indices)

    @pytest.mark.parametrize(("k", "kind"), [(0, ValueError), (18, ValueError), (1.5, TypeError)])
    def test_top_k_of_no_sense(self, tmp_path, k, kind):
        with pytest.raises(kind, match="k: got"):
            ScoreStore.open(written(tmp_path / "s")).top_k(k)

    def test_opens_in_zarr_python_with_identical_values(self, tmp_path):
        import zarr

        group = zarr.open_group(written(tmp_path / "s"), mode="r")
        scores = group["scores"]
        assert scores.metadata.dimension_names == ("query", "train")
        assert (scores.chunks, scores.dtype) == ((2, 4), np.float32)
        np.testing.assert_array_equal(scores[...], DENSE)
        assert group.attrs["influence_jax"]["what"] == "influences"

    def test_chunks_of_nothing_but_nan_are_kept(self, tmp_path):
        nothing = np.full_like(DENSE, np.nan)
        store = ScoreStore.open(written(tmp_path / "s", dense=nothing))
        np.testing.assert_array_equal(np.asarray(store), nothing)

    def test_several_processes_write_chunks_of_their_own(self, tmp_path):
        path = tmp_path / "s"
        with continued(path) as first, continued(path, process=1) as second:
            for number, chunk in enumerate(reversed(CHUNKS)):
                (first, second)[number % 2].write(*chunk, part(DENSE, chunk), data="batch")
            second.finish(EXAMPLES)
            assert not ScoreStore.open(path).complete
            first.finish(EXAMPLES)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)
        with continued(path, process=1) as later:  # what others finished counts
            assert all(later.finished(*chunk) == "batch" for chunk in CHUNKS)


class TestContinuing:
    def test_finished_chunks_are_told_with_their_data(self, tmp_path):
        path = written(tmp_path / "s", CHUNKS[:7])
        with continued(path) as store:
            for chunk in CHUNKS:
                assert store.finished(*chunk) == (f"batch {chunk[1]}" if chunk in CHUNKS[:7] else None)
        written(path, CHUNKS[7:])
        with continued(path) as store:
            store.finish(EXAMPLES)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)

    def test_a_complete_store_is_continued_without_a_change(self, tmp_path):
        path = written(tmp_path / "s")
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "lock" not in file.name}
        with continued(path) as store:
            assert all(store.finished(*chunk) for chunk in CHUNKS)
            store.finish(EXAMPLES)
        assert before == {file: file.read_bytes() for file in before}

    def test_an_unfinished_store_reads_as_far_as_it_is(self, tmp_path):
        store = ScoreStore.open(written(tmp_path / "s", [(0, 0), (0, 1), (1, 0)]))
        assert not store.complete
        assert store.shape == (QUERIES, 8)
        assert repr(store).endswith("3 of 6 chunks so far)")
        np.testing.assert_array_equal(store[:2], DENSE[:2, :8])
        for read in (
            lambda: store[2:4],
            lambda: np.asarray(store),
            lambda: store.top_k(1),
            lambda: list(store.blocks()),
        ):
            with pytest.raises(ValueError, match=r"c/1/1: this chunk is not finished; run the same command again"):
                read()

    def test_finish_refuses_what_is_not_finished(self, tmp_path):
        with continued(written(tmp_path / "s", CHUNKS[:-1])) as store:
            with pytest.raises(ValueError, match=r"examples: got 17.*lack \[\(2, 4\)\]"):
                store.finish(EXAMPLES)
            with pytest.raises(ValueError, match=r"examples: got 16, but .* holds scores of 17; give the data"):
                store.finish(16)
        assert not ScoreStore.open(tmp_path / "s").complete

    def test_room_for_a_chunk_that_was_never_finished_goes(self, tmp_path):
        path = written(tmp_path / "s", [chunk for chunk in CHUNKS if chunk[1] < 4])
        arrays.grow(path / "scores", arrays.open_array(path / "scores"), (QUERIES, 19))
        with continued(path) as store:
            store.finish(16)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE[:, :16])

    def test_wrong_params_hash_is_named(self, tmp_path):
        path = written(tmp_path / "s")
        told = r'params: "aa11" in the store, "cc33" now.*give another path, or the arguments and versions of before'
        with pytest.raises(ValueError, match=told), continued(path, {**MANIFEST, "params": "cc33"}):
            pass
        with continued(path):  # the lock was let go
            pass

    @pytest.mark.parametrize(
        ("manifest", "options", "told"),
        [
            ({"versions": {"jax": "1.1", "numpy": "2.0"}}, {}, r'\(version of jax: "1.0" in the store, "1.1" now\)'),
            ({"sign": "helpful"}, {}, r'sign: None in the store, "helpful" now'),
            ({}, {"queries": 6}, r"queries: 5 in the store, 6 now"),
            ({}, {"query_rows": 5, "train_rows": 8}, r"query_rows: 2 .* 5 now; train_rows: 4 .* 8 now"),
            ({}, {"dtype": "float64"}, r'dtype: "float32" in the store, "float64" now'),
        ],
    )
    def test_other_computations_are_refused(self, tmp_path, manifest, options, told):
        path = written(tmp_path / "s")
        with pytest.raises(ValueError, match=told), continued(path, {**MANIFEST, **manifest}, **options):
            pass
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)

    def test_factors_are_kept_and_checked(self, tmp_path):
        factors = {"dense": {"kernel": np.arange(12.0).reshape(2, 3, 2)}, "bias": jnp.ones((2, 4), jnp.float32)}
        like = jax.eval_shape(lambda: factors)
        with continued(tmp_path / "s") as store:
            assert store.load_factors(0, like) is None
            store.save_factors(0, factors)
        folder = tmp_path / "s" / "factors" / "0"
        with continued(tmp_path / "s") as store:
            got = store.load_factors(0, like)
            assert jax.tree.structure(got) == jax.tree.structure(factors)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(factors), strict=True):
                assert (a.dtype, a.tobytes()) == (b.dtype, np.asarray(b).tobytes())
            assert store.load_factors(1, like) is None
            assert store.load_factors(0, {"bias": like["bias"]}) is None
            file = arrays.chunk_file(folder / "dense" / "kernel", (0, 0, 0))
            content = file.read_bytes()
            flip(file, 40)
            assert store.load_factors(0, like) is None
            file.unlink()
            assert store.load_factors(0, like) is None
            file.write_bytes(content)
            assert store.load_factors(0, like) is not None
            (folder / "zarr.json").unlink()
            assert store.load_factors(0, like) is None
            store.save_factors(0, factors)
            assert store.load_factors(0, like) is not None


class TestMistakes:
    def test_nothing_is_on_disk_before_the_computation(self, tmp_path):
        store = ScoreStore.create(tmp_path / "new" / "s")
        assert not (tmp_path / "new").exists()
        assert "not begun" in repr(store)
        with pytest.raises(ValueError, match="nothing is written yet"):
            np.asarray(store)

    def test_paths_of_something_else(self, tmp_path):
        (tmp_path / "file").write_text("text")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "thesis.tex").write_text("text")
        with pytest.raises(ValueError, match="is a file, expected a folder for a score store"):
            ScoreStore.create(tmp_path / "file")
        with pytest.raises(ValueError, match=r"\['thesis.tex'\] in it and without the manifest"):
            ScoreStore.create(tmp_path / "folder")
        for path in ("nowhere", "folder"):
            with pytest.raises(FileNotFoundError, match="there is no manifest of a score store"):
                ScoreStore.open(tmp_path / path)
        (tmp_path / "empty").mkdir()
        written(tmp_path / "empty")

    def test_zarr_groups_of_others(self, tmp_path):
        import zarr

        zarr.create_group(tmp_path / "theirs")
        (tmp_path / "gradients").mkdir()
        arrays.write_group(tmp_path / "gradients", {"kind": "gradients", "format": 1})
        for make in (ScoreStore.create, ScoreStore.open):
            with pytest.raises(ValueError, match="zarr file of another program, expected a score store"):
                make(tmp_path / "theirs")
            with pytest.raises(ValueError, match=r"'kind': 'gradients'.*expected a score store"):
                make(tmp_path / "gradients")

    def test_scores_of_another_shape_or_dtype(self, tmp_path):
        with continued(tmp_path / "s") as store:
            for scores in (DENSE[:2, :5], DENSE[:2, :4].astype(float), DENSE[:2, :0], DENSE[0, :4]):
                with pytest.raises(
                    ValueError, match=r"scores: got .* for chunk \(0, 0\), expected float32 \(2, at most 4"
                ):
                    store.write(0, 0, scores, data="")
            with pytest.raises(ValueError, match=r"got shape \(1, 4\) for chunk \(0, 0\)"):
                store.write(0, 0, DENSE[:1, :4], data="")
            assert store.finished(0, 0) is None

    def test_readers_do_not_write(self, tmp_path):
        store = ScoreStore.open(written(tmp_path / "s"))
        with pytest.raises(ValueError, match="not being written; give ScoreStore"):
            store.write(0, 0, DENSE[:2, :4], data="")
        store.close()
        store.close()
