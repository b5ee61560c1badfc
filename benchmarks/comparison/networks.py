"""The peers' networks in torch, with the weights of a problem."""

import itertools

import torch
from torch.nn import functional as F

from . import arrays

torch.set_num_threads(1)


def fill(layer, problem, **sources):
    """The layer with its parameters from the arrays named; kernels are the other way round there."""
    for name, source in sources.items():
        value = torch.tensor(problem[source])
        getattr(layer, name).data = value.T.contiguous() if "kernel" in source else value
    return layer


def digits(problem):
    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(problem["sizes"].tolist())):
        linear = fill(torch.nn.Linear(fan_in, fan_out), problem, weight=f"kernel{i}", bias=f"bias{i}")
        layers += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def part(problem, name):
    """A layer of the transformer, its kind and size told by its arrays."""
    if f"{name}.embedding" in problem:
        return fill(torch.nn.Embedding(*problem[f"{name}.embedding"].shape), problem, weight=f"{name}.embedding")
    if f"{name}.scale" in problem:
        norm = torch.nn.LayerNorm(problem[f"{name}.scale"].shape[0], eps=float(problem["epsilon"]))
        return fill(norm, problem, weight=f"{name}.scale", bias=f"{name}.bias")
    linear = torch.nn.Linear(*problem[f"{name}.kernel"].shape)
    return fill(linear, problem, weight=f"{name}.kernel", bias=f"{name}.bias")


class Block(torch.nn.Module):
    def __init__(self, problem, name):
        super().__init__()
        self.heads = int(problem["heads"])
        for layer in ("norm1", "q", "k", "v", "o", "norm2", "up", "down"):
            self.add_module(layer, part(problem, f"{name}_{layer}"))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        normed = self.norm1(x)
        q, k, v = (self.split(layer(normed)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.tokens, self.positions = part(problem, "tokens"), part(problem, "positions")
        self.blocks = torch.nn.Sequential(*(Block(problem, f"block{i}") for i in range(problem["blocks"])))
        self.norm, self.head = part(problem, "norm"), part(problem, "head")

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions.weight)))


def load(problem):
    """The network, and inputs and labels of training data and queries."""
    model = (Transformer if "heads" in problem else digits)(problem).eval()
    data = [torch.tensor(problem[name]) for name in ("x", "y", "query_x", "query_y")]
    data[1], data[3] = data[1].long(), data[3].long()
    with torch.no_grad():
        arrays.check(model(data[2]).numpy(), problem)
    return model, data
