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

ROOT = Path(__file__).parents[1]


def torchrun(*command: str) -> str:
    """Two processes of one thread; what they print."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
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


@pytest.mark.parametrize("how", [[], ["--fsdp", "--convert"]], ids=["DistributedDataParallel", "fully_shard, convert"])
def test_example(how: list[str]) -> None:
    pytest.importorskip("sklearn")
    options = ["--device=cpu", "--image-size=8", "--epochs=1", *how]
    assert "accuracy on 360 test images" in torchrun(str(ROOT / "examples" / "distributed.py"), *options)
