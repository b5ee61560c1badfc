"""Writers that fail, meet another or are killed: what they finished survives every interruption."""

import errno
import os
import pathlib
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from chunks import CHUNKS, DENSE, MANIFEST, QUERIES, SIZES, continued, part, python, written

from influence_jax.store import ScoreStore, files


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
