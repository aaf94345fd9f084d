"""The sample and error inputs that ship inside the torch wheel, for operators, modules and optimizers, and errors to
compare."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch


def here() -> str:
    """The device of the tensors that a test makes: where the samples of torch's databases have to be, too."""
    return str(torch.get_default_device())


def _database(module: str) -> Any:
    """A module of torch's databases, which take seconds to import: the tests that ask for one import it."""
    pytest.importorskip("expecttest", reason="torch's own samples need expecttest")
    return importlib.import_module(f"torch.testing._internal.{module}")


def op_info(name: str) -> Any:
    """The OpInfo of ``torch.nn.functional.<name>``."""
    op_db = _database("common_methods_invocations").op_db
    (info,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    return info


def module_info(name: str) -> Any:
    """The ModuleInfo of ``torch.nn.<name>``."""
    (info,) = (m for m in _database("common_modules").module_db if m.name == f"nn.{name}")
    return info


def optimizer_info(name: str) -> Any:
    """The OptimizerInfo of ``torch.optim.<name>``."""
    (info,) = (o for o in _database("common_optimizers").optim_db if o.optim_cls.__name__ == name)
    return info


def older_module_tests(name: str) -> list[dict[str, Any]]:
    """The cases of ``torch.nn.<name>`` in the lists that were there before ModuleInfo."""
    lists = _database("common_nn")
    tests = [*lists.module_tests, *lists.get_new_module_tests()]
    return [t for t in tests if t.get("module_name") == name or t.get("fullname", "").startswith(f"{name}_")]


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type[BaseException], str]:
    """The type and text of the error that the call raises."""
    try:
        function(*args, **kwargs)
    except Exception as exception:
        return type(exception), str(exception)
    raise AssertionError("nothing was raised")
