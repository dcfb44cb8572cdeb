"""A small net around a module under test, for engines."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 4


class Net(nn.Module):
    """Embedding, the module under test on [b, t, WIDTH], and a Linear on what comes out, averaged over the tokens."""

    def __init__(self, middle):
        super().__init__()
        self.embed, self.middle, self.out = nn.Embedding(9, WIDTH), middle, nn.Linear(WIDTH, 3)

    def forward(self, input_ids):
        return self.out(torch.tanh(self.middle(self.embed(input_ids))).mean(1))


class Function(nn.Module):
    """A module from a function of itself and x, with the given children and parameters."""

    def __init__(self, forward, **members):
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def batch_of(size, length):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 9, (size, length)), "labels": torch.arange(size) % 3}


def loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def net_of(build):
    torch.manual_seed(0)
    return Net(build()).double()
