"""Eight devices in several shapes, and a small problem to be laid out on them."""

import helpers
import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import influence_jax as ij

SIZES = (6, 8, 4)


def split_last(x) -> PartitionSpec:
    """Parameters over the mesh's second axis, where it divides their last."""
    return PartitionSpec(*(None,) * (x.ndim - 1), "model") if x.ndim and x.shape[-1] % 4 == 0 else PartitionSpec()


class Mesh:
    """Eight devices, how parameters are laid out on them, and over which axes data are split."""

    def __init__(self, shape, kind, data, params=lambda x: PartitionSpec()):
        self.mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
        self.axes, self.layout = data, params

    def params(self, tree):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, self.layout(x))), tree)

    def split(self, batch):
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(self.axes)))

    def all(self, tree):
        return ij.sharding.replicate(tree, self.mesh)


MESHES = {
    "data": lambda kind: Mesh((8, 1), kind, "data"),
    "second axis": lambda kind: Mesh((1, 8), kind, "model"),
    "both axes": lambda kind: Mesh((2, 4), kind, ("data", "model")),
    "split params": lambda kind: Mesh((2, 4), kind, "data", split_last),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SOME = [("data", AUTO), ("split params", AUTO), ("split params", EXPLICIT)]
ALL = [(name, kind) for name in MESHES for kind in (AUTO, EXPLICIT)]


@pytest.fixture
def mesh(request):
    name, kind = request.param
    return MESHES[name](kind)


def on(*cases, thorough=()):
    """Run a test on these meshes, and when all tests are run on those as well."""
    more = [pytest.param(case, marks=pytest.mark.thorough) for case in thorough if case not in cases]
    name = lambda case: f"{case[0]}, {case[1].name}"
    return pytest.mark.parametrize("mesh", [*cases, *more], indirect=True, ids=name)


def problem(count, seed=0):
    params = helpers.random_mlp(jax.random.key(seed), SIZES)
    del params["layer1"]["bias"]  # fewer kernels to compile
    return params, helpers.random_batch(jax.random.key(seed + 1), count, SIZES[0], SIZES[-1], classes=True)


def split_of(x) -> tuple:
    """Over which mesh axes each axis of an array is split."""
    assert isinstance(x.sharding, NamedSharding)
    spec = tuple(None if axis == () else axis for axis in x.sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def laid_out_alike(stack, params, lead=()):
    return jax.tree.map(split_of, stack) == jax.tree.map(lambda x: lead + split_of(x), params)
