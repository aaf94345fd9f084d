"""The sample and error inputs that ship inside the torch wheel, for operators and modules, and errors to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def here() -> str:
    """The device of the tensors that a test makes: where the samples of torch's databases have to be, too."""
    return str(torch.get_default_device())


# torch's databases take seconds to import: they are imported by the tests that ask for them.


def op_info(name: str) -> Any:
    """The OpInfo of ``torch.nn.functional.<name>``."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    return info


def module_info(name: str) -> Any:
    """The ModuleInfo of ``torch.nn.<name>``."""
    from torch.testing._internal.common_modules import module_db

    (info,) = (m for m in module_db if m.name == f"nn.{name}")
    return info


def older_module_tests(name: str) -> list[dict[str, Any]]:
    """The cases of ``torch.nn.<name>`` in the lists that were there before ModuleInfo."""
    from torch.testing._internal.common_nn import get_new_module_tests, module_tests

    tests = [*module_tests, *get_new_module_tests()]
    return [t for t in tests if t.get("module_name") == name or t.get("fullname", "").startswith(f"{name}_")]


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type[BaseException], str]:
    """The type and text of the error that the call raises."""
    try:
        function(*args, **kwargs)
    except Exception as exception:
        return type(exception), str(exception)
    raise AssertionError("nothing was raised")
