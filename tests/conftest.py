"""Every test of an operator runs once per implementation this machine has: the ``backend`` fixture."""

import contextlib
import importlib.util
import logging
import os

import hypothesis
import pytest
import torch
from filelock import FileLock  # torch has it

if importlib.util.find_spec("expecttest"):  # which it needs
    import torch.testing._internal.common_utils  # loads a hypothesis profile of its own: before ours

GPU = torch.accelerator.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's kernels are defined, that is when a test first needs them

from reference import allow_tf32  # noqa: E402

import fastnn  # noqa: E402
from fastnn import _C  # noqa: E402

# The same examples every time; `pytest --hypothesis-profile=explore` looks for new ones. The backend fixture may serve
# all the examples of one test.
_CHECKS = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=_CHECKS)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=_CHECKS, print_blob=True)
hypothesis.settings.load_profile("fixed")

INTERPRETED_EXAMPLES = 4
COMPILED_EXAMPLES = 16  # by Triton on a GPU, most of a second for nearly every new shape
BACKENDS = [f"cpu-{isa}" for isa in _C.available_isas()]
if GPU and torch.version.cuda:
    BACKENDS.append("cuda")
if importlib.util.find_spec("triton"):
    BACKENDS.append("triton")

# The CUDA kernels compiled for the CPU, which then serve CPU tensors in place of the CPU's own: test_cuda_emulation.py
# runs the tests once more, in a process of their own, with this library.
EMULATED_CUDA = os.environ.get("FASTNN_TEST_EMULATED_CUDA")
if EMULATED_CUDA:
    BACKENDS = ["cuda-emulated"]
    spec = importlib.util.spec_from_file_location("_C_cuda", EMULATED_CUDA)
    emulated_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated_cuda)
    fastnn.dispatch.LIBRARIES["cpu"] = emulated_cuda
if "triton" in BACKENDS and not GPU:
    import triton_interpreter

    triton_interpreter.repair()


def backend_of(item):
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def is_interpreted(item):
    """Triton's interpreter takes some 2 ms a kernel and 1 ms a program of its grid, the emulation of CUDA some 0.1 ms a
    block of threads: fewer examples, and derivatives along random directions instead of every one."""
    return backend_of(item) in (("cuda-emulated",) if GPU else ("cuda-emulated", "triton"))


def is_too_big(item):
    """Marked as big and interpreted; the emulation of CUDA runs what is marked as big(emulated=True)."""
    marks = list(item.iter_markers("big"))
    if EMULATED_CUDA:
        marks = [mark for mark in marks if not mark.kwargs.get("emulated")]
    return is_interpreted(item) and bool(marks)


def is_another_tier(item):
    """On a CPU instruction set other than the fastest. What is above the kernels is the same on all of them: tests
    marked one_tier run on the fastest only, and derivatives are checked along random directions on the others."""
    return backend_of(item) in [name for name in BACKENDS[1:] if name.startswith("cpu-")]


def pytest_collection_modifyitems(config, items):
    def again(item):
        return is_another_tier(item) and item.get_closest_marker("one_tier")

    config.hook.pytest_deselected(items=[item for item in items if again(item)])
    items[:] = [item for item in items if not again(item)]
    for item in items:
        if GPU and backend_of(item) in ("cuda", "triton"):
            item.add_marker("gpu")
        if is_too_big(item):
            item.add_marker(pytest.mark.skip(reason="big: minutes in Triton's interpreter or in the emulation of CUDA"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with pytest.MonkeyPatch.context() as patch:
        if is_interpreted(item) or is_another_tier(item):
            for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                patch.setitem(check.__kwdefaults__, "fast_mode", True)
        if (is_interpreted(item) or backend_of(item) == "triton") and hypothesis.is_hypothesis_test(item.obj):
            settings = item.obj._hypothesis_internal_use_settings
            most = INTERPRETED_EXAMPLES if is_interpreted(item) else COMPILED_EXAMPLES
            examples = min(most, settings.max_examples)
            fewer = hypothesis.settings(settings, max_examples=examples, phases=[hypothesis.Phase.generate])
            patch.setattr(item.obj, "_hypothesis_internal_use_settings", fewer)
        return (yield)


def where_it_runs(name):
    """What makes a test's tensors, and its raw torch.ops.fastnn calls, go to the backend."""
    if name == "cpu":
        return contextlib.nullcontext()
    return torch.device(torch.accelerator.current_accelerator()) if GPU else triton_interpreter.as_cpu_kernels()


LEFT_TO_NATIVE = {f"{name} is off: {fastnn.dispatch.NO_KERNEL}" for name in fastnn.dispatch.KERNELS}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Forces one implementation ('cpu-avx2', ...) for the test, and fails it if a call goes to native torch, but for
    what the registry leaves to it."""
    name, _, isa = request.param.partition("-")
    before = _C.isa()
    if isa == "emulated":
        name = "cpu"
    elif isa:
        _C.set_isa(isa)
    fallbacks = []
    handler = logging.Handler()
    handler.emit = lambda record: (
        fallbacks.append(record.getMessage()) if record.args[1] not in LEFT_TO_NATIVE else None
    )
    fastnn.dispatch._logged.clear()
    fastnn.dispatch.logger.addHandler(handler)
    level = fastnn.dispatch.logger.level
    fastnn.dispatch.logger.setLevel(logging.DEBUG)
    with fastnn.backend(name), where_it_runs(name):
        yield request.param
    fastnn.dispatch.logger.setLevel(level)
    fastnn.dispatch.logger.removeHandler(handler)
    _C.set_isa(before)
    expected = request.node.get_closest_marker("expects_native") is not None
    assert expected or not fallbacks, f"went to native torch: {fallbacks}"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_tf32():
    """float32 is compared with float64, on GPUs too: of TF32 there are tests of its own."""
    allow_tf32(False)
    yield
    allow_tf32(True)


@pytest.fixture
def need_memory(tmp_path_factory):
    """Skips the test where the GPU has not so many GiB to spare; of such tests, one at a time in all the processes."""

    def need(gib):
        torch.cuda.empty_cache()  # what other tests of this process freed
        if torch.cuda.mem_get_info()[0] < gib << 30:
            pytest.skip(f"needs {gib} GiB of free GPU memory")

    with FileLock(tmp_path_factory.getbasetemp().parent / "gpu-memory.lock"):
        yield need
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of a process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
