"""What a computation is: the program that JAX traces of it, and the values of its constants.

Names, source text, classes and representations decide nothing, so a program that was moved or renamed is the same, and
one whose loss reads another number, calls another helper or differentiates by another rule is not.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import tree
from .._jaxpr_compat import called, constants, is_literal, opened, replaced
from .._typing import Array, PyTree
from ..solvers import Inverse
from ..store.files import entries_of, raw_bytes
from .loaders import Blocks
from .operators import Streamed
from .processes import agree, to_host

# Parameters of primitives that change neither numbers nor their order: names, and where arrays are.
SILENT = re.compile(r"name|debug\w*|\w*sharding\w*|\w*layouts?|ctx_mesh|memory_kind")
# Equations without a result that anybody reads.
TOLD = ("debug_callback", "debug_print")
# Entries up to which a constant is written out, and how many constants are kept for messages.
SHOWN, LISTED = 6, 256


def traced(fn: Callable[..., Any], given: PyTree, *abstract: PyTree, **about: str) -> dict[str, Any]:
    """Return the identity of `fn(given, *abstract)`.

    Args:
      fn: Function of trees of arrays, which is traced anew.
      given: What is part of the computation: its arrays count by their entries, wherever they are.
      abstract: What the computation is a function of: its arrays count by shape and dtype.
      about: What to call it in messages.

    Returns:
      `{"program": hash, "constants": hash, "about": {"constants": [...]}}`, the last for messages.
    """
    walk = _Walk()
    walk.function_of(fn, given, *abstract)
    return walk.identity(**about)


def of_loss(objective: Any, params: PyTree, examples: PyTree) -> dict[str, Any]:
    """Return the identity of a loss and its gradient, at examples of such shapes."""
    one = jax.tree.map(lambda x: shape_of(x[0]), examples)
    gradient = lambda objective, params, example: jax.value_and_grad(objective)(params, example)
    return traced(gradient, objective, jax.tree.map(shape_of, params), one, called=named(objective))


def of_inverse(inverse: Any, params: PyTree) -> dict[str, Any]:
    """Return the identity of an inverse: its product with a vector, and the data that it reads while it solves."""
    op, solver = (inverse.op, inverse.solver) if isinstance(inverse, Inverse) else (inverse, None)
    about = {"operator": named(op)}
    if solver is not None:
        about |= {"solver": named(solver), "damping": named(getattr(solver, "damping", None))}
    if not inverse.on_host:
        try:
            return traced(_product, inverse, _vector(params), **about)
        except TypeError:  # computes on the host in a way of its own
            pass
    walk = _Walk()
    walk.value(inverse)
    return walk.identity(**about)


def _product(op: Any, vector: PyTree) -> PyTree:
    return op.mm(tree.stack_of_one(vector))


def _vector(space: PyTree) -> PyTree:
    return tree.promote_shapes(jax.tree.map(shape_of, space))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array as a program sees it."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    dtype = leaf.dtype if is_key else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, weak_type=getattr(leaf, "weak_type", False))


def named(thing: Any) -> str:
    """Return a description for messages, without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


class _Constant(NamedTuple):
    """An operand whose value is known, and its name where it has one."""

    value: Any
    name: str = ""


class _Walk:
    """A computation written down in one way: variables by number, constants apart."""

    def __init__(self) -> None:
        self._program, self._values = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._numbers = itertools.count()
        self._listed: list[str] = []
        self._known: dict[int, tuple[Any, str, bytes]] = {}  # by address, with what is there
        self._open: set[int] = set()

    def identity(self, **about: str) -> dict[str, Any]:
        told = {**about, "constants": self._listed[:LISTED]}
        return {"program": self._program.hexdigest(), "constants": self._values.hexdigest(), "about": told}

    def say(self, *words: Any) -> None:
        self._program.update("".join(f"{word}\0" for word in words).encode())

    def function_of(self, fn: Callable[..., Any], given: PyTree, *abstract: PyTree) -> None:
        """Write down what `fn(given, *abstract)` computes."""
        leaves, structure = jax.tree.flatten(given)
        names = [name for name, _ in tree.named_leaves(given)]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

        def program(arrays: Sequence[Array], *arguments: PyTree) -> Any:
            whole = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                whole[place] = array
            return fn(structure.unflatten(whole), *arguments)

        closed = jax.make_jaxpr(program)([shape_of(leaves[i]) for i in places], *abstract)
        known = [_Constant(leaves[i], names[i]) for i in places]
        free = [self._fresh() for _ in opened(closed).invars[len(places) :]]
        self._operands(self.jaxpr(closed, [*known, *free]))

    def jaxpr(self, closed: Any, operands: Sequence[Any]) -> list[Any]:
        """Write down the equations of a jaxpr on given operands; returns what its results are called."""
        jaxpr = opened(closed)
        values = map(_Constant, constants(closed))
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*values, *operands], strict=True))
        for equation in jaxpr.eqns:
            if equation.primitive.name not in TOLD:
                env.update(zip(equation.outvars, self._equation(equation, _read(equation.invars, env)), strict=True))
        return _read(jaxpr.outvars, env)

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        """Write down an equation; a call is what it calls, for where it is called decides nothing."""
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            return self.jaxpr(inner, operands)
        self.say("do", equation.primitive.name)
        self._operands(operands)
        for name in sorted(equation.params):
            if not SILENT.fullmatch(name):
                self.say(name)
                self.value(equation.params[name])
        for variable in equation.outvars:
            self.value(variable.aval)
        return [self._fresh() for _ in equation.outvars]

    def _fresh(self) -> str:
        return f"v{next(self._numbers)}"

    def _operands(self, operands: Iterable[Any]) -> None:
        for operand in operands:
            if isinstance(operand, _Constant):
                self._constant(operand)
            else:
                self.say(operand)

    def _constant(self, constant: _Constant) -> None:
        """Write down that there is one, and apart from that its entries."""
        value = constant.value
        if id(value) not in self._known:
            self._known[id(value)] = (value, *_content(value))
        _, text, entries = self._known[id(value)]
        self.say("constant", text.split(" ")[0])
        self._values.update(entries)
        self._listed.append(f"{constant.name} {text}".strip())

    def value(self, thing: Any) -> None:
        """Write down whatever else a computation is made of."""
        if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
            self.say(type(thing).__name__, repr(thing))
        elif isinstance(thing, jax.Array | np.ndarray | np.generic):
            self._constant(_Constant(thing))
        elif id(thing) in self._open:
            self.say("again")
        else:
            self._open.add(id(thing))
            self._compound(thing)
            self._open.discard(id(thing))

    def _compound(self, thing: Any) -> None:
        if hasattr(opened(thing), "eqns"):
            self.say("jaxpr")
            self._operands(self.jaxpr(thing, [self._fresh() for _ in opened(thing).invars]))
            return
        for kind, write in WRITTEN.items():
            if isinstance(thing, kind):
                write(self, thing)
                return
        if hasattr(thing, "shape") and hasattr(thing, "dtype"):  # of a variable
            self.say("array", thing.dtype, thing.shape)
        elif callable(getattr(thing, "__wrapped__", None)):
            self.value(thing.__wrapped__)
        else:
            self._object(thing)

    def _object(self, thing: Any) -> None:
        """Write down an object by what it holds, and what calling it does."""
        self.say("object", type(thing).__name__)
        if callable(thing) and not _is_library(type(thing)):
            self.value(type(thing).__call__)
        for name, part in sorted(_parts(thing).items()):
            self.say(name)
            self.value(part)

    def _items(self, things: Iterable[Any]) -> None:
        things = list(things)
        self.say("items", len(things))
        for thing in things:
            self.value(thing)

    def _set(self, things: Iterable[Any]) -> None:
        """Write down what is in it; the order is that of hashes, which differs from run to run."""
        walks = [_Walk() for _ in things]
        for walk, thing in zip(walks, things, strict=True):
            walk.value(thing)
        self._items(sorted(str(walk.identity()) for walk in walks))

    def _function(self, fn: types.FunctionType) -> None:
        """Write down a function that is called on the host, by what it does and what it reads."""
        if _is_library(fn):
            self.say("function", fn.__module__, fn.__qualname__)
            return
        self._items([fn.__code__, fn.__defaults__, fn.__kwdefaults__])
        self._items(cell.cell_contents for cell in fn.__closure__ or () if _is_filled(cell))
        read = [fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__]
        self._items(value for value in read if not isinstance(value, types.ModuleType | type))

    def _streamed(self, op: Streamed) -> None:
        """Write down curvature over a loader: the operator on a batch, and all data."""
        product = lambda op, batch, vector: _product(op.on(batch, 0), vector)
        self.function_of(product, op, jax.tree.map(shape_of, op.source.head()), _vector(op.space))
        told = _data(op.source)
        self._values.update(told.encode())
        self._listed.append(told)


# How to write down what is no tree of JAX, and no array; the first kind that fits.
WRITTEN: dict[Any, Callable[[_Walk, Any], None]] = {
    Streamed: _Walk._streamed,
    types.FunctionType: _Walk._function,
    types.MethodType: lambda walk, method: walk._items([method.__self__, method.__func__]),
    functools.partial: lambda walk, made: walk._items([made.func, made.args, made.keywords]),
    types.CodeType: lambda walk, code: walk._items([code.co_code, code.co_names, code.co_consts]),
    types.BuiltinFunctionType | np.ufunc: lambda walk, fn: walk.say("function", getattr(fn, "__name__", "")),
    types.ModuleType | type: lambda walk, it: walk.say("named", it.__name__),
    enum.Enum: lambda walk, it: walk.say(type(it).__name__, it.name),
    np.dtype: lambda walk, dtype: walk.say("dtype", dtype),
    jax.tree_util.PyTreeDef: lambda walk, structure: walk.say("leaves", structure.num_leaves),
    jax.sharding.Mesh | jax.sharding.AbstractMesh: lambda walk, mesh: walk.say("mesh", *mesh.shape.items()),
    jax.sharding.Sharding: lambda walk, _: walk.say("sharding"),
    jax.sharding.PartitionSpec: lambda walk, spec: walk.say("spec", *spec),
    Mapping: lambda walk, it: walk._items(sorted(it.items(), key=lambda pair: str(pair[0]))),
    set | frozenset: _Walk._set,
    list | tuple: _Walk._items,
}


def _read(variables: Iterable[Any], env: Mapping[Any, Any]) -> list[Any]:
    """What variables are called; a number that is written into an equation is a constant."""
    literal = lambda it: _Constant(np.asarray(it.val, it.aval.dtype))
    return [literal(variable) if is_literal(variable) else env[variable] for variable in variables]


def _content(value: Any) -> tuple[str, bytes]:
    """A constant in words, and a hash of its entries."""
    is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    kind, array = entries_of(value if is_key or not isinstance(value, jax.Array) else to_host(value), "constant")
    digest = hashlib.blake2b(f"{kind}{array.shape}".encode(), digest_size=16)
    digest.update(raw_bytes(array))
    told = str(array.tolist()) if array.size <= SHOWN else digest.hexdigest()
    return f"{kind}[{','.join(map(str, array.shape))}] {told}", digest.digest()


def _data(source: Blocks) -> str:
    """All examples of a loader in words, however they are cut into batches."""
    digests: dict[str, Any] = {}
    count = 0
    for part in source.pieces():
        count += tree.count(part)
        for name, leaf in tree.named_leaves(part):
            kind, array = entries_of(leaf, name)
            header = f"{name}{kind}{array.shape[1:]}".encode()
            digests.setdefault(name, hashlib.blake2b(header, digest_size=16)).update(raw_bytes(array))
    whole = hashlib.blake2b(b"".join(digest.digest() for digest in digests.values()), digest_size=16).digest()
    shares = agree(count, *np.frombuffer(whole, np.int32)) if source.several else np.asarray([[count]])
    if source.several:
        whole = hashlib.blake2b(shares.tobytes(), digest_size=16).digest()
    return f"{source.name} of {shares[:, 0].sum()} examples {whole.hex()}"


def _parts(thing: Any) -> dict[str, Any]:
    """What an object holds, by name."""
    if dataclasses.is_dataclass(thing):
        return {field.name: getattr(thing, field.name, None) for field in dataclasses.fields(thing)}
    slots = [name for cls in type(thing).__mro__ for name in np.atleast_1d(getattr(cls, "__slots__", ()))]
    held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return held | {name: part for name, part in getattr(thing, "__dict__", {}).items()}


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that code reads, and the functions defined in it do."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


def _is_filled(cell: types.CellType) -> bool:
    """Tell whether the variable is bound already."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_library(thing: Any) -> bool:
    """Whether a function or class comes with Python or a package, whose version says what it does."""
    root = (getattr(thing, "__module__", None) or "").split(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in sys.stdlib_module_names or root == __name__.split(".")[0] or "site-packages" in file
