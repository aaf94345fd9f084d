"""Run by torchrun for test_distributed.py: trains the example's network in all processes together, with each wrapper
and optimizer, and writes the weights to the file it is given."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import distributed
from image_classification import CNN

import fastnn.nn as nn
import fastnn.optim
from benchmarks.harness import native_calls

WRAPPERS = ("ddp", "fsdp")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
}
STEPS = 4


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (4,), generator=generator)


def build(optimizer: str, wrapper: str | None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = CNN(8, 5).double()
    if wrapper is not None:
        model = distributed.parallel(model, fsdp=wrapper == "fsdp")
    return model, getattr(fastnn.optim, optimizer)(model.parameters(), **OPTIMIZERS[optimizer])


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, ranks: int = 1
) -> None:
    for step in steps:
        images, labels = (t[rank::ranks] for t in batch(step))
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(images), labels).backward()
        optimizer.step()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def main(file: str) -> None:
    dist.init_process_group("gloo")
    found = {}
    for wrapper in WRAPPERS:
        for name in OPTIMIZERS:
            whole = build(name, wrapper)
            with native_calls() as native:
                train(*whole, range(STEPS // 2), dist.get_rank(), dist.get_world_size())
            folder = [tempfile.mkdtemp()]
            dist.broadcast_object_list(folder)
            dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*whole), strict=True)), checkpoint_id=folder[0])
            train(*whole, range(STEPS // 2, STEPS), dist.get_rank(), dist.get_world_size())

            resumed = build(name, wrapper)
            state = dict(zip(("model", "optimizer"), get_state_dict(*resumed), strict=True))
            dcp.load(state, checkpoint_id=folder[0])
            set_state_dict(*resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            train(*resumed, range(STEPS // 2, STEPS), dist.get_rank(), dist.get_world_size())
            found[wrapper, name] = {"whole": weights(whole[0]), "resumed": weights(resumed[0]), "native": native}
    if dist.get_rank() == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
