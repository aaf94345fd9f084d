"""Settings of the kernels, as :mod:`torch.backends` has torch's: ``fastnn.backends.cpu``."""

from fastnn.dispatch import _C

_WINOGRAD = ("off", "default", "fast")  # csrc/cpu/conv2d.cpp has them in this order


class CpuSettings:
    """Of the CPU's kernels, for the whole process."""

    __slots__ = ()

    @property
    def winograd(self) -> str:
        """Which of Winograd's convolutions serve 3x3 windows that move by one; ``'default'`` unless set.

        ``'default'``: F(2x2, 3x3), in every dtype. ``'fast'``: F(4x4, 3x3) where it is faster, with two to three times
        native PyTorch's rounding errors in float32, see docs/kernels.md. ``'off'``: none, so that every sum is of its
        own terms alone.

        Raises:
            ValueError: set to anything else.
        """
        return _WINOGRAD[_C.winograd()]

    @winograd.setter
    def winograd(self, value: str) -> None:
        if value not in _WINOGRAD:
            raise ValueError(f"fastnn.backends.cpu.winograd set to {value!r}, expected one of {', '.join(_WINOGRAD)}")
        _C.set_winograd(_WINOGRAD.index(value))


cpu = CpuSettings()
