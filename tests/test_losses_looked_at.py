"""Losses that are NaN or infinite: their scores are NaN and told by name, curvature refuses them, weights remove them.

References leave the examples out, in plain numpy or dense float64 derivatives of single examples.
"""

import collections
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import flat, relative_error

import influence_jax as ij

RNG = np.random.default_rng(0)
N, D, C, DAMPING = 14, 3, 4, 0.3
BAD = [2, 13]
X, Y = RNG.normal(size=(N, D)), RNG.integers(0, C, N)
WEIGHTS = np.where(np.isin(np.arange(N), BAD), 0.0, 1.0)
GOOD = np.flatnonzero(WEIGHTS)
MATRIX = {"w": jnp.asarray(RNG.normal(size=(D, C)))}
VECTOR = {"w": jnp.asarray(RNG.normal(size=D))}
SPOILT = [X.copy(), X.copy()]
SPOILT[0][BAD], SPOILT[1][BAD] = 0.0, 1e4 * np.sign(np.asarray(VECTOR["w"]))


def cross_entropy(out, z):
    return optax.softmax_cross_entropy_with_integer_labels(out, z.y)


def binary(out, z):
    """0 log 0 where the probability is exactly one."""
    p = jax.nn.sigmoid(out)
    return -(z.y * jnp.log(p) + (1 - z.y) * jnp.log(1 - p))


def labelled(value):
    return ij.Batch(X, np.where(WEIGHTS > 0, Y, value))


def outer(p, z):
    return z.x @ p["w"]


SOFTMAX = ij.Objective(outer, cross_entropy)
NORM = ij.Objective(outer, lambda out, z: jnp.sqrt(jnp.sum(out**2)))
# Objective, parameters, data in which BAD have no loss or no gradient, and what is said of them.
CASES = {
    "labels from one": (SOFTMAX, MATRIX, labelled(C), r"the loss of 2 of 14 examples .* first example 2 \(nan\)"),
    "padding": (SOFTMAX, MATRIX, labelled(-100), r"the loss of 2 of 14 examples .* first example 2 \(nan\)"),
    "bare function": (
        lambda p, z: cross_entropy(jnp.tanh(z.x @ p["w"]), z),
        MATRIX,
        labelled(C),
        r"the loss of 2 of 14 examples .* first example 2 \(nan\)",
    ),
    "zero times log of zero": (
        ij.Objective(outer, binary),
        VECTOR,
        ij.Batch(SPOILT[1], np.ones(N)),
        r"the loss of 2 of 14 examples .* first example 2 \(nan\)",
    ),
    "log of zero": (
        ij.Objective(outer, binary),
        VECTOR,
        ij.Batch(SPOILT[1], np.zeros(N)),
        r"the loss of 2 of 14 examples .* first example 2 \((nan|inf)\)",
    ),
    "norm at zero": (
        NORM,
        MATRIX,
        ij.Batch(SPOILT[0], Y),
        r"the gradient of the loss of 2 of 14 examples .* first example 2 \(loss 0\)",
    ),
}


def rows(batch, places):
    return jax.tree.map(lambda a: a[np.asarray(places)], batch)


def gradients(objective, params, batch):
    """Of every example on its own, `(N, P)`."""
    slopes = [jax.grad(objective)(params, rows(batch, i)) for i in range(len(batch))]
    return np.stack([flat(jax.tree.map(np.asarray, g), params) for g in slopes])


def told(call, match, argument="train"):
    """The result of a call that warns once, of what matches."""
    with pytest.warns(ij.LossWarning, match=f"{argument}: {match}") as caught:
        result = call()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return result


def check(scores, expected, bad=BAD):
    """NaN in the columns of bad examples, right in all others."""
    scores = np.asarray(scores)
    assert np.isnan(scores[..., bad]).all()
    others = np.setdiff1d(np.arange(scores.shape[-1]), bad)
    assert relative_error(scores[..., others], expected[..., others]) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_scores_are_nan_and_told_by_name(name):
    objective, params, data, match = CASES[name]
    inverse = ij.invert(ij.EmpiricalFisher(objective, params, data, weights=WEIGHTS), ij.Direct(DAMPING))
    influence, query = ij.Influence(objective, params, inverse), rows(data, [0, 1, 3])
    grads = gradients(objective, params, data)
    fisher = grads[GOOD].T @ grads[GOOD] / len(GOOD)
    factors = np.linalg.solve(fisher + DAMPING * np.eye(len(fisher)), grads[[0, 1, 3]].T).T
    expected = factors @ np.where(WEIGHTS[:, None] > 0, grads, 0).T
    check(told(lambda: influence.influences(query, data), match), expected)
    check(told(lambda: influence.influences(rows(query, [0, 1]), data), match), expected[:2])
    top = told(lambda: influence.top_k(query, data, N), match)
    assert np.asarray(top.indices[:, -2:]).tolist() == [BAD] * 3
    assert np.isnan(top.values[:, -2:]).all()
    batches = [rows(data, range(i, min(i + 5, N))) for i in range(0, N, 5)]
    check(told(lambda: ij.stream.scores(influence, query, batches, progress=False), match, "loader"), expected)
    queries = told(lambda: influence.influences(data, query), match, "query")
    check(np.asarray(queries).T, expected)
    found = told(lambda: ij.per_example_grads(objective, params, data), match, "batch")["w"]
    assert np.isnan(np.asarray(found)[BAD]).any(axis=tuple(range(1, found.ndim))).all()


def test_every_way_to_a_score():
    objective, params, data, match = CASES["labels from one"]
    inverse = ij.invert(ij.GGN(objective, params, labelled(0)), ij.Direct(DAMPING))
    influence, query = ij.Influence(objective, params, inverse), labelled(0)
    own = np.asarray(influence.self_influences(query))
    check(told(lambda: influence.self_influences(data), match, "batch"), own)
    some = rows(query, [0, 1, 3])
    right, wrong = influence.influences(some, query, "perturbation"), partial(influence.influences, some, data)
    check(np.moveaxis(told(lambda: wrong("perturbation"), match), 1, -1), np.moveaxis(np.asarray(right), 1, -1))
    by_block = told(lambda: influence.influences_by_block(some, data, blocks=ij.by_parameter), match)
    check(by_block["w"], np.asarray(influence.influences(some, query)))
    factors = told(lambda: influence.influence_factors(data), match, "query")["w"]
    assert np.isnan(np.asarray(factors)).all(axis=(1, 2)).nonzero()[0].tolist() == BAD
    measurement = lambda p, z: jnp.log(jnp.where(z.y < C, 1.0, 0.0)) + outer(p, z)[0]
    asked = ij.Influence(objective, params, inverse, measurement=measurement)
    scores = told(lambda: asked.influences(data, some), "the measurement of 2 of 14 examples .* 2 .-inf", "query")
    assert np.isnan(np.asarray(scores)).all(axis=1).nonzero()[0].tolist() == BAD
    top = told(lambda: ij.stream.top_k(influence, some, data, N, progress=False, batch_size=4), match, "loader")
    assert top.indices[:, -2:].tolist() == [BAD] * 3
    check(told(lambda: ij.stream.self_influences(influence, data, progress=False, batch_size=4), match, "loader"), own)
    cosine = told(lambda: ij.baselines.cosine(influence, some, data), match)
    assert np.isnan(np.asarray(cosine)).any(axis=0).nonzero()[0].tolist() == BAD


def test_under_tracing_only_nan():
    objective, params, data, _ = CASES["padding"]
    influence = ij.Influence(objective, params, ij.Identity(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = jax.jit(lambda b: influence.influences(rows(b, [0]), b))(data)
        slope = jax.grad(lambda p: jnp.sum(ij.GGN(objective, p, labelled(1)).mv(p)["w"]))(params)
        product = jax.jit(lambda v: ij.GGN(objective, params, data).mv(v))(params)
    assert np.isnan(np.asarray(scores))[0].nonzero()[0].tolist() == BAD
    assert np.isfinite(slope["w"]).all()
    assert np.isnan(product["w"]).all()


NAN_ROWS = ij.Batch(np.where(WEIGHTS[:, None] > 0, X, np.nan), np.where(WEIGHTS > 0, Y, -100))


def test_an_operator_that_a_compiled_program_holds():
    """What it holds is looked at while it is traced, its weights too."""
    good, bad = (ij.GGN(SOFTMAX, MATRIX, labelled(y), weights=jnp.asarray(WEIGHTS + 1)) for y in (1, C))
    solve = lambda op: jax.jit(lambda damping: ij.invert(op, ij.Eigh(damping)).mv(MATRIX)["w"])(0.3)
    assert relative_error(solve(good), ij.invert(good, ij.Eigh(0.3)).mv(MATRIX)["w"]) < 1e-12
    with pytest.raises(ValueError, match=r"data: the loss of 2 of 14 examples .* first example 2"):
        solve(bad)


def softmax_curvature():
    """The Hessian of the mean loss of GOOD, which is the GGN, in closed form."""
    p = np.exp(X @ np.asarray(MATRIX["w"]))
    p /= p.sum(axis=1, keepdims=True)
    blocks = [np.kron(np.outer(X[i], X[i]), np.diag(p[i]) - np.outer(p[i], p[i])) for i in GOOD]
    return np.mean(blocks, axis=0)


SOLVERS = {
    "CG": ij.CG(DAMPING, rtol=1e-12),
    "BlockCG": ij.BlockCG(DAMPING, rtol=1e-12),
    "Direct": ij.Direct(DAMPING),
    "SampleSpace": ij.SampleSpace(DAMPING),
    "Nystrom": ij.Nystrom(DAMPING, rank=D * C),
}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_of_zero_removes_an_example(solver, chunk):
    op = ij.GGN(SOFTMAX, MATRIX, NAN_ROWS, weights=WEIGHTS, chunk=chunk)
    inverse = ij.invert(op, SOLVERS[solver], key=jax.random.key(0))
    v = RNG.normal(size=(D, C))
    expected = np.linalg.solve(softmax_curvature() + DAMPING * np.eye(D * C), v.ravel())
    assert relative_error(inverse.mv({"w": jnp.asarray(v)})["w"].ravel(), expected) < 1e-8


def test_a_weight_of_zero_removes_an_example_from_every_operator():
    exact = softmax_curvature()
    grads = gradients(SOFTMAX, MATRIX, NAN_ROWS)[GOOD]
    given = {"weights": WEIGHTS, "chunk": 4}
    for op, dense in (
        (ij.Hessian(SOFTMAX, MATRIX, NAN_ROWS, **given), exact),
        (ij.GGN(SOFTMAX, MATRIX, NAN_ROWS, **given), exact),
        (ij.EmpiricalFisher(SOFTMAX, MATRIX, NAN_ROWS, **given), grads.T @ grads / len(GOOD)),
    ):
        assert relative_error(ij.to_dense(op), dense) < 1e-11
        assert relative_error(ij.trace(op), np.trace(dense)) < 1e-11
        assert relative_error(flat(ij.diagonal(op), MATRIX), np.diag(dense)) < 1e-11
        assert relative_error(flat((2.0 * op).mv(MATRIX), MATRIX), 2 * dense @ flat(MATRIX, MATRIX)) < 1e-11
    fisher = ij.Fisher(SOFTMAX, MATRIX, NAN_ROWS, key=jax.random.key(0), samples=2, **given)
    assert relative_error(ij.trace(fisher), np.trace(exact)) < 0.5
    root = ij.root(ij.EmpiricalFisher(SOFTMAX, MATRIX, NAN_ROWS, **given))
    product = root.transpose(root.weights[:, None] * root.apply(MATRIX))
    assert relative_error(flat(product, MATRIX), grads.T @ grads @ flat(MATRIX, MATRIX) / len(GOOD)) < 1e-11
    for fit in (ij.kfac, ij.ekfac):
        whole = fit(SOFTMAX, MATRIX, NAN_ROWS, labels="empirical", **given)
        alone = fit(SOFTMAX, MATRIX, rows(NAN_ROWS, GOOD), labels="empirical")
        assert relative_error(ij.to_dense(whole), ij.to_dense(alone)) < 1e-10
    lissa = ij.invert(
        ij.GGN(SOFTMAX, MATRIX, NAN_ROWS, **given),
        ij.LiSSA(5.0, scale=20.0, batch_size=3, depth=40),
        key=jax.random.key(1),
    )
    assert np.isfinite(flat(lissa.solve(MATRIX)[0], MATRIX)).all()


def test_an_infinite_second_derivative_of_weight_zero():
    """The loss and its gradient are finite: only the curvature is not."""
    objective = ij.Objective(lambda p, z: z @ p["w"], lambda out, z: jnp.abs(out) ** 1.5)
    data = np.where(WEIGHTS[:, None] > 0, X, 0.0)
    out = X @ np.asarray(VECTOR["w"])
    dense = np.mean([0.75 * abs(out[i]) ** -0.5 * np.outer(X[i], X[i]) for i in GOOD], axis=0)
    for operator in (ij.GGN, ij.Hessian):
        assert not np.isfinite(ij.to_dense(operator(objective, VECTOR, data))).all()
        assert relative_error(ij.to_dense(operator(objective, VECTOR, data, weights=WEIGHTS)), dense) < 1e-11


@pytest.mark.parametrize("operator", [ij.GGN, ij.Hessian, ij.EmpiricalFisher])
def test_derivative_in_a_weight_of_zero_is_what_the_example_would_add(operator):
    data, v = labelled(1), MATRIX

    def product(weights):
        return jnp.vdot(operator(SOFTMAX, MATRIX, data, weights=weights, chunk=5).mv(v)["w"], v["w"])

    one = lambda i: float(jnp.vdot(operator(SOFTMAX, MATRIX, rows(data, [i])).mv(v)["w"], v["w"]))
    mean = np.mean([one(i) for i in GOOD])
    expected = [(one(i) - mean) / len(GOOD) for i in range(N)]
    assert relative_error(jax.jit(jax.grad(product))(jnp.asarray(WEIGHTS)), expected) < 1e-10
    assert relative_error(jax.jacfwd(product)(jnp.asarray(WEIGHTS)), expected) < 1e-10


def refusals():
    data, op = labelled(-100), ij.GGN(SOFTMAX, MATRIX, labelled(-100))
    batches = [rows(data, range(i, min(i + 5, N))) for i in range(0, N, 5)]
    stream = partial(ij.stream.invert, ij.GGN, SOFTMAX, MATRIX, batches, progress=False)
    return {
        "invert": lambda: ij.invert(op, ij.BlockCG(DAMPING)),
        "sum and multiple": lambda: ij.invert(2.0 * op + ij.Identity(MATRIX), ij.Direct(0.0)),
        "restricted": lambda: ij.invert(ij.restrict(op, ("w",)), ij.CG(DAMPING)),
        "blockwise": lambda: ij.invert(op, ij.Blockwise(ij.CG(DAMPING), ij.by_parameter)),
        "Fisher": lambda: ij.invert(ij.Fisher(SOFTMAX, MATRIX, data, key=jax.random.key(0)), ij.CG(DAMPING)),
        "spectrum": lambda: ij.spectrum(op, 2, key=jax.random.key(0)),
        "trace": lambda: ij.trace(op),
        "diagonal": lambda: ij.diagonal(ij.EmpiricalFisher(SOFTMAX, MATRIX, data)),
        "dense": lambda: ij.to_dense(ij.Hessian(SOFTMAX, MATRIX, data)),
        "kfac": lambda: ij.kfac(SOFTMAX, MATRIX, data),
        "ekfac": lambda: ij.ekfac(CASES["bare function"][0], MATRIX, data, labels="empirical"),
        "model": lambda: ij.InfluenceFunctionModel(SOFTMAX, MATRIX).fit(data),
        "stream CG": lambda: stream(ij.CG(DAMPING)),
        "stream Direct": lambda: stream(ij.Direct(DAMPING)),
        "stream ekfac": lambda: ij.stream.ekfac(SOFTMAX, MATRIX, batches, progress=False),
    }


@pytest.mark.parametrize("way", refusals())
def test_curvature_refuses_by_name(way):
    match = r"(data|loader): the loss of 2 of 14 examples is NaN or infinite, the first example 2 \(nan\); .* labels"
    with pytest.raises(ValueError, match=match):
        refusals()[way]()


@pytest.mark.parametrize("solver", [ij.Direct(DAMPING), ij.BlockCG(DAMPING)])
def test_a_solve_with_a_gradient_that_is_not_finite_names_it(solver):
    objective, params, data, _ = CASES["norm at zero"]
    influence = ij.Influence(objective, params, ij.invert(ij.EmpiricalFisher(objective, params, data), solver))
    with pytest.raises(ValueError, match=r"data: the gradient of the loss of 2 of 14 .* first example 2 \(loss 0\)"):
        influence.influences(rows(data, [0, 1]), rows(data, GOOD))


def test_stores_refuse_by_name(tmp_path):
    data, influence = labelled(-100), ij.Influence(SOFTMAX, MATRIX, ij.Identity(MATRIX))
    match = r"loader: the loss of 1 of 5 examples .* first example 2 \(nan\)"
    sink = ij.store.ScoreStore.create(tmp_path / "scores")
    with pytest.raises(ValueError, match=match):
        ij.stream.scores(influence, labelled(0), data, sink, progress=False, batch_size=5)
    projection, kept = ij.projections.rademacher(MATRIX, 4, jax.random.key(0)), tmp_path / "gradients"
    sink = ij.store.GradientStore.create(kept)
    with pytest.raises(ValueError, match=match):
        ij.stream.gradients(SOFTMAX, MATRIX, data, projection, sink, progress=False, batch_size=5)


@pytest.mark.parametrize("operator", [ij.GGN, ij.Hessian])
def test_a_second_derivative_that_is_infinite_names_its_example(operator):
    """Loss and gradient of |x|^1.5 at zero are zero; its curvature there has no place in a mean."""
    objective = ij.Objective(lambda p, z: (z.x @ p["w"])[None], lambda out, z: jnp.sum(jnp.abs(out) ** 1.5))
    data = ij.Batch(np.where(np.arange(N)[:, None] == 5, 0.0, X), Y)
    with pytest.raises(ValueError, match=r"second derivative of the loss of 1 of 14 examples .* first example 5"):
        ij.Influence(objective, VECTOR, ij.invert(operator(objective, VECTOR, data), ij.BlockCG(DAMPING))).influences(
            rows(data, [0]), data
        )
    weighted = operator(objective, VECTOR, data, weights=np.where(np.arange(N) == 5, 0.0, 1.0))
    scores = ij.Influence(objective, VECTOR, ij.invert(weighted, ij.BlockCG(DAMPING))).influences(data, rows(data, [0]))
    assert np.isfinite(scores).all()


def test_scores_beyond_the_range_of_their_dtype_are_told():
    """The losses and the gradients are in range, their products are not."""
    params, data = {"w": jnp.ones(3, jnp.float32)}, jnp.asarray([[1.0, 1, 1], [1e30, 1, 1], [2, 2, 2]], jnp.float32)
    influence = ij.Influence(lambda p, z: jnp.sum(p["w"] * z), params, ij.Identity(params))
    with pytest.warns(ij.LossWarning, match=r"scores: 1 are NaN .* example 1 on query 1: .* range of float32"):
        scores = influence.influences(data, data)
    assert np.isfinite(scores).sum() == 8
    with pytest.warns(ij.LossWarning, match="range of float32"):
        influence.influences_by_block(data, data, blocks=ij.full)


def test_rows_beyond_a_ragged_end_are_not_counted():
    """The last example is bad, and copied to fill up the last block."""
    data = ij.Batch(X, np.where(np.arange(N) == N - 1, -1 - C, Y))
    influence = ij.Influence(SOFTMAX, MATRIX, ij.Identity(MATRIX))
    match = r"loader: the loss of 1 of 14 examples .* first example 13 \(nan\)"
    with pytest.warns(ij.LossWarning, match=match):
        ij.stream.scores(influence, labelled(0), data, progress=False, batch_size=4)
    with pytest.raises(ValueError, match=match):
        ij.stream.kfac(SOFTMAX, MATRIX, data, progress=False, batch_size=4)


def test_masked_targets_that_are_nan_are_data():
    """A regression whose loss leaves out missing targets: nothing is said, and all is right."""
    y = X @ RNG.normal(size=(D, C))
    y[BAD, 1] = np.nan
    masked = lambda out, z: jnp.sum(jnp.where(jnp.isnan(z.y), 0, out - jnp.nan_to_num(z.y)) ** 2)
    objective, data = ij.Objective(outer, masked), ij.Batch(X, y)
    dense = np.mean([2 * np.kron(np.outer(x, x), np.diag(~np.isnan(t))) for x, t in zip(X, y, strict=True)], axis=0)
    batches = [rows(data, range(i, min(i + 5, N))) for i in range(0, N, 5)]
    inverse = ij.stream.invert(ij.GGN, objective, MATRIX, batches, ij.Direct(DAMPING), progress=False)
    assert relative_error(ij.to_dense(ij.GGN(objective, MATRIX, data)), dense) < 1e-11
    expected = np.linalg.solve(dense + DAMPING * np.eye(D * C), flat(MATRIX, MATRIX))
    assert relative_error(flat(inverse.mv(MATRIX), MATRIX), expected) < 1e-10
    assert np.isfinite(ij.stream.scores(ij.Influence(objective, MATRIX, inverse), data, batches, progress=False)).all()
    assert np.isfinite(ij.trace(ij.ekfac(objective, MATRIX, data)))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_modules_of_flax(framework):
    if framework == "linen":
        module = nn.Dense(C, param_dtype=jnp.float64)
        variables = module.init(jax.random.key(0), X[:1])
        objective, params = ij.from_linen(module, variables, cross_entropy)
    else:
        objective, params = ij.from_nnx(nnx.Linear(D, C, rngs=nnx.Rngs(0), param_dtype=jnp.float64), cross_entropy)
    influence = ij.Influence(objective, params, ij.Identity(params))
    scores = told(lambda: influence.influences(labelled(0), labelled(C)), "the loss of 2 of 14 examples")
    assert np.isnan(np.asarray(scores)).any(axis=0).nonzero()[0].tolist() == BAD


def test_a_loss_that_is_not_differentiable():
    accuracy = lambda p, z: jnp.where(jnp.argmax(outer(p, z)) == z.y, 0.0, 1.0) + 0 * jnp.sum(p["w"])
    influence = ij.Influence(SOFTMAX, MATRIX, ij.Identity(MATRIX), measurement=accuracy)
    with pytest.warns(ij.LossWarning, match="query: the gradient of all 14 measurements is exactly zero"):
        influence.influences(labelled(0), labelled(0))


def test_one_example_without_a_gradient_is_no_alarm():
    influence = ij.Influence(lambda p, z: jnp.maximum(0, 1 - z @ p["w"]), VECTOR, ij.Identity(VECTOR))
    far = 5 * VECTOR["w"] / jnp.sum(VECTOR["w"] ** 2)
    assert influence.influences(X, np.stack([far, -far]))[0, 0] == 0


class Tensor:
    """An array of another framework, which NumPy reads unless its gradient is recorded."""

    def __init__(self, values, requires_grad=False):
        self.values, self.requires_grad = values, requires_grad
        self.shape, self.dtype = values.shape, f"other.{values.dtype}"

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("call detach() first")
        return self.values


def test_arrays_of_other_frameworks_and_user_dicts_in_memory():
    data = {"x": X, "y": Y}
    loss = lambda p, z: optax.softmax_cross_entropy_with_integer_labels(z["x"] @ p["w"], z["y"])
    right = ij.Influence(loss, MATRIX, ij.Identity(MATRIX)).influences(data, data)
    for other in (
        {"x": Tensor(X), "y": Tensor(Y)},
        collections.UserDict(data),
        collections.UserDict(x=Tensor(X), y=Y),
    ):
        assert relative_error(ij.Influence(loss, MATRIX, ij.Identity(MATRIX)).influences(other, other), right) == 0
        assert ij.EmpiricalFisher(loss, MATRIX, other).count == N
    spoilt = {"x": Tensor(X, requires_grad=True), "y": Y}
    with pytest.raises(TypeError, match=r"train: leaf 'x': got a .*Tensor that NumPy cannot read .* \.detach\(\)"):
        ij.Influence(loss, MATRIX, ij.Identity(MATRIX)).influences(data, spoilt)


@pytest.mark.parametrize(
    "loader", [[labelled(0)] * 2, (labelled(0), labelled(0)), [{"x": X}], ({"x": X}, {"x": X}), [(X, Y), (X, Y)]]
)
def test_a_list_of_batches_is_told_to_be_a_loader(loader):
    with pytest.raises(ValueError, match=r"data: got a (list|tuple) .* which is a loader; .* influence_jax\.stream"):
        ij.GGN(SOFTMAX, MATRIX, loader)


def test_an_inverse_without_blocks_says_so():
    with pytest.raises(ValueError, match="name: got 'layers_9', but this inverse has no blocks"):
        ij.Influence(SOFTMAX, MATRIX, ij.Identity(MATRIX)).block("layers_9")
