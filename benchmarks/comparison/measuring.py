"""What all sides measure themselves with: CPU seconds and wall, cold and warm, peak memory, and the error.

A side is `python -m comparison.SIDE PROBLEM FUNCTION ORDER OUTPUT`.  Its FUNCTION, given the problem and options, makes
a `Case`.  The order, JSON, holds the options, the name of the exact answer in the problem, how large an error may be
for warm runs to be worth their time, and how many of those there are.
"""

import ctypes
import gc
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import arrays

WARM_SECONDS = 5.0  # after which no other warm run is started


class Case(NamedTuple):
    """What is timed: named stages, each given what the one before made; the result as an array in common order."""

    stages: dict[str, Callable]
    common: Callable = np.asarray


def memory(field):
    """A field of this process's status in MB: VmRSS is what it holds, VmHWM the most it held."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def start_peak():
    """Forget the peak so far, and say what is held."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def timed(run):
    """Result, CPU seconds of user and system, wall."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def once(case):
    """Result of one run of all stages, and CPU seconds and wall of each."""
    result, times = None, []
    for i, stage in enumerate(case.stages.values()):
        result, *spent = timed((lambda s=stage, r=result: s(r)) if i else stage)
        times.append(spent)
    return result, np.asarray(times)


def freeze():
    """Take what is there out of garbage collection.

    kronfluence collects garbage several times a call.  Each time looks through all modules imported, which on a small
    problem takes longer than the rest of the call, and on a large one hardly counts: so it is left out, for everybody.
    """
    gc.collect()
    gc.freeze()


def errors(answer, problem, order):
    """Against the exact answer, and where there is one a query's mean correlation with the Gauss-Newton scores."""
    figures = {"error": arrays.distance(answer, problem[order["answer"]])}
    if order.get("gauss_newton"):
        pairs = zip(answer, problem["gauss_newton"], strict=True)
        figures["correlation"] = float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))
    return figures


def figures(case, problem, order):
    """All of a case.  The first run is cold: it compiles.  Warm figures are medians."""
    freeze()
    baseline = start_peak()
    result, cold = once(case)
    found = {"cold_cpu_s": cold[:, 0].sum(), "cold_wall_s": cold[:, 1].sum(), "peak_mb": memory("VmHWM") - baseline}
    found |= errors(case.common(result), problem, order)
    if found["error"] > order["within"] or not np.isfinite(found["error"]):
        return found
    result, warm = None, []
    held = start_peak()
    while len(warm) < order["runs"] and (not warm or sum(run[:, 1].sum() for run in warm) < WARM_SECONDS):
        result = None  # so that no two are held at once
        result, times = once(case)
        warm.append(times)
    found["warm_peak_mb"] = memory("VmHWM") - held
    median = np.median(np.asarray(warm), axis=0)
    found |= {"warm_cpu_s": median[:, 0].sum(), "warm_wall_s": median[:, 1].sum(), "warm_runs": len(warm)}
    found["stages_cpu_s"] = dict(zip(case.stages, median[:, 0].tolist(), strict=True))
    return found


def main(*functions):
    """Measure the function asked for.  What the imports took is known from the process itself."""
    imports = time.process_time()
    warnings.simplefilter("ignore")
    path, function, order, output = sys.argv[1:]
    order, problem = json.loads(order), dict(np.load(path))
    case = {f.__name__: f for f in functions}[function](problem, **order["options"])
    found = figures(case, problem, order) | {"imports_cpu_s": imports}
    Path(output).write_text(json.dumps(found))
