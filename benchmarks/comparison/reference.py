"""Scores by structured curvatures from each layer's inputs and output gradients, in float64 NumPy: nothing of the
libraries.

A layer is a pair `(a, s)`: inputs `(N, T, I)`, a column of ones for the bias included, and gradients of the loss in the
outputs `(N, L, T, O)`, one for each of L labels, times the root of the label's probability.
"""

import numpy as np

CHUNK = 64


def label_gradients(logits, labels, kind):
    """Gradients of the cross entropy in the logits `(N, ..., C)`, an axis of labels after the first.

    `exact` takes the expectation over the model's own labels, `empirical` the labels of the data, and `pseudo` is what
    pyDVL differentiates in place of a loss: the log-probabilities, weighted by the roots of the probabilities.
    """
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    classes = np.eye(p.shape[-1])
    if kind == "exact":
        assert logits.ndim == 2, "the expectation over labels is written for one position"
        return np.sqrt(p)[:, :, None] * (p[:, None] - classes)
    if kind == "empirical":
        return (p - classes[labels])[:, None]
    root = np.sqrt(p)
    return (root - root.sum(-1, keepdims=True) * p)[:, None]


def gradients(a, s):
    """Gradients of a layer's weights `(N, L, O, I)`, a chunk of examples at a time."""
    for i in range(0, len(a), CHUNK):
        yield np.einsum("nlto,nti->nloi", s[i : i + CHUNK], a[i : i + CHUNK], optimize=True)


def eigenbasis(x):
    """Eigenvalues and eigenvectors of the mean of x xᵀ over positions and examples; `(N, ..., T, D)`."""
    rows = x.reshape(-1, x.shape[-1])
    return np.linalg.eigh(rows.T @ rows / (len(x) * x.shape[-2]))


def spectrum(kind, a, s):
    """The curvature's diagonal `(O, I)` in a basis of its own, and the bases of inputs and outputs."""
    if kind in ("identity", "diagonal"):
        in_basis, out_basis = np.eye(a.shape[-1]), np.eye(s.shape[-1])
    else:
        (in_values, in_basis), (out_values, out_basis) = eigenbasis(a), eigenbasis(s)
    if kind == "kfac":
        return np.outer(out_values, in_values), in_basis, out_basis
    if kind == "identity":
        return np.ones((len(out_basis), len(in_basis))), in_basis, out_basis
    rotated = gradients(a @ in_basis, s @ out_basis)
    return sum(np.sum(part**2, axis=(0, 1)) for part in rotated) / len(a), in_basis, out_basis


def rotated(layer, in_basis, out_basis):
    """Gradients of examples, one label each, in the bases: chunks `(n, O·I)`."""
    for part in gradients(layer[0] @ in_basis, layer[1] @ out_basis):
        yield part[:, 0].reshape(len(part), -1)


def scores(kind, fit, query, train, damping=0.0, relative=0.0):
    """`(Q, N)`, damping absolute or in mean eigenvalues of each layer.  The identity has none."""
    total = 0
    for layer, query_layer, train_layer in zip(fit, query, train, strict=True):
        diagonal, *bases = spectrum(kind, *layer)
        if kind != "identity":
            diagonal = diagonal + damping + relative * diagonal.mean()
        rows = np.concatenate(list(rotated(query_layer, *bases))) / diagonal.ravel()
        total = total + np.concatenate([rows @ part.T for part in rotated(train_layer, *bases)], axis=1)
    return total


def self_influence(kind, fit, train, damping):
    """`(N,)`."""
    total = 0
    for layer, train_layer in zip(fit, train, strict=True):
        diagonal, *bases = spectrum(kind, *layer)
        weights = 1 / (diagonal + damping).ravel()
        total = total + np.concatenate([part**2 @ weights for part in rotated(train_layer, *bases)])
    return total
