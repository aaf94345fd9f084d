"""The user's program, whole: the same weights as native in float64, the same loss curve in float32."""

from __future__ import annotations

from types import ModuleType

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


def batches(image_size: int, dtype: torch.dtype, batch: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """The same batches for whoever trains on them: a class is a bright square somewhere of its own."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (STEPS * batch,), generator=generator)
    images = torch.randn(len(labels), 3, image_size, image_size, generator=generator, dtype=torch.float64)
    side = image_size // 5
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 2
    return DataLoader(TensorDataset(images.to(dtype), labels), batch)


def train(program: ModuleType, model: torch.nn.Module, loader: DataLoader, optimizer: str) -> list[float]:
    """The loss of every step."""
    arguments = {"lr": 1e-3} if optimizer == "Adam" else {"lr": 0.01, "momentum": 0.9}
    opt = getattr(program.optim, optimizer)(model.parameters(), **arguments)
    return program.train(model, loader, program.nn.CrossEntropyLoss(), opt, "cpu", "training").losses


def trained(loader: DataLoader, optimizer: str, converted: bool) -> list[tuple[list[float], list[Tensor]]]:
    """(losses, final weights) of native and of fastnn, from the same initial weights."""
    images = loader.dataset.tensors[0]
    native, ours = (program.CNN(images.shape[-1], 10).to(images.dtype) for program in (NATIVE, PROGRAM))
    ours.load_state_dict(native.state_dict())
    if converted:
        fastnn.convert(ours)
    runs = []
    for program, model in ((NATIVE, native), (PROGRAM, ours)):
        losses = train(program, model, loader, optimizer)
        runs.append((losses, [p.detach() for p in model.parameters()]))
    return runs


@pytest.mark.big
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_weights_in_float64(backend, optimizer, converted):
    (exact_losses, exact), (losses, weights) = trained(batches(32, torch.float64), optimizer, converted)
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
    (exact, _), (losses, _) = trained(batches(image_size, torch.float32, batch=32), optimizer, converted)
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-3)


@pytest.mark.big
@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_channels_last(backend, converted):
    """The program after model.to(memory_format=torch.channels_last), as native users are told to write it."""
    loader = batches(32, torch.float64)
    native = NATIVE.CNN(32, 10).double()
    ours = PROGRAM.CNN(32, 10).double().to(memory_format=torch.channels_last)
    ours.load_state_dict(native.state_dict())
    if converted:
        fastnn.convert(ours)
    exact = train(NATIVE, native, loader, "Adam")
    torch.testing.assert_close(train(PROGRAM, ours, loader, "Adam"), exact, rtol=0, atol=1e-10)
