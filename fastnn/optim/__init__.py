"""All of ``torch.optim``, with ``Adam``, ``AdamW`` and ``SGD`` on fastnn's kernels."""

import sys
from typing import TYPE_CHECKING

from torch import optim as _native
from torch.optim import *  # noqa: F403
from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

from fastnn.optim.adam import Adam as Adam
from fastnn.optim.adam import AdamW as AdamW
from fastnn.optim.sgd import SGD as SGD

# `import fastnn.optim.lr_scheduler` finds torch's module under this name too.
for _name in ("lr_scheduler", "swa_utils"):
    sys.modules[f"{__name__}.{_name}"] = getattr(_native, _name)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        return getattr(_native, name)
