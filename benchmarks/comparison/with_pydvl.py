"""pyDVL's side; see `measuring`."""

import itertools

import numpy as np
import torch
from pydvl.influence import InfluenceMode, torch as influence
from pydvl.influence.torch.base import TorchBatch, TorchGradientProvider
from torch.utils.data import DataLoader, TensorDataset

from . import arrays, measuring, networks
from .measuring import Case

loss = torch.nn.functional.cross_entropy


def reorder(rows, sizes, back=False):
    """From torch's flat order (weight (out, in), then bias) to the common one (kernel (in, out), then bias)."""
    layers, start = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        shape = (-1, fan_in, fan_out) if back else (-1, fan_out, fan_in)
        matrix = rows[:, start : start + fan_in * fan_out].reshape(shape).swapaxes(1, 2)
        start += fan_in * fan_out
        layers.append((matrix, rows[:, start : start + fan_out]))
        start += fan_out
    return arrays.flat(layers)


def in_order(problem):
    """How rows of parameters are made an array."""
    return lambda rows: reorder(rows.detach().numpy(), problem["sizes"].tolist())


def batched(x, y, size):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def gradients(problem, batch_size, plain=False):
    """Per-example gradients as pyDVL computes them, or plainly by `torch.func`."""
    model, (x, y, *_) = networks.load(problem)
    batches = [TorchBatch(*pair) for pair in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    params = dict(model.named_parameters())
    one = lambda p, x, y: loss(torch.func.functional_call(model, p, (x[None],)), y[None])
    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
    provider = TorchGradientProvider(model, loss, params)

    def plainly(batch):
        found = grads(params, batch.x, batch.y)
        return torch.cat([found[name].reshape(len(batch.x), -1) for name in params], dim=1)

    of_batch = plainly if plain else provider.flat_grads
    return Case({"gradients": lambda: torch.cat([of_batch(batch) for batch in batches])}, in_order(problem))


def from_factors(problem, mode, batch_size):
    """Scores of the exact factors."""
    model, (x, y, *_) = networks.load(problem)
    loader, mode = batched(x, y, batch_size), InfluenceMode(mode)
    given = influence.InverseHarmonicMeanInfluence(model, loss, regularization=1.0).fit(loader)
    factors = torch.tensor(np.float32(reorder(problem["factors"], problem["sizes"].tolist(), back=True)))
    parts = lambda: [given.influences_from_factors(factors, *batch, mode=mode) for batch in loader]
    return Case({"scores": lambda: torch.cat(parts(), dim=1)}, lambda scores: scores.detach().numpy())


def factors(problem, model, batch_size, **options):
    """Factors of the queries by an influence model."""
    network, (x, y, query_x, query_y) = networks.load(problem)
    loader = batched(x, y, batch_size)
    make = lambda: getattr(influence, model)(network, loss, regularization=float(problem["damping"]), **options)
    stages = {"fit": lambda: make().fit(loader), "factors": lambda fitted: fitted.influence_factors(query_x, query_y)}
    return Case(stages, in_order(problem))


def scores(problem, kind, labels, fit_batch, score_batch):
    """Scores by K-FAC or EK-FAC.  There is one kind of labels, its own."""
    assert labels == "pseudo", labels
    model, (x, y, query_x, query_y) = networks.load(problem)
    settings = {"update_diagonal": kind == "ekfac", "hessian_regularization": float(problem["damping"])}

    def fit():
        return influence.EkfacInfluence(model, **settings).fit(batched(x, y, fit_batch))

    def score(fitted):
        found = fitted.influence_factors(query_x, query_y)
        parts = [fitted.influences_from_factors(found, *batch) for batch in batched(x, y, score_batch)]
        return torch.cat(parts, dim=1).detach()

    return Case({"fit": fit, "scores": score})


if __name__ == "__main__":
    measuring.main(gradients, from_factors, factors, scores)
