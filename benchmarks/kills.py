"""What is left after SIGKILL at random moments: `python benchmarks/kills.py [--kills 100] [--seconds 900]`.

One command streams scores into a store: 4 blocks of queries, 12 of training examples, the inverse fitted in the command
itself, by block CG over the loader and by EK-FAC in turn.  It is killed at a random moment of a random phase and run
again until it ends; then the next store begins.  After every kill each chunk on disk must be bit for bit that of an
uninterrupted run, and what the ledger called finished before must still be so; at the end the whole store must be the
same.  Exits with 1 and a traceback on any difference.
"""

import argparse
import collections
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SOLVERS = ("block_cg", "ekfac")
QUERIES, QUERY_ROWS, EXAMPLES, ROWS = 37, 10, 457, 40  # the last block of both is shorter
QUERY_BLOCKS, TRAIN_BLOCKS = -(-QUERIES // QUERY_ROWS), -(-EXAMPLES // ROWS)
PAUSE = 0.01  # seconds of every batch
# What the command is at: the interpreter and imports, the inverse, the store's description, a solve, factors on their
# way to disk, a chunk on its way to disk, the loader and scores until the next chunk, the last description, the exit.
PHASES = ("start", "fit", "begin", "solve", "keep", "write", "compute", "finish", "exit")
# How often each is aimed at, and among how many of the chunks that come next.
AIMS = dict.fromkeys(PHASES, 1) | {"solve": 2, "keep": 2, "write": 6, "compute": 3}
NEXT = 8


class Examples:
    """Batches made from their numbers, slowly."""

    def __init__(self, seed, count, rows):
        self.seed, self.count, self.rows = seed, count, rows

    def __iter__(self):
        for start in range(0, self.count, self.rows):
            random_numbers = np.random.default_rng((self.seed, start))
            rows = min(self.rows, self.count - start)
            time.sleep(PAUSE)
            yield {
                "x": random_numbers.normal(size=(rows, 8)).astype(np.float32),
                "y": random_numbers.integers(0, 3, rows).astype(np.int32),
            }


def command(path, solver):
    """Compute the scores into a store at `path`, and say on every step what is next."""
    import jax
    import jax.numpy as jnp

    import influence_jax as ij

    def predict(params, example):
        return jnp.tanh(example["x"] @ params["in"]) @ params["out"]

    def loss(logits, example):
        return jax.nn.logsumexp(logits) - logits[example["y"]]

    random_numbers = np.random.default_rng(0)
    sizes = {"in": (8, 8), "out": (8, 3)}
    params = {name: jnp.asarray(random_numbers.normal(size=size), jnp.float32) for name, size in sizes.items()}
    objective = ij.Objective(predict, loss)
    tell("fit")
    curvature, how = {
        "block_cg": (ij.GGN, ij.BlockCG(damping=0.1)),
        "ekfac": (ij.ekfac, ij.Direct(damping=0.1)),
    }[solver]
    inverse = ij.stream.invert(curvature, objective, params, Examples(1, 3 * ROWS, ROWS), how)
    influence = ij.Influence(objective, params, inverse)
    queries, loader = Examples(2, QUERIES, QUERY_ROWS), Examples(1, EXAMPLES, ROWS)
    ij.stream.scores(influence, queries, loader, telling_store(path), progress=False)


def tell(phase):
    os.write(1, f"{phase}\n".encode())


def telling_store(path):
    """A store that says what it is about to do."""
    from influence_jax import store

    class Telling(store.ScoreStore):
        def load_factors(self, *args):
            found = super().load_factors(*args)
            if found is None:
                tell("solve")
            return found

    def tell_around(name, before, after):
        def method(self, *args, **kwargs):
            tell(before)
            getattr(super(Telling, self), name)(*args, **kwargs)
            tell(after)

        setattr(Telling, name, method)

    tell_around("begin", "begin", "compute")
    tell_around("save_factors", "keep", "compute")
    tell_around("write", "write", "compute")
    tell_around("finish", "finish", "exit")
    return Telling.create(path)


class Run:
    """One start of the command."""

    def __init__(self, path, solver, cache):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.told = [("start", time.perf_counter())]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as the process may write
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--command", str(path), solver],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | settings,
        )

    def until_end(self):
        """Let it end, and return how long each phase took at every occurrence."""
        while self._step():
            pass
        self._require_success()
        stops = [moment for _, moment in self.told[1:]] + [time.perf_counter()]
        lengths = collections.defaultdict(list)
        for (phase, moment), stop in zip(self.told, stops, strict=True):
            lengths[phase].append(stop - moment)
        return lengths

    def killed(self, phase, occurrence, delay):
        """Kill it so long after that phase began for that many-th time; the phase it was in, None if it ended first."""
        while [name for name, _ in self.told].count(phase) <= occurrence:
            if not self._step():
                self._require_success()
                return None
        time.sleep(delay)
        self._process.send_signal(signal.SIGKILL)
        while self._step():
            pass
        if self._process.wait() != -signal.SIGKILL:
            self._require_success()
            return None
        return self.told[-1][0]

    def _step(self):
        line = self._process.stdout.readline()
        if line:
            self.told.append((line.decode().strip(), time.perf_counter()))
        return bool(line)

    def _require_success(self):
        if self._process.wait() != 0:
            self._log.seek(0)
            raise RuntimeError(f"the command failed:\n{self._log.read().decode()}")


class Reference:
    """The store of an uninterrupted run."""

    def __init__(self, folder, solver, cache):
        first, second = folder / f"first-{solver}", folder / f"second-{solver}"
        Run(first, solver, cache).until_end()  # compiles, so that the later ones start fast
        self.lengths = Run(second, solver, cache).until_end()
        self.files, self.scores, self.ledger = contents(second), whole(second), ledger(second)
        require(contents(first) == self.files, "two uninterrupted runs differ")

    def check_interrupted(self, path, before):
        """What is finished after a kill; it is right, and what was finished before is."""
        now = ledger(path)
        require(now[: len(before)] == before, f"records of the ledger were lost: {len(before)} before, {len(now)} now")
        require(all(record in self.ledger for record in now), "the ledger has a record that is not the reference's")
        chunks = {name: data for name, data in contents(path).items() if is_chunk(name)}
        wrong = [name for name, data in chunks.items() if data != self.files[name]]
        require(not wrong, f"chunks differ: {wrong}")
        finished = sum("factors" not in record for record in now)
        require(len(chunks) >= finished, f"{finished} chunks are finished, of which {len(chunks)} are there")
        return now, {
            "chunks": finished,
            "written, not yet in the ledger": len(chunks) - finished,
            "torn": (path / "ledger-0.jsonl").exists() and not (path / "ledger-0.jsonl").read_bytes().endswith(b"\n"),
        }

    def check_finished(self, path):
        """That the store is the reference, bit for bit; returns the names of files that interruptions left behind."""
        require(ledger(path) == self.ledger, "the ledgers differ")
        found = contents(path)
        differing = [name for name, data in self.files.items() if found.get(name) != data]
        require(not differing, f"files differ: {differing}")
        require(whole(path).tobytes() == self.scores.tobytes(), "the scores differ")
        return sorted(found.keys() - self.files.keys())


def require(condition, message):
    if not condition:
        raise AssertionError(message)


def contents(path):
    """The files of a store by name, except those that only say who writes."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith("lock-")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def is_chunk(name):
    return name.startswith("scores/c/") and name.split("/")[-1].isdigit()


def ledger(path):
    """Its records, one for each line that is whole."""
    from influence_jax.store.files import Ledger

    return Ledger(path / "ledger-0.jsonl").records


def whole(path):
    """All scores, read and checked by the library."""
    from influence_jax import store

    with store.ScoreStore.open(path) as found:
        require(found.complete, f"{path} is not complete")
        require(found.shape == (QUERIES, EXAMPLES), f"{path} has shape {found.shape}")
        return np.asarray(found)


def aim(reference, records):
    """A random moment: a phase that is still to come, which of its occurrences, and how long after it began.

    Of those that come often one of the next few, so that a store takes many kills before it is finished.  None, every
    other time, once there is nothing left to compute.
    """
    factors = sum("factors" in record for record in records)
    chunks = QUERY_BLOCKS * TRAIN_BLOCKS - (len(records) - factors)
    if chunks == 0 and random.random() < 0.5:
        return None
    coming = dict.fromkeys(PHASES, 1)
    coming |= {"solve": QUERY_BLOCKS - factors, "keep": QUERY_BLOCKS - factors, "write": chunks, "compute": chunks}
    weights = [AIMS[phase] * (coming[phase] > 0) for phase in PHASES]
    phase = random.choices(PHASES, weights)[0]
    occurrence = 0 if phase in ("solve", "keep") else random.randrange(min(coming[phase], NEXT))
    lengths = sorted(reference.lengths[phase])
    return phase, occurrence, random.uniform(0, lengths[len(lengths) // 2])


def experiment(kills, seconds, folder):
    """Kill and restart until there were so many kills or the time is over, then let the last store end."""
    began, hits, stores, leftovers = time.perf_counter(), [], 0, set()
    references = {}
    while not stores or (len(hits) < kills and time.perf_counter() - began < seconds):
        solver = SOLVERS[stores % len(SOLVERS)]
        if solver not in references:
            references[solver] = Reference(folder, solver, folder / "cache")
        reference, path, ended, records = references[solver], folder / f"store-{stores}", False, []
        while not ended:
            wanted = len(hits) < kills and time.perf_counter() - began < seconds
            aimed, run, phase = aim(reference, records) if wanted else None, Run(path, solver, folder / "cache"), None
            if aimed is None:
                run.until_end()
            else:
                phase = run.killed(*aimed)
            ended = phase is None
            records, state = reference.check_interrupted(path, records)
            if not ended:
                hits.append({"store": stores, "solver": solver, "phase": phase, **state})
        leftovers |= {Path(name).name for name in reference.check_finished(path)}
        stores += 1
    return {"hits": hits, "stores": stores, "leftovers": sorted(leftovers), "seconds": time.perf_counter() - began}


def table(figures):
    lines = ["| at | kills | chunks finished by then | chunk written, not yet in the ledger |", "|---" * 4 + "|"]
    for phase in PHASES:
        hits = [hit for hit in figures["hits"] if hit["phase"] == phase]
        if hits:
            chunks = sorted(hit["chunks"] for hit in hits)
            ahead = sum(hit["written, not yet in the ledger"] > 0 for hit in hits)
            lines.append(f"| {phase} | {len(hits)} | {chunks[0]} to {chunks[-1]} | {ahead} |")
    return "\n".join(lines)


def summary(figures):
    return (
        f"{len(figures['hits'])} kills, {figures['stores']} stores of {QUERY_BLOCKS * TRAIN_BLOCKS} chunks finished, "
        f"all bit-identical to an uninterrupted run ({figures['seconds']:.0f} s)"
    )


def save(figures, output):
    import jax
    import tensorstore

    about = {
        "jax": jax.__version__,
        "tensorstore": getattr(tensorstore, "__version__", None),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    output.write_text(json.dumps(about | figures, indent=1) + "\n")
    left = ", ".join(f"`{name}`" for name in figures["leftovers"]) or "none"
    notes = (
        f"{summary(figures)}.\nFiles that interruptions left beside those of the store: {left}.\n"
        f"jax {about['jax']}, Python {about['python']}, {about['cores']} cores, load {about['load']:.1f}."
    )
    output.with_suffix(".md").write_text(f"{table(figures)}\n\n{notes}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=900, help="after which the last store is let end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON; a table goes beside it")
    parser.add_argument("--command", nargs=2, metavar=("PATH", "SOLVER"), help="what is killed")
    arguments = parser.parse_args()
    if arguments.command:
        command(*arguments.command)
        return
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        figures = experiment(arguments.kills, arguments.seconds, Path(folder))
    require(figures["hits"] or not arguments.kills, "no kill hit before the time was over")
    if arguments.output:
        save(figures, arguments.output)
    print(summary(figures))


if __name__ == "__main__":
    main()
