"""EK-FAC and scores by 1, 2 and 4 processes on this machine: `python benchmarks/processes.py`.

The classifier and the made-up examples of `streaming.py`, one CPU device for each process, started by the launcher of
`examples/processes.py`.  Every process makes its own rows of each batch; one store holds the scores, which are compared
with those of one process.  Times are of the second run, compiled; processes share the cores that there are.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np
import streaming  # beside this file

HERE = pathlib.Path(__file__).parent
ROWS, COUNT, WARM = 512, 20_480, 2_048
PROCESSES = (1, 2, 4)


class Share:
    """This process's rows of every batch."""

    def __init__(self, count, number, processes):
        self.count, self.rows = count, slice(number * ROWS // processes, (number + 1) * ROWS // processes)

    def __iter__(self):
        for batch in streaming.Examples(self.count, ROWS):
            yield {name: leaf[self.rows] for name, leaf in batch.items()}


def work(arguments):
    """Of one of the processes."""
    import jax

    import influence_jax as ij

    ij.stream.connect(arguments.coordinator, arguments.processes, arguments.process, timeout=arguments.timeout)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    options = {"batch_size": ROWS, "sharding": sharding}
    objective, params = streaming.problem()
    params = jax.tree.map(np.asarray, params)
    query = streaming.batch_of(10**6, streaming.QUERIES)
    figures = {}
    for name, count in (("warm", WARM), ("scores", COUNT)):
        loader = Share(count, arguments.process, arguments.processes)
        began = [time.perf_counter(), time.process_time()]
        curvature = ij.stream.ekfac(objective, params, loader, **options)
        jax.block_until_ready(curvature)
        fitted = [time.perf_counter(), time.process_time()]
        influence = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(ij.RelativeDamping(0.1))))
        store = ij.store.ScoreStore.create(arguments.out.with_name(f"{arguments.out.name}-{name}"))
        ij.stream.scores(influence, query, loader, store, progress=False, **options)
        ended = [time.perf_counter(), time.process_time()]
        for what, start, stop in (("ekfac", began, fitted), ("scores", fitted, ended)):
            figures[what] = {
                kind: 1e6 * (b - a) / count for kind, a, b in zip(("wall", "cpu"), start, stop, strict=True)
            }
    arguments.out.with_name(f"{arguments.out.name}-{arguments.process}.json").write_text(json.dumps(figures))


def measure(launch, processes, folder):
    """Figures of so many processes, and their scores."""
    import influence_jax as ij

    out = folder / str(processes)
    code = launch(argparse.Namespace(processes=processes, devices=1, timeout=60.0, out=out), str(HERE / "processes.py"))
    if code:
        raise SystemExit(f"{processes} processes: one failed")
    parts = [json.loads((folder / f"{out.name}-{number}.json").read_text()) for number in range(processes)]
    rows = [
        {
            "what": what,
            "processes": processes,
            "wall_us": max(part[what]["wall"] for part in parts),
            "cpu_us": sum(part[what]["cpu"] for part in parts),
        }
        for what in ("ekfac", "scores")
    ]
    return rows, np.asarray(ij.store.ScoreStore.open(folder / f"{out.name}-scores"))


def main():
    spec = importlib.util.spec_from_file_location("launcher", HERE.parent / "examples" / "processes.py")
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    arguments = launcher.parse()
    if arguments.worker:
        work(arguments)
        return
    import jax

    rows, differences, first = [], {}, None
    with tempfile.TemporaryDirectory() as folder:
        for processes in PROCESSES:
            found, scores = measure(launcher.launch, processes, pathlib.Path(folder))
            rows += found
            first = scores if first is None else first
            differences[processes] = float(np.max(np.abs(scores - first)) / np.max(np.abs(first)))
    names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    about = (
        f"{COUNT:,} examples in batches of {ROWS}, {streaming.QUERIES} queries; µs per example, CPU summed over "
        f"processes.  {names[0].split(': ')[1]}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} "
        f"at the end; jax {jax.__version__}, Python {platform.python_version()}."
    )
    table = [
        "| computation | processes | wall, µs each | CPU, µs each | scores differ from one process by |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        told = f"{differences[row['processes']]:.1e}" if row["what"] == "scores" else ""
        table.append(f"| {row['what']} | {row['processes']} | {row['wall_us']:.1f} | {row['cpu_us']:.1f} | {told} |")
    text = "\n".join([*table, "", about])
    print(text)
    (HERE / "results" / "processes.md").write_text(text + "\n")
    figures = {"rows": rows, "differences": differences, "about": about}
    (HERE / "results" / "processes.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
