"""What both sides time themselves with: one core, CPU seconds cold and warm, peak memory above what was there."""

import itertools
import json
import re
import time
from pathlib import Path

import numpy as np

WARM_RUNS, WARM_SECONDS = 5, 60.0


def memory(field):
    """A field of this process's status in MB: VmRSS is what it holds, VmHWM the most it held."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def report(run, output, common):
    """Measure `run`, and save the figures and `common(result)`, an array.  The first call is cold: it compiles."""
    baseline = memory("VmRSS")
    forget_peak()
    result, cold_cpu, cold_wall = timed(run)
    cold_peak = memory("VmHWM") - baseline
    forget_peak()
    warm = []
    while len(warm) < 2 or (len(warm) < WARM_RUNS and sum(wall for _, wall in warm) < WARM_SECONDS):
        result = None  # so that no two are held at once
        result, *times = timed(run)
        warm.append(times)
    cpu, wall = np.median(np.asarray(warm), axis=0)
    figures = {
        "cpu_s": cpu,
        "wall_s": wall,
        "runs": len(warm),
        "peak_mb": memory("VmHWM") - baseline,
        "cold_cpu_s": cold_cpu,
        "cold_wall_s": cold_wall,
        "cold_peak_mb": cold_peak,
    }
    np.save(Path(output).with_suffix(".npy"), common(result))
    Path(output).with_suffix(".json").write_text(json.dumps(figures))


def flat(tree):
    """Rows of (stacked) parameters in one order for all sides: by layer, kernel (in, out), then bias."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for layer in tree for leaf in layer], axis=1)


def unflat(rows, sizes):
    """The inverse of `flat`: for each layer a stack of kernels and one of biases."""
    layers, start = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        kernel = rows[:, start : start + fan_in * fan_out].reshape(-1, fan_in, fan_out)
        start += fan_in * fan_out
        layers.append((kernel, rows[:, start : start + fan_out]))
        start += fan_out
    return layers
