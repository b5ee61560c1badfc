"""One table in Markdown, and one chart, of the rows of a comparison."""

import math

from .methods import KRONFLUENCE, METHODS, OURS, PYDVL

RIGHT = 0.1  # relative error of an answer that counts in the means
BUSY = 0.5  # load before the start from which on it is worth a warning
HEAD = (
    "method on problem | side | setting | error | warm CPU s | warm wall s | cold CPU s | cold wall s | peak MB "
    "| of a warm run | correlation with GN | warm, of ours | cold, of ours"
)
NOTES = """\
Each row is a process of its own on one core.  `cold` is the first call, with all compiling but without imports; `warm`
the median of calls after it; both are CPU seconds of user and system, and wall.  `peak` is what the process held at
most above what it held after imports and loading the problem, `of a warm run` what warm calls held above what was there
before them.  The last columns are a peer's CPU seconds over ours.  Our first call compiles with XLA, which most of its
seconds and of its peak go into; the peers compile nothing.

`error` is the relative distance to the exact answer in float64: for solvers to factors by the exact Hessian (for the
harmonic mean its own closed form), where those with a tolerance run at the loosest that comes within 1e-3; for
structured curvatures to the same method with the same labels, drawn labels to their expectation, of which one draw is a
rough estimate.  pyDVL's K-FAC and EK-FAC have labels of its own kind.  How far such a curvature is from the
Gauss-Newton matrix (GN) itself says the mean correlation over queries of its scores with those.  LiSSA stops both sides
after the same steps, Arnoldi and Nyström have the same rank, whatever error that leaves.  Of the batch sizes tried, the
fastest counts.  kronfluence's collections of garbage are all but left out."""


# Where less is better.
LESS = {
    "CPU seconds warm": "warm_cpu_s",
    "CPU seconds cold": "cold_cpu_s",
    "peak memory": "peak_mb",
    "memory of a warm run": "warm_peak_mb",
}


def pairs(results):
    """For each method its title and its rows, ours first."""
    for name, method in METHODS.items():
        rows = {row["side"]: row for row in results["rows"] if row["method"] == name}
        if rows:
            yield method, [rows[side] for side in method.sides if side in rows]


def ratio(row, ours, field):
    """A peer's figure over ours, where there are both."""
    both = field in row and field in ours and row["side"] != OURS
    return row[field] / ours[field] if both else None


def number(value, form):
    return "" if value is None else format(value, form)


def seconds(value):
    """Two digits that say something, or hundredths."""
    return "" if value is None else f"{value:.2g}" if value < 1 else f"{value:.2f}"


def cells(method, row, ours):
    """A row of the table."""
    first = [f"{method.title} ({method.problem})" if row["side"] == OURS else "", row["side"]]
    if "failed" in row:
        return [*first, f"failed: {row['failed']}".replace("|", "\\|")]
    setting = ", ".join(f"{name} {value}" for name, value in row["setting"].items())
    times = [seconds(row.get(f"{kind}_{what}_s")) for kind in ("warm", "cold") for what in ("cpu", "wall")]
    memory = [number(row.get(field), ".0f") for field in ("peak_mb", "warm_peak_mb")]
    ratios = [number(ratio(row, ours, f"{kind}_cpu_s"), ".2g") for kind in ("warm", "cold")]
    return [*first, setting, f"{row['error']:.1e}", *times, *memory, number(row.get("correlation"), ".2f"), *ratios]


def table(results):
    head = HEAD.split(" | ")
    lines = [head, ["---"] * len(head)]
    for method, rows in pairs(results):
        lines += [cells(method, row, rows[0]) for row in rows]
    return "\n".join(f"| {' | '.join(line + [''] * (len(head) - len(line)))} |" for line in lines)


def means(results):
    """Geometric means of the ratios to each peer, over what is the peer's own and right on both sides."""
    for peer in (PYDVL, KRONFLUENCE):
        ratios = {}
        for method, (ours, *others) in pairs(results):
            for row in others if method.name != "gradients" else []:
                if max(row.get("error", 0), ours.get("error", 0)) > RIGHT:
                    continue
                for kind in ("warm", "cold"):
                    value = ratio(row, ours, f"{kind}_cpu_s") if row["side"] == peer else None
                    ratios.setdefault(kind, []).extend([] if value is None else [math.log(value)])
        found = {kind: math.exp(sum(logs) / len(logs)) for kind, logs in ratios.items() if logs}
        if found:
            told = ", ".join(f"{value:.2g} times ours {kind}" for kind, value in found.items())
            count = f"{len(ratios['warm'])} methods with errors of at most {RIGHT} on both sides"
            yield f"{peer}: geometric mean of CPU seconds over {count} {told}."


def behind(results):
    """Where a peer needs less than we do, with the factor."""
    for what, field in LESS.items():
        found = []
        for method, (ours, *others) in pairs(results):
            for row in others:
                value = ratio(row, ours, field)
                if value is not None and value < 1:
                    found.append(f"{method.title} ({row['side']}) {1 / value:.1f}")
        yield f"* {what}: {', '.join(found) or 'nowhere'}."


def split(results):
    """Warm CPU seconds by stage, and of imports, for each side."""
    lines, imports = [], {}
    for method, rows in pairs(results):
        for row in rows:
            imports.setdefault(row["side"], []).extend([row["imports_cpu_s"]] if "imports_cpu_s" in row else [])
            stages = row.get("stages_cpu_s", {})
            if len(stages) > 1:
                told = ", ".join(f"{name} {seconds(value)}" for name, value in stages.items())
                lines.append(f"* {method.title}, {row['side']}: {told}")
    told = ", ".join(f"{side} {sorted(each)[len(each) // 2]:.1f}" for side, each in imports.items() if each)
    return [*lines, f"* CPU seconds of a side's imports, in neither column: {told}"]


def about(results):
    """The header in lines."""
    head, lines = results["header"], []
    before, after = head["load"]["before"], head["load"]["after"]
    if before > BUSY:
        lines.append(f"**The machine was not idle: load {before:.2f} at the start.**")
    lines.append(f"{head['date']}; {head['machine']}.  Threads: {head['threads']}.")
    lines.append(f"Load average of a minute {before:.2f} before and {after:.2f} after.")
    if head["quick"]:
        lines.append("A quick look at problems smaller than told below, with one warm run each.")
    for side, found in head["versions"].items():
        lines.append(f"{side}: {', '.join(f'{name} {version}' for name, version in found.items())}.")
    return lines + [f"`{name}`: {told}." for name, told in head["problems"].items()]


def markdown(results, chart):
    """The whole report."""
    failed = sum("failed" in row for row in results["rows"])
    parts = ["# influence_jax beside pyDVL and kronfluence", "\n".join(f"* {line}" for line in about(results))]
    parts += [f"**{failed} rows failed.**"] if failed else []
    parts += [f"![chart]({chart})", table(results), NOTES, *means(results)]
    parts += ["Where a peer needs less, and by what factor:", "\n".join(behind(results))]
    parts += ["Warm CPU seconds by stage:", "\n".join(split(results))]
    return "\n\n".join(parts) + "\n"
