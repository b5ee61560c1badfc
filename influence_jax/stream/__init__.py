"""Host loops over data that need not fit in memory: any re-iterable of batches is a loader."""

from .averages import (
    Averaging,
    ChunkAveraging,
    PointAveraging,
    accumulate,
)
from .gradients import gradients
from .inverse import invert
from .kronecker import ekfac, kfac
from .operators import Streamed, operator
from .processes import connect, share
from .scores import (
    influence_factors,
    scores,
    self_influences,
    top_k,
)

__all__ = [
    "Averaging",
    "ChunkAveraging",
    "PointAveraging",
    "Streamed",
    "accumulate",
    "connect",
    "ekfac",
    "gradients",
    "influence_factors",
    "invert",
    "kfac",
    "operator",
    "scores",
    "self_influences",
    "share",
    "top_k",
]
