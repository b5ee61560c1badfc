"""Damage to scores on disk: wherever it is, it is found, never served, and computed again."""

import json

import numpy as np
import pytest
from chunks import CHUNKS, DENSE, EXAMPLES, chunk_of, continued, flip, part, written

from influence_jax.store import ScoreStore, files


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
