"""Cost of data that are read batch by batch, by their number: `python benchmarks/streaming.py [--small]`.

A classifier 64-64-10 in float32 and examples made from the number of their batch, so that no data set is anywhere.  For
scores of 100 queries into a store, the top 10, EK-FAC and a solve by block CG: wall and CPU time per example, and the
anonymous memory of the process, sampled while it runs, above what it had after a warm-up on four batches.  Then the top
10 against a stable sort of the stored scores, the store's writing against plain files, and 1 to 8 host devices.  Every
measurement is made in a process of its own.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COUNTS, BASE = (1_000, 10_000, 50_000, 200_000), 10_000  # memory is compared with that at BASE
DEVICES = (1, 2, 4, 8)
SIZES = (64, 64, 10)
REPEATS = 20  # of the run at BASE, so that its peak is looked for as long as that at 200,000
ROWS, QUERIES, K, STEPS, WARM_BATCHES = 500, 100, 10, 5, 4
SHARED_ROWS, SHARED_COUNT = 512, 20_480  # of blocks that 8 devices can share
CHUNKS = {"100 x 500": (500, 400), "100 x 5,000": (5_000, 40)}  # examples in a chunk, chunks
WORK = ("scores", "top_k", "ekfac", "block_cg")
PAUSE = 0.02  # seconds between two looks at the memory


class Examples:
    """Examples made from the number of their batch; every eighth batch is the one before again, so that scores tie."""

    def __init__(self, count, rows=ROWS):
        self.count, self.rows = count, rows

    def __iter__(self):
        for number, start in enumerate(range(0, self.count, self.rows)):
            yield batch_of(number - (number % 8 == 7), min(self.rows, self.count - start))


def batch_of(number, rows):
    random_numbers = np.random.default_rng(number)
    return {
        "x": random_numbers.standard_normal((rows, SIZES[0]), np.float32),
        "y": random_numbers.integers(0, SIZES[-1], rows, np.int32),
    }


def anonymous_mb():
    """Memory of this process that is backed by no file; /proc's sums over threads are exact in smaps_rollup only."""
    return int(re.search(r"Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text()).group(1)) / 1024


def live_mb():
    """Anonymous memory without what the allocator holds for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_mb()


class Sampled:
    """Anonymous memory while something runs: the most, and the median of each half."""

    def __enter__(self):
        self.samples, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        while True:
            self.samples.append(anonymous_mb())
            if self._stop.wait(PAUSE):
                return

    def figures(self):
        half = len(self.samples) // 2
        first, second = (float(np.median(part)) for part in (self.samples[: half + 1], self.samples[half:]))
        return {"peak_mb": max(self.samples), "first_half_mb": first, "second_half_mb": second}


def problem():
    """Objective and parameters."""
    import jax
    import jax.numpy as jnp

    import influence_jax as ij

    def predict(params, example):
        hidden = jnp.tanh(example["x"] @ params["in"]["kernel"] + params["in"]["bias"])
        return hidden @ params["out"]["kernel"] + params["out"]["bias"]

    def loss(logits, example):
        return jax.nn.logsumexp(logits) - logits[example["y"]]

    random_numbers = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(random_numbers.standard_normal((rows, columns), np.float32) / np.sqrt(rows)),
            "bias": jnp.zeros(columns),
        }
        for name, rows, columns in zip(("in", "out"), SIZES, SIZES[1:], strict=False)
    }
    return ij.Objective(predict, loss), params


def work(what, devices=None):
    """`run(count, path)` of one of the computations."""
    import jax

    import influence_jax as ij
    from influence_jax import store

    objective, params = problem()
    rows, sharding = ROWS, None
    if devices is not None:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
        rows, sharding = SHARED_ROWS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    query = batch_of(10**6, QUERIES)
    curvature = ij.stream.ekfac(objective, params, Examples(2 * rows, rows), sharding=sharding)
    influence = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(ij.RelativeDamping(0.1))))

    def scores(count, path):
        sink = store.ScoreStore.create(path)
        return ij.stream.scores(influence, query, Examples(count, rows), sink, progress=False, sharding=sharding)

    def top_k(count, _):
        return ij.stream.top_k(influence, query, Examples(count, rows), K, progress=False, sharding=sharding)

    def ekfac(count, _):
        return ij.stream.ekfac(objective, params, Examples(count, rows), sharding=sharding)

    def block_cg(count, _):
        solver = ij.BlockCG(damping=0.01, rtol=1e-9, max_steps=STEPS)
        inverse = ij.stream.invert(ij.GGN, objective, params, Examples(count, rows), solver, sharding=sharding)
        gradients = jax.vmap(jax.grad(objective), (None, 0))(params, jax.tree.map(lambda x: x[:10], query))
        return inverse.solve_many(gradients)[0]

    return {"scores": scores, "top_k": top_k, "ekfac": ekfac, "block_cg": block_cg}[what]


def measure(what, count, folder, devices=None):
    """Figures of one computation, in this process."""
    import jax

    rows = ROWS if devices is None else SHARED_ROWS
    run, target = work(what, devices), Path(folder) / f"{what}-{count}{'' if devices is None else f'-{devices}'}"
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("first", "second"):
            jax.block_until_ready(run_on(run, WARM_BATCHES * rows, Path(scratch) / name))
    repeats = REPEATS if count == BASE else 1
    warm = live_mb()
    with Sampled() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        for turn in range(repeats):
            result = run_on(run, count, target if turn == 0 else Path(f"{target}-{turn}"))
            jax.block_until_ready(result)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = {"what": what, "count": count, "repeats": repeats}
    figures |= {"wall_us": 1e6 * wall / (count * repeats), "cpu_us": 1e6 * cpu / (count * repeats)}
    figures |= {"warm_mb": warm, "kept_mb": live_mb() - warm, **memory.figures(), "load": os.getloadavg()[0]}
    if devices is not None:
        figures["devices"] = len(jax.devices())
    if what == "top_k":
        np.savez(Path(folder) / f"top_k-{count}.npz", values=result.values, indices=result.indices)
    return figures


def run_on(run, count, path):
    """What the computation returns; of a store nothing that could be awaited."""
    result = run(count, path)
    return None if hasattr(result, "path") else result


def compare(count, folder):
    """The streamed top k against a stable sort of all stored scores."""
    from influence_jax import store

    found = np.load(Path(folder) / f"top_k-{count}.npz")
    with store.ScoreStore.open(Path(folder) / f"scores-{count}") as stored:
        dense = np.asarray(stored)
    order = np.argsort(-dense, axis=1, kind="stable")[:, :K]
    values = np.take_along_axis(dense, order, axis=1)
    return {
        "queries": len(dense),
        "count": dense.shape[1],
        "indices_equal": bool((found["indices"] == order).all()),
        "largest_relative_difference": float(np.max(np.abs(found["values"] - values) / np.abs(values))),
        "ties": int((values[:, 1:] == values[:, :-1]).sum()),
    }


def write_stored(path, chunks):
    from influence_jax import store

    with store.ScoreStore.create(path) as sink:
        rows = chunks[0].shape[1]
        sink.begin({"what": "noise"}, queries=QUERIES, query_rows=QUERIES, train_rows=rows, dtype="float32")
        for number, chunk in enumerate(chunks):
            sink.write(0, number, chunk, data="")
        sink.finish(rows * len(chunks))


def write_plainly(path, chunks):
    path.mkdir()
    for number, chunk in enumerate(chunks):
        with open(path / str(number), "wb") as file:
            file.write(chunk)
            os.fsync(file.fileno())


def throughput(folder):
    """MB/s of chunks into a store and into plain files, each forced to disk, by turns; medians of five."""
    rows = []
    for name, (length, number) in CHUNKS.items():
        random_numbers = np.random.default_rng(0)
        chunks = [random_numbers.standard_normal((QUERIES, length), np.float32) for _ in range(number)]
        ways = {"store": write_stored, "plain files": write_plainly}
        megabytes, seconds = sum(chunk.nbytes for chunk in chunks) / 1e6, {way: [] for way in ways}
        for turn in range(6):
            for way, write in ways.items():
                began = time.perf_counter()
                write(Path(folder) / f"{way}-{length}-{turn}", chunks)
                if turn:  # the first one imports
                    seconds[way].append(time.perf_counter() - began)
        speeds = {way: megabytes / float(np.median(times)) for way, times in seconds.items()}
        rows.append({"chunk": name, "chunk_mb": megabytes / number, "chunks": number, **speeds})
    return rows


def in_process(*command, devices=None):
    """The figures that this program prints when called like this."""
    settings = {"JAX_PLATFORMS": "cpu"}
    if devices is not None:
        settings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, *map(str, command)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(run.stdout)


def growth(rows):
    """Of each computation, the most anonymous memory above warm-up on more data against that on less."""
    found = {}
    for what in WORK:
        found_rows = {row["count"]: row for row in rows if row["what"] == what}
        small, large = found_rows[BASE], found_rows[max(found_rows)]
        above = [row["peak_mb"] - row["warm_mb"] for row in (small, large)]
        found[what] = {
            "counts": [small["count"], large["count"]],
            "above_warm_mb": above,
            "percent_of_warm": 100 * (above[1] - above[0]) / small["warm_mb"],
        }
    return found


def tables(figures):
    names = (
        "computation",
        "examples",
        "wall, µs each",
        "CPU, µs each",
        "after warm-up, MB",
        "peak above, MB",
        "kept, MB",
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in figures["rows"]:
        cells = f"{row['what']} | {row['count']:,} | {row['wall_us']:.1f} | {row['cpu_us']:.1f} | {row['warm_mb']:.0f}"
        lines.append(f"| {cells} | {row['peak_mb'] - row['warm_mb']:.1f} | {row['kept_mb']:.1f} |")
    lines += ["", "| computation | examples | growth of the peak above warm-up, MB | of memory after warm-up |"]
    lines.append("|---" * 4 + "|")
    for what, grown in figures["growth"].items():
        small, large = grown["above_warm_mb"]
        counts = " to ".join(f"{count:,}" for count in grown["counts"])
        lines.append(f"| {what} | {counts} | {small:.1f} to {large:.1f} | {grown['percent_of_warm']:+.1f} % |")
    lines += ["", "| chunk | MB | chunks | store, MB/s | plain files, MB/s | ratio |", "|---" * 6 + "|"]
    for row in figures["throughput"]:
        store, plain = row["store"], row["plain files"]
        cells = f"{row['chunk']} | {row['chunk_mb']:.1f} | {row['chunks']}"
        lines.append(f"| {cells} | {store:.0f} | {plain:.0f} | {store / plain:.2f} |")
    lines += ["", "| computation | host devices | wall, µs each | CPU, µs each |", "|---" * 4 + "|"]
    for row in figures["devices"]:
        lines.append(f"| {row['what']} | {row['devices']} | {row['wall_us']:.1f} | {row['cpu_us']:.1f} |")
    return "\n".join(lines)


def notes(figures):
    top = figures["top_k"]
    loads = [row["load"] for row in figures["rows"] + figures["devices"]]
    same = "the same indices" if top["indices_equal"] else "OTHER INDICES"
    return (
        f"Batches of {ROWS} ({SHARED_ROWS} on several devices), {QUERIES} queries; block CG: {STEPS} iterations for 10 "
        f"right-hand sides.  Memory is anonymous, after warm-up and at the end without the allocator's reserves.\n"
        f"{BASE:,} examples are run {REPEATS} times in a row, so that their peak is looked for as long as others'.\n"
        f"Top {K} of {top['count']:,} examples for {top['queries']} queries against a stable sort of stored scores: "
        f"{same}, values within {top['largest_relative_difference']:.1e}, {top['ties']} ties among them.\n"
        f"The devices share {figures['cores']} cores, so no more than {figures['cores']} can help.\n"
        f"{figures['processor']}, {figures['cores']} cores, load {min(loads):.1f} to {max(loads):.1f} by other work; "
        f"jax {figures['jax']}, Python {figures['python']}."
    )


def all_figures(counts, folder):
    import jax

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    figures = {
        "processor": names[0].split(": ")[1],
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rows": [],
        "devices": [],
    }
    for what in WORK:
        for count in counts:
            figures["rows"].append(in_process("--one", what, count, folder))
            print(json.dumps(figures["rows"][-1]), flush=True)
    figures["growth"] = growth(figures["rows"])
    figures["top_k"] = in_process("--compare", counts[-1], folder)
    print(json.dumps(figures["top_k"]), flush=True)
    figures["throughput"] = throughput(folder)
    for what in ("scores", "ekfac"):
        for devices in DEVICES:
            row = in_process("--shared", what, SHARED_COUNT, folder, devices, devices=devices)
            figures["devices"].append(row)
            print(json.dumps(row), flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="up to 10,000 examples")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "streaming.json")
    one = parser.add_argument_group("one measurement, as JSON")
    one.add_argument("--one", nargs=3, metavar=("WHAT", "COUNT", "FOLDER"))
    one.add_argument("--shared", nargs=4, metavar=("WHAT", "COUNT", "FOLDER", "DEVICES"))
    one.add_argument("--compare", nargs=2, metavar=("COUNT", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.one or arguments.shared:
        what, count, folder, *devices = arguments.one or arguments.shared
        print(json.dumps(measure(what, int(count), folder, *map(int, devices))))
    elif arguments.compare:
        print(json.dumps(compare(int(arguments.compare[0]), arguments.compare[1])))
    else:
        counts = [count for count in COUNTS if count <= 10_000] if arguments.small else COUNTS
        with tempfile.TemporaryDirectory() as folder:
            figures = all_figures(counts, folder)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(f"{tables(figures)}\n\n{notes(figures)}\n")
        print(f"{tables(figures)}\n\n{notes(figures)}")


if __name__ == "__main__":
    main()
