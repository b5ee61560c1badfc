"""Objectives from flax modules, linen and nnx; flax is imported only when an adapter is called."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _rows, tree
from ._typing import Array, PyTree
from .objective import Objective, get_field

_NOT_FOR_FLAX_APPLY = {
    "rngs": "a per-example loss has to be deterministic",
    "mutable": "a per-example loss must not update state",
}


def from_linen(
    module: Any,
    variables: Mapping[str, PyTree],
    loss: Callable[[PyTree, PyTree], Array],
    *,
    input: str | int = "x",
    batched: bool = True,
    method: str | None = None,
    **apply_kwargs: Any,
) -> tuple[Objective, PyTree]:
    """Objective and parameters of a `flax.linen` module in evaluation mode.

    Two calls on equal modules give equal objectives, so a jitted program compiles once.

    Args:
      module: The unbound module.
      variables: What `module.init` returned or training left: `"params"` is differentiated, every other collection
        (batch statistics, ...) becomes the objective's constants.
      loss: `loss(output, example) -> scalar` for one example.
      input: Which part of the example the module is called with: key, attribute or tuple index.
      batched: Whether the module expects a batch axis; if so it is called on a batch of one.
      method: Name of the module's method, `__call__` if None.
      **apply_kwargs: Python values passed to every call, e.g. `train=False` or `deterministic=True`.

    Returns:
      `(objective, params)`.

    Raises:
      ValueError: If there are no `"params"`, or, on a call, if dropout or batch norm runs in training mode, or the
        output of a row is seen to depend on the other rows of a batch.
      TypeError: If `rngs`, `mutable` or an array is passed as a keyword, or other collections are among the parameters.

    Example:
      >>> import influence_jax as ij
      >>> import flax.linen as nn
      >>> net = nn.Dense(2)
      >>> variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> objective, params = ij.from_linen(net, variables, lambda out, z: jnp.sum((out - z["y"]) ** 2))
      >>> objective(params, {"x": jnp.ones(3), "y": jnp.zeros(2)}).shape
      ()
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables: got {got}, expected a dict with 'params', as module.init returns; wrap bare params"
        )
    for name, value in apply_kwargs.items():
        if name in _NOT_FOR_FLAX_APPLY:
            raise TypeError(f"{name}: not accepted, {_NOT_FOR_FLAX_APPLY[name]}; use the module's evaluation mode")
        if isinstance(value, jax.Array | np.ndarray):
            raise TypeError(
                f"{name}: got an array, expected a Python value; make arrays part of the example or variables"
            )
    _check_linen(module)
    tree.check_only_params(variables["params"], "variables['params']")
    constants = {name: value for name, value in variables.items() if name != "params"}
    keywords = tuple(sorted(apply_kwargs.items()))
    predict = _LinenPredict(module, _one_input(input, "linen", batched), batched, method, keywords)
    return Objective(predict, loss, constants=constants or None), variables["params"]


def from_nnx(
    model: Any, loss: Callable[[PyTree, PyTree], Array], *, input: str | int = "x", batched: bool = True
) -> tuple[Objective, PyTree]:
    """Objective and parameters of a `flax.nnx` module in evaluation mode.

    Args:
      model: The module, after `model.eval()`.
      loss: `loss(output, example) -> scalar` for one example.
      input: Which part of the example the module is called with: key, attribute or tuple index.
      batched: Whether the module expects a batch axis; if so it is called on a batch of one.

    Returns:
      `(objective, params)`; `params` is the `nnx.State` of all `nnx.Param`, everything else is constant.  The objective
      takes them in any containers, as they come back from a disk: they are matched with the model's by their paths.

    Raises:
      TypeError: If the model is no nnx module, or takes more than one input.
      ValueError: If the model has dropout or batch norm in training mode, or no parameters; on a call, if the leaves of
        the parameters are not those of the model, or the output of a row is seen to depend on other rows of a batch.

    Example:
      >>> import influence_jax as ij
      >>> from flax import nnx
      >>> net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> objective, params = ij.from_nnx(net, lambda out, z: jnp.sum((out - z["y"]) ** 2))
      >>> objective(params, {"x": jnp.ones(3), "y": jnp.zeros(2)}).shape
      ()
    """
    from flax import nnx

    _check_nnx(model)
    for path, module in nnx.iter_graph(model):
        training = getattr(module, "deterministic", None) is False and _dropout_rate(module) != 0.0
        if isinstance(module, nnx.Module) and (training or getattr(module, "use_running_average", None) is False):
            where = "/".join(map(str, path)) or "the model itself"
            raise ValueError(
                f"model: {where} ({type(module).__name__}) is in training mode, where the loss of one example is "
                "random or depends on its batch; call model.eval() first"
            )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError("model: has no nnx.Param, so there is nothing to differentiate")
    # nnx.split shares the model's Variables: a snapshot does not change when the model is trained on.
    params = jax.tree.map(jnp.asarray, params)
    predict = _NnxPredict(graph, tree.form(params), tree.form(rest), _one_input(input, "nnx", batched), batched)
    return Objective(predict, loss, constants=rest), params


def _check_linen(module: Any) -> None:
    """Raise TypeError unless it is a linen module that can be applied."""
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        return
    if isinstance(module, nnx.Module):
        hint = "; influence_jax.from_nnx(model, loss) takes nnx modules"
    elif isinstance(module, type) and issubclass(module, linen.Module):
        hint = f"; pass an instance, {module.__name__}(...)"
    elif hasattr(module, "apply_fn") and hasattr(module, "params"):
        hint = '; of a train state, from_linen(module, {"params": state.params}, loss)'
    else:
        hint = ""
    raise TypeError(f"module: got {_kind(module)}, expected a flax.linen module{hint}")


def _check_nnx(model: Any) -> None:
    """Raise TypeError unless it is an nnx module."""
    from flax import linen, nnx

    if isinstance(model, nnx.Module):
        return
    if isinstance(model, linen.Module):
        hint = "; influence_jax.from_linen(module, variables, loss) takes linen modules"
    elif isinstance(model, type) and issubclass(model, nnx.Module):
        hint = f"; pass an instance, {model.__name__}(...)"
    elif isinstance(model, nnx.Optimizer):
        hint = "; pass the model that the optimizer updates"
    elif hasattr(model, "apply_fn") or hasattr(model, "opt_state"):
        hint = "; pass the model, not the state of its training"
    else:
        hint = ""
    raise TypeError(f"model: got {_kind(model)}, expected a flax.nnx module{hint}")


def _kind(value: Any) -> str:
    """Return what was given, in words."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _one_input(input: Any, framework: str, batched: bool) -> str | int:
    """Return the name of the input, which is one part of an example."""
    if isinstance(input, str | int) and not isinstance(input, bool):
        return input
    parts = list(input) if isinstance(input, tuple | list) and len(input) > 1 else ["a", "b"]
    raise TypeError(
        f"input: got {input!r}, expected one part of an example, a key, attribute or tuple index; "
        + _own_objective(parts, framework, batched)
    )


def _check_one_input(method: Any, name: str, keywords: Mapping[str, Any], framework: str, batched: bool) -> None:
    """Raise TypeError if the method of a module needs arguments beside one input and the keywords."""
    try:
        given = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # nothing that tells its arguments
        return
    places = [argument for argument in given if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)]
    first = [argument.name for argument in places if argument.kind != argument.KEYWORD_ONLY][:1]
    others = [argument.name for argument in places if argument.default is argument.empty]
    others = [other for other in others if other not in (*first, *keywords)]
    if others:
        flags = f" if one is a flag, pass it to from_linen, e.g. {others[-1]}=False;" if framework == "linen" else ""
        raise TypeError(
            f"module: {name} needs {', '.join(map(repr, others))} beside its first argument, {''.join(first)!r}, but "
            f"is called with one input;{flags} {_own_objective([*first, *others], framework, batched)}"
        )


def _own_objective(parts: Sequence[Any], framework: str, batched: bool) -> str:
    """Return how to write the objective of a module with several inputs."""
    axis, first = ("[None]", "[0]") if batched else ("", "")
    inputs = ", ".join(f"z[{part!r}]{axis}" for part in parts)
    if framework == "linen":
        made = f"influence_jax.Objective(lambda params, z: module.apply({{'params': params}}, {inputs}){first}, loss)"
    else:
        made = (
            "graph, params, rest = nnx.split(model, nnx.Param, ...) and influence_jax.Objective("
            f"lambda params, z, rest: nnx.merge(graph, params, rest, copy=True)({inputs}){first}, loss, constants=rest)"
        )
    return f"several inputs go into an Objective of your own: {made}"


def _dropout_rate(module: Any) -> float:
    return getattr(module, "rate", getattr(module, "dropout_rate", 1.0))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _LinenPredict:
    """`module.apply` on one example, equal for equal modules."""

    module: Any
    input: str | int
    batched: bool
    method: str | None
    keywords: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        # Modules with list attributes (nn.Sequential) compare by value but do not hash; equal ones share a type.
        return hash((type(self.module), self.input, self.batched, self.method))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _LinenPredict):
            return NotImplemented
        try:
            return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self))
        except ValueError:  # attributes that are arrays have no truth value: not known to be equal
            return self.module is other.module and self.keywords is other.keywords

    def __repr__(self) -> str:
        return type(self.module).__name__

    def __call__(self, params: PyTree, example: PyTree, constants: PyTree = None) -> PyTree:
        from flax import errors

        method = getattr(self.module, self.method or "__call__", None)
        _check_one_input(method, type(self.module).__name__, dict(self.keywords), "linen", self.batched)
        tree.check_only_params(params, "params")
        variables = {"params": params, **(constants or {})}
        try:
            return _on_one(self, variables, get_field(example, self.input, "input"), type(self.module).__name__)
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise ValueError(
                f"module: {type(self.module).__name__} runs dropout or batch norm in training mode, where the "
                "loss of one example is random or depends on its batch; pass the module's evaluation flag to "
                f"from_linen, e.g. train=False, deterministic=True or use_running_average=True (flax said: {error})"
            ) from None

    def on_batch(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """Apply the module."""
        return self.module.apply(variables, inputs, method=self.method, **dict(self.keywords))


@dataclasses.dataclass(frozen=True, repr=False)
class _NnxPredict:
    """A merged nnx module on one example, equal for equal graph definitions."""

    graph: Any
    params: tree.Form
    constants: tree.Form
    input: str | int
    batched: bool

    def __repr__(self) -> str:
        return "nnx module"

    def __call__(self, params: PyTree, example: PyTree, constants: PyTree) -> PyTree:
        # Merging takes leaves in the order they come in, whatever they are called.
        params = self.params.matched(params, "params", "the model")
        constants = self.constants.matched(constants, "constants", "the model")
        name = type(model := self._merged((params, constants))).__name__
        _check_one_input(model, name, {}, "nnx", self.batched)
        return _on_one(self, (params, constants), get_field(example, self.input, "input"), name)

    def on_batch(self, variables: tuple[PyTree, PyTree], inputs: PyTree) -> PyTree:
        """Call the module, merged from parameters and constants."""
        return self._merged(variables)(inputs)

    def _merged(self, variables: tuple[PyTree, PyTree]) -> Any:
        from flax import nnx

        # A copy, since the model may write to its variables: the caller's must stay as they are.
        return nnx.merge(self.graph, *variables, copy=True)


def _on_one(predict: _LinenPredict | _NnxPredict, variables: PyTree, inputs: PyTree, name: str) -> PyTree:
    """Return the output of one example, if it is that of a batch of any size."""
    if not predict.batched:
        return predict.on_batch(variables, inputs)
    outputs = predict.on_batch(variables, jax.tree.map(lambda x: jnp.asarray(x)[None], inputs))
    for leaf in jax.tree.leaves(outputs):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != 1:
            raise ValueError(
                f"module: called on a batch of one it returned shape {jnp.shape(leaf)}, expected a leading axis of "
                "length 1; pass batched=False if the module takes one example"
            )
    how = _rows.mixed(predict, _rows.described(variables), _rows.described(inputs))
    if how is not None:
        raise ValueError(
            f"module: {name} computes over the batch that it is given: the output of one row {how}. The library calls "
            "it on a batch of one example, where that is another number than in training; expected a model whose "
            "output of an example depends on that example alone, e.g. with stored statistics as constants "
            "(use_running_average=True, model.eval()) in place of those of the batch, and with losses over pairs of "
            "examples made of examples that hold both"
        )
    return jax.tree.map(lambda x: x[0], outputs)
