"""What is refused on the host cannot be under tracing: there it is NaN, and what is right is bit for bit as it was."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import CLASSIFICATION, REGRESSION, random_batch, random_mlp, relative_error

import influence_jax as ij

PARAMS = random_mlp(jax.random.key(0))
MOVED = jax.tree.map(lambda x: x + 0.25 * (x == jnp.max(x)), PARAMS)  # one entry of each leaf
BATCH = random_batch(jax.random.key(1), 7, 5, 3, classes=True)
FEW = jax.tree.map(lambda x: x[:2], BATCH)


def all_nan(values):
    return all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(values))


# What goes through the inverse: (influence, more queries, fewer) -> arrays.
THROUGH_THE_INVERSE = {
    "influences": lambda influence: influence.influences(FEW, BATCH),
    "influences of more queries": lambda influence: influence.influences(BATCH, FEW),
    "perturbation": lambda influence: influence.influences(FEW, BATCH, "perturbation"),
    "factors": lambda influence: influence.influence_factors(FEW),
    "self-influences": lambda influence: influence.self_influences(BATCH),
    "top k": lambda influence: influence.top_k(FEW, BATCH, 3).values,
    "cosine": lambda influence: ij.baselines.cosine(influence, FEW, BATCH),
}


@functools.cache
def direct():
    return ij.invert(ij.GGN(CLASSIFICATION, PARAMS, BATCH), ij.Direct(0.1))


class TestAnInverseOfOtherParameters:
    @pytest.mark.parametrize("what", THROUGH_THE_INVERSE)
    def test_is_nan(self, what):
        through = THROUGH_THE_INVERSE[what]
        program = jax.jit(lambda params, inverse: through(ij.Influence(CLASSIFICATION, params, inverse)))
        assert all_nan(program(MOVED, direct()))
        right, at_hand = program(PARAMS, direct()), through(ij.Influence(CLASSIFICATION, PARAMS, direct()))
        for got, expected in zip(jax.tree.leaves(right), jax.tree.leaves(at_hand), strict=True):
            assert relative_error(got, expected) < 1e-12

    def test_of_kinds_of_inverses_and_in_blocks(self):
        """In a sum, block by block, Kronecker-factored; closed over; a hair's breadth off."""
        by_block = lambda influence: influence.influences_by_block(FEW, BATCH)
        kronecker = ij.invert(ij.ekfac(CLASSIFICATION, PARAMS, BATCH), ij.Direct(0.1))
        for inverse, through in (
            (0.5 * direct() + ij.Identity(PARAMS), THROUGH_THE_INVERSE["influences"]),
            (kronecker, by_block),
            (direct(), by_block),
        ):
            program = jax.jit(lambda params, f=through, p=inverse: f(ij.Influence(CLASSIFICATION, params, p)))
            assert all_nan(program(MOVED))
            assert all_nan(program(jax.tree.map(lambda x: jnp.nextafter(x, x + 1), PARAMS)))
            assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(program(PARAMS)))

    def test_in_other_transformations(self):
        """Of a stack of parameters those that fit are scored; derivatives at the right ones are what they were."""
        scored = lambda params: ij.Influence(CLASSIFICATION, params, direct()).influences(FEW, BATCH)
        found = jax.vmap(scored)(jax.tree.map(lambda x, y: jnp.stack([x, y]), PARAMS, MOVED))
        assert relative_error(found[0], scored(PARAMS)) < 1e-12
        assert all_nan(found[1])
        inverse = jnp.linalg.inv(ij.to_dense(direct().op) + 0.1 * jnp.eye(direct().size))
        rows = lambda params, batch: ij.flatten(ij.per_example_grads(CLASSIFICATION, params, batch), PARAMS)
        slope = jax.grad(lambda params: jnp.sum(scored(params) ** 2))(PARAMS)
        by_hand = jax.grad(lambda params: jnp.sum((rows(params, FEW) @ inverse @ rows(params, BATCH).T) ** 2))(PARAMS)
        assert relative_error(ij.flatten(slope, PARAMS), ij.flatten(by_hand, PARAMS)) < 1e-10

    def test_rounded_parameters_are_the_same(self):
        """As on the host: equal in the narrower of the two dtypes."""
        program = jax.jit(lambda params: ij.Influence(REGRESSION, params, ij.invert(fisher, ij.Eigh(0.1)))._fits)
        fisher = ij.EmpiricalFisher(REGRESSION, PARAMS, random_batch(jax.random.key(2), 4, 5, 3, classes=False))
        for dtype in (jnp.float32, jnp.bfloat16):
            assert program(jax.tree.map(lambda x, d=dtype: x.astype(d), PARAMS))
        assert not program(jax.tree.map(lambda x: x.astype(jnp.bfloat16) * jnp.bfloat16(1.01), PARAMS))

    def test_one_and_the_same_is_not_compared(self):
        """Fitted inside of the program, or known to be right before it: no comparison is part of it."""

        @jax.jit
        def program(params, influence):
            inverse = ij.invert(ij.GGN(CLASSIFICATION, params, BATCH), ij.BlockCG(0.1))
            assert ij.Influence(CLASSIFICATION, params, inverse)._fits is None
            assert influence._fits is None
            assert ij.Influence(CLASSIFICATION, params, ij.Identity(params))._fits is None
            return influence.influences(FEW, FEW)

        influence = ij.Influence(CLASSIFICATION, PARAMS, direct())
        assert not all_nan(program(PARAMS, influence))

    def test_bounds(self):
        program = jax.jit(
            lambda params: ij.score_bounds(ij.Influence(CLASSIFICATION, params, direct()), FEW, BATCH)[:2]
        )
        assert all_nan(program(MOVED))


def drawn(scale):
    def sample(key, out):
        p = jax.nn.softmax(out)
        return scale * (p - jax.nn.one_hot(jax.random.categorical(key, out), out.shape[-1], dtype=out.dtype))

    return sample


def masked_tokens(out, z):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(out), z["y"][:, None], axis=1)[:, 0]
    return -jnp.sum(z["mask"] * log_p) / 2


def mask_of(z):
    return z["mask"]


TOKENS = {
    "x": jax.random.normal(jax.random.key(3), (6, 4, 5)),
    "y": jnp.arange(24).reshape(6, 4) % 3,
    "mask": 1.0 * (jnp.arange(4)[None] < jnp.array([4, 2, 3, 4, 1, 2])[:, None]),
}
HEAD = {"w": 0.3 * jax.random.normal(jax.random.key(4), (5, 3))}


class TestSamplesThatAreNotTheHessian:
    """Three times too large; of a mean that is drawn for a sum, over positions of which some are masked."""

    def fits(self, objective, params, data):
        settings = {"labels": "sampled", "key": jax.random.key(5)}
        yield "kfac", lambda p, d: ij.kfac(objective, p, d, **settings).mv(p)
        yield "ekfac", lambda p, d: ij.invert(ij.ekfac(objective, p, d, **settings), ij.Direct(0.1)).mv(p)
        yield "Fisher", lambda p, d: ij.Fisher(objective, p, d, key=settings["key"]).mv(p)

    def test_classes(self):
        for scale in (1.0, 3.0):
            objective = ij.Objective(lambda p, z: z.x @ p["w"], CLASSIFICATION.loss, sample=drawn(scale))
            for name, fit in self.fits(objective, HEAD, BATCH):
                found = jax.jit(fit)(HEAD, BATCH)
                if scale == 1:
                    assert relative_error(found["w"], fit(HEAD, BATCH)["w"]) < 1e-12, name
                else:
                    assert all_nan(found), name

    def test_masked_positions(self):
        """What is drawn does not know the mask: wrong, unless the fit is told it and the scale is right."""
        predict = lambda p, z: z["x"] @ p["w"]
        for scale, options in ((0.5**0.5, {}), (0.5, {"mask": mask_of}), (0.5**0.5, {"mask": mask_of})):
            objective = ij.Objective(predict, masked_tokens, sample=drawn(scale))
            settings = {"labels": "sampled", "key": jax.random.key(5), **options}
            found = jax.jit(lambda p, d, o=objective, s=settings: ij.kfac(o, p, d, **s).mv(p))(HEAD, TOKENS)
            assert all_nan(found) != (scale == 0.5**0.5 and bool(options)), (scale, options)

    def test_examples_without_weight_have_no_say(self):
        """The same examples are looked at as on the host: those that weigh something."""
        off = jnp.array([0, 0, 0, 0, 0, 1.0])
        data = {**TOKENS, "mask": jnp.where(off[:, None] == 1, 2.0, 1.0), "y": TOKENS["y"]}
        objective = ij.Objective(lambda p, z: z["x"] @ p["w"], masked_tokens, sample=drawn(0.5**0.5))
        fit = lambda p, d, w: ij.Fisher(objective, p, d, weights=w, key=jax.random.key(6)).mv(p)
        program = jax.jit(fit)
        assert not all_nan(program(HEAD, data, 1 - off))
        assert all_nan(program(HEAD, data, off))

    def test_parts_of_it_are_nan_as_well(self):
        """Restricted to a block, and a minibatch."""
        objective = ij.Objective(lambda p, z: z["x"] @ p["w"], masked_tokens, sample=drawn(3.0))

        @jax.jit
        def program(params):
            op = ij.Fisher(objective, params, TOKENS, key=jax.random.key(7))
            return ij.minibatch(op, jnp.arange(3)).mv(params), ij.trace(ij.restrict(op, ("w",)))

        assert all_nan(program(HEAD))


def student(out, z):
    """Not convex in the output beyond one from the label."""
    return jnp.sum(jnp.log1p((out - z.y) ** 2))


class TestRootsOfWhatIsNotConvex:
    def test_sample_space_and_fisher_are_nan(self):
        batch = random_batch(jax.random.key(8), 6, 5, 3, classes=False)
        far = ij.Batch(batch.x, 10 * batch.y)
        objective = ij.Objective(REGRESSION.predict, student)

        @jax.jit
        def program(params, data):
            space = ij.invert(ij.GGN(objective, params, data), ij.SampleSpace(0.5)).mv(params)
            return space, ij.Fisher(objective, params, data, key=jax.random.key(9)).mv(params)

        assert all_nan(program(PARAMS, far))
        near = ij.Batch(batch.x, jax.vmap(lambda x: REGRESSION.predict(PARAMS, ij.Batch(x)))(batch.x))
        assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(program(PARAMS, near)))
