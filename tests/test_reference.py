"""The reference is the docstrings: what each public name's has to say, so that nobody need read the code."""

import enum
import inspect
import re
import types
from collections.abc import Callable

import jax
import pytest

import influence_jax as ij

MODULES = {name: getattr(ij, name) for name in ij.__all__ if isinstance(getattr(ij, name), types.ModuleType)}
# Where methods that were published live, which are documented with their equation and their source...
PUBLISHED = ("baselines", "bounds", "curvature", "general", "gradients", "influence", "metrics", "projections")
PUBLISHED += ("retrain", "solvers", "unrolled")
# ...but for what is in these places and is nobody's method: containers, algebra, what a solve reports.
OURS = {
    *("Blockwise", "ConvergenceError", "ConvergenceWarning", "Diagonal", "Identity", "Info"),
    *("InfluenceMode", "Inverse", "InverseHvpResult", "InversionMethod", "LinearOperator", "LowRank"),
    *("Solver", "Spectrum", "diagonal", "diagonal_blocks", "invert", "minibatch", "restrict", "root", "spectral"),
    *("sums", "to_dense", "metrics.DiscoveryCurve", "metrics.Interval", "metrics.Summary", "metrics.own_outcomes"),
    *("projections.OneSided", "projections.Projection", "projections.TwoSided", "retrain.retrain"),
    *("baselines.over_checkpoints", "metrics.removal_masks"),
}
# What takes anything, or is made by the library alone.
CANNOT_FAIL = {
    "ChunkAveraging",
    *("ConvergenceError", "ConvergenceWarning", "Coverage", "Info", "InfluenceMode"),
    *("Inverse", "InverseHvpResult", "InversionMethod", "Kronecker", "LeafCoverage", "LinearOperator", "LossWarning"),
    *("NotFittedError", "Spectrum", "TopK", "by_layer", "by_parameter", "full", "softmax_sample"),
    *("baselines.negative_margin", "metrics.DiscoveryCurve", "metrics.Interval", "metrics.Summary"),
    *("planning.Memory", "planning.Plan", "projections.OneSided", "projections.Projection", "projections.TwoSided"),
    *("retrain.Training", "stream.Averaging", "stream.Streamed"),
}
# Whose results have a sign.
SIGNED = {
    *("Influence", "InfluenceFunctionModel", "TopK", "baselines.cosine", "baselines.relative", "baselines.tracin"),
    *("baselines.trak", "compute_influences", "compute_influences_pert", "compute_influences_up", "metrics.lds"),
    *("metrics.predicted_changes", "score_bounds", "store.ScoreStore", "stream.scores", "stream.top_k"),
    *("unrolled.influences",),
}


def exported(module: types.ModuleType) -> dict[str, object]:
    """What a module offers, without modules."""
    offered = {name: getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in offered.items() if not isinstance(thing, types.ModuleType)}


def public() -> dict[str, object]:
    """Every public function and class, under its path below the package; the shortest if there are several."""
    found = {**exported(ij), **{f"{m}.{name}": x for m, it in MODULES.items() for name, x in exported(it).items()}}
    first: dict[int, str] = {}
    for name, thing in found.items():
        first.setdefault(id(thing), name)
    return {name: thing for name, thing in found.items() if first[id(thing)] == name}


PUBLIC = public()
CLASSES = {name: thing for name, thing in PUBLIC.items() if isinstance(thing, type)}


def parameters(thing: Callable) -> list[str]:
    """What is passed, by name; nothing for what people do not make themselves."""
    if isinstance(thing, type) and (issubclass(thing, Exception | enum.Enum) or getattr(thing, "_is_protocol", False)):
        return []
    return [name for name in inspect.signature(thing).parameters if name != "self"]


def described(doc: str) -> set[str]:
    """The names in its lists of arguments and attributes."""
    lists = re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)+)", doc, re.MULTILINE)
    return {
        name.strip(" *")
        for part in lists
        for line in re.findall(r"^  ([\w*, ]+):", part, re.M)
        for name in line.split(",")
    }


def takes_arrays(thing: Callable) -> bool:
    """Whether an array or a tree is passed or returned; a number that may be an array is none."""
    kinds = " | ".join(str(kind) for kind in getattr(thing, "__annotations__", {}).values())
    return re.search(r"\b(Array|PyTree)\b", re.sub(r"\bfloat \| Array\b|\bArray \| float\b", "", kinds)) is not None


def missing(name: str, thing: Callable) -> list[str]:
    """What the docstring of a public name does not say."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    lines = [*doc.splitlines(), ""]
    inherited = [base.__doc__ for base in getattr(thing, "__mro__", ()) if base.__module__.startswith("influence_jax")]
    names = described(doc).union(*(described(inspect.cleandoc(other or "")) for other in inherited))
    home = thing.__module__.split(".")[1]
    published = home in PUBLISHED and name not in OURS
    checks = {
        "a summary in one line": lines[0].endswith((".", "?")) and lines[1:2] in ([""], []),
        "an example": ">>>" in doc,
        "every argument": set(parameters(thing)) <= names,
        "the shapes": not takes_arrays(thing) or re.search(r"`\([^`]*\)|[Ss]calar|one example", doc) is not None,
        "the errors": ("Raises:" in doc) != (name in CANNOT_FAIL),
        "an equation": not published or "$" in doc or "As `" in doc,
        "the source": ("\nReference: " in doc) or not published,
        "the sign": name not in SIGNED or re.search(r"[Pp]ositive|[Hh]elpful", doc) is not None,
    }
    return [what for what, said in checks.items() if not said]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_all_there_is_to_know(name):
    assert missing(name, PUBLIC[name]) == []


def test_lists_of_exceptions_are_of_public_names():
    assert sorted((OURS | CANNOT_FAIL | SIGNED) - set(PUBLIC)) == []


def test_a_bare_function_is_found_out():
    def scores(query: jax.Array, train: jax.Array) -> jax.Array:
        """Scores"""

    scores.__module__ = "influence_jax.metrics"
    assert len(missing("metrics.lds", scores)) == 8


def methods(cls: type) -> dict[str, Callable]:
    """Public methods and properties as the package declares them; overriding ones say what the first said."""
    found = {}
    for base in cls.__mro__:
        if base.__module__.startswith("influence_jax"):
            for name, value in vars(base).items():
                fn = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if not name.startswith("_") and isinstance(fn, types.FunctionType):
                    found[name] = fn
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_methods_are_documented(name):
    """A sentence on each, which says what every argument is, or whose method it is like."""
    for method, fn in methods(CLASSES[name]).items():
        doc = inspect.cleandoc(fn.__doc__ or "")
        assert re.match(r".*[.?:]$", doc, re.MULTILINE), f"{name}.{method}: {doc!r}"
        unsaid = [x for x in parameters(fn) if x != "cls" and not re.search(rf"\b{x}\b", doc)]
        assert not unsaid or "s those of `" in doc or "As `" in doc, f"{name}.{method} does not say what {unsaid} are"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_a_repr_of_their_own(name):
    cls = CLASSES[name]
    if issubclass(cls, Exception | enum.Enum) or getattr(cls, "_is_protocol", False):
        return
    own = next(vars(base)["__repr__"] for base in cls.__mro__ if "__repr__" in vars(base))
    plain = name in ("LeafCoverage", "PointAveraging", "ChunkAveraging")  # a few words and numbers
    written = own.__code__.co_filename.endswith(".py")  # by hand, where a dataclass would have made one
    assert plain or (written and own.__module__.startswith("influence_jax")), own
