"""What a curvature product costs, in gradients of the mean loss, and what memory it plans, against the data size.

    python benchmarks/products.py [--output benchmarks/results/products.json]

A dense network of about a million parameters on 1500 examples, float32.  Each figure is the median of nine interleaved
runs, after one that compiles; memory is what the compiled program asks for beyond its arguments and results.
"""

import argparse
import itertools
import json
import os
import platform
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import influence_jax as ij
from influence_jax.curvature.exact import _mean_product

SIZES, EXAMPLES, RUNS = (400, 1024, 512, 10), 1500, 9


def predict(params, example):
    hidden = example["x"]
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ params[-1]["kernel"] + params[-1]["bias"]


def cross_entropy(logits, example):
    return jax.nn.logsumexp(logits) - logits[example["y"]]


OBJECTIVE = ij.Objective(predict, cross_entropy)


@jax.jit
def gradient(params, data):
    return jax.grad(lambda p: jnp.mean(jax.vmap(OBJECTIVE, (None, 0))(p, data)))(params)


def problem(count, sizes=SIZES):
    rng = np.random.default_rng(0)
    params = [
        {
            "kernel": jnp.asarray(rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in), jnp.float32),
            "bias": jnp.zeros(fan_out, jnp.float32),
        }
        for fan_in, fan_out in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.normal(size=(count, sizes[0])), jnp.float32)
    return params, {"x": x, "y": jnp.asarray(rng.integers(0, sizes[-1], count), jnp.int32)}


def measure(chunk):
    """Median seconds of each product, runs interleaved so that all meet the same machine."""
    params, data = problem(EXAMPLES)
    programs = {"gradient": lambda: gradient(params, data)}
    for kind in (ij.Hessian, ij.GGN, ij.EmpiricalFisher):
        op = kind(OBJECTIVE, params, data, chunk=chunk)
        programs[kind.__name__] = lambda op=op: op.mv(params)
    times = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(RUNS):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def memory(kind, count):
    """Bytes of temporary memory planned by the compiler for a product in chunks of 128."""
    params, data = problem(count, (64, 256, 10))
    op = kind(OBJECTIVE, params, data, chunk=128)
    return _mean_product.lower(op, params).compile().memory_analysis().temp_size_in_bytes


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", help="write the figures to this JSON file")
args = parser.parse_args()

report = {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem(1)[0])),
    "examples": EXAMPLES,
    "runs": RUNS,
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    "seconds": {},
    "temporary_bytes": {},
}
for label, chunk in (("one chunk", EXAMPLES), ("default chunks", None), ("chunks of 100", 100)):
    seconds = measure(chunk)
    report["seconds"][label] = seconds
    ratios = ", ".join(f"{name} {value / seconds['gradient']:.2f}" for name, value in seconds.items())
    print(f"{label}: gradient {seconds['gradient'] * 1e3:.1f} ms; in gradients: {ratios}")
for kind in (ij.Hessian, ij.GGN, ij.EmpiricalFisher):
    planned = {count: memory(kind, count) for count in (1_000, 10_000, 100_000)}
    report["temporary_bytes"][kind.__name__] = planned
    print(f"{kind.__name__}: temporary MiB by examples { ({n: round(b / 2**20, 2) for n, b in planned.items()}) }")
if args.output:
    with open(args.output, "w") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
