"""Where scores go, block by block: to memory, or to a store that an interrupted computation continues from."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any, Protocol

import jax
import jaxlib
import numpy as np

from .. import tree
from .._typing import Array, PyTree
from ..curvature.exact import OverData
from ..influence import Influence
from ..solvers import Inverse
from .loaders import Block, Blocks
from .processes import agree, to_host


class Table(Protocol):
    """Scores by block of queries and block of examples."""

    def has(self, row: int, block: Block) -> bool:
        """Whether that part is finished already."""
        ...

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        """Keep scores `(rows of queries, rows)`; those beyond the queries and the examples are dropped."""
        ...

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        """Factors kept earlier."""
        ...

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        """Keep factors, and return them as they will be found."""
        ...

    def finish(self, examples: int) -> Any:
        """The whole."""
        ...


class Memory:
    """Scores in memory."""

    def __init__(self) -> None:
        self._rows: dict[int, list[np.ndarray]] = {}

    def has(self, row: int, block: Block) -> bool:
        return False

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        self._rows.setdefault(row, []).append(to_host(values)[:queries, : block.count])

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        return None

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        return factors

    def finish(self, examples: int) -> np.ndarray:
        return np.concatenate([np.concatenate(self._rows[row], axis=1) for row in sorted(self._rows)])


class Stored:
    """Scores in a store."""

    def __init__(self, store: Any, manifest: dict[str, Any], queries: int, query_rows: int, blocks: Blocks) -> None:
        from ..store.files import fingerprint  # files and their libraries are needed where there is a store only

        self._store, self._blocks, self._fingerprint = store, blocks, fingerprint
        self._local = blocks.local.stop - blocks.local.start
        self._processes = jax.process_count() if blocks.several else 1
        sizes = {"queries": queries, "query_rows": query_rows, "train_rows": self._local, "dtype": manifest["dtype"]}
        if jax.process_index() == 0:
            store.begin(manifest, **sizes)
        agree(0)  # what is shared is there now
        if jax.process_index() != 0:
            if self._processes == 1:
                raise ValueError("sharding: several processes write one store only if the sharding spans all of them")
            store.begin(manifest, **sizes, process=jax.process_index())

    def _column(self, block: Block) -> int:
        return block.number * self._processes + (jax.process_index() if self._processes > 1 else 0)

    def _mine(self, block: Block) -> int:
        """How many examples of a block are this process's."""
        return int(np.clip(block.count - self._blocks.local.start, 0, self._local))

    def has(self, row: int, block: Block) -> bool:
        done, count = True, self._mine(block)
        if count:
            before = self._store.finished(row, self._column(block))
            done = before is not None
            if done and before != self._fingerprint(block.host):
                start = block.start + self._blocks.local.start
                raise ValueError(
                    f"{self._blocks.name}: examples {start} to {start + count} are not those that the scores in "
                    f"{self._store!r} were computed from; give the data of before in the same order, or another path"
                )
        return bool(agree(int(done)).all())

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        count = self._mine(block)
        if count:
            part = _local_columns(values, self._blocks) if self._processes > 1 else np.asarray(values)
            fingerprint = self._fingerprint(block.host)
            self._store.write(row, self._column(block), part[:queries, :count], data=fingerprint)

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        found = self._store.load_factors(row, like)
        return found if bool(agree(int(found is not None)).all()) else None

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        kept = jax.tree.map(to_host, factors)
        self._store.save_factors(row, kept)
        return kept

    def finish(self, examples: int) -> Any:
        agree(0)  # every process has written what is its
        self._store.finish(examples)
        agree(0)
        return self._store


def _local_columns(values: Array, blocks: Blocks) -> np.ndarray:
    """This process's columns of scores that are spread over several."""
    sharding = blocks.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    spread = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec[:1]))
    values = jax.jit(lambda x: x, out_shardings=spread)(values)
    parts = {shard.index[1].indices(blocks.rows)[0]: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=1)


def describe(what: str, influence: Influence, queries: list[PyTree] | None) -> dict[str, Any]:
    """All that makes scores comparable."""
    from ..store.files import fingerprint

    inverse = influence.inverse
    solver = inverse.solver if isinstance(inverse, Inverse) else None
    over_data = [
        part
        for part in jax.tree.leaves(getattr(inverse, "op", inverse), is_leaf=lambda x: isinstance(x, OverData))
        if isinstance(part, OverData)
    ]
    return {
        "what": what,
        "params": fingerprint(jax.tree.map(to_host, influence.params)),
        "query": None if queries is None else fingerprint(queries),
        "objective": _named(influence.objective),
        "measurement": None if influence.measurement is None else _named(influence.measurement),
        "curvature": _named(getattr(inverse, "op", inverse)),
        "curvature_data": fingerprint([(part.data, part.weights) for part in over_data]) if over_data else None,
        "solver": None if solver is None else _named(solver),
        "damping": None if solver is None else _named(getattr(solver, "damping", None)),
        "sign": "positive: training on the example lowers the loss of the query",
        "units": "gradient of the query, inverse curvature of the mean loss, gradient of the example; no factor 1/N",
        "dtype": np.dtype(tree.accumulation_dtype(*(x.dtype for x in jax.tree.leaves(influence.params)))).name,
        "versions": {
            "influence_jax": version("influence-jax"),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
        },
    }


def _named(thing: Any) -> str:
    """Its description, without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
