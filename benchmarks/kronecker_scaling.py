"""How the cost of EK-FAC grows with the model and with the data: `python benchmarks/kronecker_scaling.py [--small]`.

A decoder-only transformer of two blocks, 32 tokens of a vocabulary of 256, labels of the data, float32.  First at 256
sequences and growing width, then at width 64 and growing data.  For each: the time per sequence and core of the fit and
of scoring against 8 queries, once compiled; and what the process holds at most above what was there before.  Every
measurement is made in a process of its own, on one core.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
COUNTS = (250, 1000, 4000, 16000)
QUERIES, LENGTH, VOCABULARY, HEADS = 8, 32, 256, 4


def measure(width, count):
    """Figures of one fit and one scoring, in this process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from comparison.measuring import memory, start_peak, timed

    import influence_jax as ij

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, width)(tokens) + self.param("positions", nn.initializers.normal(), (LENGTH, width))
            for _ in range(2):
                h = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h, mask=nn.make_causal_mask(tokens))
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
            return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))

    def loss(logits, example):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, example.y))

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, LENGTH + 1))
    train = ij.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    query = jax.tree.map(lambda x: x[:QUERIES], train)
    net = Transformer()
    objective, params = ij.from_linen(net, jax.jit(net.init)(jax.random.key(0), train.x[:1]), loss)

    def fit():
        return jax.block_until_ready(ij.ekfac(objective, params, train, labels="empirical"))

    def score():
        return jax.block_until_ready(influence.influences(query, train))

    figures = {"width": width, "count": count, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    influence = ij.Influence(objective, params, ij.invert(fit(), ij.Direct(ij.RelativeDamping(0.1))))
    for name, run in (("fit", fit), ("score", score)):
        run()
        baseline = start_peak()
        times = [timed(run)[1] for _ in range(3)]
        figures |= {f"{name}_ms": 1e3 * min(times) / count, f"{name}_mb": memory("VmHWM") - baseline}
    return figures


def table(rows):
    lines = [
        "| width | parameters | sequences | fit, ms each | score, ms each | fit, MB | score, MB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        cells = (
            f"{row['width']} | {row['parameters']:,} | {row['count']:,} | {row['fit_ms']:.2f} | {row['score_ms']:.2f}"
        )
        lines.append(f"| {cells} | {row['fit_mb']:.0f} | {row['score_mb']:.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int, metavar=("WIDTH", "COUNT"), help="one measurement, as JSON")
    parser.add_argument("--small", action="store_true", help="the small half of both series")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kronecker_scaling.json")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    series = [(width, 256) for width in WIDTHS] + [(64, count) for count in COUNTS]
    if arguments.small:
        series = [(width, count) for width, count in series if width <= 64 and count <= 1000]
    rows = []
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    for width, count in series:
        command = [sys.executable, __file__, "--one", str(width), str(count)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | threads)
        rows.append(json.loads(run.stdout))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    import jax

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    about = {"processor": names[0].split(": ")[1], "jax": jax.__version__, "python": platform.python_version()}
    arguments.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    notes = f"{about['processor']}, one core; jax {about['jax']}, Python {about['python']}."
    arguments.output.with_suffix(".md").write_text(f"{table(rows)}\n\n{notes}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
