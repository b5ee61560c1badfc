"""What a computation is: stores see whatever changes its numbers, and nothing else."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import influence_jax as ij
from influence_jax.store import GradientStore, OutcomeStore, ScoreStore
from influence_jax.stream.identity import of_inverse, of_loss

DRAW = np.random.default_rng(0)
DATA = ij.Batch(DRAW.normal(size=(12, 3)).astype("f"), DRAW.integers(0, 3, 12).astype("i4"))
PARAMS = {"w": DRAW.normal(size=(3, 3)).astype("f")}
HEAD = """
import dataclasses, functools, types
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
import influence_jax as ij
from flax import nnx
ce = optax.softmax_cross_entropy_with_integer_labels
predict = lambda params, z: z.x @ params["w"]
"""

# Each makes `objective` of a number `{}`, which nobody is told of.
PROGRAMS = {
    "closure over an array": """
def weighted(weights):
    return lambda out, z: jnp.asarray(weights)[z.y] * ce(out, z.y)
objective = ij.Objective(predict, weighted(np.array([1, 1, {}], np.float32)))
""",
    "object": """
class Weighted:
    def __init__(self, weights):
        self.weights = np.asarray(weights, np.float32)
    def __call__(self, out, z):
        return jnp.asarray(self.weights)[z.y] * ce(out, z.y)
objective = ij.Objective(predict, Weighted([1, 1, {}]))
""",
    "frozen dataclass": """
@dataclasses.dataclass(frozen=True)
class Smoothed:
    by: float
    def __call__(self, out, z):
        return ce(out, z.y) + self.by * jnp.sum(out ** 2)
objective = ij.Objective(predict, Smoothed({}))
""",
    "bound method": """
class Model:
    def __init__(self, scale):
        self.inner = types.SimpleNamespace(scale=scale)
    def predict(self, params, z):
        return self.inner.scale * (z.x @ params["w"])
objective = ij.Objective(Model({}).predict, lambda out, z: ce(out, z.y))
""",
    "global number": """
SCALE = {}
objective = ij.Objective(predict, lambda out, z: SCALE * ce(out, z.y))
""",
    "global array": """
WEIGHTS = jnp.array([1.0, 1.0, {}], jnp.float32)
objective = ij.Objective(predict, lambda out, z: WEIGHTS[z.y] * ce(out, z.y))
""",
    "entry of a global dict": """
SETTINGS = dict(loss=dict(scale={}))
objective = ij.Objective(predict, lambda out, z: SETTINGS["loss"]["scale"] * ce(out, z.y))
""",
    "helper": """
def scaled(x):
    return {} * x
objective = ij.Objective(predict, lambda out, z: scaled(ce(out, z.y)))
""",
    "partial": """
def loss(out, z, scale):
    return scale * ce(out, z.y)
objective = ij.Objective(predict, functools.partial(loss, scale={}))
""",
    "default argument": """
objective = ij.Objective(predict, lambda out, z, scale={}: scale * ce(out, z.y))
""",
    "keyword default": """
def loss(out, z, *, scale={}):
    return scale * ce(out, z.y)
objective = ij.Objective(predict, loss)
""",
    "jitted function": """
@jax.jit
def scaled(x):
    return {} * x
objective = ij.Objective(predict, lambda out, z: scaled(ce(out, z.y)))
""",
    "remat and scan": """
@jax.checkpoint
def body(carry, _):
    return jnp.sin({} * carry), None
objective = ij.Objective(predict, lambda out, z: jax.lax.scan(body, ce(out, z.y), None, length=3)[0])
""",
    "cond": """
objective = ij.Objective(
    predict, lambda out, z: jax.lax.cond(out[0] > 0, lambda x: {} * x, lambda x: x, ce(out, z.y)))
""",
    "custom_vjp rule": """
@jax.custom_vjp
def clipped(x):
    return x
clipped.defvjp(lambda x: (x, None), lambda _, g: ({} * g,))
objective = ij.Objective(predict, lambda out, z: ce(clipped(out), z.y))
""",
    "custom_jvp rule": """
@jax.custom_jvp
def straight(x):
    return x
@straight.defjvp
def rule(primals, tangents):
    return primals[0], {} * tangents[0]
objective = ij.Objective(predict, lambda out, z: ce(straight(out), z.y))
""",
    "linen body": """
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False)(x * {})
objective = ij.Objective(lambda p, z: Net().apply(dict(params=dict(Dense_0=dict(kernel=p["w"]))), z.x),
                         lambda out, z: ce(out, z.y))
""",
    "linen attribute": """
class Net(nn.Module):
    scale: float
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False)(x * self.scale)
net = Net({})
objective = ij.Objective(lambda p, z: net.apply(dict(params=dict(Dense_0=dict(kernel=p["w"]))), z.x),
                         lambda out, z: ce(out, z.y))
""",
    "constants": """
objective = ij.Objective(lambda p, z, c: c["scale"] * (z.x @ p["w"]), lambda out, z: ce(out, z.y),
                         constants=dict(scale=jnp.float32({})))
""",
    "random key": """
draw = jax.random.normal
objective = ij.Objective(predict, lambda out, z: ce(out + draw(jax.random.key(int(2 * {})), (3,), out.dtype), z.y))
""",
    "function on the host": """
SCALE = {}
def on_host(x):
    return np.float32(SCALE * 1.0)
objective = ij.Objective(predict, lambda out, z: ce(out, z.y) * jax.lax.stop_gradient(jax.pure_callback(
    on_host, jax.ShapeDtypeStruct((), np.float32), jax.lax.stop_gradient(out[0]), vmap_method="sequential")))
""",
    "method that a function on the host calls": """
class Host:
    def there(self, x):
        return np.float32({} * x)
host = Host()
objective = ij.Objective(predict, lambda out, z: ce(out, z.y) * jax.lax.stop_gradient(jax.pure_callback(
    lambda x: host.there(x), jax.ShapeDtypeStruct((), np.float32), jax.lax.stop_gradient(out[0]),
    vmap_method="sequential")))
""",
    "kernel of a backward pass": """
from jax.experimental import pallas
def kernel(factor):
    def body(x, o):
        o[...] = factor * x[...]
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    return lambda x: pallas.pallas_call(body, out_shape=shape, interpret=True)(x.astype(jnp.float32))
@jax.custom_vjp
def scaled(x):
    return kernel(1.0)(x)
scaled.defvjp(lambda x: (scaled(x), None), lambda _, g: (kernel({})(g),))
objective = ij.Objective(predict, lambda out, z: ce(scaled(out), z.y))
""",
}


def program(source, number):
    names = {"__name__": "users"}
    exec(HEAD + source.replace("{}", str(number)), names)
    return names["objective"]


def same(one, other):
    return (one["program"], one["constants"]) == (other["program"], other["constants"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_changes_numbers_is_seen(name):
    one, again, other = (of_loss(program(PROGRAMS[name], x), PARAMS, DATA) for x in (1.5, 1.5, 2.5))
    assert same(one, again)
    assert not same(one, other)


def test_names_and_places_decide_nothing():
    """The same operations from a lambda, a method, a jitted function and with other names are the same."""
    forms = [
        "loss = lambda out, z: 2.0 * ce(out, z.y)",
        "class A:\n    def there(self, o, e):\n        return 2.0 * ce(o, e.y)\nloss = A().there",
        "@jax.jit\ndef loss(out, z):\n    'Words.'\n    return 2.0 * ce(out, z.y)",
        "def scaled(by, out, z):\n    return by * ce(out, z.y)\nloss = functools.partial(scaled, 2.0)",
        "LABEL, FACTOR = 'y', 2.0\ndef loss(out, z):\n    return FACTOR * ce(out, getattr(z, LABEL))",
    ]
    made = [program(f"{form}\nobjective = ij.Objective(predict, loss)", 0) for form in forms]
    first, *others = (of_loss(objective, PARAMS, DATA) for objective in made)
    assert all(same(first, other) for other in others)


def nets(number):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.inner(x * number)

    return ij.from_nnx(Net(nnx.Rngs(0)), lambda out, z: optax.softmax_cross_entropy_with_integer_labels(out, z.y))


def test_the_body_of_an_nnx_module_is_seen():
    one, again, other = (of_loss(*nets(number), DATA) for number in (1.5, 1.5, 2.5))
    assert same(one, again)
    assert not same(one, other)


def loss(params, z):
    return optax.softmax_cross_entropy_with_integer_labels(z.x @ params["w"], z.y)


OBJECTIVE = ij.Objective(
    lambda p, z: z.x @ p["w"], lambda o, z: optax.softmax_cross_entropy_with_integer_labels(o, z.y)
)
SOLVERS = {
    "damping": ij.BlockCG(0.1),
    "other": ij.BlockCG(0.2),
    "tolerance": ij.BlockCG(0.1, rtol=1e-2),
    "CG": ij.CG(0.1),
}
CUT = [jax.tree.map(lambda x: x[:6], DATA), jax.tree.map(lambda x: x[6:], DATA)]


def inverses(data, loaded):
    """An inverse in memory, or one that reads a loader while it solves, with each solver."""
    if loaded:
        return {n: ij.stream.invert(ij.GGN, OBJECTIVE, PARAMS, data, s, progress=False) for n, s in SOLVERS.items()}
    return {n: ij.invert(ij.GGN(OBJECTIVE, PARAMS, data), s) for n, s in SOLVERS.items()}


@pytest.mark.parametrize("loaded", [False, True])
def test_inverses_by_solver_damping_and_data(loaded):
    found = {name: of_inverse(inverse, PARAMS) for name, inverse in inverses(CUT if loaded else DATA, loaded).items()}
    assert len({(it["program"], it["constants"]) for it in found.values()}) == len(SOLVERS)
    again = inverses(CUT if loaded else DATA, loaded)["damping"]
    assert same(found["damping"], of_inverse(again, PARAMS))
    last = jax.tree.map(lambda x: x.at[-1].set(0) if isinstance(x, jax.Array) else x, jax.tree.map(jnp.asarray, DATA))
    other = [CUT[0], jax.tree.map(lambda x: x[6:], last)] if loaded else last
    changed = of_inverse(inverses(other, loaded)["damping"], PARAMS)
    assert found["damping"]["program"] == changed["program"]
    assert found["damping"]["constants"] != changed["constants"]


def test_the_curvature_function_of_a_loader_is_seen():
    made = [
        of_inverse(
            ij.stream.invert(lambda *a, c=c: c * ij.GGN(*a), OBJECTIVE, PARAMS, CUT, ij.CG(0.1), progress=False), PARAMS
        )
        for c in (1.0, 1.0, 2.0)
    ]
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_another_process_with_another_history_finds_the_same():
    """Neither addresses nor the order of hashes nor what was traced before decide anything."""
    names = [
        "helper",
        "custom_vjp rule",
        "linen body",
        "remat and scan",
        "function on the host",
        "entry of a global dict",
    ]
    here = [of_loss(program(PROGRAMS[name], 1.5), PARAMS, DATA) for name in names]
    script = (
        "import json, sys; import test_identity as t\n"
        f"print(json.dumps([t.of_loss(t.program(t.PROGRAMS[n], 1.5), t.PARAMS, t.DATA) for n in {names[::-1]}][::-1]))"
    )
    flags = {"PYTHONHASHSEED": "7", "JAX_ENABLE_X64": str(int(jax.config.jax_enable_x64)), "JAX_PLATFORMS": "cpu"}
    tests = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **flags, "PYTHONPATH": paths},
        capture_output=True,
        check=True,
    )
    there = json.loads(done.stdout.decode().splitlines()[-1])
    assert [(it["program"], it["constants"]) for it in there] == [(it["program"], it["constants"]) for it in here]


def influence(objective, params=PARAMS, **options):
    return ij.Influence(objective, params, ij.Identity(params), **options)


class TestStores:
    @pytest.mark.parametrize("name", ["object", "helper"])
    def test_scores_and_gradients_of_another_loss_are_refused(self, name, tmp_path):
        one, again, other = (program(PROGRAMS[name], x) for x in (1.5, 1.5, 2.5))
        projection = ij.projections.rademacher(PARAMS, 4, jax.random.key(0))

        def run(objective):
            scores = ScoreStore.create(tmp_path / "scores")
            ij.stream.scores(influence(objective), DATA, CUT, scores, progress=False)
            ij.stream.gradients(
                objective, PARAMS, CUT, projection, GradientStore.create(tmp_path / "g"), progress=False
            )
            return np.asarray(scores)

        first = run(one)
        np.testing.assert_array_equal(run(again), first)
        with pytest.raises(
            ValueError, match=r"objective: the same program with other constants, .* in the store, .* now"
        ):
            run(other)
        with pytest.raises(ValueError, match=r"objective: the same .*; losses of the first rows: \[.* in the store, "):
            ij.stream.gradients(other, PARAMS, CUT, projection, GradientStore.create(tmp_path / "g"), progress=False)

    def test_what_changed_since_it_was_compiled_is_computed_anew(self, tmp_path):
        """JAX has compiled the loss at weight one; what is kept under the identity at weight three is that at three."""

        class Scaled:
            scale = 1.0

            def __call__(self, params, z):
                return self.scale * jnp.sum((z.x @ params["w"]) ** 2)

        loss = Scaled()
        kept = lambda name: np.asarray(
            ij.stream.scores(influence(loss), DATA, CUT, ScoreStore.create(tmp_path / name), progress=False)
        )
        before = np.asarray(influence(loss).influences(DATA, DATA))
        assert relative_error(kept("one"), before) < 1e-6
        loss.scale = 3.0
        assert relative_error(kept("three"), 9 * before) < 1e-6
        with pytest.raises(ValueError, match=r"objective: the same program with other constants"):
            kept("one")

    def test_the_measurement_is_seen(self, tmp_path):
        asked = lambda scale: lambda params, z: scale * jnp.sum(z.x @ params["w"])

        def run(measurement):
            made = influence(loss, measurement=measurement)
            ij.stream.scores(made, DATA, CUT, ScoreStore.create(tmp_path / "s"), progress=False)

        run(asked(1.5))
        run(asked(1.5))
        for other in (asked(2.5), None):
            with pytest.raises(ValueError, match=r"measurement: .* in the store, .* now"):
                run(other)

    def test_damping_is_named(self, tmp_path):
        for damping in (0.1, 0.1, 0.2):
            made = ij.Influence(OBJECTIVE, PARAMS, ij.invert(ij.GGN(OBJECTIVE, PARAMS, DATA), ij.Direct(damping)))
            call = lambda m=made: ij.stream.scores(m, DATA, CUT, ScoreStore.create(tmp_path / "s"), progress=False)
            if damping == 0.1:
                call()
        with pytest.raises(ValueError, match=r"inverse: .*, damping 0.1 in the store, 0.2 now"):
            call()

    def test_what_no_program_shows_is_seen_in_the_losses(self, tmp_path):
        """A function of the host that reads a file."""
        (tmp_path / "number").write_text("1.0")
        read = lambda _: np.float32((tmp_path / "number").read_text())
        shape = jax.ShapeDtypeStruct((), np.float32)
        factor = lambda z: jax.pure_callback(read, shape, z.y, vmap_method="sequential")
        objective = lambda params, z: jax.lax.stop_gradient(factor(z)) * loss(params, z)
        run = lambda: ij.stream.scores(
            influence(objective), DATA, CUT, ScoreStore.create(tmp_path / "s"), progress=False
        )
        run()
        run()
        (tmp_path / "number").write_text("1.001")
        with pytest.raises(ValueError, match=r"computation \(losses of the first rows: \[.* in the store, \[.* now\)"):
            run()

    def test_rounding_of_another_machine_continues(self, tmp_path):
        run = lambda: ij.stream.scores(influence(loss), DATA, CUT, ScoreStore.create(tmp_path / "s"), progress=False)
        run()
        from influence_jax.store import arrays

        manifest = ScoreStore.open(tmp_path / "s").manifest
        kept = manifest["losses of the first rows"]
        kept["losses"] = [repr(float(x) * (1 + 1e-6)) for x in kept["losses"]]
        arrays.write_group(tmp_path / "s", manifest)
        run()
        kept["losses"][2] = "nan"
        arrays.write_group(tmp_path / "s", manifest)
        with pytest.raises(ValueError, match=r"losses of the first rows: \[.*nan.*\] in the store"):
            run()

    def test_outcomes_of_another_training_are_refused(self, tmp_path):
        class Mean:
            def __init__(self, by):
                self.by = by

            def __call__(self, weights, key):
                return self.by * (weights @ DATA.x.astype(weights.dtype)) / weights.sum()

        masks = ij.retrain.leave_one_out(12, [0, 1])
        scaled = lambda by: lambda params: by * params

        def run(train, measure):
            sink = OutcomeStore.create(tmp_path / "o")
            return ij.retrain.retrain(
                train, masks, jax.random.key(0), measure, how="each", group=1, sink=sink, progress=False
            )

        first = run(Mean(1.5), scaled(2.0))
        np.testing.assert_array_equal(run(Mean(1.5), scaled(2.0)), first)
        with pytest.raises(
            ValueError, match=r"train_fn: the same program with other constants, .*1.5 in the store, .*2.5"
        ):
            run(Mean(2.5), scaled(2.0))
        with pytest.raises(
            ValueError, match=r"measure: the same program with other constants, .*2.0 in the store, .*3.0"
        ):
            run(Mean(1.5), scaled(3.0))
