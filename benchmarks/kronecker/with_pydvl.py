"""pyDVL's side: `python with_pydvl.py PROBLEM KIND LABELS STAGE OPTIONS OUTPUT`.

Options hold the batch size.  There is one kind of labels, its own.
"""

import json
import sys
import warnings

import networks
import numpy as np
import stages
import torch
from pydvl.influence.torch import EkfacInfluence
from torch.utils.data import DataLoader, TensorDataset


def case(problem, kind, options):
    """Fit, and scores."""
    model, (x, y, query_x, query_y) = networks.load(problem)
    loader = DataLoader(TensorDataset(x, y), batch_size=options["batch_size"])

    def fit():
        settings = {"update_diagonal": kind == "ekfac", "hessian_regularization": float(problem["damping"])}
        return EkfacInfluence(model, **settings).fit(loader)

    def score(fitted):
        factors = fitted.influence_factors(query_x, query_y)
        parts = [fitted.influences_from_factors(factors, x, y) for x, y in loader]
        return torch.cat(parts, dim=1).detach()

    return fit, score


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path, kind, labels, stage, options, output = sys.argv[1:]
    assert labels == "pseudo", labels
    stages.measure(stage, *case(dict(np.load(path)), kind, json.loads(options)), output)
