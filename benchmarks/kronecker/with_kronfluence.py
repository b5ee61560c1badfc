"""kronfluence's side: `python with_kronfluence.py PROBLEM KIND LABELS STAGE OPTIONS OUTPUT`.

Options hold the batch size.  Factors and scores go through files, in memory where there is such a file system.
"""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import networks
import numpy as np
import stages
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset


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


def case(problem, kind, labels, options, folder):
    """Fit, and scores."""
    model, (x, y, query_x, query_y) = networks.load(problem)
    train, query, task = TensorDataset(x, y), TensorDataset(query_x, query_y), CrossEntropy()
    quiet = {"log_level": logging.ERROR, "disable_tqdm": True}
    analyzer = Analyzer("benchmark", prepare_model(model, task), task, cpu=True, output_dir=folder, **quiet)
    batch = options["batch_size"]
    of_factors = FactorArguments(strategy=kind, use_empirical_fisher=labels == "empirical")
    # Without a damping it takes a tenth of each layer's mean eigenvalue.
    of_scores = ScoreArguments(damping_factor=None if "relative" in problem else float(problem["damping"]))

    def fit():
        settings = {"per_device_batch_size": batch, "factor_args": of_factors, "overwrite_output_dir": True}
        analyzer.fit_all_factors("factors", train, **settings)

    def score(_):
        batches = {"per_device_query_batch_size": len(query), "per_device_train_batch_size": batch}
        settings = {"score_args": of_scores, "overwrite_output_dir": True} | batches
        analyzer.compute_pairwise_scores("scores", "factors", query, train, **settings)
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    return fit, score


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path, kind, labels, stage, options, output = sys.argv[1:]
    torch.manual_seed(0)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        problem = dict(np.load(path))
        stages.measure(stage, *case(problem, kind, labels, json.loads(options), folder), output)
