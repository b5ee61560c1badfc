"""Which methods are compared, on what, with which functions of each side.  Imports nothing of any side."""

from dataclasses import dataclass, field

OURS, PYDVL, KRONFLUENCE = "influence_jax", "pyDVL", "kronfluence"
MODULES = {OURS: "ours", PYDVL: "with_pydvl", KRONFLUENCE: "with_kronfluence"}
PROBLEMS = {
    "digits": "network 64-128-64-10 on digits, 1500 training examples, 50 queries, damping 0.01",
    "small": "network 64-24-10 on digits, 1500 training examples, 50 queries, damping 0.01",
    "transformer": "two blocks of width 64, 64 tokens of a vocabulary of 256, 512 training sequences, 16 queries; "
    "damping a tenth of each layer's mean eigenvalue, embeddings and normalisations fixed",
}
ACCURATE = 1e-3  # the relative error that solvers with a tolerance have to reach


@dataclass(frozen=True)
class Side:
    """A function of a side's module, its options, the settings tried, and the exact answer if not the method's."""

    function: str
    options: dict = field(default_factory=dict)
    tries: tuple = ({},)
    answer: str | None = None


@dataclass(frozen=True)
class Method:
    """A computation that we and at least one peer have.

    Where errors have to be `within` something, settings are tried in turn until one is; else the fastest counts.
    """

    name: str
    title: str
    problem: str
    answer: str
    sides: dict[str, Side]
    within: float | None = None
    gauss_newton: bool = False  # whether scores are held against those of the Gauss-Newton matrix, too


def batches(*sizes, **common):
    return tuple(common | {"batch_size": size} for size in sizes)


def tolerances(*values, **common):
    return tuple(common | {"rtol": value} for value in values)


def solver(name, title, ours, theirs, problem="digits", answer="factors", within=None):
    """Factors of the queries by a solver: its name there and here, and the settings of each."""
    (our_solver, our_tries), (their_model, their_tries) = ours, theirs
    curvature = "EmpiricalFisher" if answer == "harmonic" else "Hessian"
    sides = {
        OURS: Side("factors", {"solver": our_solver, "curvature": curvature}, our_tries),
        PYDVL: Side("factors", {"model": their_model}, their_tries),
    }
    return Method(name, title, problem, answer, sides, within)


# A tolerance of pyDVL's is squared, so that looser ones are tried.
TIGHT = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
LOOSE = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
SERIES = {"scale": 30.0, "rtol": 1e-12}
SOLVERS = [
    solver("direct", "Direct", ("Direct", ({},)), ("DirectInfluence", batches(1500, 250)), "small"),
    solver(
        "cg",
        "CG",
        ("CG", tolerances(*TIGHT)),
        ("CgInfluence", tolerances(*LOOSE, batch_size=1500, precompute_grad=True)),
        within=ACCURATE,
    ),
    solver(
        "block_cg",
        "block CG",
        ("BlockCG", tolerances(*TIGHT)),
        ("CgInfluence", tolerances(*LOOSE, batch_size=1500, solve_simultaneously=True)),
        within=ACCURATE,
    ),
    solver(
        "lissa",
        "LiSSA, 100 steps",
        ("LiSSA", (SERIES | {"depth": 100},)),
        ("LissaInfluence", batches(1500, maxiter=100, **SERIES)),
    ),
    solver(
        "lissa_minibatch",
        "LiSSA, 1000 minibatches of 50",
        ("LiSSA", (SERIES | {"depth": 1000, "batch_size": 50},)),
        ("LissaInfluence", batches(50, maxiter=1000, **SERIES)),
    ),
    solver(
        "arnoldi",
        "Arnoldi, rank 20",
        ("Arnoldi", ({"rank": 20},)),
        ("ArnoldiInfluence", batches(1500, rank=20, use_woodbury=True)),
    ),
    solver(
        "nystrom",
        "Nyström, rank 20",
        ("Nystrom", ({"rank": 20},)),
        ("NystroemSketchInfluence", batches(1500, rank=20)),
    ),
    solver(
        "harmonic",
        "harmonic mean",
        ("HarmonicMean", ({},)),
        ("InverseHarmonicMeanInfluence", batches(1500, 250, 50)),
        answer="harmonic",
    ),
]

PLAIN = batches(250, 50, plain=True)  # torch.func without pyDVL
PARTS = [
    Method(
        "gradients",
        "gradients by plain vmap, both",
        "digits",
        "grads",
        {OURS: Side("gradients"), PYDVL: Side("gradients", {}, PLAIN + batches(50))},
    ),
    Method(
        "from_factors",
        "scores from given factors",
        "digits",
        "scores",
        {
            OURS: Side("from_factors", {"mode": "up"}),
            PYDVL: Side("from_factors", {"mode": "up"}, batches(1500, 250, 50)),
        },
    ),
    Method(
        "perturbation",
        "perturbation from given factors",
        "digits",
        "perturbation",
        {
            OURS: Side("from_factors", {"mode": "perturbation"}),
            PYDVL: Side("from_factors", {"mode": "perturbation"}, batches(50)),
        },
    ),
]

# kronfluence's batches for the fit and for the scores.
PAIRS = tuple({"fit_batch": fit, "score_batch": 250} for fit in (50, 250, 1500))
# pyDVL's gradients of n examples cost n² backward passes of one: of 1500 at once, 20 times those of 50 at a time.
SMALL = tuple({"fit_batch": fit, "score_batch": 50} for fit in (1500, 250))


def scores(name, title, kind, labels, peer, their_labels, tries, problem="digits"):
    """Scores by a structured curvature, fit included, with our labels and theirs."""
    function = {"labels": labels, "kind": kind}
    # Drawn labels are held against the expectation over them.
    answers = [f"{kind}_{'exact' if each == 'sampled' else each}" for each in (labels, their_labels)]
    sides = {
        OURS: Side("scores", function, answer=answers[0]),
        peer: Side("scores", function | {"labels": their_labels}, tries, answers[1]),
    }
    return Method(name, title, problem, answers[0], sides, gauss_newton=problem == "digits")


def kronecker(kind, title):
    return [
        scores(f"{kind}_data", f"{title}, labels of the data", kind, "empirical", KRONFLUENCE, "empirical", PAIRS),
        scores(f"{kind}_sampled", f"{title}, sampled labels", kind, "sampled", KRONFLUENCE, "sampled", PAIRS),
        scores(f"{kind}_model", f"{title}, labels of the model", kind, "exact", PYDVL, "pseudo", SMALL),
    ]


SELF = {"kind": "ekfac", "labels": "empirical"}
STRUCTURED = [
    scores("dot", "gradient dot product", "identity", "empirical", KRONFLUENCE, "empirical", PAIRS[1:]),
    scores("diagonal", "diagonal Fisher", "diagonal", "empirical", KRONFLUENCE, "empirical", PAIRS),
    *kronecker("kfac", "K-FAC"),
    *kronecker("ekfac", "EK-FAC"),
    Method(
        "self_influence",
        "self-influence, EK-FAC",
        "digits",
        "self_influence",
        {OURS: Side("self_influence", SELF), KRONFLUENCE: Side("self_influence", SELF, PAIRS[:2])},
    ),
    scores(
        "transformer",
        "EK-FAC of a transformer",
        "ekfac",
        "empirical",
        KRONFLUENCE,
        "empirical",
        tuple({"fit_batch": size, "score_batch": size} for size in (64, 256)),
        "transformer",
    ),
]

METHODS = {method.name: method for method in [*PARTS, *SOLVERS, *STRUCTURED]}
# Every function of every side, at least once.
QUICK = ("gradients", "perturbation", "block_cg", "harmonic", "ekfac_data", "ekfac_model", "self_influence")
