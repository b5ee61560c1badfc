"""K-FAC and EK-FAC of influence_jax beside kronfluence and pyDVL: the same weights, data and damping, one core each.

    python benchmarks/kronecker [--peer PYTHON] [--only CASE ...] [--output benchmarks/results/kronecker.json]

Without `--peer` an environment with the peers is made next to this file, once.  Of the peers' batch sizes the fastest
counts, for the fit (Kronecker factors, their eigendecomposition, for EK-FAC the corrected eigenvalues) and for the
scores (gradients of queries, preconditioning, products with all training gradients) apart.

* `digits_*`: a digits network 64-128-64-10, 50 queries, 1500 training examples, damping 0.01.  Errors are against the
  same method with the same labels in float64, and against scores with the Gauss-Newton matrix itself.  Sampled labels
  are held against their expectation.  pyDVL has labels of its own kind, and is compared with our `exact`.
* `transformer_ekfac`: two blocks of width 64, 64 tokens of a vocabulary of 256, 16 queries, 512 training sequences,
  labels of the data, a damping of a tenth of each layer's mean eigenvalue.  kronfluence covers linear layers, so
  embeddings and normalisations are fixed in both.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import stages  # noqa: F401, finds what the benchmark beside is made of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from side_by_side.__main__ import environment, peers, processor  # noqa: E402

SCRIPTS = {"ours": "ours.py", "kronfluence": "with_kronfluence.py", "pyDVL": "with_pydvl.py"}
EMPIRICAL = ("empirical", "kronfluence", "empirical")
# Our labels, and the peer with the labels to compare them with.
DIGITS = [("exact", "pyDVL", "pseudo"), ("sampled", "kronfluence", "sampled"), EMPIRICAL]
# For each case: the problem, the method, and the comparisons.
CASES = {
    "digits_ekfac": ("digits", "ekfac", DIGITS),
    "digits_kfac": ("digits", "kfac", DIGITS),
    "transformer_ekfac": ("transformer", "ekfac", [EMPIRICAL]),
}
BATCHES = {"digits": (50, 250, 1500), "transformer": (16, 64, 256)}
# pyDVL's gradients of n examples cost n² backward passes of one: of 1500 at once, 20 times those of 50 at a time.
SMALL = (10, 50, 250)
STAGES = ("fit", "score")
NOTES = """\
CPU seconds, warm but for `cold`, where the first call compiles; memory above what was there before.  kronfluence's
collections of garbage are all but left out.  pyDVL's labels are of its own kind.

`apart` is the relative distance of the two sides' scores, `error` that of each to the same method in float64, sampled
labels to their expectation, of which one draw is a rough estimate: some twenty labels of 1500 differ from the model's
first choice.  `to GGN` is the distance to the scores with the Gauss-Newton matrix itself, with the mean correlation of
a query's scores with those."""


def settings(side, which, stage):
    """What is tried, and the fastest of which counts."""
    if side == "ours":
        return [{}]
    sizes = SMALL if (side, stage) == ("pyDVL", "score") else BATCHES[which]
    return [{"batch_size": size} for size in sizes]


def measure(python, folder, case, side, labels, stage, setting):
    """Figures and answer of one stage of one side, in a process of its own."""
    which, kind, _ = CASES[case]
    output = folder / "answer"
    arguments = [folder / f"{which}.npz", kind, labels, stage, json.dumps(setting), output]
    command = [python, HERE / SCRIPTS[side], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{side} {case} {labels} {stage} {setting} failed:\n{done.stderr[-2000:]}")
    figures = json.loads(output.with_suffix(".json").read_text())
    return figures | {"setting": setting}, np.load(output.with_suffix(".npy"))


def distance(answer, exact):
    return float(np.linalg.norm(answer - exact) / np.linalg.norm(exact))


def errors(answer, problem, kind, labels):
    """Distances to the method in float64 and to Gauss-Newton, and a query's mean correlation with that."""
    same = problem[f"{kind}_exact" if labels == "sampled" else f"{kind}_{labels}"]
    figures = {"error": distance(answer, same)}
    if "ggn" in problem:
        rows = zip(answer, problem["ggn"], strict=True)
        correlation = np.mean([np.corrcoef(*pair)[0, 1] for pair in rows])
        figures |= {"to_ggn": distance(answer, problem["ggn"]), "correlation": float(correlation)}
    return figures


def best(python, folder, case, side, labels):
    """Figures of one side, each stage at its fastest setting, and its scores."""
    which, kind, _ = CASES[case]
    figures = {"side": side, "labels": labels}
    for stage in STAGES:
        tries = [measure(python, folder, case, side, labels, stage, each) for each in settings(side, which, stage)]
        figures[stage], answer = min(tries, key=lambda pair: pair[0]["cpu_s"])
    return figures | errors(answer, dict(np.load(folder / f"{which}.npz")), kind, labels), answer


def compare(python, folder, case):
    """All comparisons of a case."""
    rows = []
    for labels, side, its_labels in CASES[case][2]:
        ours, our_scores = best(sys.executable, folder, case, "ours", labels)
        theirs, its_scores = best(python, folder, case, side, its_labels)
        rows.append({"ours": ours, "peer": theirs, "apart": distance(its_scores, our_scores)})
        costs = (f"{stage} {ours[stage]['cpu_s']:.3f} against {theirs[stage]['cpu_s']:.3f}" for stage in STAGES)
        print(f"{case}, {labels}, {side}: CPU seconds of {', of '.join(costs)}", flush=True)
    return rows


def versions(python):
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    names = ["torch", "kronfluence", "pydvl", "numpy"]
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    ours = {name: importlib.metadata.version(name) for name in ("influence_jax", "jax", "jaxlib", "flax", "numpy")}
    return {"ours": ours | {"python": platform.python_version()}, "peer": json.loads(found.stdout)}


def seconds(side):
    """What ratios are taken of: fit, scores, and the first call of both, which compiles."""
    fit, score = side["fit"], side["score"]
    return [fit["cpu_s"], score["cpu_s"], fit["cold_cpu_s"] + score["cold_cpu_s"]]


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def table(results):
    """Two tables in Markdown, of costs and of errors, and the geometric means of the ratios."""
    costs, distances, ratios = [], [], {}
    for case, rows in results["cases"].items():
        for row in rows:
            sides = row["ours"], row["peer"]
            peer, first = row["peer"]["side"], [case, row["ours"]["labels"], row["peer"]["side"]]
            pairs = list(zip(*map(seconds, sides), strict=True))
            ratios.setdefault(peer, []).append([theirs / ours for ours, theirs in pairs])
            costs.append([*first, *(f"{x:.3f} | {y:.3f} | {y / x:.1f}" for x, y in pairs)])
            costs[-1] += [" | ".join(f"{side[stage]['peak_mb']:.0f}" for side in sides) for stage in STAGES]
            costs[-1].append(", ".join(str(row["peer"][stage]["setting"]["batch_size"]) for stage in STAGES))
            distances.append([*first, f"{row['apart']:.1e}"])
            for field, form in (("error", ".1e"), ("to_ggn", ".2f"), ("correlation", ".2f")):
                distances[-1].append(" | ".join(format(side[field], form) if field in side else "" for side in sides))
    first = ["case", "labels", "peer"]
    head = [*first, *(f"{name} | peer | ratio" for name in ("fit", "scores", "cold, both"))]
    head += [f"peak MB, {stage} | peer" for stage in ("fit", "scores")]
    text = [markdown([cell for part in [*head, "its batches"] for cell in part.split(" | ")], costs), NOTES]
    head = [*first, "apart", *(f"{name} | peer" for name in ("error", "to GGN", "correlation"))]
    text.append(markdown([cell for part in head for cell in part.split(" | ")], distances))
    for peer, rows in ratios.items():
        fit, scores, cold = np.exp(np.mean(np.log(rows), axis=0))
        text.append(f"{peer}, geometric means of the ratios: {fit:.1f} fit, {scores:.1f} scores, {cold:.1f} cold.")
    named = [" ".join(pair) for side in results["versions"].values() for pair in side.items()]
    return "\n\n".join([*text, f"{results['processor']}; {', '.join(named)}."])


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--peer", help="a Python that has torch, kronfluence and pydvl")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "kronecker.json")
    arguments = parser.parse_args()
    python = arguments.peer or peers(HERE)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # for all that is started from here
    results = {"processor": processor(), "versions": versions(python), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for which in {CASES[case][0] for case in arguments.only}:
            subprocess.run([sys.executable, HERE / f"{which}.py", folder / f"{which}.npz"], check=True)
        for case in arguments.only:
            results["cases"][case] = compare(python, folder, case)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
            arguments.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
