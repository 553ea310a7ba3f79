"""A small model, and steps that train it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def model():
    """Two layers of ones, 4 x 4 each, without biases."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    return model


@pytest.fixture
def step():
    """Takes one real optimiser step on a model that maps 4 numbers to some."""

    def step(model, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **options)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
