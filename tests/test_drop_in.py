"""What other people's code does with modules, done with fastnn's: checkpointing, parametrizations, functional calls."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastnn.nn


def model(nn: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5)).double()


def plainly(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed(model: torch.nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def checkpointed_reentrantly(model: torch.nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=True)


def functionally(model: torch.nn.Module, x: Tensor) -> Tensor:
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    return torch.func.functional_call(model, doubled, (x,))


def weight_normed(model: torch.nn.Module, x: Tensor) -> Tensor:
    parametrizations.weight_norm(model[0])
    return model(x)


def spectral_normed(model: torch.nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    parametrizations.spectral_norm(model[2])
    return model(x)


def hooked(model: torch.nn.Module, x: Tensor) -> Tensor:
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
    return model(x)


USES = [plainly, checkpointed, checkpointed_reentrantly, functionally, weight_normed, spectral_normed, hooked]


@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(backend, use: Callable[[torch.nn.Module, Tensor], Tensor]):
    target = torch.tensor([0, 3])
    found = []
    for nn in (torch.nn, fastnn.nn):
        x = torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6).requires_grad_()
        module = model(nn)
        loss = nn.CrossEntropyLoss()(use(module, x), target)
        loss.backward()
        found.append([loss.detach(), x.grad, *(p.grad for p in module.parameters())])
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_saved_weights_load_both_ways(backend, tmp_path):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours, native = model(fastnn.nn), model(torch.nn)
    for source, target in ((ours, native), (native, ours)):
        for p in source.parameters():
            torch.nn.init.normal_(p)
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        torch.testing.assert_close(target(x), source(x))
