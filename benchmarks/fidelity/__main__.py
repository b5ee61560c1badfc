"""Do scores predict what retraining does?  `python benchmarks/fidelity [--peer PYTHON] [--small]`.

Digits, 1000 training examples, 100 queries; a softmax regression trained to its optimum at two penalties, and a network
64-32-10 trained by minibatches with ten seeds.  Ground truth by retraining: losses of all queries after training on 100
random halves, and without one of 50 examples.  Of every method the linear datamodeling score (Spearman over the halves,
of the mean over seeds) and the leave-one-out correlation (Pearson), means over queries with 95 % intervals by bootstrap
over queries.  What is compared is of one size, halves or all but one, so that both kinds of removal rank alike.
Dampings are chosen by the score on 50 other queries.  With `--peer`, the Python of an environment with torch,
kronfluence and pyDVL, their scores of the same weights are held against the same outcomes.
"""

import argparse
import json
import logging
import os
import pathlib
import platform
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import methods
import numpy as np
import problems

import influence_jax as ij

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results"
SUBSETS, LEFT_OUT, DROPPED, FEW = 100, 50, 10, 50
DAMPINGS = (1e-1, 1e-2, 1e-3)
KEY = jax.random.key(0)


class Truth:
    """Outcomes of retraining, and the models whose scores are to predict them."""

    def __init__(self, recipe, train, query, tuning, counts):
        keys = jax.random.split(jax.random.key(1), recipe.seeds)
        self.query, self.tuning, self.count = query, tuning, len(query["y"])
        both = jax.tree.map(lambda *x: jnp.concatenate(x), query, tuning)
        self.halves = ij.retrain.subsets(problems.TRAIN, 0.5, counts[0], KEY)
        self.ones = ij.retrain.leave_one_out(problems.TRAIN, np.arange(counts[1]) * (problems.TRAIN // counts[1]))
        measure = jax.tree_util.Partial(problems.losses, both)
        began = time.perf_counter()
        self.on_halves = ij.retrain.retrain(recipe.training(train), self.halves, keys, measure, progress=False)
        # In the same order with or without the one, else its effect would drown in that of the order.
        shared = recipe.training(train, "shared")
        self.without_one = ij.retrain.retrain(shared, self.ones, keys, measure, progress=False)
        self.seconds = time.perf_counter() - began
        self.runs = self.on_halves.shape[0] * recipe.seeds + self.without_one.shape[0] * recipe.seeds
        self.models = ij.retrain.retrain(shared, np.ones((1, problems.TRAIN), bool), keys, progress=False)
        self.models = jax.tree.map(lambda x: jnp.asarray(x[0]), self.models)
        self.keys = keys

    def first(self):
        """The model of the first seed."""
        return jax.tree.map(lambda x: x[0], self.models)

    def figures(self, name, scores, damping=None):
        """Measures of scores of the queries."""
        halves = self.on_halves[..., : self.count]
        of_halves = ij.metrics.lds_summary(scores, self.halves, halves, key=KEY)
        ones = self.without_one[..., : self.count]
        of_ones = ij.metrics.lds_summary(scores, self.ones, ones, key=KEY, method="pearson")
        row = {"method": name, "damping": damping}
        for what, found in (("lds", of_halves), ("loo", of_ones)):
            low, high = found.over_queries
            row[what] = [float(found.mean), float(low), float(high), *map(float, found.over_subsets)]
        return row

    def tuned(self, scores_at):
        """The damping whose scores of the other queries predict best."""
        halves = self.on_halves[..., self.count :]
        quality = {d: float(jnp.mean(ij.metrics.lds(scores_at(d), self.halves, halves))) for d in DAMPINGS}
        return max(quality, key=lambda d: quality[d])

    def ceiling(self):
        """The mean over queries of the highest score that the noise of seeds allows."""
        halves = self.on_halves[..., : self.count]
        return float(jnp.mean(ij.metrics.seed_ceiling(halves, key=KEY))) if halves.shape[1] > 1 else None


def of_methods(recipe, truth, train):
    """Figures of all methods, at one model and for ensembles."""
    rows = []
    for method in methods.METHODS:
        kinds = [(method.name, lambda q, d, m=method: m.scores(truth.first(), train, q, d))]
        if recipe.seeds > 1:
            several = lambda q, d, m=method: methods.ensemble(m, truth.models, train, q, d)
            kinds.append((f"{method.name}; {recipe.seeds} models", several))
        for name, scores in kinds:
            began = time.perf_counter()
            damping = None
            if method.damped:  # at an optimum the penalty is the damping
                tune = not recipe.convex or method.name.startswith("TRAK")
                damping = truth.tuned(lambda d, s=scores: s(truth.tuning, d)) if tune else recipe.penalty
            rows.append(truth.figures(name, scores(truth.query, damping), damping))
            print(f"{recipe.name}: {rows[-1]} in {time.perf_counter() - began:.0f} s", flush=True)
    if recipe.seeds > 1:
        rows.append(truth.figures("TracIn, 6 checkpoints", methods.tracin(recipe, train, truth.query, truth.keys[0])))
        shared = recipe.training(train, "shared")
        of_one = lambda key: ij.unrolled.influences(shared, truth.query, key=key)
        rows.append(truth.figures("unrolled", of_one(truth.keys[0])))
        mean = sum(of_one(key) for key in truth.keys) / recipe.seeds
        rows.append(truth.figures(f"unrolled; {recipe.seeds} models", mean))
        print(rows[-3:], flush=True)
    return rows


def fixed_seed(recipe, truth, train, few, subsets):
    """One training, its order kept, without a hundredth of the examples."""
    query = jax.tree.map(lambda x: x[:few], truth.query)
    masks = ij.retrain.leave_k_out(problems.TRAIN, DROPPED, subsets, jax.random.key(2))
    shared, key = recipe.training(train, "shared"), truth.keys[0]
    measure = jax.tree_util.Partial(problems.losses, query)
    outcomes = ij.retrain.retrain(shared, masks, key, measure, progress=False)
    found, params = {}, truth.first()
    scores = {"unrolled": ij.unrolled.influences(shared, query, key=key)}
    for method in methods.METHODS:
        scores[method.name] = method.scores(params, train, query, 1e-2)
    for name, rows in scores.items():
        summary = ij.metrics.lds_summary(rows, masks, outcomes, key=KEY)
        found[name] = [float(summary.mean), *map(float, summary.over_queries)]
    return found


def rates(recipe, train):
    """Trainings a minute, each way, once compiled."""
    masks = ij.retrain.subsets(problems.TRAIN, 0.5, 32, KEY)
    measure = jax.tree_util.Partial(problems.losses, train)
    found = {}
    for how in ("each", "map", "vmap"):
        run = lambda n, how=how: ij.retrain.retrain(
            recipe.training(train), masks[:n], KEY, measure, how=how, group=8, progress=False
        )
        run(8)
        began = time.perf_counter()
        run(32)
        found[how] = 60 * 32 / (time.perf_counter() - began)
    return found


def of_peers(python, recipe, truth, train):
    """Figures of the peers' scores of the first model."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        layers = [layer for _, layer in sorted(truth.first().items())]
        leaves = {f"{name}{i}": x for i, layer in enumerate(layers) for name, x in layer.items()}
        sizes = [layers[0]["kernel"].shape[0], *(len(layer["bias"]) for layer in layers)]
        arrays = {"x": train["x"], "y": train["y"], "query_x": truth.query["x"], "query_y": truth.query["y"]}
        np.savez(folder / "problem.npz", sizes=sizes, **arrays, **leaves)
        dampings = [recipe.penalty] if recipe.convex else DAMPINGS
        command = [python, HERE / "peers.py", folder / "problem.npz", folder / "scores.npz", *map(str, dampings)]
        subprocess.run([str(part) for part in command], check=True)
        scores = dict(np.load(folder / "scores.npz"))
    best = {}
    for full, found in scores.items():
        name, damping = full.split("|")
        row = truth.figures(name, found, float(damping))
        # Their best damping is chosen by the queries themselves, which can only favour them.
        best[name] = max(best.get(name, row), row, key=lambda row: row["lds"][0])
    return list(best.values())


def table(figures):
    lines = []
    for name, part in figures["problems"].items():
        ceiling = "" if part["ceiling"] is None else f", ceiling by the noise of seeds {part['ceiling']:.3f}"
        lines += [f"### {name}{ceiling}", "", "| method | damping | LDS | LOO correlation |", "|---|---|---|---|"]
        for row in sorted(part["rows"], key=lambda row: -row["lds"][0]):
            damping = "" if row["damping"] is None else f"{row['damping']:g}"
            cells = [f"{x[0]:.3f} ({x[1]:.3f} to {x[2]:.3f})" for x in (row["lds"], row["loo"])]
            lines.append(f"| {row['method']} | {damping} | {cells[0]} | {cells[1]} |")
        lines += ["", "Trainings a minute: " + ", ".join(f"{k} {v:,.0f}" for k, v in part["rates"].items()) + ".", ""]
    lines += ["### One training of the network, its seed and order kept, without 1 % of the examples", ""]
    lines += ["| method | LDS |", "|---|---|"]
    for name, x in sorted(figures["fixed_seed"].items(), key=lambda item: -item[1][0]):
        lines.append(f"| {name} | {x[0]:.3f} ({x[1]:.3f} to {x[2]:.3f}) |")
    return "\n".join([*lines, "", figures["about"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python with torch, kronfluence and pyDVL")
    parser.add_argument("--small", action="store_true", help="20 halves, 5 left out, to see that it runs")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "fidelity.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    counts = (20, 5) if arguments.small else (SUBSETS, LEFT_OUT)
    train, query, tuning = problems.data()
    began, figures = time.perf_counter(), {"problems": {}}
    for recipe in (problems.softmax(1e-2), problems.softmax(1e-3), problems.MLP):
        truth = Truth(recipe, train, query, tuning, counts)
        print(f"{recipe.name}: {truth.runs} trainings in {truth.seconds:.0f} s", flush=True)
        rows = of_methods(recipe, truth, train)
        if arguments.peer:
            rows += of_peers(arguments.peer, recipe, truth, train)
        part = {"ceiling": truth.ceiling(), "rows": rows, "rates": rates(recipe, train)}
        figures["problems"][recipe.name] = part
    figures["fixed_seed"] = fixed_seed(recipe, truth, train, FEW, counts[0])
    names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine = (
        f"{names[0].split(': ')[1]}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the end"
    )
    figures["about"] = (
        f"{counts[0]} halves, {counts[1]} left out, {len(query['y'])} queries, intervals by bootstrap over "
        f"queries; {time.perf_counter() - began:.0f} s in all on {machine}; jax {jax.__version__}, Python "
        f"{platform.python_version()}."
    )
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(figures) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
