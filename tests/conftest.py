"""Every test of an operator runs once per implementation this machine has: the ``backend`` fixture."""

import importlib.util
import logging
import os

import hypothesis
import pytest
import torch
import torch.testing._internal.common_utils  # loads a hypothesis profile of its own: before ours

import fastnn
from fastnn import _C

# The same examples every time; `pytest --hypothesis-profile=explore` looks for new ones. The backend fixture may serve
# all the examples of one test.
_CHECKS = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=_CHECKS)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=_CHECKS, print_blob=True)
hypothesis.settings.load_profile("fixed")

BACKENDS = [f"cpu-{isa}" for isa in _C.available_isas()]

# The CUDA kernels compiled for the CPU, which then serve CPU tensors in place of the CPU's own: test_cuda_emulation.py
# runs the tests once more, in a process of their own, with this library.
EMULATED_CUDA = os.environ.get("FASTNN_TEST_EMULATED_CUDA")
if EMULATED_CUDA:
    spec = importlib.util.spec_from_file_location("_C_cuda", EMULATED_CUDA)
    emulated_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated_cuda)
    BACKENDS = ["cuda-emulated"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Forces one implementation ('cpu-avx2', ...) for the test, and fails it if a call goes to native torch."""
    device, isa = request.param.split("-")
    before = _C.isa()
    if EMULATED_CUDA:
        device = "cpu"
    else:
        _C.set_isa(isa)
    fallbacks = []
    handler = logging.Handler()
    handler.emit = lambda record: fallbacks.append(record.getMessage())
    fastnn.dispatch._logged.clear()
    fastnn.dispatch.logger.addHandler(handler)
    level = fastnn.dispatch.logger.level
    fastnn.dispatch.logger.setLevel(logging.DEBUG)
    with fastnn.backend(device):
        yield request.param
    fastnn.dispatch.logger.setLevel(level)
    fastnn.dispatch.logger.removeHandler(handler)
    _C.set_isa(before)
    expected = request.node.get_closest_marker("expects_native") is not None
    assert expected or not fallbacks, f"went to native torch: {fallbacks}"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
