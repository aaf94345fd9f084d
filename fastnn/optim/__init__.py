"""All of ``torch.optim``, with ``Adam``, ``AdamW`` and ``SGD`` on fastnn's kernels."""

from typing import TYPE_CHECKING

from torch import optim as _native

if not TYPE_CHECKING:
    from torch.optim import *  # noqa: F403
from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

from fastnn.optim.adam import Adam as Adam
from fastnn.optim.adam import AdamW as AdamW
from fastnn.optim.sgd import SGD as SGD

if TYPE_CHECKING:  # which keeps the first of what has one name
    from torch.optim import *  # type: ignore[assignment]  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        return getattr(_native, name)
