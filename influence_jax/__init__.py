"""Training-data attribution in JAX: which training examples made this model behave like this."""

from importlib.metadata import version as _version

from jax import __version__ as _jax

from ._jax_version import require_supported_jax as _require_supported_jax

_require_supported_jax(_jax)

from . import (
    baselines as baselines,
    metrics as metrics,
    planning as planning,
    plot as plot,
    projections as projections,
    retrain as retrain,
    sharding as sharding,
    store as store,
    stream as stream,
    unrolled as unrolled,
)
from .adapters import from_linen as from_linen, from_nnx as from_nnx
from .batching import Batch as Batch
from .blocks import by_layer as by_layer, by_parameter as by_parameter, full as full
from .bounds import score_bounds as score_bounds
from .capture import Coverage as Coverage, coverage as coverage
from .curvature import (
    GGN as GGN,
    Diagonal as Diagonal,
    EmpiricalFisher as EmpiricalFisher,
    Fisher as Fisher,
    Hessian as Hessian,
    Identity as Identity,
    Kronecker as Kronecker,
    LinearOperator as LinearOperator,
    LowRank as LowRank,
    Projected as Projected,
    Spectrum as Spectrum,
    diagonal as diagonal,
    diagonal_blocks as diagonal_blocks,
    ekfac as ekfac,
    kfac as kfac,
    minibatch as minibatch,
    restrict as restrict,
    root as root,
    spectral as spectral,
    spectrum as spectrum,
    sums as sums,
    to_dense as to_dense,
    trace as trace,
)
from .general import (
    InfluenceType as InfluenceType,
    InverseHvpResult as InverseHvpResult,
    InversionMethod as InversionMethod,
    compute_influence_factors as compute_influence_factors,
    compute_influences as compute_influences,
    compute_influences_pert as compute_influences_pert,
    compute_influences_up as compute_influences_up,
)
from .gradients import (
    jacobian_product as jacobian_product,
    mixed_grads as mixed_grads,
    mixed_product as mixed_product,
    per_example_grads as per_example_grads,
)
from .influence import Influence as Influence, InfluenceMode as InfluenceMode
from .model import InfluenceFunctionModel as InfluenceFunctionModel, NotFittedError as NotFittedError
from .objective import Objective as Objective, softmax_sample as softmax_sample
from .scoring import TopK as TopK
from .solvers import (
    CG as CG,
    Arnoldi as Arnoldi,
    BlockCG as BlockCG,
    Blockwise as Blockwise,
    ConvergenceError as ConvergenceError,
    ConvergenceWarning as ConvergenceWarning,
    Direct as Direct,
    Eigh as Eigh,
    HarmonicMean as HarmonicMean,
    Info as Info,
    Inverse as Inverse,
    Jacobi as Jacobi,
    LiSSA as LiSSA,
    Nystrom as Nystrom,
    RelativeDamping as RelativeDamping,
    SampleSpace as SampleSpace,
    Solver as Solver,
    invert as invert,
)
from .stream import ChunkAveraging as ChunkAveraging, PointAveraging as PointAveraging
from .tree import flatten as flatten, unflatten as unflatten

__version__ = _version("influence-jax")
