"""Trains a small convolutional network to classify images.

A normal PyTorch script: the two fastnn imports below are all that is special about it. Without --data it trains on the
handwritten digits that come with scikit-learn; --data DIR reads DIR/train/<class>/* and DIR/test/<class>/*.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import fastnn.nn as nn
import fastnn.optim as optim

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# ---- data ------------------------------------------------------------------------------------------------------------


class DataError(Exception):
    """The data cannot be used; the message names the file or folder."""


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    """A normalised (3, size, size) float tensor of any image."""
    pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    return (torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 255 - MEAN) / STD


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """scikit-learn's 1797 handwritten digits, four fifths of them for training."""

    def __init__(self, split: str, size: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        halves = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        self.images, self.labels = halves[0::2] if split == "train" else halves[1::2]
        self.classes = [str(name) for name in digits.target_names]
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray((self.images[index] * (255 / 16)).astype(np.uint8))
        return to_tensor(image, self.size), int(self.labels[index])


class ImageFolder(Dataset[tuple[torch.Tensor, int]]):
    """The images of ``root/<class>/*``, in every format that Pillow reads; other files are passed over."""

    def __init__(self, root: Path, size: int) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        if not folders:
            raise DataError(f"{root}: no class folders in it")
        extensions = Image.registered_extensions()
        self.classes = [folder.name for folder in folders]
        self.size = size
        self.samples: list[tuple[Path, int]] = []
        for label, folder in enumerate(folders):
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in extensions)
            if not files:
                raise DataError(f"{folder}: no images in it")
            self.samples += [(file, label) for file in files]
        for file, _ in tqdm(self.samples, desc=f"checking {root}", unit=" images", leave=False, disable=None):
            self.open(file).close()

    @staticmethod
    def open(file: Path) -> Image.Image:
        """The image, decoded in full: a truncated one shows only then."""
        try:
            image = Image.open(file)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not a readable image ({error})") from error
        return image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.samples[index]
        return to_tensor(self.open(file), self.size), label


def load_data(data: Path | None, size: int) -> tuple[Any, Any]:
    """The training and the test set."""
    if data is None:
        return Digits("train", size), Digits("test", size)
    if not data.is_dir():
        raise DataError(f"{data}: no such folder")
    train_set, test_set = ImageFolder(data / "train", size), ImageFolder(data / "test", size)
    for name in sorted(set(train_set.classes) ^ set(test_set.classes)):
        here, there = ("train", "test") if name in train_set.classes else ("test", "train")
        raise DataError(f"{data / here / name}: class {name!r} is not in {data / there}")
    return train_set, test_set


# ---- model -----------------------------------------------------------------------------------------------------------


class CNN(nn.Module):
    def __init__(self, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


# ---- training and testing --------------------------------------------------------------------------------------------


@dataclass
class History:
    """The loss and the seconds (forward, backward and update) of every training step so far, and the test accuracy."""

    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def train(
    model: nn.Module, loader: Any, criterion: nn.Module, optimizer: optim.Optimizer, device: str, title: str
) -> History:
    model.train()
    history = History()
    with tqdm(total=len(loader.dataset), desc=title, unit=" images") as bar:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            history.losses.append(loss.item())
            history.step_times.append(time.perf_counter() - start)
            bar.update(len(images))
            bar.set_postfix(loss=f"{history.losses[-1]:.4f}")
    return history


def test(model: nn.Module, loader: Any, device: str) -> float:
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in tqdm(loader, desc="test", unit=" batches"):
            correct += int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
    return correct / len(loader.dataset)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def check_can_save(path: Path) -> None:
    """Said before an epoch is trained for it."""
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DataError(f"{path.parent}: cannot be written to")


def save_checkpoint(path: Path, **state: Any) -> None:
    """Written beside ``path`` and moved there, so that an interruption leaves the old checkpoint."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `save_checkpoint` saved, if it was saved under these settings."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        saved: dict[str, Any] = state["settings"]
    except Exception as error:  # a file of any other content; torch.load raises many kinds
        raise DataError(f"{path}: not a checkpoint of this program ({error})") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            raise DataError(f"{path}: saved with {name} {saved.get(name)}, but this run has {value}")
    return state


# ---- the program -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with train/ and test/, a sub-folder a class (default: digits)"
    )
    parser.add_argument("--image-size", type=int, default=224, help="images are resized to this square (default: 224)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    parser.add_argument("--momentum", type=float, default=0.9, help="of sgd (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="saved here after every epoch, and resumed from if it is there")
    parser.add_argument("--convert", action="store_true", help="run the layers fused, by fastnn.convert(model)")
    args = parser.parse_args(argv)
    for name, least in {"image_size": 4, "epochs": 1, "batch_size": 1, "lr": 0, "momentum": 0}.items():
        if not getattr(args, name) >= least:  # not a number, too
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    if not -(2**63) <= args.seed < 2**64:
        parser.error(f"--seed is {args.seed}, expected a number of 64 bits")
    if not is_here(args.device):
        parser.error(f"--device is {args.device!r}, which torch does not have here")
    return args


def is_here(name: str) -> bool:
    """Whether there is such a device; none is initialised by the question."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    if device.type == "cpu":
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = accelerator is not None and accelerator.type == device.type
    return there and (device.index or 0) < torch.accelerator.device_count()


def run(args: argparse.Namespace) -> History:
    if args.checkpoint is not None:
        check_can_save(args.checkpoint)
    torch.manual_seed(args.seed)
    train_set, test_set = load_data(args.data, args.image_size)
    order = torch.Generator().manual_seed(args.seed)
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, generator=order)
    test_loader = DataLoader(test_set, args.batch_size)

    model = CNN(args.image_size, len(train_set.classes)).to(args.device)
    if args.convert:
        import fastnn

        print(fastnn.convert(model))
    criterion = nn.CrossEntropyLoss()
    optimizer: optim.Optimizer
    if args.optimizer == "adam":
        optimizer = optim.Adam(model.parameters(), lr=args.lr)
    else:
        optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)

    first_epoch = 0
    history = History()
    settings = {
        name: getattr(args, name) for name in ("image_size", "batch_size", "lr", "optimizer", "momentum", "seed")
    }
    settings["classes"] = train_set.classes
    if args.checkpoint is not None and args.checkpoint.exists():
        state = load_checkpoint(args.checkpoint, settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        first_epoch = state["epoch"]
        history = History(state["losses"], state["step_times"])
        print(f"resumed from {args.checkpoint} after epoch {first_epoch}")

    for epoch in range(first_epoch, args.epochs):
        title = f"epoch {epoch + 1}/{args.epochs}"
        part = train(model, train_loader, criterion, optimizer, args.device, title)
        history.losses += part.losses
        history.step_times += part.step_times
        if args.checkpoint is not None:
            save_checkpoint(
                args.checkpoint,
                settings=settings,
                epoch=epoch + 1,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                order=order.get_state(),
                rng=torch.get_rng_state(),
                losses=history.losses,
                step_times=history.step_times,
            )
    history.accuracy = test(model, test_loader, args.device)
    print(f"accuracy on {len(test_set)} test images: {history.accuracy:.1%}")
    return history


def main(argv: list[str] | None = None) -> History:
    try:
        return run(parse_args(argv))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
