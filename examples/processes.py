# %% [markdown]
"""# Scores of one data set by several processes, each with its own devices and its own rows, into one store.

    python examples/processes.py --processes 2

starts two processes on this machine, and stops all if one fails; so does the notebook, which needs the script beside
it.  On a cluster start the same file with `--worker` on every host: JAX finds the others on TPU pods, Slurm and
Kubernetes, elsewhere pass `--coordinator host:port`, `--processes` and `--process`.
"""

# %% [markdown]
# ## What every process does

# %%
import argparse
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

NOTEBOOK = "ipykernel" in sys.modules
SCRIPT = "processes.py" if NOTEBOOK else __file__


def work(arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    from jax.experimental import multihost_utils
    from sklearn.datasets import load_digits

    import influence_jax as ij

    if arguments.processes != 1:
        ij.stream.connect(arguments.coordinator, arguments.processes, arguments.process, timeout=arguments.timeout)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    digits = load_digits()
    data = {"x": (digits.data / 16).astype(np.float32), "y": digits.target.astype(np.int32)}
    train, query = (jax.tree.map(lambda x, s=s: x[s], data) for s in (slice(0, 1501), slice(1501, 1521)))
    objective = ij.Objective(
        lambda params, z: z["x"] @ params["w"] + params["b"],
        lambda logits, z: jax.nn.logsumexp(logits) - logits[z["y"]],
    )

    # A small model, trained by each and taken from the first; a large one would be loaded, sharded over the mesh.
    @jax.jit
    def fit(data: dict) -> dict:
        optimizer = optax.adam(0.03)
        params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
        loss = lambda params: jnp.mean(jax.vmap(objective, (None, 0))(params, data))

        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]

    params = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(fit(train)))

    # Only the process's own rows are read; with files larger than memory `train` would be memory maps.
    loader = ij.stream.share(train, batch_size=256)
    options = {"batch_size": 256, "sharding": sharding}
    curvature = ij.stream.ekfac(objective, params, loader, **options)
    influence = ij.Influence(objective, params, ij.invert(curvature, ij.Direct(ij.RelativeDamping(0.1))))
    store = ij.store.ScoreStore.create(arguments.out)
    ij.stream.scores(influence, query, loader, store, **options)
    best = ij.stream.top_k(influence, query, loader, 5, **options)
    if jax.process_index() == 0:
        same = np.mean(train["y"][best.indices] == query["y"][:, None])
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices: {ij.store.ScoreStore.open(arguments.out)}"
        )
        print(f"{same:.0%} of the 5 most helpful examples of each query show the same digit, a tenth of all do")


# %% [markdown]
# ## Starting them on one machine


# %%
def launch(arguments: argparse.Namespace, script: str = SCRIPT) -> int:
    """Run the script once per process; when one fails the others are stopped, and its exit code is returned."""
    count = arguments.processes or 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    command = [sys.executable, script, "--worker", "--coordinator", coordinator, "--out", str(arguments.out)]
    command += ["--processes", str(count), "--timeout", str(arguments.timeout)]
    running = [
        subprocess.Popen([*command, "--process", str(number)], env={**os.environ, "XLA_FLAGS": flags})
        for number in range(count)
    ]
    while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
        time.sleep(0.1)
    failed = [number for number, process in enumerate(running) if process.poll()]
    if not failed:
        return 0
    first = min(failed, key=lambda number: running[number].returncode)  # a signal's code is negative, an error's is 1
    print(f"process {first} stopped with exit code {running[first].returncode}", file=sys.stderr)
    deadline = time.monotonic() + arguments.timeout  # the others have that long to say what they saw
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in running:
        process.kill()
        process.wait()
    return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.lstrip("# "), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, help="how many processes; here 2 if not given")
    parser.add_argument("--devices", type=int, default=1, help="devices of each process started here (CPU)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores.zarr"), help="the store")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until a silent process counts as dead")
    parser.add_argument("--worker", action="store_true", help="be one of the processes")
    parser.add_argument("--coordinator", help="address:port of process 0")
    parser.add_argument("--process", type=int, help="which one this is")
    return parser.parse_args([] if NOTEBOOK else None)


# %%
if __name__ == "__main__":
    arguments = parse()
    if arguments.worker:
        work(arguments)
    elif code := launch(arguments):
        sys.exit(code)
