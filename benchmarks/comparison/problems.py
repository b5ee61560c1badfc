"""Weights, data and exact answers of a problem: `python -m comparison.problems NAME OUTPUT [--quick]`."""

import os
import sys

os.environ["JAX_ENABLE_X64"] = "1"

import numpy as np

from . import digits, transformer

# Of the whole comparison, and of a quick look at whether all works.
FULL = {
    "digits": lambda: digits.make([64, 128, 64, 10]),
    "small": lambda: digits.make([64, 24, 10]),
    "transformer": transformer.make,
}
QUICK = {
    "digits": lambda: digits.make([64, 16, 10], count=200, queries=5, steps=500),
    "small": lambda: digits.make([64, 8, 10], count=200, queries=5, steps=500),
    "transformer": lambda: transformer.make(count=32, queries=4),
}

if __name__ == "__main__":
    name, output, *quick = sys.argv[1:]
    np.savez(output, **(QUICK if quick else FULL)[name]())
