"""The example's network trained by two processes, under DistributedDataParallel and sharded by FSDP2: the same weights
as one process gives, and a distributed checkpoint from which training goes on exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("PIL")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
import distributed_worker as worker
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import fastnn.optim
from benchmarks.harness import native_calls

ROOT = Path(__file__).parents[1]


# What a program of torch's alone, sharded by FSDP2, ends with once in ten times where the cores are busy: a thread of
# gloo's lets go of its last tensor while Python shuts down, and Python before 3.14 ends the thread for it.
TORCHS_OWN_ABORT = "terminate called without an active exception"


def torchrun(*command: str) -> str:
    """Two processes of one thread; what they print."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
        if TORCHS_OWN_ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("distributed") / "weights.pt"
    torchrun(str(ROOT / "tests" / "distributed_worker.py"), str(file))
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("wrapper", worker.WRAPPERS)
@pytest.mark.parametrize("optimizer", worker.OPTIMIZERS)
def test_two_processes_give_the_weights_of_one(trained: Any, wrapper: str, optimizer: str) -> None:
    alone = worker.build(optimizer, None)
    worker.train(*alone, range(worker.STEPS))
    found = trained[wrapper, optimizer]
    torch.testing.assert_close(found["whole"], dict(alone[0].state_dict()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)
    assert not [message for message in found["native"] if message.startswith(("adam", "sgd"))]


S0, S1, R = Shard(0), Shard(1), Replicate()
LAYOUTS = {
    "sharded": ([(S0, S0), (S1, S1)], True),
    "replicated": ([(R, R)], True),
    "one not distributed": ([(S0, S0), (None, None)], True),
    "gradient laid out otherwise": ([(S0, R)], False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", worker.OPTIMIZERS)
def test_distributed_tensors(mesh: Any, optimizer: str, layout: str) -> None:
    """native torch's step and types of state; by the kernels where what belongs to a parameter is laid out as it is."""

    def placed(tensor: Tensor, placement: Placement | None) -> Tensor:
        return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])

    placements, by_kernels = LAYOUTS[layout]
    found = []
    for module in (torch.optim, fastnn.optim):
        torch.manual_seed(0)
        params = [nn.Parameter(placed(torch.randn(4, 3, dtype=torch.float64), of_param)) for of_param, _ in placements]
        stepped = getattr(module, optimizer)(params, **worker.OPTIMIZERS[optimizer])
        with native_calls() as native:
            for _ in range(3):
                for p, (_, of_grad) in zip(params, placements, strict=True):
                    p.grad = placed(getattr(p.detach(), "full_tensor", p.detach)().cos(), of_grad)
                stepped.step()
        found.append((params, stepped.state_dict()["state"]))
        assert all(p._version > 0 for p in params)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    states = [{key: type(value) for i in state for key, value in state[i].items()} for _, state in found]
    assert states[0] == states[1]
    assert bool(native) != by_kernels


@pytest.mark.parametrize("how", [[], ["--fsdp", "--convert"]], ids=["DistributedDataParallel", "fully_shard, convert"])
def test_example(how: list[str]) -> None:
    pytest.importorskip("sklearn")
    options = ["--device=cpu", "--image-size=8", "--epochs=1", *how]
    assert "accuracy on 360 test images" in torchrun(str(ROOT / "examples" / "distributed.py"), *options)
