"""A few scores and a store that holds them in chunks, to write, continue and damage; code run by another process."""

import contextlib
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np

from influence_jax.store import ScoreStore, arrays

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
