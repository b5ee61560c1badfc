"""Influence against brute force, closed forms and finite differences."""

import dataclasses
import typing

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mainly, relative_error, tree_error
from hypothesis import given, strategies as st

import influence_jax as ij
import influence_jax.influence as influence_module
from influence_jax import scoring

PARAMS = helpers.random_mlp(jax.random.key(0), biases=False)
TRAIN = helpers.random_batch(jax.random.key(1), 17, 5, 3, classes=True)
QUERY = helpers.random_batch(jax.random.key(2), 6, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
OPERATOR = ij.GGN(OBJECTIVE, PARAMS, TRAIN)
DAMPING = 0.05
INVERSE = ij.invert(OPERATOR, ij.Direct(DAMPING))
INFLUENCE = ij.Influence(OBJECTIVE, PARAMS, INVERSE)
MATRIX = helpers.dense_reference(ij.GGN, OBJECTIVE, PARAMS, TRAIN)
DENSE = np.linalg.inv(MATRIX + DAMPING * np.eye(OPERATOR.size))


def flat_grads(batch, objective=OBJECTIVE):
    """Per-example gradients by reverse mode on the flat vector, one at a time."""
    gradient = jax.jit(jax.grad(helpers.flat_objective(objective, PARAMS)))
    flat = helpers.flat(PARAMS, PARAMS)
    return np.stack([gradient(flat, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(len(batch))])


def slice_of(batch, *bounds):
    return jax.tree.map(lambda x: x[slice(*bounds)], batch)


QUERY_GRADS, TRAIN_GRADS = flat_grads(QUERY), flat_grads(TRAIN)
UP = QUERY_GRADS @ DENSE @ TRAIN_GRADS.T


@pytest.fixture(params=["directional", "captured"])
def path(request, monkeypatch):
    """Both ways to the scores: forward-mode passes, and captured inputs and cotangents."""
    monkeypatch.setattr(scoring, "DIRECTIONAL", 100 if request.param == "directional" else 0)
    return ij.Objective(lambda p, z: helpers.mlp(p, z), helpers.cross_entropy)  # a new one, so that it is traced anew


@pytest.mark.as_users
def test_up_equals_brute_force_either_way(path):
    made = lambda chunk: dataclasses.replace(INFLUENCE, objective=path, chunk=chunk, rhs_chunk=chunk)
    for chunk in (None, 1, 5):
        assert relative_error(made(chunk).influences(QUERY, TRAIN), UP) < 1e-11
    assert relative_error(made(5).influences(TRAIN, QUERY), UP.T) < 1e-11
    top = made(5).top_k(QUERY, TRAIN, 4)
    assert relative_error(top.values, jnp.sort(UP, axis=1)[:, ::-1][:, :4]) < 1e-11


@pytest.mark.as_users
@pytest.mark.parametrize(("queries", "examples"), mainly([(1, 1), (1, 17), (6, 1), (6, 3), (6, 17)], (1, 1), (6, 3)))
def test_any_number_of_queries_and_examples(queries, examples):
    """pyDVL's perturbation raises when there are more queries than examples."""
    query, train = slice_of(QUERY, queries), slice_of(TRAIN, examples)
    assert relative_error(INFLUENCE.influences(query, train), UP[:queries, :examples]) < 1e-11
    perturbed = INFLUENCE.influences(query, train, "perturbation")
    assert perturbed.shape == (queries, examples, 5)
    whole = INFLUENCE.influences(QUERY, TRAIN, ij.InfluenceMode.Perturbation)
    assert relative_error(perturbed, whole[:queries, :examples]) < 1e-11


def test_solving_on_the_side_with_fewer_examples(monkeypatch):
    few = slice_of(TRAIN, 3)
    monkeypatch.setattr(influence_module, "_up", None)  # more queries than examples: the other way is not needed
    assert relative_error(INFLUENCE.influences(QUERY, few), UP[:, :3]) < 1e-11


def test_a_solver_that_is_not_symmetric_keeps_to_the_query_side(monkeypatch):
    monkeypatch.setattr(ij.Direct, "symmetric", False)
    monkeypatch.setattr(influence_module, "_up_from_train", None)
    assert relative_error(INFLUENCE.influences(QUERY, slice_of(TRAIN, 3)), UP[:, :3]) < 1e-11


@pytest.mark.parametrize("operator", ["Diagonal", "Identity", "CG"])
def test_any_operator_will_do(operator):
    op = {
        "Diagonal": ij.Diagonal(PARAMS),
        "Identity": ij.Identity(PARAMS),
        "CG": ij.invert(OPERATOR, ij.CG(DAMPING, rtol=1e-12)),
    }[operator]
    dense = {"Diagonal": np.diag(helpers.flat(PARAMS, PARAMS)), "Identity": np.eye(OPERATOR.size), "CG": DENSE}[
        operator
    ]
    expected = QUERY_GRADS @ dense @ TRAIN_GRADS.T
    assert relative_error(ij.Influence(OBJECTIVE, PARAMS, op).influences(QUERY, TRAIN), expected) < 1e-9


def test_factors():
    factors = INFLUENCE.influence_factors(QUERY)
    assert relative_error(helpers.flat(factors, PARAMS), QUERY_GRADS @ DENSE) < 1e-11
    for mode in ("up", "perturbation"):
        expected = INFLUENCE.influences(QUERY, TRAIN, mode)
        assert relative_error(INFLUENCE.influences_from_factors(factors, TRAIN, mode), expected) < 1e-12


@given(st.integers(0, 5), st.sampled_from([1, 2, 6]))
def test_a_factor_does_not_depend_on_its_batch_mates(index, count):
    """pyDVL's harmonic mean changes the factors of an example sixfold with the batch it is in."""
    alone = INFLUENCE.influence_factors(slice_of(QUERY, index, index + 1))
    together = INFLUENCE.influence_factors(slice_of(QUERY, max(0, index - count + 1), index + 1))
    assert tree_error(jax.tree.map(lambda x: x[-1:], together), alone) < 1e-12


def test_self_influences():
    expected = np.einsum("ni,ij,nj->n", TRAIN_GRADS, DENSE, TRAIN_GRADS)
    for chunk in (None, 1, 4):
        got = dataclasses.replace(INFLUENCE, chunk=chunk).self_influences(TRAIN)
        assert relative_error(got, expected) < 1e-11
    asked = ij.Influence(OBJECTIVE, PARAMS, INVERSE, measurement=lambda p, z: 7.0 * OBJECTIVE(p, z))
    assert relative_error(asked.self_influences(TRAIN), expected) < 1e-11


def test_measurement_replaces_the_loss_on_the_query_side_only():
    def margin(params, example):
        logits = helpers.mlp(params, example)
        return logits[example.y] - jax.nn.logsumexp(jnp.where(jnp.arange(3) == example.y, -jnp.inf, logits))

    influence = ij.Influence(OBJECTIVE, PARAMS, INVERSE, measurement=margin)
    expected = flat_grads(QUERY, margin) @ DENSE @ TRAIN_GRADS.T
    assert relative_error(influence.influences(QUERY, TRAIN), expected) < 1e-11
    assert relative_error(influence.influences(QUERY, slice_of(TRAIN, 2)), expected[:, :2]) < 1e-11
    split = ij.Objective(helpers.mlp, lambda out, z: out[0])
    first = ij.Influence(OBJECTIVE, PARAMS, INVERSE, measurement=split).influences(QUERY, TRAIN)
    assert relative_error(first, flat_grads(QUERY, split) @ DENSE @ TRAIN_GRADS.T) < 1e-11


class TestTopK:
    def test_is_the_sorted_scores(self):
        for chunk in (None, 1, 4, 17):
            top = dataclasses.replace(INFLUENCE, chunk=chunk).top_k(QUERY, TRAIN, 5)
            assert top.indices.tolist() == jnp.argsort(-UP, axis=1)[:, :5].tolist()
            assert relative_error(top.values, jnp.take_along_axis(UP, top.indices, axis=1)) < 1e-11
            assert top.indices.dtype == jnp.int32

    def test_of_all_examples(self):
        top = INFLUENCE.top_k(QUERY, TRAIN, 17)
        assert jnp.sort(top.indices, axis=1).tolist() == [list(range(17))] * 6

    @pytest.mark.parametrize("chunk", [None, 1, 2, 3])
    def test_ties_go_to_the_lower_index(self, chunk):
        """In whole numbers, so that scores of equal examples are equal to the last bit, however they are compiled."""
        params = {"w": jnp.ones(2)}
        influence = ij.Influence(lambda p, z: p["w"] @ z["x"], params, ij.Identity(params), chunk=chunk)
        twins = {"x": jnp.array([[1.0, 2.0], [3.0, 1.0]] * 3 + [[1.0, 2.0]])}
        top = influence.top_k({"x": jnp.array([[2.0, 1.0], [-1.0, 5.0]])}, twins, 7)
        assert top.indices.tolist() == [[1, 3, 5, 0, 2, 4, 6], [0, 2, 4, 6, 1, 3, 5]]
        assert top.values.tolist() == [[7.0] * 3 + [4.0] * 4, [9.0] * 4 + [2.0] * 3]

    @pytest.mark.parametrize("chunk", [None, 1, 5])
    def test_not_a_number_comes_last_with_its_own_index(self, chunk):
        influence = ij.Influence(lambda p, z: OBJECTIVE(p, z), PARAMS, ij.Identity(PARAMS), chunk=chunk)
        poisoned = ij.Batch(jnp.asarray(TRAIN.x).at[4].set(jnp.nan), TRAIN.y)
        with pytest.warns(
            ij.LossWarning, match=r"train: the loss of 1 of 17 examples is NaN .* first example 4 \(nan\)"
        ):
            top = influence.top_k(QUERY, poisoned, 17)
        assert top.indices[:, -1].tolist() == [4] * 6
        assert jnp.sort(top.indices, axis=1).tolist() == [list(range(17))] * 6
        assert bool(jnp.all(jnp.isnan(top.values[:, -1])) & jnp.all(jnp.isfinite(top.values[:, :-1])))


class Halved(ij.Solver):
    """Half of what it is given, which never converges; says nothing of its own about that."""

    def solve(self, op, damping, fit, V):
        rows = jnp.ones(jax.tree.leaves(V)[0].shape[0])
        return jax.tree.map(lambda v: v / 2, V), ij.Info(jnp.int32(rows), rows, rows < 0)


jax.tree_util.register_static(Halved)
STEPS, SCALE, MORE, ZERO = "max_steps", "scale", "raise the damping", "raise the damping, which is 0"
ADVICE = {
    "Direct": (ij.Direct(0.0), [ZERO, "singular"], [STEPS, "Eigh", "rtol"]),
    "Eigh": (ij.Eigh(0.0), [ZERO, "singular"], [STEPS, "Eigh", "rtol"]),
    "CG": (ij.CG(1e-6, rtol=1e-14, max_steps=1), [MORE, STEPS, "rtol"], ["which is 0", "rank"]),
    "BlockCG": (ij.BlockCG(1e-6, rtol=1e-14, max_steps=1), [MORE, STEPS, "rtol"], ["which is 0", "rank"]),
    "diverging": (ij.LiSSA(0.1, scale=1e-3), [SCALE, "diverges"], [STEPS, "rank"]),
    "too short": (ij.LiSSA(1e-3, scale=100.0, depth=2), ["raise depth (2)", "the damping"], [STEPS, "repeats"]),
    "too few pairs": (ij.Arnoldi(0.1, rank=1, steps=1), ["rank", "steps"], [STEPS]),
    "nothing outside": (ij.Nystrom(0.0, rank=2), [ZERO, "complement=False"], [STEPS]),
    "sample space": (ij.SampleSpace(0.0), [ZERO], [STEPS, "rank"]),
    "a block": (
        ij.Blockwise({"layer0": ij.LiSSA(0.1, scale=1e-3), "layer1": ij.CG(0.1)}),
        [SCALE, "diverges"],
        [STEPS, "rtol"],
    ),
    "one's own": (Halved(), [MORE], [STEPS, "which is 0"]),
}


class TestUnconverged:
    """A solve that fails is a warning on the host, wherever scores come from it."""

    def test_every_way_to_a_score(self):
        indefinite = ij.Hessian(OBJECTIVE, PARAMS, TRAIN)
        assert jnp.linalg.eigvalsh(ij.to_dense(indefinite))[0] < -1e-3
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(indefinite, ij.CG(0.0)))
        for call in (
            lambda: influence.influences(QUERY, TRAIN),
            lambda: influence.influences(TRAIN, QUERY),
            lambda: influence.influences(QUERY, TRAIN, "perturbation"),
            lambda: influence.influence_factors(QUERY),
            lambda: influence.self_influences(TRAIN),
            lambda: influence.top_k(QUERY, TRAIN, 2),
        ):
            with pytest.warns(ij.ConvergenceWarning, match=r"CG.*did not converge.*indefinite; use GGN"):
                call()

    def test_advice_without_negative_curvature(self):
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(OPERATOR, ij.CG(1e-4, rtol=1e-12, max_steps=2)))
        with pytest.warns(ij.ConvergenceWarning, match=r"6 of 6 solves.*worst relative residual.*max_steps"):
            influence.influences(QUERY, TRAIN)

    @pytest.mark.parametrize("name", ADVICE)
    def test_names_what_the_solver_has(self, name):
        """Of each solver its own knobs, of blocks that of the block which failed, and what another has is not named."""
        solver, said, unsaid = ADVICE[name]
        operator = ij.GGN(OBJECTIVE, PARAMS, slice_of(TRAIN, 2))
        inverse = ij.invert(operator, solver, key=jax.random.key(0))
        with pytest.warns(ij.ConvergenceWarning) as caught:
            ij.Influence(OBJECTIVE, PARAMS, inverse).influences(QUERY, TRAIN)
        advice = str(caught[0].message).split("cannot be relied on: ")[1]
        assert all(word in advice for word in said), advice
        assert not any(word in advice for word in (*unsaid, "GGN")), advice

    def test_a_sum_asks_what_it_is_made_of(self):
        terms = [ij.invert(OPERATOR, ij.CG(1e-4, max_steps=1)), ij.invert(OPERATOR, ij.LiSSA(0.1, scale=1e-3))]
        with pytest.warns(ij.ConvergenceWarning, match=r"relied on: .*max_steps.*; the series diverges: its scale"):
            ij.Influence(OBJECTIVE, PARAMS, terms[0] + 0.5 * terms[1]).influences(QUERY, TRAIN)

    def test_silent_under_tracing(self):
        influence = ij.Influence(OBJECTIVE, PARAMS, ij.invert(OPERATOR, ij.CG(1e-4, rtol=1e-12, max_steps=2)))
        jax.jit(lambda influence: influence.influences(QUERY, TRAIN))(influence)


def test_constants_closed_over_under_jit():
    """Weights and indices that are concrete inside a traced function are checked, not traced."""
    weights, v = jnp.linspace(0.5, 1.5, 17), PARAMS
    fn = lambda p: ij.GGN(OBJECTIVE, p, TRAIN, weights=weights).mv(v)
    assert tree_error(jax.jit(fn)(PARAMS), fn(PARAMS)) < 1e-12
    few = jax.jit(lambda op: ij.minibatch(op, jnp.array([0, 1])).mv(v))(OPERATOR)
    assert tree_error(few, ij.minibatch(OPERATOR, jnp.array([0, 1])).mv(v)) < 1e-12


def test_narrow_inputs_and_factors_are_scored_in_float32(float32):
    narrow = jnp.bfloat16
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    train = ij.Batch(TRAIN.x.astype(narrow), TRAIN.y.astype(jnp.int32))
    widened = ij.Batch(train.x.astype(jnp.float32), train.y)
    objective = ij.Objective(lambda p, z: _mlp(p, z.x.astype(jnp.float32)), helpers.cross_entropy)
    influence = ij.Influence(objective, params, ij.Identity(params))
    got = influence.influences(train, train, "perturbation")
    assert got.dtype == jnp.float32
    assert relative_error(got, influence.influences(widened, widened, "perturbation")) < 1e-5
    factors = jax.tree.map(lambda x: x.astype(narrow), influence.influence_factors(widened))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    got = influence.influences_from_factors(factors, widened)
    assert relative_error(got, influence.influences_from_factors(exact, widened)) < 1e-5


class TestPerturbation:
    @pytest.mark.parametrize("chunk", [None, 1, 4])
    def test_is_the_derivative_of_up_in_the_input(self, chunk):
        influence = dataclasses.replace(INFLUENCE, chunk=chunk, rhs_chunk=chunk)
        perturbed = influence.influences(QUERY, TRAIN, "perturbation")
        step = 1e-5
        for axis in (0, 3):
            shift = step * jnp.broadcast_to(jnp.eye(5)[axis], TRAIN.x.shape)
            up = [influence.influences(QUERY, ij.Batch(TRAIN.x + sign * shift, TRAIN.y)) for sign in (1.0, -1.0)]
            assert relative_error(perturbed[..., axis], (up[0] - up[1]) / (2 * step)) < 1e-7

    def test_equals_mixed_gradients_contracted(self):
        mixed = ij.mixed_grads(OBJECTIVE, PARAMS, TRAIN)
        factors = INFLUENCE.influence_factors(QUERY)
        expected = np.einsum("qp,nxp->qnx", helpers.flat(factors, PARAMS), helpers.flat(mixed, PARAMS))
        assert relative_error(INFLUENCE.influences(QUERY, TRAIN, "perturbation"), expected) < 1e-11

    @pytest.mark.parametrize("shape", [(), (4,), (2, 3), (4, 4, 2)])
    def test_any_input_shape(self, shape):
        def predict(params, example):
            return jnp.sum(jnp.tanh(example["image"]) * params["w"]) + params["b"]

        objective = ij.Objective(predict, lambda out, z: 0.5 * (out - z["y"]) ** 2)
        key = jax.random.key(0)
        params = {"w": helpers.normal(key, shape), "b": jnp.array(0.1)}
        data = {"image": helpers.normal(key, (7, *shape)), "y": jnp.arange(7.0)}
        influence = ij.Influence(objective, params, ij.invert(ij.GGN(objective, params, data), ij.Direct(0.1)))
        perturbed = influence.influences(jax.tree.map(lambda x: x[:3], data), data, "perturbation", wrt="image")
        assert perturbed.shape == (3, 7, *shape)
        step = 1e-6
        moved = [dict(data, image=data["image"] + sign * step) for sign in (1.0, -1.0)]
        up = [influence.influences(jax.tree.map(lambda x: x[:3], data), batch) for batch in moved]
        total = perturbed.reshape(3, 7, -1).sum(-1)
        assert relative_error(total, (up[0] - up[1]) / (2 * step)) < 1e-6

    def test_inputs_by_key_attribute_index_and_as_trees(self):
        class Pair(typing.NamedTuple):
            x: typing.Any
            y: typing.Any

        expected = INFLUENCE.influences(QUERY, TRAIN, "perturbation")
        kinds = {
            "mapping": (dict, "x", lambda z: z),
            "tuple": (lambda **parts: (parts["x"], parts["y"]), 0, lambda z: {"x": z[0], "y": z[1]}),
            "named tuple": (lambda **parts: Pair(**parts), "x", lambda z: z._asdict()),
            "list": (lambda **parts: [parts["x"], parts["y"]], 0, lambda z: {"x": z[0], "y": z[1]}),
            "tree": (
                lambda **parts: {"both": {"left": parts["x"][:, :2], "right": parts["x"][:, 2:]}, "y": parts["y"]},
                "both",
                lambda z: {"x": jnp.concatenate([z["both"]["left"], z["both"]["right"]]), "y": z["y"]},
            ),
        }
        for name, (make, wrt, read) in kinds.items():
            objective = ij.Objective(
                lambda p, z, read=read: _mlp(p, read(z)["x"]),
                lambda out, z, read=read: jax.nn.logsumexp(out) - out[read(z)["y"]],
            )
            train, query = make(x=TRAIN.x, y=TRAIN.y), make(x=QUERY.x, y=QUERY.y)
            influence = ij.Influence(objective, PARAMS, INVERSE)
            got = influence.influences(query, train, "perturbation", wrt=wrt)
            if name == "tree":
                got = jnp.concatenate([got["left"], got["right"]], axis=-1)
            assert relative_error(got, expected) < 1e-11, name


def _mlp(params, x):
    return jnp.tanh(x @ params["layer0"]["kernel"]) @ params["layer1"]["kernel"]


class TestTransformations:
    def test_jit_and_vmap(self):
        scores = jax.jit(lambda influence, q, t: influence.influences(q, t))(INFLUENCE, QUERY, TRAIN)
        assert relative_error(scores, UP) < 1e-11
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), PARAMS, jax.tree.map(lambda x: 1.1 * x, PARAMS))

        def of_checkpoint(params):
            inverse = ij.invert(ij.GGN(OBJECTIVE, params, TRAIN), ij.Direct(DAMPING))
            return ij.Influence(OBJECTIVE, params, inverse).influences(QUERY, TRAIN)

        both = jax.vmap(of_checkpoint)(stacked)
        assert relative_error(both[0], UP) < 1e-9
        assert relative_error(both[1], of_checkpoint(jax.tree.map(lambda x: 1.1 * x, PARAMS))) < 1e-9

    def test_derivative_of_a_score_in_data_weights_and_inputs(self):
        def score(weights, shift):
            data = ij.Batch(TRAIN.x + shift, TRAIN.y)
            op = ij.GGN(OBJECTIVE, PARAMS, data, weights=weights)
            return ij.Influence(OBJECTIVE, PARAMS, ij.invert(op, ij.CG(DAMPING, rtol=1e-12))).influences(QUERY, data)[
                0, 0
            ]

        weights, step = jnp.linspace(0.5, 1.5, 17), 1e-5
        by_weight, by_shift = jax.grad(score, argnums=(0, 1))(weights, jnp.array(0.0))
        bump = step * jnp.eye(17)[3]
        expected = (score(weights + bump, 0.0) - score(weights - bump, 0.0)) / (2 * step)
        assert abs(by_weight[3] - expected) < 1e-6 * abs(expected)
        expected = (score(weights, step) - score(weights, -step)) / (2 * step)
        assert abs(by_shift - expected) < 1e-6 * abs(expected)

    def test_second_call_compiles_nothing(self, compilations):
        influence = dataclasses.replace(INFLUENCE, chunk=4)

        def everything(influence, query, train):
            influence.influences(query, train)
            influence.influences(query, train, "perturbation")
            influence.self_influences(train)
            return jax.block_until_ready(influence.top_k(query, train, 3))

        everything(influence, QUERY, TRAIN)
        moved = jax.tree.map(lambda x: 1.5 * x, PARAMS)
        query, train = ij.Batch(QUERY.x + 1.0, QUERY.y), ij.Batch(TRAIN.x - 1.0, TRAIN.y)
        jax.block_until_ready((moved, query, train))
        operator = dataclasses.replace(INVERSE.op, params=moved)
        inverse = dataclasses.replace(INVERSE, op=operator)
        with compilations() as names:
            everything(dataclasses.replace(influence, params=moved, inverse=inverse), query, train)
        assert names == []

    def test_sharded_examples(self):
        """Eight devices, examples sharded over them: the same scores."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        even = slice_of(TRAIN, 16)
        sharded = jax.device_put(even, sharding)
        for chunk in (None, 8):
            op = ij.GGN(OBJECTIVE, PARAMS, sharded, chunk=chunk)
            expected = ij.GGN(OBJECTIVE, PARAMS, even).mv(PARAMS)
            assert tree_error(op.mv(PARAMS), expected) < 1e-11
            influence = dataclasses.replace(INFLUENCE, chunk=chunk)
            assert relative_error(influence.influences(QUERY, sharded), UP[:, :16]) < 1e-11


class TestWhereAnInverseWasFitted:
    """At the parameters of the influence, or it is refused: of every kind, moved, restricted, in sums, from a file."""

    def kinds(self, data, tmp_path):
        ggn = ij.GGN(OBJECTIVE, PARAMS, data)
        exact = ij.invert(ggn, ij.Eigh(0.1))
        yield "moved", exact.with_damping(0.2)
        yield "in a sum", 0.5 * exact + ij.Identity(PARAMS)
        yield "in blocks", ij.invert(ggn, ij.Blockwise(ij.CG(0.1)))
        yield (
            "low rank over a loader",
            ij.stream.invert(
                ij.GGN, OBJECTIVE, PARAMS, [data], ij.Nystrom(0.1, rank=3), key=jax.random.key(0), progress=False
            ),
        )
        kronecker = ij.invert(ij.ekfac(OBJECTIVE, PARAMS, data, labels="empirical"), ij.Direct(0.1))
        ij.store.save(tmp_path / "fit", kronecker)
        yield "from a file", ij.store.load(tmp_path / "fit", kronecker)

    def test_other_parameters_are_refused(self, tmp_path):
        leaves, structure = jax.tree.flatten(PARAMS)
        equal = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), PARAMS)
        narrow = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
        other = structure.unflatten([*leaves[:-1], leaves[-1] + 0.25])
        for name, inverse in self.kinds(TRAIN, tmp_path):
            for same in (PARAMS, equal, narrow):
                assert ij.Influence(OBJECTIVE, same, inverse).inverse is inverse, name
            with pytest.raises(ValueError, match=r"params: leaf '.*' is up to 2.5e-01 away from where .* was fitted"):
                ij.Influence(OBJECTIVE, other, inverse)

    def test_what_was_fitted_nowhere_serves_everywhere(self):
        other = jax.tree.map(lambda x: x + 1.0, PARAMS)
        for inverse in (ij.Identity(PARAMS), ij.Diagonal(PARAMS), ij.invert(ij.Diagonal(PARAMS), ij.Eigh(9.0))):
            assert ij.Influence(OBJECTIVE, other, inverse).inverse is inverse

    def test_under_tracing_nothing_is_read(self):
        inverse = ij.invert(ij.GGN(OBJECTIVE, PARAMS, TRAIN), ij.Eigh(0.1))
        at = lambda step: ij.Influence(OBJECTIVE, jax.tree.map(lambda x: x + step, PARAMS), inverse).params
        assert jax.tree.leaves(jax.vmap(at)(jnp.arange(3.0)))[0].shape[0] == 3


class TestConstantsOfAnInverse:
    """Those of the influence's loss, or it is refused: as statistics of before the training."""

    def loss(self, shift, count=3):
        statistics = {"mean": jnp.full(3, shift), "seen": jnp.int32(count)}
        return ij.Objective(
            lambda p, z, c: p["w"] * (z["x"] - c["mean"]) * c["seen"].astype(float),
            lambda out, z: jnp.sum((out - z["y"]) ** 2),
            constants=statistics,
        )

    def inverses(self, loss):
        ggn = ij.GGN(loss, SCALED, ROWS)
        yield (exact := ij.invert(ggn, ij.Direct(0.1)))
        yield 2.0 * exact + ij.Identity(SCALED)
        yield ij.stream.invert(ij.GGN, loss, SCALED, [ROWS], ij.CG(0.1), progress=False)

    def test_others_are_refused(self):
        for inverse in self.inverses(self.loss(0.0)):
            assert ij.Influence(self.loss(0.0), SCALED, inverse).inverse is inverse
            with pytest.raises(
                ValueError, match=r"constants: leaf 'mean' is up to 2.0e\+00 away from those that .*GGN"
            ):
                ij.Influence(self.loss(2.0), SCALED, inverse)
            with pytest.raises(ValueError, match=r"constants: leaf 'seen' is up to 4.0e\+00 away"):
                ij.Influence(self.loss(0.0, 7), SCALED, inverse)
            assert ij.Influence(SCALING, SCALED, inverse).inverse is inverse  # a loss that has none

    def test_under_tracing_they_are_nan(self):
        inverse = next(self.inverses(self.loss(0.0)))
        scores = jax.vmap(lambda s: ij.Influence(self.loss(s), SCALED, inverse).influences(ROWS, ROWS))
        other, same = scores(jnp.array([2.0, 0.0]))
        assert np.isnan(other).all()
        eager = ij.Influence(self.loss(0.0), SCALED, inverse).influences(ROWS, ROWS)
        assert relative_error(same, eager) < 1e-12


RAW = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "y": np.ones((2, 3))}


class TestExamplesPreparedAlike:
    """Pixels are from 0 to 255 or from 0 to 1 on both sides, or it is refused."""

    WORDS = r"{}: leaf 'x' is uint8, that of {} float64; expected examples that were prepared alike"

    def test_of_queries_and_examples(self):
        plain = ij.Influence(SCALING, SCALED, ij.Identity(SCALED))
        fitted = ij.Influence(SCALING, SCALED, ij.invert(ij.GGN(SCALING, SCALED, ROWS), ij.Direct(0.1)))
        of_curvature = "the data of the curvature"
        for call, name, of in (
            (lambda: plain.influences(RAW, ROWS), "query", "train"),
            (lambda: plain.top_k(RAW, ROWS, 1), "query", "train"),
            (lambda: ij.stream.scores(plain, RAW, [ROWS], progress=False), "query", "loader"),
            (lambda: fitted.influence_factors(RAW), "query", of_curvature),
            (lambda: fitted.self_influences(RAW), "batch", of_curvature),
            (lambda: fitted.influences(RAW, RAW), "train", of_curvature),
            (lambda: fitted.influences_from_factors({"w": jnp.ones((1, 3))}, RAW), "train", of_curvature),
        ):
            with pytest.raises(ValueError, match=self.WORDS.format(name, of)):
                call()
        with pytest.raises(ValueError, match="query: leaf 'x' is float64, that of train uint8"):
            plain.influences(ROWS, RAW)

    def test_widths_and_flags_may_differ(self):
        casting = ij.Objective(lambda p, z: p["w"] * z["x"].astype(float), SCALING.loss)
        plain = ij.Influence(casting, SCALED, ij.Identity(SCALED))
        for kinds in ((np.int32, np.int64), (np.float32, np.float64), (bool, np.float32), (jnp.bfloat16, np.float32)):
            query, train = ({**ROWS, "x": (ROWS["x"] > 3).astype(kind)} for kind in kinds)
            assert np.isfinite(plain.influences(query, train)).all()
        margin = lambda params, z: jnp.sum(params["w"] * z["x"].astype(float))
        other = dataclasses.replace(plain, measurement=margin)
        assert other.influences(RAW, ROWS).shape == (2, 5)


class TestPartsWithoutEffect:
    """Derivatives in them are zero, and are said to be; as those of a loss that rounds."""

    def test_perturbations_are_told(self, recwarn):
        rounded = ij.Objective(lambda p, z: p["w"] * jnp.round(z["x"]), SCALING.loss)
        unused = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: jnp.sum(out**2))
        for objective, wrt in ((rounded, "x"), (unused, "y")):
            influence = ij.Influence(objective, SCALED, ij.Identity(SCALED))
            factors = influence.influence_factors(ROWS)
            for call in (
                lambda i=influence, w=wrt: i.influences(ROWS, ROWS, "perturbation", wrt=w),
                lambda i=influence, w=wrt, f=factors: i.influences_from_factors(f, ROWS, "perturbation", wrt=w),
            ):
                with pytest.warns(ij.LossWarning, match=f"wrt: the derivatives in part '{wrt}' .* exactly zero"):
                    call()
            influence.influences_from_factors(jax.tree.map(jnp.zeros_like, factors), ROWS, "perturbation", wrt=wrt)
        ij.Influence(SCALING, SCALED, ij.Identity(SCALED)).influences(ROWS, ROWS, "perturbation")
        assert not recwarn.list


SCALED, ROW = {"w": jnp.arange(1.0, 4.0)}, {"x": jnp.ones(3), "y": jnp.zeros(3)}
ROWS = {"x": jnp.arange(15.0).reshape(5, 3), "y": jnp.ones((5, 3))}
SCALING = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: jnp.sum((out - z["y"]) ** 2))


class TestOneExampleWithoutItsAxis:
    """It is refused, not taken for as many examples as it has entries."""

    def influences(self):
        fisher = ij.EmpiricalFisher(SCALING, SCALED, ROWS)
        yield ij.Influence(SCALING, SCALED, ij.invert(fisher, ij.Direct(0.1)))
        kronecker = ij.ekfac(SCALING, SCALED, ROWS, labels="empirical")
        yield ij.Influence(SCALING, SCALED, ij.invert(kronecker, ij.Direct(0.1)))
        measurement = lambda params, z: jnp.sum(params["w"]) * jnp.sum(z["x"])
        yield ij.Influence(SCALING, SCALED, ij.invert(fisher, ij.CG(0.1)), measurement=measurement)

    def test_beside_the_training_examples(self):
        words = r"leaf 'x' has shape \(3,\), that of .* \((5|3), 3\).*jax.tree.map\(lambda a: a\[None\], query\)"
        loader = [jax.tree.map(lambda x: x[:3], ROWS), jax.tree.map(lambda x: x[3:], ROWS)]
        for influence in self.influences():
            for call in (
                lambda i=influence: i.influences(ROW, ROWS),
                lambda i=influence: i.influences(ROW, ROWS, "perturbation"),
                lambda i=influence: i.influences_by_block(ROW, ROWS),
                lambda i=influence: i.top_k(ROW, ROWS, 2),
                lambda i=influence: ij.baselines.relative(i, ROW, ROWS),
                lambda i=influence: ij.score_bounds(i, ROW, ROWS),
                lambda i=influence: ij.stream.scores(i, ROW, loader, progress=False),
                lambda i=influence: ij.stream.top_k(i, ROW, loader, 2, progress=False),
            ):
                with pytest.raises(ValueError, match=words):
                    call()
        with pytest.raises(ValueError, match=words):
            ij.baselines.tracin(SCALING, [SCALED], [1.0], ROW, ROWS)

    def test_beside_the_data_of_the_curvature(self):
        """Alone, it is compared with what the inverse was made of, inside of sums as well, if that is known."""
        whole, unknown, _ = self.influences()
        mixed = dataclasses.replace(whole, inverse=0.5 * whole.inverse + ij.Identity(SCALED))
        for influence in (whole, mixed):
            for method in ("influence_factors", "influence_factors_by_block", "self_influences"):
                with pytest.raises(ValueError, match=r"leaf 'x' has shape \(3,\), that of the data of the curvature"):
                    getattr(influence, method)(ROW)
        with pytest.raises(ValueError, match="that of the data of the curvature"):
            ij.stream.influence_factors(whole, ROW, progress=False)
        assert unknown.influence_factors(ROW)["w"].shape == (3, 3)

    def test_other_examples_pass(self):
        """Of another length, of another structure; of a measurement also those of another rank."""
        whole, _, measured = self.influences()
        assert whole.influences(jax.tree.map(lambda a: a[None], ROW), ROWS).shape == (1, 5)
        sums = ij.Objective(lambda p, z: jnp.sum(p["w"]) * z["x"], lambda out, z: jnp.sum((out - z["y"]) ** 2))
        any_length = ij.Influence(sums, SCALED, ij.Identity(SCALED))
        assert any_length.influences({"x": jnp.ones((2, 7)), "y": jnp.ones((2, 7))}, ROWS).shape == (2, 5)
        scalars = {"x": jnp.arange(4.0), "y": jnp.zeros(4)}
        assert measured.influences(scalars, ROWS).shape == (4, 5)
        assert measured.influences({"x": jnp.ones((2, 3))}, ROWS).shape == (2, 5)

    def test_a_label_that_is_no_array_of_examples(self):
        one = {"x": jnp.ones(3), "y": jnp.zeros(2)}
        with pytest.raises(ValueError, match=r"disagree in length.*jax.tree.map\(lambda a: a\[None\], query\)"):
            ij.Influence(SCALING, SCALED, ij.Identity(SCALED)).influences(one, ROWS)
