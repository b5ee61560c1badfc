"""Host loops over data that need not fit in memory: any re-iterable of batches is a loader."""

from .averages import (
    Averaging as Averaging,
    ChunkAveraging as ChunkAveraging,
    PointAveraging as PointAveraging,
    accumulate as accumulate,
)
from .gradients import gradients as gradients
from .inverse import invert as invert
from .kronecker import ekfac as ekfac, kfac as kfac
from .operators import Streamed as Streamed, operator as operator
from .processes import connect as connect, share as share
from .scores import (
    influence_factors as influence_factors,
    scores as scores,
    self_influences as self_influences,
    top_k as top_k,
)
