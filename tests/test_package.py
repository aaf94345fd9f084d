"""The package as a whole: what importing it does and exports, and that a wheel of it works."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_wheel import audit, run, try_out

import fastnn
import fastnn.nn
import fastnn.nn.functional
import fastnn.optim

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_import_is_silent_and_light():
    done = python(
        "import sys, torch\n"
        "torchs_own = set(sys.modules)\n"
        "import fastnn, fastnn.nn, fastnn.optim\n"
        "heavy = {'triton', 'matplotlib', 'PIL', 'sklearn', 'tqdm', 'scipy', 'torch._dynamo'}\n"
        "assert not heavy & (set(sys.modules) - torchs_own), heavy & set(sys.modules)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_is_typed():
    assert (Path(fastnn.__file__).parent / "py.typed").exists()


def test_version():
    try:
        installed = importlib.metadata.version("fastnn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastnn is built in place, not installed: it has no metadata")
    assert fastnn.__version__ == installed


@pytest.mark.parametrize(
    ("ours", "native"),
    [
        (fastnn.nn, torch.nn),
        (fastnn.nn.functional, torch.nn.functional),
        (fastnn.optim, torch.optim),
    ],
    ids=["nn", "nn.functional", "optim"],
)
def test_exports_all_that_torch_does(ours, native):
    names = [name for name in dir(native) if not name.startswith("_")]
    assert len(names) > 10
    assert [name for name in names if not hasattr(ours, name)] == []
    for name in names:
        theirs = getattr(native, name)
        if isinstance(theirs, type):
            assert issubclass(getattr(ours, name), theirs), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ours.no_such_name


def test_type_checkers_see_all_that_torch_has(tmp_path):
    """mypy knows each name of torch's here too, and flags a misspelt one."""
    pytest.importorskip("mypy")
    modules = {"nn": torch.nn, "nn.functional": torch.nn.functional, "optim": torch.optim}
    names = [
        (module, name) for module, native in modules.items() for name in dir(native) if not name.startswith("_")
    ] + [("nn", "Liner"), ("nn.functional", "rellu"), ("optim", "Adma")]
    for package in ("torch", "fastnn"):
        imports = "; ".join(f"import {package}.{module}" for module in modules)
        lines = [imports, *(f"{package}.{module}.{name}" for module, name in names)]
        (tmp_path / f"{package}_names.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", str(tmp_path)],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    unknown: dict[str, set[tuple[str, str]]] = {"torch": set(), "fastnn": set()}
    for line in done.stdout.splitlines():
        if found := re.match(r"(?:.*/)?(\w+)_names\.py:(\d+): error", line):
            unknown[found[1]].add(names[int(found[2]) - 2])
    assert {("nn", "Liner"), ("nn.functional", "rellu"), ("optim", "Adma")} <= unknown["fastnn"] <= unknown["torch"]


def test_type_checkers_see_what_is_replaced(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(
        "import torch\n"
        "import fastnn.nn as nn\n"
        "import fastnn.nn.functional as F\n"
        "import fastnn.optim as optim\n"
        "from fastnn.optim.lr_scheduler import StepLR\n"
        "conv = nn.Conv2d(3, 4, 3)\n"
        "StepLR(optim.SGD(conv.parameters(), lr=0.1, lr_in_velocity=True), 3)\n"
        "pooled: torch.Tensor = F.max_pool2d(F.conv2d(torch.ones(1, 3, 8, 8), conv.weight, padding='same'), 2)\n"
        "reveal_type(conv)\n"
        "reveal_type(F.max_pool2d(pooled, 2, return_indices=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "program.py"],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        'program.py:9: note: Revealed type is "fastnn.nn.layers.Conv2d"',
        'program.py:10: note: Revealed type is "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"',
        "Success: no issues found in 1 source file",
    ]


def test_torchs_submodules_have_fastnns_names_too():
    """They are torch's own, one copy of each, and loaded when torch loads them."""
    done = python(
        "import fastnn.nn as nn\n"
        "import sys\n"
        "assert 'torch.nn.utils.prune' not in sys.modules\n"
        "from fastnn.nn.utils.rnn import pad_sequence\n"
        "from fastnn.optim.lr_scheduler import StepLR\n"
        "import fastnn.nn.functional, fastnn.nn.init, fastnn.nn.modules.conv, fastnn.nn.parallel, fastnn.nn.parameter\n"
        "import fastnn.nn.utils.prune, fastnn.optim.optimizer\n"
        "import torch.nn.functional, torch.nn.utils.prune\n"
        "assert fastnn.nn.utils.prune is torch.nn.utils.prune\n"
        "assert nn.modules.batchnorm is torch.nn.modules.batchnorm\n"
        "assert torch.nn.utils.prune.__name__ == torch.nn.utils.prune.__spec__.name == 'torch.nn.utils.prune'\n"
        "assert fastnn.nn.functional is not torch.nn.functional\n"
        "try:\n"
        "    import fastnn.nn.no_such_name\n"
        "except ModuleNotFoundError as error:\n"
        "    assert error.name == 'fastnn.nn.no_such_name'\n"
        "else:\n"
        "    raise AssertionError"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_replaced():
    from fastnn.nn import functional

    assert functional is fastnn.nn.functional is not torch.nn.functional
    for name in ("conv2d", "relu", "max_pool2d", "cross_entropy"):
        assert getattr(functional, name) is not getattr(torch.nn.functional, name)
    for module, native, names in (
        (fastnn.nn, torch.nn, ("Conv2d", "ReLU", "MaxPool2d", "CrossEntropyLoss", "Sequential")),
        (fastnn.optim, torch.optim, ("Adam", "AdamW", "SGD")),
    ):
        for name in names:
            ours, theirs = getattr(module, name), getattr(native, name)
            assert ours is not theirs
            assert issubclass(ours, theirs)
    for name in ("conv2d_relu", "conv2d_relu_max_pool2d"):
        assert callable(getattr(functional, name))
    for name in ("ConvReLU2d", "ConvReLUMaxPool2d"):
        assert issubclass(getattr(fastnn.nn, name), torch.nn.Module)
    assert {"backend", "convert"} <= set(fastnn.__all__)


def test_star_import_of_the_functional_interface():
    done = python(
        "from fastnn.nn.functional import *\n"
        "import fastnn.nn.functional as F\n"
        "assert relu is F.relu and conv2d is F.conv2d and max_pool2d is F.max_pool2d"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 0])
def test_backend_refuses_other_names(name):
    with pytest.raises(ValueError, match=r"expected one of 'cpu'.*'torch'"), fastnn.backend(name):
        pass


def test_backend_torch_is_native_and_nests():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    w = torch.randn(4, 3, 3, 3)
    with fastnn.backend("torch"):
        assert "Convolution" in fastnn.nn.functional.conv2d(x, w).grad_fn.name()
        with fastnn.backend("cpu"):
            assert "Convolution" not in fastnn.nn.functional.conv2d(x, w).grad_fn.name()
        assert "Convolution" in fastnn.nn.functional.conv2d(x, w).grad_fn.name()
    with pytest.raises(KeyError), fastnn.backend("torch"):
        raise KeyError
    assert "Convolution" not in fastnn.nn.functional.conv2d(x, w).grad_fn.name()


def test_says_once_why_a_call_goes_native(caplog):
    fastnn.dispatch._logged.clear()
    with caplog.at_level("DEBUG", logger="fastnn"):
        for _ in range(3):
            fastnn.nn.functional.relu(torch.arange(1 << 15))
            fastnn.nn.functional.relu(torch.ones(3))
            fastnn.nn.functional.cross_entropy(torch.ones(2, 3), torch.tensor([0, 2]))
    assert [record.getMessage() for record in caplog.records] == [
        "relu: native torch, because dtype torch.int64 has no kernel",
        "relu: native torch, because a small tensor, of up to 16384 elements, takes less time there",
        "cross_entropy: native torch, because a small tensor, of up to 8192 elements, takes less time there",
    ]


def test_python_m_fastnn():
    done = subprocess.run([sys.executable, "-m", "fastnn"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert fastnn._C.isa() in done.stdout
    assert torch.__version__ in done.stdout


def test_wheel(tmp_path):
    """A wheel, of the objects that `make` left in build/ where they are up to date, needs no library but torch's, and
    works in an environment of its own. Beside another torch: `make test-wheel`."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    environment = {"CXX": os.environ.get("CXX", "g++")}  # as make has it: another compiler makes objects of its own
    run(*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ROOT, **environment)
    (wheel,) = tmp_path.glob("fastnn-*.whl")
    assert audit(wheel)["system"].startswith("manylinux")
    report = try_out(wheel, tmp_path / "env")
    assert report.count("as native") >= len(fastnn.dispatch.OPERATORS)
    assert list((tmp_path / "env").glob("lib/python*/site-packages/fastnn/py.typed"))
