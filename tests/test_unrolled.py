"""Trainings as functions of the examples' weights, and their derivatives, against loops in plain Python."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CLASSIFICATION, mainly, relative_error, tree_error

import influence_jax as ij
from influence_jax import unrolled
from influence_jax.training import training

COUNT, CLASSES, EPOCHS, PENALTY = 11, 3, 3, 0.03
PARAMS = helpers.random_mlp(jax.random.key(0), biases=False)
DATA = helpers.random_batch(jax.random.key(1), COUNT, 5, CLASSES, classes=True)
QUERY = helpers.random_batch(jax.random.key(2), 5, 5, CLASSES, classes=True)
KEY, OTHER_KEY = jax.random.key(3), jax.random.key(8)
ONES = np.ones(COUNT)

MASKS = np.ones((4, COUNT), bool)
MASKS[1, 3] = MASKS[2, [0, 4, 10]] = MASKS[3, [1, 2, 3, 5, 8, 9, 10]] = False
WEIGHTS = np.linspace(0, 2, COUNT)


def promoting(optimizer):
    """Adam and schedules of optax raise a float to a whole power, which strict promotion forbids."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


OPTIMIZERS = {
    "sgd": optax.sgd(0.4),
    "momentum": optax.sgd(0.2, momentum=0.9, nesterov=True),
    "adam": promoting(optax.adam(0.05, eps_root=1e-8)),
    "schedule": promoting(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(optax.cosine_decay_schedule(0.5, 9)))),
}
BATCH_SIZES = [None, 4]
CASES = [("sgd", None), ("sgd", 4), ("momentum", None), ("momentum", 4), ("adam", None), ("adam", 4), ("schedule", 4)]


def made(optimizer="sgd", batch_size=None, **options):
    options = {"params": PARAMS, "data": DATA, "epochs": EPOCHS, "penalty": PENALTY, **options}
    return training(CLASSIFICATION, OPTIMIZERS.get(optimizer, optimizer), batch_size=batch_size, **options)


per_example = jax.jit(jax.vmap(jax.grad(CLASSIFICATION), (None, 0)))


def mean_gradient(params, batch, weights):
    mean = lambda g, p: np.average(np.asarray(g)[batch], axis=0, weights=weights) + PENALTY * p
    return jax.tree.map(mean, per_example(params, DATA), params)


def reference(optimizer, batch_size, weights, *, own, params=PARAMS, epochs=EPOCHS):
    """A training in plain Python: numpy's weighted means of the gradients of single examples."""
    optimizer = OPTIMIZERS.get(optimizer, optimizer)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for epoch in range(epochs):
        order = np.arange(COUNT)
        if batch_size is not None:
            key = jax.random.fold_in(jax.random.split(KEY)[1], epoch)
            order = np.asarray(jax.random.permutation(key, COUNT))
        visited = [i for i in order if weights[i] > 0 or not own]
        for start in range(0, len(visited), batch_size or COUNT):
            batch = visited[start : start + (batch_size or COUNT)]
            if weights[batch].sum() == 0:
                continue
            slope = mean_gradient(params, batch, weights[batch])
            change, state = update(slope, state, params)
            params = jax.tree.map(np.add, params, change)
    return params


def rows(stack):
    leaves, structure = jax.tree.flatten(stack)
    return [structure.unflatten(row) for row in zip(*leaves, strict=True)]


FLAGS = jax.tree.map(lambda x: x.ndim > 1, PARAMS)
WRAPPERS = {
    "several batches": optax.MultiSteps(optax.sgd(0.4, momentum=0.9), 2, accumulator_dtype=jnp.float64),
    "more and more batches": optax.MultiSteps(optax.adam(0.05), lambda n: 1 + n % 3, accumulator_dtype=jnp.float64),
    "finite batches": optax.MultiSteps(optax.sgd(0.4), 2, should_skip_update_fn=optax.skip_not_finite),
    "finite": optax.apply_if_finite(optax.sgd(0.4), 2),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 9)),
    "masked": optax.masked(optax.sgd(0.4, momentum=0.9), FLAGS),
}


# Of what optax keeps in float32, whatever the parameters are: sums of gradients and injected numbers.
TOLERANCES = {"finite batches": 1e-6, "injected": 1e-6}


class TestWrappers:
    """Optimizers made of others, which count, skip and accumulate, train as in a loop of optax's own."""

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_trains_as_in_a_loop(self, wrapper):
        optimizer = WRAPPERS[wrapper]
        with jax.numpy_dtype_promotion("standard"):
            expected = reference(optimizer, 4, MASKS[1].astype(float), own=True)
            assert tree_error(made(optimizer, 4)(MASKS[1], KEY), expected) < TOLERANCES.get(wrapper, 1e-12)

    def test_derivative(self):
        train = made(WRAPPERS["several batches"], 4, batches="shared", epochs=2)
        with jax.numpy_dtype_promotion("standard"):
            scores = unrolled.influences(train, QUERY, key=KEY)
            losses = lambda weights: jax.vmap(CLASSIFICATION, (None, 0))(train(weights, KEY), QUERY)
            step = 1e-5 * np.eye(COUNT)[3]
            expected = -COUNT * (losses(ONES + step) - losses(ONES - step)) / 2e-5
        assert relative_error(scores[:, 3], expected) < 1e-7

    def test_one_that_wants_parameters_of_its_own_kind(self):
        with pytest.raises(AttributeError, match=r"optimizer: .*failed with AttributeError.*such as optax.lookahead"):
            made(optax.lookahead(optax.sgd(0.1), 5, 0.5))(ONES, KEY)


class TestMaskedTraining:
    @pytest.mark.parametrize(
        ("optimizer", "batch_size"), mainly(CASES, ("sgd", 4), ("momentum", None), ("adam", 4), ("schedule", 4))
    )
    def test_is_training_on_the_subset(self, optimizer, batch_size):
        """Of what is kept, in the same order: as many steps, the same batches, the last of them ragged."""
        train = made(optimizer, batch_size)
        expected = [reference(optimizer, batch_size, mask.astype(float), own=True) for mask in MASKS]
        trained = jax.vmap(train, (0, None))(MASKS, KEY)
        for got, want in zip(rows(trained), expected, strict=True):
            assert tree_error(got, want) < 1e-12

    def test_one_by_one(self):
        train = made("momentum", 4)
        expected = [reference("momentum", 4, mask.astype(float), own=True) for mask in MASKS]
        mapped = jax.jit(lambda masks: jax.lax.map(lambda mask: train(mask, KEY), masks))(MASKS)
        for mask, got, want in zip(MASKS, rows(mapped), expected, strict=True):
            assert tree_error(got, want) < 1e-12
            assert tree_error(train(mask, KEY), want) < 1e-12

    @pytest.mark.parametrize("batch_size", BATCH_SIZES)
    @pytest.mark.parametrize("batches", ["own", "shared"])
    def test_with_other_weights(self, batches, batch_size):
        weights = WEIGHTS * MASKS[3]
        expected = reference("momentum", batch_size, weights, own=batches == "own")
        assert tree_error(made("momentum", batch_size, batches=batches)(weights, KEY), expected) < 1e-12

    def test_shared_batches_keep_their_places_and_those_without_weight_make_no_step(self):
        first = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.split(KEY)[1], 0), COUNT))[:4]
        weights = np.where(np.isin(np.arange(COUNT), first), 0.0, 1.0)
        got = made("adam", 4, batches="shared")(weights, KEY)
        expected = reference("adam", 4, weights, own=False)
        assert tree_error(got, expected) < 1e-12
        assert tree_error(got, reference("adam", 4, weights, own=True)) > 1e-2

    @pytest.mark.parametrize("batch_size", BATCH_SIZES)
    @pytest.mark.parametrize("batches", ["own", "shared"])
    def test_on_nothing_is_the_start(self, batches, batch_size):
        assert tree_error(made(batch_size=batch_size, batches=batches)(0 * ONES, KEY), PARAMS) == 0

    def test_what_is_left_out_may_be_anything(self):
        x = DATA.x.copy()
        x[~MASKS[2]] = np.nan
        train = made(batch_size=3, data=ij.Batch(x, DATA.y))
        assert tree_error(train(MASKS[2], KEY), reference("sgd", 3, MASKS[2].astype(float), own=True)) < 1e-12

    @pytest.mark.parametrize("random", mainly(["threefry2x32", "rbg"], "rbg"))
    def test_batches_that_are_shared_or_not_are_the_same_with_every_generator(self, random):
        key = jax.random.key(0, impl=random)
        own = made(batch_size=3)(ONES, key)
        shared = made(batch_size=3, batches="shared")
        assert tree_error(shared(ONES, key), own) < 1e-12
        last = jax.tree.map(lambda x: x[0], shared.checkpoints(ONES, key, [shared.epochs]))
        assert tree_error(last, own) < 1e-12

    @pytest.mark.parametrize("batch_size", [1, COUNT, 10 * COUNT])
    def test_any_batch_size(self, batch_size):
        expected = reference("sgd", batch_size, ONES, own=True)
        for batches in ("own", "shared"):
            assert tree_error(made(batch_size=batch_size, batches=batches)(ONES, KEY), expected) < 1e-12

    def test_starts_drawn_from_the_key(self):
        draw = lambda key: jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), PARAMS)
        start = draw(jax.random.split(KEY)[0])
        got = made(batch_size=4, params=draw)(ONES, KEY)
        assert tree_error(got, reference("sgd", 4, ONES, own=True, params=start)) < 1e-12
        both = jax.vmap(made(batch_size=4, params=draw), (None, 0))(ONES, jnp.stack([KEY, OTHER_KEY]))
        assert tree_error(rows(both)[0], got) < 1e-12
        assert tree_error(rows(both)[1], got) > 1e-2

    def test_compiles_once_for_all_masks_and_keys(self, compilations):
        train = jax.vmap(made(batch_size=3), (0, None))
        train(MASKS, KEY)
        with compilations() as names:
            train(MASKS[::-1].copy(), OTHER_KEY)
        assert names == []

    def test_line_searches_are_given_the_loss(self):
        """L-BFGS comes to the optimum of a softmax regression in a few full batches."""
        objective = ij.Objective(helpers.affine, helpers.cross_entropy)
        start = {"kernel": jnp.zeros((5, CLASSES)), "bias": jnp.zeros(CLASSES)}
        train = training(objective, optax.lbfgs(), start, DATA, epochs=25, penalty=0.1)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            trained = train(ONES, KEY)
        slope = jax.tree.map(
            lambda g, p: jnp.mean(g, 0) + 0.1 * p,
            jax.vmap(jax.grad(objective), (None, 0))(trained, DATA),
            trained,
        )
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope)) < 1e-8

    @pytest.mark.parametrize("dtype", mainly([jnp.float32, jnp.bfloat16], jnp.float32))
    @pytest.mark.parametrize("batches", ["own", "shared"])
    def test_in_the_dtype_of_the_parameters(self, float32, batches, dtype):
        cast = lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else jnp.int32)
        train = made("momentum", 4, params=jax.tree.map(cast, PARAMS), data=jax.tree.map(cast, DATA), batches=batches)
        got = train(MASKS[2], KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
        with jax.enable_x64(True):
            want = reference("momentum", 4, MASKS[2].astype(float), own=batches == "own")
        assert tree_error(jax.tree.map(lambda x: x.astype(jnp.float32), got), want) < 30 * jnp.finfo(dtype).eps


class TestCheckpoints:
    @pytest.mark.parametrize("batch_size", BATCH_SIZES)
    @pytest.mark.parametrize("batches", ["own", "shared"])
    def test_are_the_ends_of_shorter_trainings(self, batches, batch_size):
        found = made("adam", batch_size, batches=batches).checkpoints(MASKS[2], KEY, [0, 2, EPOCHS])
        weights = MASKS[2].astype(float)
        for epochs, got in zip([0, 2, EPOCHS], rows(found), strict=True):
            assert tree_error(got, reference("adam", batch_size, weights, own=batches == "own", epochs=epochs)) < 1e-12

    def test_stop_with_the_last_one(self):
        train = made("sgd", 4, epochs=1000)
        assert tree_error(rows(train.checkpoints(ONES, KEY, (1,)))[0], made("sgd", 4, epochs=1)(ONES, KEY)) < 1e-12


@jax.jit
def losses(params):
    return jax.vmap(lambda z: CLASSIFICATION(params, z))(QUERY)


def differences(train, weights, measure=losses, h=2e-5):
    """Central finite differences of actual trainings, as scores."""
    shifts = h * np.concatenate([np.eye(COUNT), -np.eye(COUNT)])
    up, down = np.split(jax.vmap(measure)(jax.vmap(train, (0, None))(weights[None] + shifts, KEY)), 2)
    return -weights.sum() * (up - down).T / (2 * h)


class TestUnrolled:
    @pytest.mark.parametrize(("optimizer", "batch_size"), mainly(CASES, ("sgd", None), ("momentum", 4), ("adam", 4)))
    def test_is_the_derivative_of_retraining(self, optimizer, batch_size):
        train = made(optimizer, batch_size, batches="shared", epochs=4)
        scores = unrolled.influences(train, QUERY, key=KEY)
        assert scores.shape == (5, COUNT)
        assert relative_error(scores, differences(train, ONES)) < 1e-6
        assert np.abs(np.sum(scores, axis=1)).max() < 1e-12 * np.abs(scores).max()  # a mean has no scale

    def test_elsewhere_and_of_measurements_in_ragged_groups(self):
        margin = lambda params, z: helpers.mlp(params, z)[0] - helpers.mlp(params, z)[1]
        train = made("momentum", 4, batches="shared")
        weights = WEIGHTS + 0.5
        options = {"key": KEY, "measurement": margin}
        scores = unrolled.influences(train, QUERY, weights, rhs_chunk=2, **options)
        expected = differences(train, weights, lambda params: jax.vmap(lambda z: margin(params, z))(QUERY))
        assert relative_error(scores, expected) < 1e-6
        assert relative_error(unrolled.influences(train, QUERY, weights, rhs_chunk=1, **options), scores) < 1e-12

    def test_of_what_a_mask_leaves_out(self):
        """The score of an example of weight zero is what its coming in does."""
        train, h = made(), 1e-6
        weights = MASKS[2].astype(float)
        scores = unrolled.influences(train, QUERY, MASKS[2], key=KEY)
        changes = np.asarray(losses(train(weights + h * np.eye(COUNT)[4], KEY)) - losses(train(weights, KEY)))
        assert relative_error(scores[:, 4], -weights.sum() * changes / h) < 1e-4

    def test_predicts_leaving_one_out(self):
        """Sign and scale of the library; rows sum to zero, so that one example is worth its score over N - 1."""
        train = made("momentum", epochs=20, penalty=0.3, params=helpers.random_mlp(jax.random.key(0)))
        scores = np.asarray(unrolled.influences(train, QUERY, key=KEY))
        without = jax.vmap(train, (0, None))(~np.eye(COUNT, dtype=bool), KEY)
        changes = (np.asarray(jax.vmap(losses)(without)) - np.asarray(losses(train(ONES, KEY)))).T
        predicted = ij.metrics.predicted_changes(scores, ~np.eye(COUNT, dtype=bool)).T
        assert relative_error(predicted, scores / (COUNT - 1)) < 1e-9
        assert relative_error(predicted, changes) < 0.3
        assert np.corrcoef(np.ravel(scores), np.ravel(changes))[0, 1] > 0.97

    def test_at_the_optimum_is_influence_less_its_mean(self):
        objective = ij.Objective(helpers.affine, helpers.cross_entropy)
        start = {"kernel": jnp.zeros((5, CLASSES)), "bias": jnp.zeros(CLASSES)}
        train = training(objective, optax.sgd(0.5), start, DATA, epochs=900, penalty=0.1)
        params = train(ONES, KEY)
        inverse = ij.invert(ij.Hessian(objective, params, DATA), ij.Direct(0.1))
        expected = np.asarray(ij.Influence(objective, params, inverse).influences(QUERY, DATA))
        scores = unrolled.influences(train, QUERY, key=KEY)
        assert relative_error(scores, expected - expected.mean(axis=1, keepdims=True)) < 1e-8

    def test_derivatives_in_hyperparameters_are_grads(self):
        def loss(rate, penalty):
            train = made(optax.sgd(rate, momentum=0.9), 4, batches="shared", penalty=penalty)
            return jnp.mean(losses(train(ONES, KEY)))

        h, at = 1e-5, np.array([0.1, 0.03])
        points = at + h * np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
        around = jax.vmap(loss)(*points.T)
        expected = [(around[0] - around[1]) / (2 * h), (around[2] - around[3]) / (2 * h)]
        assert relative_error(jax.grad(loss, (0, 1))(*at), expected) < 1e-6

    def test_compiles_once_for_all_weights_and_keys(self, compilations):
        train = made(batch_size=3, batches="shared")
        unrolled.influences(train, QUERY, ONES, key=KEY, rhs_chunk=2)
        with compilations() as names:
            unrolled.influences(train, QUERY, WEIGHTS, key=OTHER_KEY, rhs_chunk=2)
        assert names == []

    @pytest.mark.thorough
    def test_memory_grows_with_the_root_of_the_number_of_steps(self):
        def used(epochs):
            train = made(
                "momentum", 4, batches="shared", params=helpers.random_mlp(KEY, (5, 200, CLASSES)), epochs=epochs
            )
            program = jax.jit(lambda w: unrolled.influences(train, QUERY, w, key=KEY))
            return program.lower(jnp.asarray(ONES)).compile().memory_analysis().temp_size_in_bytes

        # Sixteen times the steps, four times the states that are kept.
        assert 2 < used(12 * 256) / used(12 * 16) < 4.5

    def test_under_jit_what_is_not_finite_passes_unseen(self):
        train = made(optax.sgd(1e200))
        assert not np.isfinite(jax.jit(lambda w: unrolled.influences(train, QUERY, w, key=KEY))(ONES)).all()


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"epochs": 0}, ValueError, "epochs: got 0"),
            ({"epochs": 2.0}, TypeError, "epochs: got 2.0"),
            ({"batch_size": 0}, ValueError, "batch_size: got 0"),
            ({"penalty": -1.0}, ValueError, "penalty: got -1.0"),
            ({"penalty": "small"}, TypeError, "penalty: got 'small'"),
            ({"batches": "mine"}, ValueError, r"batches: got 'mine', expected one of \['own', 'shared'\]"),
            ({"batches": None}, ValueError, "batches: got None"),
            ({"optimizer": "sgd "}, TypeError, r"optimizer: got a str, expected one from optax, such as optax.sgd"),
            ({"optimizer": optax.sgd}, TypeError, "optimizer: got a function"),
            ({"objective": 3}, TypeError, "objective: got a int"),
            ({"params": {"w": jnp.arange(3)}}, TypeError, "params: leaf 'w' is int64"),
            ({"params": lambda key: {"w": 1.0}}, TypeError, r"params\(key\): leaf 'w' is a float"),
            ({"params": {}}, ValueError, "params: got a tree without leaves"),
            ({"data": ij.Batch}, TypeError, "data: leaf '' is a type"),
            ({"data": {"x": np.ones(3), "y": np.ones(4)}}, ValueError, "data: leaves disagree in length"),
        ],
    )
    def test_of_what_to_train(self, change, error, message):
        arguments = {"objective": CLASSIFICATION, "optimizer": OPTIMIZERS["sgd"], "params": PARAMS, "data": DATA}
        with pytest.raises(error, match=message):
            training(**{**arguments, "epochs": EPOCHS, **change})

    @pytest.mark.parametrize(
        ("weights", "key", "error", "message"),
        [
            (ONES[1:], KEY, ValueError, r"weights: got shape \(10,\), expected \(11,\)"),
            (-ONES, KEY, ValueError, "weights: got -1.0, expected finite numbers that are not negative"),
            (np.nan * ONES, KEY, ValueError, "weights: got nan"),
            (1j * ONES, KEY, TypeError, "weights: got complex128"),
            ([1.0] * COUNT, KEY, TypeError, "weights: got a list"),
            (ONES, None, ValueError, "key: a training draws .*; got None"),
            (ONES, 3, TypeError, "key: a training draws .*; got 3"),
        ],
    )
    def test_of_a_call(self, weights, key, error, message):
        train = made()
        for call in (
            lambda: train(weights, key),
            lambda: train.checkpoints(weights, key, [1]),
            lambda: unrolled.influences(train, QUERY, weights, key=key),
        ):
            with pytest.raises(error, match=message):
                call()

    @pytest.mark.parametrize(
        ("epochs", "error"),
        [
            *[((), TypeError), (2, TypeError), ([1.0], TypeError)],
            *[([2, 1], ValueError), ([1, 1], ValueError), ([-1], ValueError), ([EPOCHS + 1], ValueError)],
        ],
    )
    def test_of_checkpoints(self, epochs, error):
        with pytest.raises(error, match="epochs: got"):
            made().checkpoints(ONES, KEY, epochs)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"training": lambda w, key: PARAMS}, TypeError, "training: got a function"),
            ({"training": made(batch_size=4)}, ValueError, r'own batches of 4.*batches="shared"'),
            ({"training": made(batch_size=1, batches="shared")}, ValueError, "batch of one does not depend"),
            ({"weights": 0 * ONES}, ValueError, "weights: all are 0"),
            ({"query": [1.0]}, TypeError, "query: leaf '0' is a float"),
            ({"measurement": 3}, TypeError, "measurement: got a int"),
            ({"rhs_chunk": 0}, ValueError, "rhs_chunk: got 0"),
        ],
    )
    def test_of_what_to_differentiate(self, change, error, message):
        with pytest.raises(error, match=message):
            unrolled.influences(**{"training": made(), "query": QUERY, "key": KEY, **change})

    def test_adam_without_a_root_of_its_own(self):
        """An input that is always zero leaves a second moment of zero, the root of which has no derivative."""
        data = ij.Batch(DATA.x * np.array([1.0, 1, 1, 1, 0]), DATA.y)
        train = made(promoting(optax.adam(0.05)), data=data, penalty=0.0)
        with pytest.raises(ValueError, match=r"derivative of Training\(.*eps_root, e.g. optax.adam"):
            unrolled.influences(train, QUERY, key=KEY)
        unrolled.influences(made("adam", data=data, penalty=0.0), QUERY, key=KEY)

    def test_steps_too_large(self):
        with pytest.raises(ValueError, match="training: the parameters are NaN or infinite after the last step"):
            unrolled.influences(made(optax.sgd(1e200)), QUERY, key=KEY)
