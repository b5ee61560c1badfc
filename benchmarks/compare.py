"""influence_jax beside pyDVL and kronfluence: the same weights and data, one core each, errors against exact answers.

    python benchmarks/compare.py [--only METHOD ...] [--quick] [--peers PYTHON] [--output PATH]

Writes one table and one chart, `benchmarks/results/compare.md` and `.png`, with all figures in `compare.json`.  Takes
some 20 minutes; interrupted, the same command continues.  What fails is told in the table.  Without `--peers`, an
environment is made once from `comparison/requirements.txt`.  With `--quick` small problems are run through once, in two
minutes.  A part of the comparison goes to `compare_part` beside the whole, unless an output is named.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from comparison import report, running
from comparison.methods import METHODS, QUICK

RESULTS = Path(__file__).parent / "results"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--quick", action="store_true", help="small problems, few methods and settings")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has torch, pyDVL and kronfluence")
    parser.add_argument("--output", type=Path, help="where results go, with .json, .md and .png for an ending")
    given = parser.parse_args()
    if given.peers and not shutil.which(given.peers):
        parser.error(f"--peers: {given.peers} is no program")
    part = given.only or given.quick
    given.output = (given.output or RESULTS / ("compare_part" if part else "compare")).resolve().with_suffix("")
    given.only = given.only or (list(QUICK) if given.quick else list(METHODS))
    return given


def told(row):
    """A row as progress."""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    return f"{row['warm_cpu_s']:.3f} CPU s warm, {row['cold_cpu_s']:.2f} cold, error {row['error']:.1e}"


def write(results, output):
    from comparison import chart

    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    chart.draw(results, output.with_suffix(".png"))
    output.with_suffix(".md").write_text(report.markdown(results, output.with_suffix(".png").name))


def main():
    given = arguments()
    python = os.path.abspath(shutil.which(given.peers)) if given.peers else running.peers_python()
    about = running.versions(python)
    kept = running.Kept(given.output.with_suffix(".quick" if given.quick else ".work"), about)
    if kept.start["load"] > report.BUSY:
        print(f"WARNING: the machine is not idle, load {kept.start['load']:.2f}; times are worth little", flush=True)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # for all that is started from here
    runner, began = running.Runner(kept.folder, python, given.quick), time.monotonic()
    for i, name in enumerate(given.only):
        method = METHODS[name]
        for side in method.sides:
            before = kept.rows.get((name, side))
            if not before:
                kept.add(runner.row(method, side))
            state = told(kept.rows[name, side]) + (", kept" if before else "")
            print(f"[{time.monotonic() - began:5.0f} s, {i + 1}/{len(given.only)}] {name}, {side}: {state}", flush=True)
    rows = [kept.rows[name, side] for name in given.only for side in METHODS[name].sides]
    results = {"header": running.header(kept, about, given.quick), "rows": rows}
    write(results, given.output)
    kept.remove()
    print("\n".join([report.table(results), *report.means(results), *report.behind(results)]))


if __name__ == "__main__":
    main()
