"""Results on disk: what is finished survives every interruption, what is damaged is found, never served."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import CLASSIFICATION, LINEAR, random_batch, random_like, random_mlp, relative_error
from jax.sharding import NamedSharding, PartitionSpec

import influence_jax as ij
from influence_jax import store as stores
from influence_jax.store import ScoreStore, arrays, files

QUERIES, EXAMPLES = 5, 17
SIZES = {"queries": QUERIES, "query_rows": 2, "train_rows": 4, "dtype": "float32"}
MANIFEST = {"what": "influences", "params": "aa11", "query": "bb22", "versions": {"jax": "1.0", "numpy": "2.0"}}
DENSE = np.random.default_rng(0).normal(size=(QUERIES, EXAMPLES)).astype(np.float32)
CHUNKS = [(q, t) for q in range(3) for t in range(5)]


def part(dense, chunk, sizes=SIZES):
    """The scores of a chunk."""
    rows, columns = sizes["query_rows"], sizes["train_rows"]
    return dense[chunk[0] * rows : (chunk[0] + 1) * rows, chunk[1] * columns : (chunk[1] + 1) * columns]


def written(path, chunks=CHUNKS, dense=DENSE, **options):
    """A store with some chunks of the dense scores, finished if all of them."""
    with ScoreStore.create(path) as store:
        store.begin(options.pop("manifest", MANIFEST), **{**SIZES, **options})
        for chunk in chunks:
            store.write(*chunk, part(dense, chunk), data=f"batch {chunk[1]}")
        if len(chunks) == len(CHUNKS):
            store.finish(EXAMPLES)
    return path


@contextlib.contextmanager
def continued(path, manifest=MANIFEST, **options):
    with ScoreStore.create(path) as store:
        store.begin(manifest, **{**SIZES, **options})
        yield store


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def chunk_of(path, chunk):
    return arrays.chunk_file(path / "scores", chunk)


def python(code, *arguments):
    """Run code in another process, which ends well."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    here = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


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
        [0, -1, np.s_[1, 2], np.s_[:, 5], np.s_[1:4, 3:11], np.s_[::-1, ::-3], np.s_[4:1:-2, -3:], np.s_[2:2, :], ...],
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


class TestDamage:
    """A reader says what is wrong and what to do; a writer computes it again."""

    def refused(self, path, told):
        with pytest.raises(ValueError, match=told):
            np.asarray(ScoreStore.open(path))

    def recomputed(self, path, chunk):
        with continued(path) as store:
            assert [c for c in CHUNKS if store.finished(*c) is None] == [chunk]
            store.write(*chunk, part(DENSE, chunk), data=f"batch {chunk[1]}")
            assert store.finished(*chunk) == f"batch {chunk[1]}"
            store.finish(EXAMPLES)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)

    @pytest.mark.parametrize("length", [0, 1, 200, -1])
    def test_truncated_manifest(self, tmp_path, length):
        path = written(tmp_path / "s")
        manifest = path / "zarr.json"
        manifest.write_bytes(manifest.read_bytes()[:length])
        for make in (ScoreStore.open, ScoreStore.create):
            with pytest.raises(
                ValueError, match=r"zarr.json: the manifest of a score store is damaged.*restore it from a"
            ):
                make(path)

    def test_damaged_manifest(self, tmp_path):
        """A bit flipped anywhere is found, or leaves everything as it was."""
        path = written(tmp_path / "s")
        manifest = path / "zarr.json"
        content, good = manifest.read_bytes(), ScoreStore.open(path).manifest
        silent = []
        for place in range(len(content)):
            flip(manifest, place)
            try:
                assert ScoreStore.open(path).manifest == good
                silent.append(content[place : place + 1])
            except ValueError:
                pass
            manifest.write_bytes(content)
        assert len(silent) < 0.2 * len(content)  # blanks, and what zarr wants besides the attributes
        manifest.write_bytes(content.replace(b"aa11", b"aa12"))
        with pytest.raises(ValueError, match="its checksum does not fit"):
            ScoreStore.open(path)

    @pytest.mark.parametrize("chunk", [(0, 0), (1, 2), (2, 4)])
    def test_truncated_chunk(self, tmp_path, chunk):
        path = written(tmp_path / "s")
        file = chunk_of(path, chunk)
        file.write_bytes(file.read_bytes()[:-3])
        self.refused(path, f"{file}: this chunk is damaged .*; run the same command again to recompute it")
        self.recomputed(path, chunk)

    def test_empty_chunk(self, tmp_path):
        path = written(tmp_path / "s")
        chunk_of(path, (1, 2)).write_bytes(b"")
        self.refused(path, "c/1/2: this chunk is damaged")
        self.recomputed(path, (1, 2))

    @pytest.mark.parametrize("chunk", [(0, 0), (2, 4)])
    def test_deleted_chunk(self, tmp_path, chunk):
        path = written(tmp_path / "s")
        chunk_of(path, chunk).unlink()
        self.refused(path, f"{chunk_of(path, chunk)}: this chunk is missing; run the same command")
        self.recomputed(path, chunk)

    @pytest.mark.parametrize("chunk", [(0, 0), (2, 4)])
    def test_bit_flip(self, tmp_path, chunk):
        path = written(tmp_path / "s")
        file = chunk_of(path, chunk)
        content = file.read_bytes()
        for place in range(len(content)):
            flip(file, place, bit=place % 8)
            self.refused(path, f"{file}: this chunk is damaged")
            file.write_bytes(content)
        flip(file, 1)
        self.recomputed(path, chunk)

    def test_intact_chunk_in_the_place_of_another(self, tmp_path):
        path = written(tmp_path / "s")
        chunk_of(path, (0, 0)).write_bytes(chunk_of(path, (0, 1)).read_bytes())
        self.refused(path, "c/0/0: this chunk holds other scores than those that were finished")
        self.recomputed(path, (0, 0))

    def test_other_chunks_of_a_damaged_store_read(self, tmp_path):
        path = written(tmp_path / "s")
        chunk_of(path, (0, 0)).unlink()
        np.testing.assert_array_equal(ScoreStore.open(path)[2:], DENSE[2:])

    @pytest.mark.parametrize("torn", [1, 5, 60])
    def test_torn_ledger_line(self, tmp_path, torn):
        path = written(tmp_path / "s")
        ledger = path / "ledger-0.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-torn])
        self.refused(path, "c/2/4: this chunk is not finished")
        assert not ScoreStore.open(path).complete
        self.recomputed(path, (2, 4))
        assert len(ledger.read_bytes().splitlines()) == len(CHUNKS)

    @pytest.mark.parametrize("tail", [b'{"query":', b"\0" * 500, b'{"query":0}' * 50])
    def test_ledger_lines_follow_whole_ones(self, tmp_path, tail):
        """Also where what was torn is longer than the line that takes its place."""
        for record in ({"a": 1}, {"b": 2}):
            ledger = files.Ledger(tmp_path / "ledger")
            ledger.append(record)
            ledger.close()
            whole = (tmp_path / "ledger").read_bytes()
            (tmp_path / "ledger").write_bytes(whole + tail)
            assert files.Ledger(tmp_path / "ledger").records == ledger.records
        assert ledger.records == [{"a": 1}, {"b": 2}]
        assert [sorted(json.loads(line))[0] for line in whole.splitlines()] == ["a", "b"]

    def test_last_ledger_line_damaged(self, tmp_path):
        path = written(tmp_path / "s")
        flip(path / "ledger-0.jsonl", -20)
        self.recomputed(path, (2, 4))

    def test_ledger_damaged_in_the_middle(self, tmp_path):
        path = written(tmp_path / "s")
        flip(path / "ledger-0.jsonl", 300)
        told = r"ledger-0.jsonl: line [2-4] of 15 is damaged; restore the file from a copy, or remove it and run"
        self.refused(path, told)
        with pytest.raises(ValueError, match=told), continued(path):
            pass
        (path / "ledger-0.jsonl").unlink()
        written(path)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)

    @pytest.mark.parametrize(("old", "new"), [(b"{", b"("), (b"17", b"13"), (b"float32", b"int32"), (b"4", b"3")])
    def test_damaged_description_of_the_array(self, tmp_path, old, new):
        path = written(tmp_path / "s")
        description = path / "scores" / "zarr.json"
        content = description.read_bytes()
        description.write_bytes(content.replace(old, new, 1))
        self.refused(path, r"scores/zarr.json: .*damaged")
        with continued(path) as store:  # it says nothing new, and is made again
            assert all(store.finished(*chunk) for chunk in CHUNKS)
        assert json.loads(description.read_bytes()) == json.loads(content)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(path)), DENSE)


class TestFailedWrites:
    def test_files_that_may_not_grow(self, tmp_path):
        """A real refusal by the operating system; the same command continues once it is lifted."""
        sizes = {"query_rows": 5, "train_rows": 40_000, "queries": 5}
        dense = np.ones((5, 80_000), np.float32)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with continued(tmp_path / "s", **sizes) as store:
            store.write(0, 0, dense[:, :40_000], data="first")
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
            try:
                told = "File too large, while writing a chunk; what is finished is kept: .* run the same command again"
                with pytest.raises(OSError, match=told) as caught:
                    store.write(0, 1, dense[:, 40_000:], data="second")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG
            assert caught.value.filename.endswith("c/0/1")
        with continued(tmp_path / "s", **sizes) as store:
            assert [store.finished(0, 0), store.finished(0, 1)] == ["first", None]
            store.write(0, 1, dense[:, 40_000:], data="second")
            store.finish(80_000)
        np.testing.assert_array_equal(np.asarray(ScoreStore.open(tmp_path / "s")), dense)

    def test_full_disk(self, tmp_path, monkeypatch):
        """Half a line reaches the ledger, then the disk is full."""
        real = os.pwrite

        def full(descriptor, content, place):
            if len(content) > 50 and content.startswith(b'{"query"'):
                return real(descriptor, content[:20], place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with continued(written(tmp_path / "s", CHUNKS[:3])) as store:
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match=r"No space .*while writing the ledger.*free space") as caught:
                store.write(*CHUNKS[3], part(DENSE, CHUNKS[3]), data="")
            monkeypatch.undo()
            assert caught.value.errno == errno.ENOSPC
            assert store.finished(*CHUNKS[3]) is None
            store.write(*CHUNKS[3], part(DENSE, CHUNKS[3]), data="batch")
        with continued(tmp_path / "s") as store:
            assert [chunk for chunk in CHUNKS if store.finished(*chunk)] == CHUNKS[:4]

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
    def test_read_only_folder(self, tmp_path, monkeypatch, number):
        def refuse(*arguments, **options):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
        told = f"{os.strerror(number)}, while writing a score store; what is finished is kept: "
        with pytest.raises(OSError, match=told) as caught, continued(tmp_path / "s"):
            pass
        assert caught.value.errno == number
        monkeypatch.undo()
        path = written(tmp_path / "s")
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="while writing a lock") as caught, continued(path):
            pass
        assert caught.value.errno == number

    def test_failures_that_a_library_hides_in_words(self):
        text = "RESOURCE_EXHAUSTED: Error writing local file \"x\": No space left on device [os_error_code='28']"
        with pytest.raises(OSError, match=r"Errno 28.*free space on this disk"), files.writing("scores", "x"):
            raise RuntimeError("saving failed") from ValueError(text)
        with pytest.raises(RuntimeError, match="a mistake"), files.writing("scores", "x"):
            raise RuntimeError("a mistake")


class TestOtherProcesses:
    def test_second_writer_is_refused(self, tmp_path):
        code = """
            import sys
            from influence_jax.store import ScoreStore
            store = ScoreStore.create(sys.argv[1])
            store.begin({}, queries=5, query_rows=2, train_rows=4, dtype="float32")
            print("begun", flush=True)
            sys.stdin.read()
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline() == "begun\n"
                told = f"being written by process {other.pid} on .*; wait until that ends or stop it, then run the same"
                with pytest.raises(BlockingIOError, match=told), continued(tmp_path / "s", {}):
                    pass
                assert ScoreStore.open(tmp_path / "s").shape == (QUERIES, 0)  # readers need no lock
            finally:
                other.kill()
        with continued(tmp_path / "s", {}):  # death let it go
            pass

    def test_second_writer_in_the_same_process_is_refused(self, tmp_path):
        with continued(tmp_path / "s"), pytest.raises(BlockingIOError), continued(tmp_path / "s"):
            pass
        with continued(tmp_path / "s") as store:
            store.begin(MANIFEST, **SIZES)  # its own lock is no obstacle

    def test_forked_workers_do_not_keep_the_lock(self, tmp_path):
        code = """
            import os, signal, sys, time
            from influence_jax.store.files import Lock
            lock = Lock(sys.argv[1])
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(0.2)
            lock.close()
            Lock(sys.argv[1])
            os.kill(worker, signal.SIGKILL)
            print("free")
        """
        assert python(code, tmp_path / "lock") == "free"

    def test_killed_at_any_moment(self, tmp_path):
        """What the ledger calls finished after each of many kills reads back as it was to be written.

        A process writes twelve chunks at most before it waits for its end, so there are several kills however fast
        the machine is; each comes at some point of this progress, now and then before the first chunk.
        """
        code = """
            import os, pathlib, random, signal, sys, time
            import numpy as np
            from influence_jax.store import ScoreStore

            path, ledger = sys.argv[1], pathlib.Path(sys.argv[1], "ledger-0.jsonl")
            sizes = dict(queries=48, query_rows=8, train_rows=512, dtype="float64")
            chunks = [(q, t) for t in range(12) for q in range(6)]

            def work():
                with ScoreStore.create(path) as store:
                    store.begin({"what": "scores"}, **sizes)
                    done = {chunk: store.finished(*chunk) for chunk in chunks}
                    assert all(data in (None, f"batch {t}") for (q, t), data in done.items())
                    assert len(store._records) == sum(data is not None for data in done.values())
                    todo = [chunk for chunk in chunks if done[chunk] is None]
                    for q, t in todo[:12]:
                        scores = np.random.default_rng([q, t]).normal(size=(8, 512 if t < 11 else 100))
                        store.write(q, t, scores, data=f"batch {t}")
                    if len(todo) > 12:
                        time.sleep(600)
                    store.finish(11 * 512 + 100)

            def lines():
                return ledger.read_bytes().count(b"\\n") if ledger.exists() else 0

            random.seed(0)
            for kills in range(200):
                wanted = lines() + random.randrange(12)
                child = os.fork()
                if child == 0:
                    try:
                        work()
                    except BaseException as error:
                        print("failed", repr(error), flush=True)
                        os._exit(1)
                    os._exit(0)
                ended = 0
                while not ended and lines() < wanted:
                    ended, status = os.waitpid(child, os.WNOHANG)
                if not ended:
                    time.sleep(random.uniform(0, 0.01))
                    os.kill(child, signal.SIGKILL)
                    ended, status = os.waitpid(child, 0)
                if os.WIFEXITED(status):
                    break
            print(kills, status)
        """
        kills, status = map(int, python(code, tmp_path / "s").splitlines()[-1].split())
        assert status == 0
        assert kills >= 5
        store = ScoreStore.open(tmp_path / "s")
        assert store.complete
        for rows, columns, values in store.blocks():
            chunk = [rows.start // 8, columns.start // 512]
            np.testing.assert_array_equal(values, np.random.default_rng(chunk).normal(size=values.shape))


class TestFiles:
    def test_fingerprints_tell_trees_apart(self):
        x = np.arange(6.0)
        key = jax.random.key(0)
        trees = [
            {"a": x},
            {"b": x},
            {"a": x.reshape(2, 3)},
            {"a": x.astype(np.float32)},
            {"a": x.view(np.int64)},
            {"a": np.where(x == 3, np.nextafter(3, 4), x)},
            {"a": x, "b": 1},
            {"a": x, "b": 1.0},
            {"a": x, "b": True},
            {"a": x[:3], "b": x[3:]},
            {"a": key},
            {"a": jax.random.key_data(key)},
            {"a": jax.random.key(0, impl="rbg")},
            {"a": x.astype(ml_dtypes.bfloat16)},
            {"a": x.astype(np.float16)},
            {"a": x[:0]},
        ]
        assert len({files.fingerprint(tree) for tree in trees}) == len(trees)

    def test_fingerprints_are_the_same_wherever_the_bytes_are(self):
        x = np.arange(16.0).reshape(8, 2)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        alike = [x, jnp.asarray(x), sharded, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]]
        assert {files.fingerprint({"x": leaf}) for leaf in alike} == {"e6c7ec95bef7da477554338dc87adb4d"}

    def test_other_leaves_have_no_fingerprint(self):
        for leaf in (object(), np.array([object()]), iter([1])):
            with pytest.raises(TypeError, match=r"leaf 'a' is a .*, expected an array or a Python scalar"):
                files.fingerprint({"a": leaf})

    def test_trees_of_arrays_of_every_kind(self, tmp_path):
        leaves = {
            "dense/kernel": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
            "": np.array([True, False]),
            "scalar": np.array(2.5, np.float32),
            "none": np.zeros((0, 3)),
            "narrow": np.arange(4).astype(ml_dtypes.bfloat16),
            "../c/a b%": np.arange(3),
            "complex": np.array([1 + 2j, np.nan], np.complex64),
        }
        for _ in range(2):  # a second time in the same place
            arrays.write_tree(tmp_path / "t", leaves)
            got = arrays.read_tree(tmp_path / "t")
            assert list(got) == list(leaves)
            for name, leaf in leaves.items():
                assert (got[name].dtype, got[name].shape) == (leaf.dtype, leaf.shape)
                assert got[name].tobytes() == leaf.tobytes()
        assert list(tmp_path.iterdir()) == [tmp_path / "t"]

    def test_large_leaves_are_split(self, tmp_path, monkeypatch):
        monkeypatch.setattr(arrays, "_CHUNK_BYTES", 100)
        leaf = np.arange(60.0).reshape(10, 6)
        arrays.write_tree(tmp_path / "t", {"x": leaf})
        assert len(list((tmp_path / "t" / "x" / "c").iterdir())) == 5
        np.testing.assert_array_equal(arrays.read_tree(tmp_path / "t")["x"], leaf)
        arrays.chunk_file(tmp_path / "t" / "x", (3, 0)).unlink()
        with pytest.raises(ValueError, match="x/c/3/0: this chunk is missing"):
            arrays.read_tree(tmp_path / "t")


class TestStates:
    def test_every_kind_of_leaf(self, tmp_path):
        state = {
            "float": 0.1,
            "int": -3,
            "bool": True,
            "nan": float("nan"),
            "none": None,
            "array": jnp.arange(6.0).reshape(2, 3),
            "weak": jnp.asarray(0.1),
            "narrow": jnp.arange(3, dtype=jnp.bfloat16),
            "scalar": jnp.float32(2.5),
            "empty": jnp.zeros((0, 4)),
            "flags": jnp.array([True, False]),
            "numpy": np.arange(4, dtype=np.int16),
            "numpy 0-d": np.array(1.5),
            "numpy scalar": np.float32(7),
            "key": jax.random.key(3),
            "keys": jax.random.split(jax.random.key(4, impl="rbg"), (2, 2)),
            "complex": jnp.array([1 + 2j]),
            "list": [jnp.zeros(1), (jnp.ones(2),)],
        }
        stores.save(tmp_path / "s", state)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, state)
        for like in (state, abstract):
            got = stores.load(tmp_path / "s", like)
            assert jax.tree.structure(got) == jax.tree.structure(state)
            for (name, a), b in zip(ij.tree.named_leaves(got), jax.tree.leaves(state), strict=True):
                assert type(a) is type(b), name
                assert files.fingerprint([a]) == files.fingerprint([b]), name
                assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None), name
                assert getattr(a, "committed", None) == getattr(b, "committed", None), name

    def test_an_array_that_is_there_twice_is_kept_once(self, tmp_path):
        x = jnp.asarray(np.random.default_rng(0).normal(size=100_000))
        stores.save(tmp_path / "s", {"op": x, "state": {"op": x}})
        assert sum(file.stat().st_size for file in (tmp_path / "s").rglob("*") if file.is_file()) < 1.2 * x.nbytes
        got = stores.load(tmp_path / "s", {"op": x, "state": {"op": x}})
        assert got["op"] is got["state"]["op"]

    def test_inverse_in_a_fresh_process_solves_bit_for_bit(self, tmp_path):
        params = random_mlp(jax.random.key(0))
        data = random_batch(jax.random.key(1), 40, 5, 3, classes=True)
        inverse = ij.invert(ij.ekfac(CLASSIFICATION, params, data), ij.Direct(ij.RelativeDamping(0.1)))
        vector = random_like(jax.random.key(2), params)
        stores.save(tmp_path / "s", {"inverse": inverse, "vector": vector})
        code = """
            import conftest, sys
            import jax, influence_jax as ij, numpy as np
            from helpers import CLASSIFICATION, random_batch, random_mlp
            from influence_jax import store
            jax.config.update("jax_disable_most_optimizations", sys.argv[2] == "True")
            params = random_mlp(jax.random.key(0))
            data = random_batch(jax.random.key(1), 40, 5, 3, classes=True)
            def fit(params, data):
                return ij.invert(ij.ekfac(CLASSIFICATION, params, data), ij.Direct(ij.RelativeDamping(0.1)))
            like = jax.eval_shape(lambda p, d: {"inverse": fit(p, d), "vector": p}, params, data)
            state = store.load(sys.argv[1], like)
            solved, info = state["inverse"].solve(state["vector"])
            print(np.asarray(ij.flatten(solved, params)).tobytes().hex(), bool(info.converged))
        """
        solved, _ = inverse.solve(vector)
        expected = np.asarray(ij.flatten(solved, params))
        assert relative_error(expected, 0 * expected + 1) > 0.1
        # Compiled alike, or the last bits differ whatever was stored.
        compiler = jax.config.read("jax_disable_most_optimizations")
        assert python(code, tmp_path / "s", compiler) == f"{expected.tobytes().hex()} True"

    def test_sharded_over_eight_devices(self, tmp_path):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        placed = NamedSharding(mesh, PartitionSpec("a", "b"))
        turned = NamedSharding(mesh, PartitionSpec("b", "a"))
        x = np.random.default_rng(0).normal(size=(8, 16))
        state = {"x": jax.device_put(x, placed), "y": jnp.arange(3), "key": jax.random.key(0)}
        stores.save(tmp_path / "s", state)
        got = stores.load(tmp_path / "s", state)
        assert got["x"].sharding == placed
        assert len(got["x"].addressable_shards) == 8
        abstract = {**state, "x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=turned)}
        assert stores.load(tmp_path / "s", abstract)["x"].sharding == turned
        here = stores.load(tmp_path / "s", {**state, "x": jax.ShapeDtypeStruct(x.shape, x.dtype)})["x"]
        for loaded in (got["x"], stores.load(tmp_path / "s", abstract)["x"], here):
            np.testing.assert_array_equal(loaded, x)
        np.testing.assert_array_equal(here + got["x"], 2 * x)  # what nobody placed mixes with what is sharded

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"w": jnp.zeros((3, 2))}, r"leaf 'w' is saved as float64 \(2, 3\), like has float64 \(3, 2\)"),
            ({"w": jnp.zeros((2, 3), jnp.float32)}, r"leaf 'w' is saved as float64 \(2, 3\), like has float32"),
            ({"more": jnp.zeros(1)}, r"leaf 'more' is in like but not saved"),
            ({"w": None}, r"leaf 'w' is saved but not in like"),
            ({"c": 3}, r"leaf 'c' is saved as a Python float, like has a int"),
            ({"p": (jnp.zeros(2),)}, r"saved is the tree/p: list\(\); like is the tree/p: tuple\(\)"),
            ({"s": ij.Direct(0.1)}, r"saved is the tree/s: CG\(max_steps=7.*; like is the tree/s: Direct\("),
            ({"s": ij.CG(0.1, max_steps=8)}, r"saved is .*max_steps=7.*; like is .*max_steps=8"),
        ],
    )
    def test_other_states_are_refused(self, tmp_path, change, told):
        state = {"w": jnp.zeros((2, 3)), "c": 0.5, "p": [jnp.zeros(2)], "s": ij.CG(0.1, max_steps=7)}
        stores.save(tmp_path / "s", state)
        with pytest.raises(ValueError, match=r"like: differs from the state in .*; build it as") as caught:
            stores.load(tmp_path / "s", {**state, **change})
        if "Direct" not in told:  # its leaves differ from those of CG, too
            caught.match(told)

    def test_states_are_not_overwritten_by_accident(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"a state is saved in .* already; give another path, or overwrite=True"):
            stores.save(tmp_path / "s", {"x": jnp.ones(2)})
        stores.save(tmp_path / "s", {"x": jnp.ones(2)}, overwrite=True)
        assert stores.load(tmp_path / "s", {"x": jnp.ones(2)})["x"].tolist() == [1, 1]
        assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["arrays-1", "lock", "state.json"]

    def test_paths_of_something_else(self, tmp_path):
        (tmp_path / "file").write_text("text")
        with pytest.raises(ValueError, match="is a file, expected a folder"):
            stores.save(tmp_path / "file", {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match=r"\['file'\] in it and no state"):
            stores.save(tmp_path, {"x": jnp.zeros(2)})
        with pytest.raises(FileNotFoundError, match="there is no saved state"):
            stores.load(tmp_path, {"x": jnp.zeros(2)})
        with pytest.raises(TypeError, match="tree: leaf 'x' is a str"):
            stores.save(tmp_path / "s", {"x": "text"})
        assert not (tmp_path / "s").exists()

    def test_half_a_save_is_never_loaded(self, tmp_path, monkeypatch):
        old, new = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(stores.states, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                stores.save(tmp_path / "s", old)
        with pytest.raises(FileNotFoundError):
            stores.load(tmp_path / "s", old)
        stores.save(tmp_path / "s", old)  # what it left is no obstacle
        with monkeypatch.context() as context:
            context.setattr(stores.states, "write_json", interrupt)
            with pytest.raises(KeyboardInterrupt):
                stores.save(tmp_path / "s", new, overwrite=True)
        assert stores.load(tmp_path / "s", old)["x"].tolist() == [0, 0]
        stores.save(tmp_path / "s", new, overwrite=True)
        assert stores.load(tmp_path / "s", old)["x"].tolist() == [1, 1]

    def test_damage_is_found(self, tmp_path):
        """Every byte of every file: what loads is what was saved."""
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=500))}
        stores.save(tmp_path / "s", state)
        data = max(
            (file for file in (tmp_path / "s").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
        content = data.read_bytes()
        found = 0
        for place in range(7, len(content), len(content) // 20):
            flip(data, place)
            try:
                np.testing.assert_array_equal(stores.load(tmp_path / "s", state)["x"], state["x"])
            except ValueError:
                found += 1
            data.write_bytes(content)
        assert found > 10
        data.unlink()
        with pytest.raises(ValueError, match="the saved state is damaged"):
            stores.load(tmp_path / "s", state)

    def test_damaged_description(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        description = tmp_path / "s" / "state.json"
        description.write_bytes(description.read_bytes().replace(b"float64", b"float32"))
        with pytest.raises(ValueError, match="its checksum does not fit"):
            stores.load(tmp_path / "s", {"x": jnp.zeros(2)})
        stores.save(tmp_path / "s", {"x": jnp.ones(2)}, overwrite=True)
        assert stores.load(tmp_path / "s", {"x": jnp.zeros(2)})["x"].tolist() == [1, 1]

    def test_failed_write(self, tmp_path):
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            with pytest.raises(OSError, match="File too large, while writing a state"):
                stores.save(tmp_path / "s", state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(FileNotFoundError):
            stores.load(tmp_path / "s", state)
        stores.save(tmp_path / "s", state)
        np.testing.assert_array_equal(stores.load(tmp_path / "s", state)["x"], state["x"])

    def test_float64_without_64_bit_mode(self, tmp_path):
        stores.save(tmp_path / "s", {"x": jnp.zeros(2)})
        like = {"x": jax.ShapeDtypeStruct((2,), np.float64)}
        with jax.enable_x64(False), pytest.raises(ValueError, match="leaf 'x' is float64 but 64-bit mode is off"):
            stores.load(tmp_path / "s", like)
