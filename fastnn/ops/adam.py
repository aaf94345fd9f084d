"""Adam: the rules of ``fastnn::adam_``, one step of many parameters in place."""

from __future__ import annotations

from fastnn.ops.step import register_step

register_step("adam_")
