"""The user's program, whole: the same weights as native in float64, the same loss curve in float32."""

from __future__ import annotations

import copy
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastnn
from examples.compare import load_program

for module in ("tqdm", "PIL"):  # what the program needs
    pytest.importorskip(module)
PROGRAM, NATIVE = load_program(native=False), load_program(native=True)
STEPS = 20


def batches(image_size: int, dtype: torch.dtype, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    """The same batches for whoever trains on them, wherever: a class is a bright square somewhere of its own."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (STEPS * batch,), generator=generator)
    images = torch.randn(len(labels), 3, image_size, image_size, generator=generator, dtype=torch.float64)
    side = image_size // 5
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 2
    return DataLoader(TensorDataset(images.to(dtype), labels), batch)


def train(program: ModuleType, model: torch.nn.Module, loader: DataLoader, optimizer: str) -> list[float]:
    """The loss of every step, on the default device."""
    arguments = {"lr": 1e-3} if optimizer == "Adam" else {"lr": 0.01, "momentum": 0.9}
    opt = getattr(program.optim, optimizer)(model.parameters(), **arguments)
    device = str(torch.get_default_device())
    return program.train(model, loader, program.nn.CrossEntropyLoss(), opt, device, "training").losses


@cache
def native(
    image_size: int, dtype: torch.dtype, batch: int, optimizer: str
) -> tuple[dict[str, Tensor], list[float], list[Tensor]]:
    """Native's initial weights, losses and final weights: trained once for all that are compared with it."""
    torch.manual_seed(0)
    model = NATIVE.CNN(image_size, 10).to(dtype)
    initial = copy.deepcopy(model.state_dict())
    losses = train(NATIVE, model, batches(image_size, dtype, batch), optimizer)
    return initial, losses, [p.detach() for p in model.parameters()]


def trained(
    image_size: int, dtype: torch.dtype, batch: int, optimizer: str, converted: bool, **to: Any
) -> list[tuple[list[float], list[Tensor]]]:
    """(losses, final weights) of native on the CPU and of fastnn, from the same initial weights."""
    with torch.device("cpu"):
        initial, *exact = native(image_size, dtype, batch, optimizer)
        loader = batches(image_size, dtype, batch)
    model = PROGRAM.CNN(image_size, 10).to(dtype=dtype, **to)
    model.load_state_dict(initial)
    if converted:
        fastnn.convert(model)
    losses = train(PROGRAM, model, loader, optimizer)
    return [tuple(exact), (losses, [p.detach().cpu() for p in model.parameters()])]


@pytest.mark.big
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_weights_in_float64(backend, optimizer, converted):
    (exact_losses, exact), (losses, weights) = trained(32, torch.float64, 8, optimizer, converted)
    assert exact_losses[-1] < 0.9 * exact_losses[0]  # it does learn
    torch.testing.assert_close(losses, exact_losses, rtol=0, atol=1e-10)
    for w, e in zip(weights, exact, strict=True):
        assert (w - e).abs().max() <= 1e-10


@pytest.mark.big
@pytest.mark.parametrize(("optimizer", "image_size"), [("Adam", 32), ("SGD", 32), ("Adam", 64)])
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_loss_curve_in_float32(backend, optimizer, converted, image_size):
    # At a batch of 8, one rounding that takes a ReLU across zero is enough for Adam to part two float32 curves by 5e-3:
    # native's own, in NCHW and in channels_last, too.
    (exact, _), (losses, _) = trained(image_size, torch.float32, 32, optimizer, converted)
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-3)


@pytest.mark.big
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_channels_last(backend, converted):
    """The program after model.to(memory_format=torch.channels_last), as native users are told to write it."""
    to = {"memory_format": torch.channels_last}
    (exact, _), (losses, _) = trained(32, torch.float64, 8, "Adam", converted, **to)
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-10)
