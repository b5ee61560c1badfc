"""Memory planned before anything is allocated."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import planned
import pytest
from helpers import CLASSIFICATION, relative_error
from planned import ROWS, first

import influence_jax as ij
from influence_jax import _footprint, planning
from influence_jax._memory import OutOfMemory
from influence_jax.influence import _factors, _self_influences, _up, _up_from_train
from influence_jax.scoring import perturbed

problem = planned.problem  # the fixture


@pytest.fixture(scope="module")
def dense(problem):
    """The same through a dense inverse, which takes more than scores of a few examples at once."""
    influence, query, train = problem
    curvature = ij.GGN(CLASSIFICATION, influence.params, first(train, 40))
    return dataclasses.replace(influence, inverse=ij.invert(curvature, ij.Direct(0.1))), query, train


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def nbytes(tree):
    """Of distinct arrays."""
    return sum({id(x): np.asarray(x).nbytes for x in jax.tree.leaves(tree)}.values())


def chunked(influence, chunk, rhs_chunk=4):
    return dataclasses.replace(influence, chunk=chunk, rhs_chunk=rhs_chunk)


def beyond_arguments(fn, *args):
    stats = jax.jit(fn).lower(*args).compile().memory_analysis()
    return stats.output_size_in_bytes + stats.temp_size_in_bytes


def taken(influence, query, train, chunk, *, blocks=1):
    """What scores take, from arrays that are there and programs compiled for them."""
    influence = chunked(influence, chunk)
    factors = _factors(influence, query)[0]
    held = nbytes((influence, query)) + blocks * nbytes(train)
    solving = held + beyond_arguments(_factors, influence, query)
    return max(solving, held + nbytes(factors) + beyond_arguments(_up, influence, factors, train))


class TestMemory:
    def test_counts_what_goes_in_and_comes_out(self):
        found = planning.memory(jnp.outer, jnp.ones(300), jax.ShapeDtypeStruct((200,), np.float64))
        assert (found.arguments, found.outputs) == (8 * 500, 8 * 60_000)
        assert found.total >= found.arguments + found.outputs + found.temporary

    def test_counts_what_is_held_in_between(self):
        small, large = (
            planning.memory(lambda x: jnp.sort(jnp.outer(x, x)).sum(), jax.ShapeDtypeStruct((side,), np.float32))
            for side in (100, 200)
        )
        assert large.temporary > 3 * small.temporary > 100 * 100 * 4

    def test_nothing_runs_and_nothing_is_allocated(self):
        ran = []

        def fn(x):
            jax.debug.callback(ran.append, 1)
            return x + 1

        huge = jax.ShapeDtypeStruct((2**45,), np.float32)  # 128 TiB
        assert planning.memory(fn, huge).outputs == 2**47
        assert ran == []

    def test_trees_and_numbers(self):
        found = planning.memory(lambda tree: tree["a"] * tree["b"], {"a": jnp.ones(10), "b": 2.0})
        assert found.outputs == 80

    def test_prints_units(self):
        assert repr(planning.Memory(512, 2048, 3 * 2**20, 2**33)) == (
            "Memory(arguments 512 bytes, outputs 2.00 KiB, temporary 3.00 MiB, total 8.00 GiB)"
        )

    def test_a_backend_that_does_not_tell_is_told_in_words(self, monkeypatch):
        monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
        with pytest.raises(
            NotImplementedError, match=r"does not tell .* on 'cpu'; choose chunk= and rhs_chunk= by hand"
        ):
            planning.memory(jnp.sin, jnp.ones(3))

    def test_sharded_arrays_count_by_device(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(jnp.ones((64, 10)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        assert planning.memory(lambda x: x + 1, x).arguments == 64 * 10 * 8 // 8


class TestChunksOfAPlan:
    @pytest.mark.parametrize("share", [0.6, 0.1])
    def test_are_the_largest_that_fit(self, problem, share):
        influence, query, train = problem
        least, most = (taken(influence, query, train, chunk) for chunk in (16, ROWS))
        budget = int(least + share * (most - least))
        plan = planning.plan(influence, query, train, budget=budget)
        assert plan.batch_size == ROWS
        assert 16 <= plan.chunk < ROWS
        assert plan.bytes == taken(influence, query, train, plan.chunk) <= budget
        assert taken(influence, query, train, min(2 * plan.chunk, ROWS)) > budget

    def test_are_everything_where_that_fits(self, problem):
        influence, query, train = problem
        plan = planning.plan(influence, query, train, budget="1 GiB")
        assert (plan.chunk, plan.batch_size, plan.rhs_chunk) == (ROWS, ROWS, 4)
        assert plan.bytes == taken(influence, query, train, ROWS)

    def test_leave_room_for_the_solves(self, dense):
        """Whatever the scores take."""
        influence, query, train = dense
        budget = taken(influence, query, first(train, 1), 1, blocks=4)
        plan = planning.plan(influence, query, train, budget=budget)
        assert plan.parts["influences"].total < plan.bytes == plan.parts["factors"].total <= budget
        with pytest.raises(ValueError, match=r"factors takes at least .* one example at a time"):
            planning.plan(influence, query, train, budget=int(0.98 * plan.bytes))

    def test_are_blocks_where_the_training_data_do_not_fit(self, problem):
        influence, query, train = problem
        budget = taken(influence, query, first(train, 100), 100, blocks=4)
        plan = planning.plan(influence, query, train, budget=budget)
        assert plan.chunk == plan.batch_size == 64
        assert plan.bytes == taken(influence, query, first(train, 64), 64, blocks=4) <= budget
        assert taken(influence, query, first(train, 128), 128, blocks=4) > budget

    def test_shrink_with_the_budget(self, problem):
        influence, query, train = problem
        most = taken(influence, query, train, ROWS)
        sizes = [planning.plan(influence, query, train, budget=most // by) for by in (1, 3, 10)]
        assert sizes[0].chunk > sizes[1].chunk > sizes[2].chunk
        assert sizes[0].batch_size == ROWS > sizes[2].batch_size

    def test_do_not_change_scores(self, dense):
        influence, query, train = dense
        plan = planning.plan(influence, query, train, budget=taken(influence, query, train, ROWS) // 2)
        planned = plan.apply(influence)
        assert (planned.chunk, planned.rhs_chunk) == (plan.chunk, plan.rhs_chunk) != (None, None)
        assert planned.chunk < ROWS
        assert relative_error(planned.influences(query, train), influence.influences(query, train)) < 1e-12

    def test_compile_few_programs_and_nothing_else(self, problem, compilations):
        influence, query, train = problem
        budget = taken(influence, query, train, ROWS) // 2
        arguments = shapes((influence, query, train))
        with compilations() as names:
            planning.plan(*arguments, budget=budget)
        assert set(names) <= {"jit(_factors)", "jit(_program)"}
        assert names.count("jit(_factors)") <= 2
        assert 3 <= len(names) <= 7
        with compilations() as names:
            planning.plan(*arguments, budget="1 GiB")
        assert len(names) <= 2

    def test_of_shapes_are_those_of_arrays(self, problem):
        influence, query, train = problem
        budget = taken(influence, query, train, ROWS) // 2
        plan = planning.plan(influence, query, train, budget=budget)
        for query_like, train_like in (
            (query, shapes(train)),
            shapes((query, train)),
            (query.__class__(*map(np.asarray, jax.tree.leaves(query))), train),
        ):
            assert planning.plan(influence, query_like, train_like, budget=budget) == plan

    def test_of_an_influence_that_was_never_made(self):
        """Parameters of 4 GB, ten million examples."""

        def build(params):
            return ij.Influence(CLASSIFICATION, params, 2.0 * ij.Identity(params))

        wide = {f"layer{i}": {"kernel": (2**14, 2**14), "bias": (2**14,)} for i in range(4)}
        params = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, np.float32), wide, is_leaf=lambda x: isinstance(x, tuple)
        )
        x = jax.ShapeDtypeStruct((10_000_000, 2**14), np.float32)
        train = ij.Batch(x, jax.ShapeDtypeStruct((10_000_000,), np.int32))
        query = jax.tree.map(lambda x: x.update(shape=(3, *x.shape[1:])), train)
        influence = jax.eval_shape(build, params)
        plan = planning.plan(influence, query, train, budget="64 GiB")
        assert 16 <= plan.batch_size < 10_000_000
        assert 20 * 2**30 < plan.bytes <= 64 * 2**30
        assert plan.apply(influence).chunk == plan.chunk

    def test_are_found_where_a_compiler_refuses_programs_that_cannot_fit(self, problem, monkeypatch):
        influence, query, train = problem
        budget = taken(influence, query, train, ROWS) // 2
        plan = planning.plan(influence, query, train, budget=budget)
        measured = _footprint.measured

        def refusing(fn, *args):
            found = measured(fn, *args)
            if found[0].total > budget:
                raise OutOfMemory("refused")
            return found

        monkeypatch.setattr(_footprint, "measured", refusing)
        assert planning.plan(influence, query, train, budget=budget) == plan


class TestOtherMethods:
    def perturbation_needs(self, influence, factors, train, query, rhs_chunk):
        held = nbytes((influence, query, factors)) + 4 * nbytes(train)
        fn = lambda i, f, t: perturbed(i.objective, i.params, f, t, "x", i.chunk, i.rhs_chunk)
        return held + beyond_arguments(fn, chunked(influence, len(train), rhs_chunk), factors, train)

    def test_perturbation_takes_fewer_factors_at_once_where_one_example_is_too_much(self):
        params = {"kernel": jnp.ones((400, 4)), "bias": jnp.ones(4)}
        influence = ij.Influence(helpers.LINEAR, params, ij.Identity(params))
        query, train = (helpers.random_batch(jax.random.key(i), n, 400, 4, classes=False) for i, n in ((0, 6), (1, 90)))
        factors, one = influence.influence_factors(query), first(train, 1)
        needs = [self.perturbation_needs(influence, factors, one, query, size) for size in (1, 2, 4)]
        assert needs[0] < needs[1] < needs[2]
        for size, need in ((1, needs[0]), (2, needs[1])):
            plan = planning.plan(influence, query, train, budget=need, method="perturbation")
            assert (plan.chunk, plan.batch_size, plan.rhs_chunk, plan.bytes) == (1, 1, size, need)

    def test_self_influences_hold_gradients(self, problem):
        influence, _, train = problem
        held = nbytes((influence, train))
        needs = lambda chunk: held + beyond_arguments(_self_influences, chunked(influence, chunk), train)
        budget = needs(100)
        plan = planning.plan(influence, None, train, budget=budget, method="self_influences")
        assert plan.batch_size == ROWS
        assert plan.bytes == needs(plan.chunk) <= budget < needs(2 * plan.chunk)
        assert relative_error(plan.apply(influence).self_influences(train), influence.self_influences(train)) < 1e-12

    def test_fewer_training_examples_than_queries(self, problem):
        """Then solves are for the training examples."""
        influence, query, train = problem
        swapped = (influence, train, query)
        needs = lambda chunk: (
            nbytes(swapped) + beyond_arguments(_up_from_train, chunked(influence, chunk), train, query)
        )
        plan = planning.plan(*swapped, budget="1 GiB")
        assert (plan.batch_size, plan.bytes) == (5, needs(plan.chunk))

    def test_positions(self):
        params = {"kernel": jnp.ones((3, 4))}
        objective = ij.Objective(lambda p, z: z @ p["kernel"], lambda out, z: jnp.sum(out**2))
        influence = ij.Influence(objective, params, ij.Identity(params))
        query, train = jnp.ones((2, 7, 3)), jnp.ones((50, 7, 3))
        plan = planning.plan(influence, query, train, budget="1 MiB", method="token_influences")
        assert plan.parts["token_influences"].outputs == 2 * 50 * 7 * 8
        with pytest.raises(ValueError, match=r"expected one array \(T, C\)"):
            planning.plan(influence, query[:, 0], train[:, 0], budget="1 MiB", method="token_influences")

    def test_curvature_from_a_loader(self, problem):
        """Solves run on the host; gradients of the queries and scores are planned."""
        influence, query, train = problem
        loader = [first(train, 20)]
        streamed = ij.stream.invert(ij.GGN, CLASSIFICATION, influence.params, loader, ij.CG(0.1))
        plan = planning.plan(dataclasses.replace(influence, inverse=streamed), query, train, budget="1 GiB")
        assert plan.parts["factors"].outputs == pytest.approx(5 * 8 * streamed.size, rel=0.01)


class TestDevices:
    def test_needs_are_those_of_each_device_and_blocks_split_evenly(self, problem):
        influence, query, train = problem
        train = first(train, 2048)
        alone = planning.plan(influence, query, train, budget="1 GiB")
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread, everywhere = (
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (("data",), ())
        )
        train = jax.device_put(train, spread)
        influence, query = jax.device_put((influence, query), everywhere)
        plan = planning.plan(influence, query, train, budget="1 GiB")
        held = nbytes(influence) + nbytes(query)
        assert plan.parts["factors"].arguments == held + nbytes(train) // 8
        assert plan.bytes < alone.bytes
        budget = max(part.total for part in plan.parts.values()) - nbytes(train) // 8
        small = planning.plan(influence, query, train, budget=budget)
        assert small.bytes <= budget
        assert small.batch_size % 8 == 0
        assert (
            relative_error(small.apply(influence).influences(query, train), influence.influences(query, train)) < 1e-12
        )


class TestTable:
    def test_says_what_every_part_takes(self, problem):
        text = repr(planning.plan(*problem, budget="1 GiB"))
        assert "of 1.00 GiB on each device" in text
        for word in ("chunk", "3,000  training examples at once", "rhs_chunk", "batch_size", "factors", "temporary"):
            assert word in text
        assert len({len(line) for line in text.splitlines()[4:]}) == 1


class TestMistakes:
    @pytest.mark.parametrize("budget", ["2 gigs", "", "GiB", "0 GiB", "-1 GiB", "1e9 B", "2 gib", "0.1 B", "nan GB"])
    def test_budget_in_unknown_words(self, problem, budget):
        with pytest.raises(ValueError, match=r"budget: got .* such as '2 GiB' or '500 MB'; the units are B, kB"):
            planning.plan(*problem, budget=budget)

    @pytest.mark.parametrize(
        ("budget", "error"), [(0, ValueError), (-5, ValueError), (True, TypeError), (1.5, TypeError), (None, TypeError)]
    )
    def test_budget_that_is_no_number_of_bytes(self, problem, budget, error):
        with pytest.raises(error, match=r"budget: got .*, expected a positive int"):
            planning.plan(*problem, budget=budget)

    @pytest.mark.parametrize(
        ("text", "expected"), [("3B", 3), ("2 kB", 2000), ("0.5 KiB", 512), (" 1 TB ", 10**12), ("2GiB", 2**31)]
    )
    def test_budgets_that_are_understood(self, text, expected):
        assert planning.as_bytes(text) == expected

    def test_budget_too_small_for_one_example(self, problem):
        message = (  # which of the two takes more is up to the compiler
            r"budget: got 1.00 KiB, but (influences|factors) takes at least .*, one example at a time: .* in between. "
            r"Less is taken by fewer queries at once \(now 5\), .* curvature operator, .* more devices; "
            r"or raise the budget"
        )
        with pytest.raises(ValueError, match=message):
            planning.plan(*problem, budget="1 KiB")

    def test_least_of_the_message_is_enough(self, problem):
        influence, query, train = problem
        needed = taken(influence, query, first(train, 1), 1, blocks=4)
        plan = planning.plan(influence, query, train, budget=needed)
        assert plan.bytes <= needed
        with pytest.raises(ValueError, match="takes at least"):
            planning.plan(influence, query, train, budget=int(0.8 * needed))

    def test_arguments_of_the_wrong_kind(self, problem):
        influence, query, train = problem
        with pytest.raises(TypeError, match=r"influence: got a Scaled, expected an influence_jax.Influence"):
            planning.plan(influence.inverse, query, train, budget="1 GiB")
        with pytest.raises(ValueError, match=r"method: got 'scores', expected one of \['influences'"):
            planning.plan(influence, query, train, budget="1 GiB", method="scores")
        with pytest.raises(ValueError, match="wrt: got 'z'"):
            planning.plan(influence, query, train, budget="1 GiB", method="perturbation", wrt="z")
        with pytest.raises(TypeError, match="train: leaf '' is a generator"):
            planning.plan(influence, query, (part for part in [train]), budget="1 GiB")
