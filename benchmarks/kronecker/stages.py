"""Measuring fit and scores apart, with what the benchmark beside this one measures with."""

import ctypes
import gc
import sys
from pathlib import Path

import numpy as np

# After this folder, which the scripts here find first.
sys.path.append(str(Path(__file__).parent.parent / "side_by_side"))
from measuring import report

LOGITS = 1e-4  # how far apart the sides' logits may lie


def check(logits, problem):
    """The sides have the same network, or there is nothing to compare."""
    np.testing.assert_allclose(logits, problem["logits"], rtol=0, atol=LOGITS)


def freeze():
    """Take what is there out of garbage collection.

    kronfluence collects garbage several times a call.  Each time looks through all modules imported, which on a small
    problem takes longer than the rest of the call, and on a large one hardly counts: so it is left out, for everybody.
    """
    gc.collect()
    gc.freeze()


def measure(stage, fit, score, output):
    """Figures of `fit()`, or of `score(fitted)`, whose result they are saved with: scores `(Q, N)`."""
    if stage == "fit":
        freeze()
        report(fit, output, lambda fitted: np.zeros(0))
    else:
        fitted = fit()
        freeze()
        ctypes.CDLL(None).malloc_trim(0)  # what the fit freed is not the scores' to use again unseen
        report(lambda: score(fitted), output, np.asarray)
