"""pyDVL's side: `python theirs.py PROBLEM CASE OPTIONS OUTPUT`; options hold the batch size."""

import itertools
import json
import sys
import warnings

import numpy as np
import torch
from measuring import flat, report
from pydvl.influence import InfluenceMode, torch as influence
from pydvl.influence.torch.base import TorchBatch, TorchGradientProvider
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
loss = torch.nn.functional.cross_entropy
MODELS = {
    "direct": influence.DirectInfluence,
    "cg": influence.CgInfluence,
    "block_cg": influence.CgInfluence,
    "lissa": influence.LissaInfluence,
    "arnoldi": influence.ArnoldiInfluence,
    "nystroem": influence.NystroemSketchInfluence,
    "harmonic": influence.InverseHarmonicMeanInfluence,
}


def load(problem):
    """The same network with the same weights, and the data."""
    sizes = problem["sizes"].tolist()
    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = torch.nn.Linear(fan_in, fan_out)
        linear.weight.data = torch.tensor(problem[f"kernel{i}"].T.copy())
        linear.bias.data = torch.tensor(problem[f"bias{i}"])
        layers += [linear, torch.nn.Tanh()]
    data = [torch.tensor(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    data[1], data[3] = data[1].long(), data[3].long()
    return torch.nn.Sequential(*layers[:-1]).eval(), data


def reorder(rows, sizes, back=False):
    """From torch's flat order (weight (out, in), then bias) to the common one (kernel (in, out), then bias)."""
    layers, start = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        shape = (-1, fan_in, fan_out) if back else (-1, fan_out, fan_in)
        matrix = rows[:, start : start + fan_in * fan_out].reshape(shape).swapaxes(1, 2)
        start += fan_in * fan_out
        layers.append((matrix, rows[:, start : start + fan_out]))
        start += fan_out
    return flat(layers)


def case(name, options, problem):
    """What is to be timed, and the function that brings its result into the common order."""
    model, (x, y, query_x, query_y) = load(problem)
    sizes = problem["sizes"].tolist()
    batch = options.pop("batch_size")
    batches = [TorchBatch(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)]

    def common(rows):
        return reorder(rows.detach().numpy(), sizes)

    if name == "gradients" and options.pop("plain", False):
        params = dict(model.named_parameters())
        one = lambda p, x, y: loss(torch.func.functional_call(model, p, (x[None],)), y[None])
        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
        in_order = lambda g: torch.cat([g[key].reshape(len(g[key]), -1) for key in params], dim=1)
        return lambda: torch.cat([in_order(grads(params, b.x, b.y)) for b in batches]), common
    if name == "gradients":
        provider = TorchGradientProvider(model, loss, dict(model.named_parameters()))
        return lambda: torch.cat([provider.flat_grads(b) for b in batches]), common
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    if name in ("scores", "perturbation"):
        mode = InfluenceMode.Up if name == "scores" else InfluenceMode.Perturbation
        given = influence.InverseHarmonicMeanInfluence(model, loss, regularization=1.0).fit(loader)
        factors = torch.tensor(np.float32(reorder(problem["factors"], sizes, back=True)))
        parts = lambda: [given.influences_from_factors(factors, b.x, b.y, mode=mode) for b in batches]
        return lambda: torch.cat(parts(), dim=1), lambda scores: scores.detach().numpy()
    recipe = lambda: MODELS[name](model, loss, regularization=1e-2, **options)
    return lambda: recipe().fit(loader).influence_factors(query_x, query_y), common


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path, name, options, output = sys.argv[1:]
    run, common = case(name, json.loads(options), np.load(path))
    report(run, output, common)
