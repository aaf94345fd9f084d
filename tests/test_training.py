"""The user's program, whole: the same weights as native in float64, the same loss curve in float32."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.nn
import fastnn.optim

STEPS = 20


def network(nn: ModuleType, image_size: int) -> torch.nn.Module:
    """The user's program's model, for smaller images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class Batches:
    """The same batches for whoever trains on them: a class is a bright square somewhere of its own."""

    def __init__(self, image_size: int, dtype: torch.dtype, batch: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(10, (STEPS, batch), generator=generator)
        self.images = torch.randn(STEPS, batch, 3, image_size, image_size, generator=generator, dtype=torch.float64)
        side = image_size // 5
        for images, labels in zip(self.images, self.labels, strict=True):
            for image, label in zip(images, labels.tolist(), strict=True):
                row, column = divmod(label, 5)
                image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 2
        self.images = self.images.to(dtype)


def train(model: torch.nn.Module, nn: ModuleType, optim: ModuleType, batches: Batches, optimizer: str) -> list[float]:
    """The loss of every step."""
    criterion = nn.CrossEntropyLoss()
    arguments = {"lr": 1e-3} if optimizer == "Adam" else {"lr": 0.01, "momentum": 0.9}
    opt = getattr(optim, optimizer)(model.parameters(), **arguments)
    losses = []
    for images, labels in zip(batches.images, batches.labels, strict=True):
        opt.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def trained(batches: Batches, optimizer: str, converted: bool) -> list[tuple[list[float], list[Tensor]]]:
    """(losses, final weights) of native and of fastnn, from the same initial weights."""
    image_size, dtype = batches.images.shape[-1], batches.images.dtype
    native = network(torch.nn, image_size).to(dtype)
    ours = network(fastnn.nn, image_size).to(dtype)
    ours.load_state_dict(copy.deepcopy(native.state_dict()))
    if converted:
        fastnn.convert(ours)
    runs = []
    for model, nn, optim in ((native, torch.nn, torch.optim), (ours, fastnn.nn, fastnn.optim)):
        losses = train(model, nn, optim, batches, optimizer)
        runs.append((losses, [p.detach() for p in model.parameters()]))
    return runs


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_weights_in_float64(backend, optimizer, converted):
    (exact_losses, exact), (losses, weights) = trained(Batches(32, torch.float64), optimizer, converted)
    assert exact_losses[-1] < 0.9 * exact_losses[0]  # it does learn
    torch.testing.assert_close(losses, exact_losses, rtol=0, atol=1e-10)
    for w, e in zip(weights, exact, strict=True):
        assert (w - e).abs().max() <= 1e-10


@pytest.mark.parametrize(("optimizer", "image_size"), [("Adam", 32), ("SGD", 32), ("Adam", 64)])
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_loss_curve_in_float32(backend, optimizer, converted, image_size):
    # At a batch of 8, one rounding that takes a ReLU across zero is enough for Adam to part two float32 curves by 5e-3:
    # native's own, in NCHW and in channels_last, too.
    (exact, _), (losses, _) = trained(Batches(image_size, torch.float32, batch=32), optimizer, converted)
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_channels_last(backend, converted):
    """The program after model.to(memory_format=torch.channels_last), as native users are told to write it."""
    batches = Batches(32, torch.float64)
    native = network(torch.nn, 32).double()
    ours = network(fastnn.nn, 32).double().to(memory_format=torch.channels_last)
    ours.load_state_dict(native.state_dict())
    if converted:
        fastnn.convert(ours)
    exact = train(native, torch.nn, torch.optim, batches, "Adam")
    torch.testing.assert_close(train(ours, fastnn.nn, fastnn.optim, batches, "Adam"), exact, rtol=0, atol=1e-10)
