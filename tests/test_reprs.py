"""What notebooks print: one line that says what a thing is, without arrays, computations or compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CLASSIFICATION, cross_entropy, mlp, random_batch, random_mlp

import influence_jax as ij
from influence_jax.blocks import as_blocks

KEY = jax.random.key(0)
PARAMS, DATA = random_mlp(KEY), random_batch(KEY, 9, 5, 3, classes=True)
PARTS = {"head": ["layer1"], "body": ["layer0"]}
GGN = ij.GGN(CLASSIFICATION, PARAMS, DATA)
IDENTITY = ij.Identity(PARAMS)
KRONECKER = ij.ekfac(CLASSIFICATION, PARAMS, DATA)
SOLVED = ij.invert(IDENTITY, ij.Direct(0.1))
INFLUENCE = ij.Influence(CLASSIFICATION, PARAMS, SOLVED)
PROJECTION = ij.projections.gaussian(PARAMS, 16, KEY)
HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
TRAINING = ij.retrain.training(CLASSIFICATION, optax.sgd(0.1), PARAMS, DATA, epochs=3)
INFO = ij.Info(
    steps=jnp.array([12, 9]),
    residual=jnp.array([3.2e-7, jnp.nan]),
    converged=jnp.array([True, False]),
    min_curvature=jnp.array([0.1, -2.0]),
    block=jnp.array([0, 3]),
    standard_error=jnp.zeros(2),
)
OF_ONE = jax.tree.map(lambda field: field[0], INFO)
TOP_K = ij.TopK(jnp.array([[4.0, -0.25], [1.5, 1.0]]), jnp.array([[3, 1], [0, 2]]))
RITZ = ij.spectrum(IDENTITY, 2, key=KEY)
INTERVAL = ij.metrics.Interval(jnp.array(0.1), jnp.array(0.25))

# What each prints, and what it prints when its arrays are traced or abstract; None where that is the same.
PRINTED = {
    "batch": (DATA, "Batch(float64[9, 5], int64[9])", None),
    "objective": (CLASSIFICATION, "Objective(mlp, cross_entropy)", None),
    "constants": (
        ij.Objective(functools.partial(mlp), cross_entropy, constants=PARAMS),
        "Objective(partial(mlp), cross_entropy, constants with 39 entries)",
        None,
    ),
    "loss": (ij.Hessian(cross_entropy, PARAMS, DATA).objective, "LossOnly(cross_entropy)", None),
    "hessian": (ij.Hessian(CLASSIFICATION, PARAMS, DATA), "Hessian(39 parameters, 9 examples)", None),
    "bfloat16": (ij.Hessian(CLASSIFICATION, HALF, DATA), "Hessian(39 bfloat16 parameters, 9 examples)", None),
    "ggn": (GGN, "GGN(39 parameters, 9 examples)", None),
    "fisher": (ij.Fisher(CLASSIFICATION, PARAMS, DATA, key=KEY), "Fisher(39 parameters, 9 examples)", None),
    "kronecker": (KRONECKER, "Kronecker(39 parameters in 2 blocks)", None),
    "layer": (KRONECKER.layers[0], "KroneckerLayer(layer0/kernel, 1 x 6 x 4)", None),
    "identity": (IDENTITY, "Identity(39 parameters)", None),
    "diagonal": (ij.Diagonal(PARAMS), "Diagonal(39 parameters)", None),
    "low rank": (
        ij.LowRank({"w": jnp.eye(3)[:2]}, jnp.array([2.0, 1.0])),
        "LowRank(3 parameters, rank 2)",
        None,
    ),
    "projected": (ij.Projected(PARAMS, PROJECTION, jnp.eye(16)), "Projected(39 parameters, rank 16)", None),
    "projection": (PROJECTION, "OneSided(gaussian, 39 parameters to 16)", None),
    "sum": (
        2 * (GGN + 0.5 * IDENTITY),
        "2 * (GGN(39 parameters, 9 examples) + 0.5 * Identity(39 parameters))",
        "int64[] * (GGN(39 parameters, 9 examples) + float64[] * Identity(39 parameters))",
    ),
    "restricted": (
        ij.restrict(SOLVED, ["layer0/bias"]),
        "Restricted(Inverse(Identity(39 parameters), Direct(damping=0.1)), layer0/bias)",
        "Restricted(Inverse(Identity(39 parameters), Direct(damping=float64[])), layer0/bias)",
    ),
    "form": (IDENTITY.as_bilinear_form(), "BilinearForm(Identity(39 parameters))", None),
    "inverse": (
        SOLVED,
        "Inverse(Identity(39 parameters), Direct(damping=0.1))",
        "Inverse(Identity(39 parameters), Direct(damping=float64[]))",
    ),
    "blockwise inverse": (
        ij.invert(IDENTITY, ij.Blockwise(ij.Eigh(0.1))),
        "Inverse(Identity(39 parameters), Blockwise(Eigh(damping=0.1), blocks=by_layer), 2 blocks)",
        "Inverse(Identity(39 parameters), Blockwise(Eigh(damping=float64[]), blocks=by_layer), 2 blocks)",
    ),
    "influence": (
        INFLUENCE,
        "Influence(Objective(mlp, cross_entropy), Inverse(Identity(39 parameters), Direct(damping=0.1)))",
        "Influence(Objective(mlp, cross_entropy), Inverse(Identity(39 parameters), Direct(damping=float64[])))",
    ),
    "model": (
        ij.InfluenceFunctionModel(CLASSIFICATION, PARAMS, blocks=PARTS),
        "InfluenceFunctionModel(GGN of 39 parameters, BlockCG(damping=0.001), blocks=Prefixes(head, body), not fitted)",
        "InfluenceFunctionModel(GGN of 39 parameters, BlockCG(damping=float64[], rtol=float64[], atol=float64[]), "
        "blocks=Prefixes(head, body), not fitted)",
    ),
    "Direct": (ij.Direct(jnp.float32(0.1)), "Direct(damping=0.1)", "Direct(damping=float32[])"),
    "relative": (
        ij.Direct(ij.RelativeDamping(0.1)),
        "Direct(damping=RelativeDamping(0.1))",
        "Direct(damping=RelativeDamping(float64[]))",
    ),
    "CG": (
        ij.CG(1e-3, rtol=1e-5, max_steps=5, preconditioner=ij.Jacobi(1e-3)),
        "CG(damping=0.001, max_steps=5, preconditioner=Jacobi(damping=0.001))",
        "CG(damping=float64[], rtol=float64[], atol=float64[], max_steps=5, preconditioner=Jacobi(damping=float64[]))",
    ),
    "LiSSA": (
        ij.LiSSA(0.1, scale=2.0),
        "LiSSA(damping=0.1, scale=2.0)",
        "LiSSA(damping=float64[], scale=float64[], rtol=float64[])",
    ),
    "Arnoldi": (ij.Arnoldi(0.1, rank=5), "Arnoldi(damping=0.1, rank=5)", "Arnoldi(damping=float64[], rank=5)"),
    "Nystrom": (ij.Nystrom(0.1, rank=5), "Nystrom(damping=0.1, rank=5)", "Nystrom(damping=float64[], rank=5)"),
    "HarmonicMean": (ij.HarmonicMean(0.1), "HarmonicMean(damping=0.1)", "HarmonicMean(damping=float64[])"),
    "SampleSpace": (ij.SampleSpace(0.1), "SampleSpace(damping=0.1)", "SampleSpace(damping=float64[])"),
    "Blockwise": (
        ij.Blockwise({"head": ij.Eigh(0.1), "body": ij.Jacobi(0.1)}, blocks=PARTS),
        "Blockwise(Eigh(damping=0.1) and Jacobi(damping=0.1), blocks=Prefixes(head, body))",
        "Blockwise(Eigh(damping=float64[]) and Jacobi(damping=float64[]), blocks=Prefixes(head, body))",
    ),
    "info": (
        INFO,
        "Info(1 of 2 converged, steps 9 to 12, residual 3.2e-07 and 1 NaN, min_curvature -2 to 0.1, block 0 to 3)",
        "Info(converged bool[2], steps int64[2], residual float64[2], min_curvature float64[2], block int64[2], "
        "standard_error float64[2])",
    ),
    "info of one": (
        OF_ONE,
        "Info(converged, steps 12, residual 3.2e-07, min_curvature 0.1)",
        "Info(converged bool[], steps int64[], residual float64[], min_curvature float64[], block int64[], "
        "standard_error float64[])",
    ),
    "top k": (TOP_K, "TopK(2 queries, k=2, values -0.25 to 4)", "TopK(2 queries, k=2, values float64[2, 2])"),
    "factors": (
        ij.InverseHvpResult({"w": jnp.zeros((2, 3))}, OF_ONE),
        "InverseHvpResult(2 factors, Info(converged, steps 12, residual 3.2e-07, min_curvature 0.1))",
        "InverseHvpResult(2 factors, Info(converged bool[], steps int64[], residual float64[], "
        "min_curvature float64[], block int64[], standard_error float64[]))",
    ),
    "training": (TRAINING, "Training(Objective(mlp, cross_entropy), 9 examples, 3 epochs of full batches)", None),
    "interval": (INTERVAL, "Interval(low 0.1, high 0.25)", "Interval(low float64[], high float64[])"),
    "summary": (
        ij.metrics.Summary(jnp.array(1 / 3), INTERVAL, INTERVAL),
        "Summary(mean 0.333, over_queries Interval(low 0.1, high 0.25), over_subsets Interval(low 0.1, high 0.25))",
        "Summary(mean float64[], over_queries Interval(low float64[], high float64[]), "
        "over_subsets Interval(low float64[], high float64[]))",
    ),
    "curve": (
        ij.metrics.DiscoveryCurve(jnp.linspace(0, 1, 3), jnp.array([0.0, 0.5, 1.0])),
        "DiscoveryCurve(float64[3], found 0 to 1)",
        "DiscoveryCurve(float64[3], found float64[3])",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_one_line_says_what_it_is(name, compilations):
    """In sight, traced by `jit` and `vmap`, and abstract; nothing is compiled and nothing large is read."""
    thing, printed, unseen = PRINTED[name]
    with compilations() as programs, jax.transfer_guard_host_to_device("disallow"):
        assert repr(thing) == printed
        assert len(printed) < 120
    assert programs == []
    seen = []
    abstract = jax.eval_shape(lambda x: seen.append(repr(x)) or x, thing)
    assert [repr(abstract), *seen] == [unseen or printed] * 2
    jax.eval_shape(jax.vmap(lambda i, x: seen.append(repr(x)) or i, in_axes=(0, None)), jnp.arange(2), thing)
    assert seen[1] in (printed, unseen)
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), thing)
    jax.eval_shape(jax.vmap(lambda i, x: seen.append(repr(x)) or i), jnp.arange(2), stacked)
    assert seen[2] == (unseen or printed)


def test_tables_are_of_numbers_at_hand(compilations):
    with compilations() as programs:
        assert repr(RITZ).startswith("39 eigenvalues, from 1 (")
        assert repr(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), RITZ)).startswith("Spectrum(39 eig")
    assert programs == []


def test_what_jax_puts_into_trees_can_be_printed():
    """Trees of axes, sentinels and nothing, which transformations make of a thing."""
    for thing, _, _ in PRINTED.values():
        for filling in (None, 0, object()):
            assert repr(jax.tree.map(lambda _, x=filling: x, thing))


def test_large_and_deleted_arrays_are_not_read():
    large = ij.TopK(np.broadcast_to(np.float32(1), (2**11, 2**10)), np.zeros((2**11, 2**10), int))
    assert repr(large) == "TopK(2,048 queries, k=1024, values float32[2048, 1024])"
    gone = jax.tree.map(jnp.array, TOP_K)
    gone.values.delete()
    assert repr(gone) == "TopK(2 queries, k=2, values float64[2, 2])"


def test_named_tuples_stay_named_tuples():
    values, indices = TOP_K
    assert (TOP_K.values is values, TOP_K._replace(values=indices).values is indices) == (True, True)
    assert len(INFO) == len(jax.tree.leaves(INFO)) == 6


def test_partitions_name_their_blocks():
    assert repr(as_blocks({str(place): [str(place)] for place in range(9)})).endswith(", 3 and 5 more)")


def test_a_grid_of_solvers_is_told_by_its_shape():
    assert repr(jax.vmap(ij.Direct)(np.ones(4))) == "Direct(damping=float64[4])"


def test_solvers_of_users_print_their_settings():
    class Mine(ij.Solver):
        def solve(self, op, damping, fit, V):
            raise NotImplementedError

    assert repr(Mine()) == "Mine()"
