"""What a computation is: the program that JAX traces of it, and the values of its constants.

Names, source text, classes and representations decide nothing, so a program that was moved or renamed is the same, and
one whose loss reads another number, calls another helper or differentiates by another rule is not.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import tree
from .._jaxpr_compat import called, constants, is_literal, opened, replaced
from .._pytree import set_field
from .._typing import Array, PyTree
from .._words import name_of
from ..curvature.exact import OverData
from ..curvature.layout import Layout
from ..objective import LossOnly, Objective, as_objective
from ..solvers import Inverse
from ..store.files import entries_of, raw_bytes
from .loaders import Blocks
from .operators import Streamed
from .processes import agree, to_host

# Parameters of primitives that change neither numbers nor their order: names, and where arrays are.
SILENT = re.compile(r"name|weak_type|debug\w*|\w*sharding\w*|\w*layouts?|ctx_mesh|memory_kind")
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
    return walk.identity(walk.function_of(fn, given, *abstract), about)


def of_loss(objective: Any, params: PyTree, examples: PyTree) -> dict[str, Any]:
    """Return the identity of a loss and its gradient, at examples of such shapes."""
    one = jax.tree.map(lambda x: shape_of(x[0]), examples)
    gradient = lambda objective, params, example: jax.value_and_grad(objective)(params, example)
    return traced(gradient, objective, jax.tree.map(shape_of, params), one, called=named(objective))


@dataclasses.dataclass(frozen=True, repr=False)
class Pinned:
    """A function at what has been traced of it: another program, or other constants in it, is another function.

    JAX compiles a function once, whatever of what it reads changes later; so what is kept under an identity has to be
    computed by programs that were compiled for that identity.
    """

    fn: Callable[..., Any]
    identity: str

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __repr__(self) -> str:
        return name_of(self.fn)


def pinned(objective: Objective | LossOnly, found: Mapping[str, Any]) -> Objective | LossOnly:
    """Return an objective whose programs are compiled for the identity that was found of it."""
    if isinstance(objective, LossOnly):
        return dataclasses.replace(objective, fn=Pinned(objective.fn, found["constants"]))
    return dataclasses.replace(objective, predict=Pinned(objective.predict, found["constants"]))


def pinned_inverse(inverse: Any, found: Mapping[str, Any]) -> Any:
    """Return an inverse whose operators over data are compiled for the identity that was found of it."""
    over_data = lambda part: isinstance(part, OverData | Streamed)

    def pin(part: Any) -> Any:
        if not over_data(part):
            return part
        part = copy.copy(part)
        set_field(part, "objective", pinned(as_objective(part.objective), found))
        return part

    return jax.tree.map(pin, inverse, is_leaf=over_data)


def of_inverse(inverse: Any, params: PyTree) -> dict[str, Any]:
    """Return the identity of an inverse: its product with a vector, and the data that it reads while it solves."""
    op, solver = (inverse.op, inverse.solver) if isinstance(inverse, Inverse) else (inverse, None)
    about = {"operator": named(op)}
    if solver is not None:
        about |= {"solver": named(solver), "damping": named(getattr(solver, "damping", None))}
    if not inverse.on_host:
        try:
            return traced(_product, _wherever(inverse), _vector(params), **about)
        except TypeError:  # computes on the host in a way of its own
            pass
    walk = _Walk()
    return walk.identity(walk.value(inverse), about)


def _wherever(op: Any) -> Any:
    """Return an operator without how many examples it takes at once, and how these lie on devices."""

    def alone(part: Any) -> Any:
        if not isinstance(part, OverData):
            return part
        part = copy.copy(part)
        for name, value in (("chunk", None), ("rhs_chunk", None), ("layout", Layout())):
            set_field(part, name, value)
        return part

    return jax.tree.map(alone, op, is_leaf=lambda part: isinstance(part, OverData))


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


class _Hash(NamedTuple):
    """Of a value within a computation: how it is made, and the same with the entries of the constants it is made of."""

    program: bytes
    whole: bytes


class _Constant(NamedTuple):
    """An operand whose value is known, and its name where it has one."""

    value: Any
    name: str = ""


def _hash(*parts: str | _Hash) -> _Hash:
    """The hash of what is made of parts, in order."""
    pairs = [part if isinstance(part, _Hash) else _Hash(part.encode(), part.encode()) for part in parts]
    return _Hash(_joined(pair.program for pair in pairs), _joined(pair.whole for pair in pairs))


def _joined(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


class _Walk:
    """The way through a computation, on which every value gets its hash.

    That of a result is made of the primitive, its parameters and the hashes of its operands, so that neither the order
    of equations nor what nobody uses decides anything.
    """

    def __init__(self) -> None:
        self._listed: list[str] = []
        self._known: dict[int, tuple[Any, str, _Hash]] = {}  # of constants by address, with what is there
        self._open: set[int] = set()
        self._functions: dict[int, tuple[Any, _Hash]] = {}  # by address, with what is there
        self._effects: list[_Hash] = []  # of the jaxpr at hand, such as what a kernel writes

    def identity(self, found: _Hash, about: Mapping[str, str]) -> dict[str, Any]:
        told = {**about, "constants": self._listed[:LISTED]}
        return {"program": found.program.hex(), "constants": found.whole.hex(), "about": told}

    def function_of(self, fn: Callable[..., Any], given: PyTree, *abstract: PyTree) -> _Hash:
        """Return the hash of what `fn(given, *abstract)` computes."""
        leaves, structure = jax.tree.flatten(given)
        names = [name for name, _ in tree.named_leaves(given)]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

        def program(arrays: Sequence[Array], *arguments: PyTree) -> Any:
            whole = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                whole[place] = array
            return fn(structure.unflatten(whole), *arguments)

        closed = jax.make_jaxpr(program)([shape_of(leaves[i]) for i in places], *abstract)
        known = [self._constant(_Constant(leaves[i], names[i])) for i in places]
        return _hash(*self._results(closed, known))

    def _results(self, closed: Any, given: Sequence[_Hash] = ()) -> list[_Hash]:
        """Return the hashes of what a jaxpr gives, on some operands that are known and others that are not."""
        free = [_hash("input", str(i), self.value(v.aval)) for i, v in enumerate(opened(closed).invars[len(given) :])]
        before, self._effects = self._effects, []
        found = self._run(closed, [*given, *free])
        effects, self._effects = self._effects, before
        return [*found, *effects]

    def _run(self, closed: Any, operands: Sequence[_Hash]) -> list[_Hash]:
        jaxpr = opened(closed)
        values = [self._constant(_Constant(value)) for value in constants(closed)]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*values, *operands], strict=True))
        for equation in jaxpr.eqns:
            env.update(zip(equation.outvars, self._equation(equation, self._read(equation.invars, env)), strict=True))
        return self._read(jaxpr.outvars, env)

    def _read(self, variables: Iterable[Any], env: Mapping[Any, _Hash]) -> list[_Hash]:
        """Return the hashes of variables; a number that is written into an equation is a constant."""
        literal = lambda it: self._constant(_Constant(np.asarray(it.val, it.aval.dtype)))
        return [literal(variable) if is_literal(variable) else env[variable] for variable in variables]

    def _equation(self, equation: Any, operands: list[_Hash]) -> list[_Hash]:
        """Return the hashes of results; a call is what it calls, for where that is written decides nothing."""
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            return self._run(inner, operands)
        if equation.primitive.name == "sharding_constraint" or _keeps_dtype(equation):
            return operands
        names = [name for name in sorted(equation.params) if not SILENT.fullmatch(name)]
        settings = [part for name in names for part in (name, self.value(equation.params[name]))]
        made = _hash(equation.primitive.name, *settings, "of", *operands)
        if equation.effects and not equation.primitive.name.startswith("debug"):
            self._effects.append(made)
        return [_hash(made, str(i), self.value(v.aval)) for i, v in enumerate(equation.outvars)]

    def _constant(self, constant: _Constant) -> _Hash:
        value = constant.value
        if id(value) not in self._known:
            kind, told, entries = _content(value)
            shown = f"{constant.name} {kind} {told}".strip()
            self._known[id(value)] = (value, shown, _Hash(kind.encode(), entries))
        _, shown, found = self._known[id(value)]
        self._listed.append(shown)
        return found

    def value(self, thing: Any) -> _Hash:
        """Return the hash of whatever else a computation is made of."""
        if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
            return _hash(type(thing).__name__, repr(thing))
        if isinstance(thing, jax.Array | np.ndarray | np.generic):
            return self._constant(_Constant(thing))
        if id(thing) in self._open:
            return _hash("again")
        self._open.add(id(thing))
        try:
            return self._compound(thing)
        finally:
            self._open.discard(id(thing))

    def _compound(self, thing: Any) -> _Hash:
        if hasattr(opened(thing), "eqns"):
            return _hash("jaxpr", *self._results(thing))
        for kind, hashed in HASHED.items():
            if isinstance(thing, kind):
                return hashed(self, thing)
        if hasattr(thing, "shape") and hasattr(thing, "dtype"):  # of a variable
            return _hash("array", str(thing.dtype), str(thing.shape))
        if callable(getattr(thing, "__wrapped__", None)):
            return self.value(thing.__wrapped__)
        return self._object(thing)

    def _object(self, thing: Any) -> _Hash:
        """Return the hash of an object: of what it holds, and what its methods do."""
        classes = [cls for cls in type(thing).__mro__ if not _is_library(cls)]
        own = [value for cls in classes for _, value in sorted(vars(cls).items())]
        methods = [self.value(value) for value in own if isinstance(value, types.FunctionType)]
        held = [part for name, value in sorted(_parts(thing).items()) for part in (name, self.value(value))]
        return _hash("object", type(thing).__name__, *methods, *held)

    def items(self, things: Iterable[Any]) -> _Hash:
        """Return the hash of a sequence."""
        return _hash("items", *map(self.value, things))

    def unordered(self, things: Iterable[Any]) -> _Hash:
        """Return the hash of what comes in the order of Python's hashes, which differs from run to run."""
        return _hash("set", *sorted(map(self.value, things)))

    def function(self, fn: types.FunctionType) -> _Hash:
        """Return the hash of a function that is called on the host: of what it does and what it reads."""
        if _is_library(fn):
            return _hash("function", fn.__module__, fn.__qualname__)
        if id(fn) not in self._functions:
            names = list(_names(fn.__code__))
            read = [fn.__globals__[name] for name in names if name in fn.__globals__]
            modules = [it for it in read if isinstance(it, types.ModuleType) and not _is_library(it)]
            read += [getattr(module, name) for module in modules for name in names if hasattr(module, name)]
            values = [value for value in read if not isinstance(value, types.ModuleType | type)]
            cells = [cell.cell_contents for cell in fn.__closure__ or () if _is_filled(cell)]
            found = self.items([fn.__code__, fn.__defaults__, fn.__kwdefaults__, cells, values])
            self._functions[id(fn)] = (fn, found)
        return self._functions[id(fn)][1]

    def streamed(self, op: Streamed) -> _Hash:
        """Return the hash of curvature over a loader: of the operator on a batch, and of all data."""
        product = lambda op, batch, vector: _product(op.on(batch, 0), vector)
        made = self.function_of(product, op, jax.tree.map(shape_of, op.source.head()), _vector(op.space))
        told = _data(op.source)
        self._listed.append(told)
        return _hash(made, _Hash(b"data", told.encode()))


# How to hash what is no tree of JAX, and no array; the first kind that fits.
HASHED: dict[Any, Callable[[_Walk, Any], _Hash]] = {
    Streamed: _Walk.streamed,
    types.FunctionType: _Walk.function,
    types.MethodType: lambda walk, method: walk.items([method.__self__, method.__func__]),
    functools.partial: lambda walk, made: walk.items([made.func, made.args, made.keywords]),
    types.CodeType: lambda walk, code: walk.items([code.co_code, code.co_names, code.co_consts]),
    types.BuiltinFunctionType | np.ufunc: lambda _, fn: _hash("function", fn.__name__),
    types.ModuleType | type: lambda _, it: _hash("named", it.__name__),
    enum.Enum: lambda _, it: _hash(type(it).__name__, it.name),
    np.dtype: lambda _, dtype: _hash("dtype", str(dtype)),
    jax.tree_util.PyTreeDef: lambda _, structure: _hash("leaves", str(structure.num_leaves)),
    jax.sharding.Mesh | jax.sharding.AbstractMesh: lambda _, mesh: _hash("mesh", str(dict(mesh.shape))),
    jax.sharding.Sharding: lambda _, it: _hash("sharding"),
    jax.sharding.PartitionSpec: lambda _, spec: _hash("spec", str(tuple(spec))),
    Mapping: lambda walk, it: walk.items(sorted(it.items(), key=lambda pair: str(pair[0]))),
    set | frozenset: _Walk.unordered,
    list | tuple: _Walk.items,
}


def _content(value: Any) -> tuple[str, str, bytes]:
    """Return dtype and shape of a constant, its entries in words, and a hash of them."""
    is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    kind, array = entries_of(value if is_key or not isinstance(value, jax.Array) else to_host(value), "constant")
    digest = hashlib.blake2b(f"{kind}{array.shape}".encode(), digest_size=16)
    digest.update(raw_bytes(array))
    told = str(array.tolist()) if array.size <= SHOWN else digest.hexdigest()
    return f"{kind}[{','.join(map(str, array.shape))}]", told, digest.digest()


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
    shares = agree(count, *np.frombuffer(whole, np.int32).tolist()) if source.several else np.asarray([[count]])
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


def _keeps_dtype(equation: Any) -> bool:
    """Tell whether an equation only says how strongly its operand is typed."""
    cast = equation.primitive.name == "convert_element_type"
    return cast and equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype


def _is_filled(cell: types.CellType) -> bool:
    """Tell whether the variable is bound already."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_library(thing: Any) -> bool:
    """Whether a function, class or module comes with Python or a package, whose version says what it does."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    root = (name or "").split(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in sys.stdlib_module_names or root == __name__.split(".")[0] or "site-packages" in file
