"""Training-data attribution in JAX: which training examples made this model behave like this."""

from importlib.metadata import version as _version

from jax import __version__ as _jax

from ._jax_version import require_supported_jax as _require_supported_jax

_require_supported_jax(_jax)

from . import (
    baselines,
    losses,
    metrics,
    planning,
    plot,
    projections,
    retrain,
    sharding,
    store,
    stream,
    unrolled,
)
from ._sound import LossWarning
from .adapters import from_linen, from_nnx
from .batching import Batch
from .blocks import by_layer, by_parameter, full
from .bounds import score_bounds
from .capture import Coverage, LeafCoverage, coverage
from .curvature import (
    GGN,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Identity,
    Kronecker,
    LinearOperator,
    LowRank,
    Projected,
    Spectrum,
    diagonal,
    diagonal_blocks,
    ekfac,
    kfac,
    minibatch,
    restrict,
    root,
    spectral,
    spectrum,
    sums,
    to_dense,
    trace,
)
from .general import (
    InfluenceType,
    InverseHvpResult,
    InversionMethod,
    compute_influence_factors,
    compute_influences,
    compute_influences_pert,
    compute_influences_up,
)
from .gradients import (
    jacobian_product,
    mixed_grads,
    mixed_product,
    per_example_grads,
)
from .influence import Influence
from .model import InfluenceFunctionModel, NotFittedError
from .objective import Objective, softmax_labels, softmax_sample
from .scoring import InfluenceMode, TopK
from .solvers import (
    CG,
    Arnoldi,
    BlockCG,
    Blockwise,
    ConvergenceError,
    ConvergenceWarning,
    Direct,
    Eigh,
    HarmonicMean,
    Info,
    Inverse,
    Jacobi,
    LiSSA,
    Nystrom,
    RelativeDamping,
    SampleSpace,
    Solver,
    invert,
)
from .stream import ChunkAveraging, PointAveraging
from .tree import flatten, unflatten

__all__ = [
    "CG",
    "GGN",
    "Arnoldi",
    "Batch",
    "BlockCG",
    "Blockwise",
    "ChunkAveraging",
    "ConvergenceError",
    "ConvergenceWarning",
    "Coverage",
    "Diagonal",
    "Direct",
    "Eigh",
    "EmpiricalFisher",
    "Fisher",
    "HarmonicMean",
    "Hessian",
    "Identity",
    "Influence",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InfluenceType",
    "Info",
    "Inverse",
    "InverseHvpResult",
    "InversionMethod",
    "Jacobi",
    "Kronecker",
    "LeafCoverage",
    "LiSSA",
    "LinearOperator",
    "LossWarning",
    "LowRank",
    "NotFittedError",
    "Nystrom",
    "Objective",
    "PointAveraging",
    "Projected",
    "RelativeDamping",
    "SampleSpace",
    "Solver",
    "Spectrum",
    "TopK",
    "baselines",
    "by_layer",
    "by_parameter",
    "compute_influence_factors",
    "compute_influences",
    "compute_influences_pert",
    "compute_influences_up",
    "coverage",
    "diagonal",
    "diagonal_blocks",
    "ekfac",
    "flatten",
    "from_linen",
    "from_nnx",
    "full",
    "invert",
    "jacobian_product",
    "kfac",
    "losses",
    "metrics",
    "minibatch",
    "mixed_grads",
    "mixed_product",
    "per_example_grads",
    "planning",
    "plot",
    "projections",
    "restrict",
    "retrain",
    "root",
    "score_bounds",
    "sharding",
    "softmax_labels",
    "softmax_sample",
    "spectral",
    "spectrum",
    "store",
    "stream",
    "sums",
    "to_dense",
    "trace",
    "unflatten",
    "unrolled",
]

__version__ = _version("influence-jax")
