"""SGD: the rules of ``fastnn::sgd_``, one step of many parameters in place."""

from __future__ import annotations

from fastnn.ops.step import register_step

register_step("sgd_")
