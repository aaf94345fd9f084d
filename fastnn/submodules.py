"""``import fastnn.nn.utils.rnn``: the submodules of torch.nn and torch.optim under fastnn's names too."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class TorchsSubmodules(MetaPathFinder, Loader):
    """Finds torch's own module where fastnn has no file. It comes first: what lies in one of torch's packages would
    be found there, and run once more under fastnn's name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, name = fullname.partition(".")
        if top != "fastnn" or not name.startswith(("nn.", "optim.")):
            return None
        if name.count(".") == 1 and (ours := PathFinder.find_spec(fullname, path)):
            return ours
        return ModuleSpec(fullname, self) if importlib.util.find_spec(f"torch.{name}") else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module("torch" + module.__name__.removeprefix("fastnn"))


sys.meta_path.insert(0, TorchsSubmodules())
