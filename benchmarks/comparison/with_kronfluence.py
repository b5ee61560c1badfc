"""kronfluence's side; see `measuring`.  Factors and scores go through files, in memory where there are such."""

import logging
import tempfile
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset

from . import measuring, networks
from .measuring import Case

MEMORY = Path("/dev/shm")


class CrossEntropy(Task):
    """Summed over positions and examples, as kronfluence asks."""

    def compute_train_loss(self, batch, model, sample=False):
        x, labels = batch
        logits = model(x).flatten(end_dim=-2)
        if sample:
            labels = torch.multinomial(torch.softmax(logits.detach(), dim=-1), 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def load(problem, kind, labels, fit_batch):
    """An analyzer, training data, queries, settings of the scores, and the fit."""
    torch.manual_seed(0)
    model, (x, y, query_x, query_y) = networks.load(problem)
    train, query, task = TensorDataset(x, y), TensorDataset(query_x, query_y), CrossEntropy()
    folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
    quiet = {"log_level": logging.ERROR, "disable_tqdm": True}
    analyzer = Analyzer("comparison", prepare_model(model, task), task, cpu=True, output_dir=folder.name, **quiet)
    analyzer.folder = folder  # which is deleted with it
    of_factors = FactorArguments(strategy=kind, use_empirical_fisher=labels == "empirical")
    # Without a damping it takes a tenth of each layer's mean eigenvalue.
    of_scores = ScoreArguments(damping_factor=None if "relative" in problem else float(problem["damping"]))
    scored = {"scores_name": "scores", "factors_name": "factors", "score_args": of_scores, "overwrite_output_dir": True}

    def fit():
        settings = {"per_device_batch_size": fit_batch, "factor_args": of_factors, "overwrite_output_dir": True}
        analyzer.fit_all_factors("factors", train, **settings)

    return analyzer, train, query, scored, fit


def scores(problem, kind, labels, fit_batch, score_batch):
    """Scores by a structured curvature."""
    analyzer, train, query, settings, fit = load(problem, kind, labels, fit_batch)
    batches = {"per_device_query_batch_size": len(query), "per_device_train_batch_size": score_batch}

    def score(_):
        analyzer.compute_pairwise_scores(query_dataset=query, train_dataset=train, **settings, **batches)
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    return Case({"fit": fit, "scores": score})


def self_influence(problem, kind, labels, fit_batch, score_batch):
    """Influence of the training examples on themselves."""
    analyzer, train, _, settings, fit = load(problem, kind, labels, fit_batch)

    def score(_):
        analyzer.compute_self_scores(train_dataset=train, per_device_train_batch_size=score_batch, **settings)
        return analyzer.load_self_scores("scores")["all_modules"]

    return Case({"fit": fit, "scores": score})


if __name__ == "__main__":
    measuring.main(scores, self_influence)
