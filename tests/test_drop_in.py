"""What other people's code does with modules, done with fastnn's: checkpointing, parametrizations, hooks, functional
calls, copies and saved weights."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from reference import mostly_big
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastnn.nn


def model(nn: ModuleType, fused: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    if not fused:
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    elif nn is fastnn.nn:
        layers = [nn.ConvReLU2d(3, 4, 3), nn.Identity(), nn.ConvReLUMaxPool2d(4, 4, 3, padding=1)]
    else:  # what these two compute, in the same places
        layers = [
            Together(nn.Conv2d(3, 4, 3), nn.ReLU()),
            nn.Identity(),
            Together(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).double()


class Together(torch.nn.Module):
    """A convolution and what follows it as one module, with the convolution's parameters for its own."""

    def __init__(self, conv: torch.nn.Conv2d, *after: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = conv.padding
        self.after = torch.nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding))


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


def weight_normed_as_before_parametrizations(model: torch.nn.Module, x: Tensor) -> Tensor:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model[0])
    return model(x)


class Symmetric(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.transpose(-1, -2)


def parametrized(model: torch.nn.Module, x: Tensor) -> Tensor:
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    with parametrize.cached():
        return model(x)


def spectral_normed(model: torch.nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    parametrizations.spectral_norm(model[2])
    return model(x)


def hooked(model: torch.nn.Module, x: Tensor) -> Tensor:
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
    model[1].register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0] * 0.5,))
    return model(x)


def hooked_at_its_tensors(model: torch.nn.Module, x: Tensor) -> Tensor:
    model[0].weight.register_hook(lambda grad: grad * 2)
    first = model[0](x)
    first.register_hook(lambda grad: grad + 1)
    return model[1:](first)


def copied(model: torch.nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model)(x)


def pickled(model: torch.nn.Module, x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(model))(x)


def pruned(model: torch.nn.Module, x: Tensor) -> Tensor:
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model(x)


def made_without_memory(model: torch.nn.Module, x: Tensor) -> Tensor:
    weights = model.state_dict()
    model.to("meta").load_state_dict(weights, assign=True)
    return model(x)


def frozen_in_part(model: torch.nn.Module, x: Tensor) -> Tensor:
    model[0].requires_grad_(False)
    return model(x)


def averaged(model: torch.nn.Module, x: Tensor) -> Tensor:
    average = AveragedModel(model)
    average.update_parameters(model)
    return model(x) + average(x)


USES = [
    plainly,
    checkpointed,
    checkpointed_reentrantly,
    functionally,
    weight_normed,
    weight_normed_as_before_parametrizations,
    parametrized,
    spectral_normed,
    hooked,
    hooked_at_its_tensors,
    copied,
    pickled,
    pruned,
    made_without_memory,
    frozen_in_part,
    averaged,
]


@pytest.mark.one_tier
@pytest.mark.parametrize("fused", mostly_big([False, True], 1), ids=["layers", "fused"])
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(backend, use: Callable[[torch.nn.Module, Tensor], Tensor], fused: bool):
    target = torch.tensor([0, 3])
    found = []
    for nn in (torch.nn, fastnn.nn):
        x = torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6).requires_grad_()
        module = model(nn, fused)
        loss = nn.CrossEntropyLoss()(use(module, x), target)
        loss.backward()
        found.append([loss.detach(), x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*reversed(found), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_on_relu_in_place_raises_as_in_torch(backend, hook: str):
    errors = []
    for nn in (torch.nn, fastnn.nn):
        module = model(nn)
        getattr(module[3], hook)(lambda *args: None)
        with pytest.raises(RuntimeError, match="is being modified inplace") as error:
            module(torch.ones(2, 3, 6, 6, dtype=torch.float64))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_saved_weights_load_both_ways(backend, tmp_path):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours, native = model(fastnn.nn), model(torch.nn)
    for source, target in ((ours, native), (native, ours)):
        for p in source.parameters():
            torch.nn.init.normal_(p)
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        torch.testing.assert_close(target(x), source(x))


@pytest.mark.one_tier
@pytest.mark.parametrize("fused", mostly_big([False, True], 1), ids=["layers", "fused"])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_counted_as_torchs(backend, frozen: bool, fused: bool):
    counts = []
    for nn in (torch.nn, fastnn.nn):
        module = model(nn, fused)
        module[0].requires_grad_(not frozen)
        x = torch.ones(2, 3, 6, 6, dtype=torch.float64, requires_grad=not frozen)
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "fastnn"])
def test_flops_are_counted_whichever_is_imported_first(first: str):
    code = f"""
import {first}
import fastnn.nn.functional as F, torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    F.conv2d(torch.ones(4, 3, 30, 30), torch.ones(8, 3, 3, 3), stride=2, padding="valid")
assert counter.get_total_flops() == 2 * 4 * 8 * 14 * 14 * 27, counter.get_total_flops()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.expects_native
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_a_trace_computes_from_its_own_input(backend, recorded: bool, fused: bool):
    """torch.jit.trace records what the dispatcher sees; a result it does not see would be a constant of the trace."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours = model(fastnn.nn, fused)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(3 * x), model(torch.nn, fused)(3 * x))
