"""K-FAC and EK-FAC scores from each layer's inputs and output gradients, in float64 NumPy: nothing of the libraries.

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


def eigenvalues(kind, a, s, in_values, in_basis, out_values, out_basis):
    """The curvature's diagonal in the Kronecker eigenbasis, products of eigenvalues or corrected ones."""
    if kind == "kfac":
        return np.outer(out_values, in_values)
    rotated = gradients(a @ in_basis, s @ out_basis)
    return sum(np.sum(part**2, axis=(0, 1)) for part in rotated) / len(a)


def scores(kind, fit, query, train, damping=0.0, relative=0.0):
    """`(Q, N)`, damping absolute or in mean eigenvalues of each layer."""
    total = 0
    for (a, s), (query_a, query_s), (train_a, train_s) in zip(fit, query, train, strict=True):
        inputs, outputs = eigenbasis(a), eigenbasis(s)
        diagonal = eigenvalues(kind, a, s, *inputs, *outputs)
        diagonal = diagonal + damping + relative * diagonal.mean()
        (_, in_basis), (_, out_basis) = inputs, outputs
        rotated = np.concatenate([part[:, 0] for part in gradients(query_a @ in_basis, query_s @ out_basis)])
        rows = (rotated / diagonal).reshape(len(rotated), -1)
        parts = gradients(train_a @ in_basis, train_s @ out_basis)
        total = total + np.concatenate([rows @ part.reshape(len(part), -1).T for part in parts], axis=1)
    return total
