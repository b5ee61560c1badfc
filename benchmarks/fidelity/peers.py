"""Scores of the peers for given weights: `python peers.py PROBLEM SCORES DAMPING ...`; names are `method|damping`."""

import itertools
import logging
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from pydvl.influence import torch as influence
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from comparison import networks
from comparison.with_kronfluence import CrossEntropy

loss = torch.nn.functional.cross_entropy


def network(problem):
    return networks.digits(problem).eval()


def of_kronfluence(problem, train, query, damping, folder):
    task = CrossEntropy()
    quiet = {"log_level": logging.ERROR, "disable_tqdm": True}
    analyzer = Analyzer("fidelity", prepare_model(network(problem), task), task, cpu=True, output_dir=folder, **quiet)
    options = {"per_device_batch_size": len(train), "overwrite_output_dir": True}
    analyzer.fit_all_factors("factors", train, factor_args=FactorArguments(strategy="ekfac"), **options)
    options = {"per_device_query_batch_size": len(query), "per_device_train_batch_size": len(train)}
    options |= {"score_args": ScoreArguments(damping_factor=damping), "overwrite_output_dir": True}
    analyzer.compute_pairwise_scores("s", "factors", query, train, **options)
    return analyzer.load_pairwise_scores("s")["all_modules"].numpy()


def of_pydvl(problem, train, query, damping):
    """Methods of pyDVL that have a counterpart here."""
    loader, given = DataLoader(train, batch_size=len(train)), query.tensors + train.tensors
    made = {
        "pyDVL CG": lambda m: influence.CgInfluence(m, loss, damping, rtol=1e-3, solve_simultaneously=True),
        "pyDVL Nyström, rank 100": lambda m: influence.NystroemSketchInfluence(m, loss, damping, rank=100),
        "pyDVL Arnoldi, rank 100": lambda m: influence.ArnoldiInfluence(m, loss, damping, rank=100),
        "pyDVL EK-FAC": lambda m: influence.EkfacInfluence(m, update_diagonal=True, hessian_regularization=damping),
        "pyDVL harmonic mean": lambda m: influence.InverseHarmonicMeanInfluence(m, loss, damping),
    }
    for name, make in made.items():
        try:
            scores = make(network(problem)).fit(loader).influences(*given).detach().numpy()
        except (RuntimeError, ValueError) as error:  # e.g. its block CG for an indefinite Hessian
            print(f"{name} at damping {damping:g} failed: {error}", file=sys.stderr)
            continue
        if np.isfinite(scores).all():
            yield name, scores


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    path, output, *dampings = sys.argv[1:]
    problem = dict(np.load(path))
    tensors = [torch.tensor(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    train, query = TensorDataset(tensors[0], tensors[1].long()), TensorDataset(tensors[2], tensors[3].long())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for damping in map(float, dampings):
            ours = of_pydvl(problem, train, query, damping)
            theirs = [("kronfluence EK-FAC", of_kronfluence(problem, train, query, damping, folder))]
            for name, scores in itertools.chain(ours, theirs):
                found[f"{name}|{damping:g}"] = scores
    np.savez(output, **found)
