"""Times several ways of computing one thing side by side, and says how right each of them is.

A suite (conv2d.py, relu.py, ...) turns each layer of its list into cases: one pass of that layer, computed by fastnn
and by native PyTorch in every configuration worth having. `measure` gives one row for each of a case's fastnn variants.
"""

from __future__ import annotations

import gc
import logging
import math
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch._functorch.config
from torch import Tensor

import fastnn.nn.functional
from fastnn import dispatch

Bound = Literal["flops", "bytes"]

# The largest error against float64 (as `error` defines it) of a result that is right. Sums over thousands of terms and
# Winograd transforms stay well within it; a missing term, a zero gradient or a wrong element does not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BLOCK = 1 << 24  # elements compared at once: 128 MiB in float64
TOUCHED = 16  # bytes touched before the rounds for each one that a case moves: several variants, each with buffers
MOST_TOUCHED = 1 << 30  # up to two seconds where all of it is new


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    device: torch.device
    quick: bool = False
    compile_all: bool = False

    @property
    def seconds(self) -> float:
        """Time spent on the rounds of one case, about. A GPU's are some 10 samples of half a millisecond each."""
        return 0.25 if self.quick or self.device.type == "cuda" else 1.0

    @property
    def rounds(self) -> tuple[int, int]:
        """Fewest and most rounds of one case."""
        return (3, 15) if self.quick else (7, 51)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: ``run`` does it once and returns the results that are checked."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    ours: bool = False
    graph: bool = False  # a CUDA graph: without what a call costs the host


@dataclass(frozen=True)
class Case:
    """One pass of one layer. The first native variant is plain eager PyTorch, the yardstick of what is right."""

    suite: str
    layer: str
    pass_name: str
    dtype: torch.dtype
    bound: Bound  # what limits it at best: arithmetic or memory
    flops: float
    bytes: float  # what any implementation must at least move
    variants: Sequence[Variant]
    reference: Sequence[Tensor]  # the results in float64


@dataclass(frozen=True)
class Timing:
    """How long one variant took, and how far from float64 it was."""

    name: str
    error: float
    wrong: bool  # too far from float64: not timed, not compared with
    note: str | None = None
    median_ms: float = math.nan
    q1_ms: float = math.nan
    q3_ms: float = math.nan
    rounds: int = 0


@dataclass
class Row:
    """One fastnn variant of one case beside every native one."""

    suite: str
    layer: str
    pass_name: str
    dtype: str
    bound: Bound
    flops: float
    bytes: float
    ours: Timing
    native: list[Timing]
    thp: dict[str, Any] | None = field(default=None)  # the same row measured under THP_MEM_ALLOC_ENABLE=1

    @property
    def key(self) -> tuple[str, ...]:
        return self.suite, self.layer, self.pass_name, self.dtype, self.ours.name

    @property
    def best(self) -> Timing | None:
        """The fastest native configuration whose results are right."""
        return min((t for t in self.native if not t.wrong), key=lambda t: t.median_ms, default=None)

    @property
    def ratio(self) -> float | None:
        """Best native time over ours: above 1 fastnn is faster. None where ours is wrong or no native one is right."""
        best = self.best
        return None if best is None or self.ours.wrong else best.median_ms / self.ours.median_ms

    def rate(self, timing: Timing) -> float:
        """GFLOP/s or GB/s, by what bounds the case."""
        work = self.flops if self.bound == "flops" else self.bytes
        return work / timing.median_ms / 1e6


def own(name: str, module: ModuleType, native: ModuleType) -> Callable[..., Any]:
    """``module.<name>``, which must be fastnn's.

    Raises:
        NotImplementedError: there is none, or the name leads to native PyTorch's, which would be compared with itself.
    """
    function = getattr(module, name, None)
    if function is None or function is getattr(native, name, None):
        raise NotImplementedError(f"{module.__name__} has no {name} of its own in this build")
    return function


def functional(name: str) -> Callable[..., Tensor]:
    """fastnn's own function of that name in ``fastnn.nn.functional``."""
    return own(name, fastnn.nn.functional, torch.nn.functional)


def ours_of(op: str, function: Callable[..., Any], settings: Settings) -> dict[str, Callable[..., Any]]:
    """fastnn's ``function`` by the name of its rows: one for every backend that has kernels of ``op`` on the device."""
    device_type = settings.device.type
    backends = [name for name, device_types in dispatch.DEVICES.items() if device_type in device_types]
    if len(backends) == 1:
        return {"fastnn": function}

    def on(backend: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with fastnn.backend(backend):
                return function(*args, **kwargs)

        return call

    return {f"fastnn {name}": on(name) for name in backends if dispatch.why_off(name, op, settings.device) is None}


def compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """``torch.compile`` for the shapes at hand. Backward runs many times over one graph here, which a compiled function
    only allows where it does not reuse the buffers of its forward. On a GPU it tunes, as native at its best does; CUDA
    graphs are `with_graphs`."""
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if settings.device.type == "cuda" else None
    return torch.compile(function, dynamic=False, mode=mode)


def graphed(
    run: Callable[[], Sequence[Tensor]], undo: Callable[[], None] = lambda: None
) -> Callable[[], Sequence[Tensor]]:
    """``run`` as a CUDA graph, which its first call captures. ``undo`` takes back what ``run`` has changed, so that the
    first call's results are those of a first ``run``."""
    captured: list[tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]] = []

    def replay() -> Sequence[Tensor]:
        if not captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what a first or second call makes or loads must not be in the graph
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            undo()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run()
            captured.append((graph, results))
        captured[0][0].replay()
        return captured[0][1]

    return replay


def undo_steps(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that sets the parameters back to what they are now, and Adam's or SGD's state to that before its first
    step: the same tensors, of zeros, as a graph needs them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in parameters]

    def undo() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            for state in optimizer.state.values():
                for entry in state.values():
                    if isinstance(entry, Tensor):
                        entry.zero_()

    return undo


def with_graphs(variants: Sequence[Variant], pass_name: str, settings: Settings) -> list[Variant]:
    """The variants, and on CUDA native's eager ones and ours as CUDA graphs: of passes that begin with forward, which
    record nothing."""
    if settings.device.type != "cuda" or not pass_name.startswith("forward"):
        return list(variants)
    captured = [v for v in variants if v.ours or v.name.startswith("eager")]
    return [*variants, *(Variant(f"graph of {v.name}", graphed(v.run), v.ours, graph=True) for v in captured)]


def error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """``|result - reference| / |reference|`` in the Euclidean norm, of the worst of the tensors.

    A norm and not a largest difference: where ReLU or max-pooling meets two nearly equal values, rounding alone decides
    which way one element's whole gradient goes, in every implementation.
    """
    errors = [torch.zeros((), dtype=torch.float64)]
    for got, want in zip(results, reference, strict=True):
        if got.shape != want.shape:
            return math.inf
        rows = max(1, BLOCK * max(want.shape[:1], default=1) // max(want.numel(), 1))
        blocks = zip(torch.atleast_1d(got.detach()).split(rows), torch.atleast_1d(want).split(rows), strict=True)
        distance = torch.stack([(g.double() - w).square().sum() for g, w in blocks]).sum().sqrt()
        norm = want.norm()
        errors.append((distance / norm if norm > 0 else distance).cpu())
    return torch.stack(errors).max().item()  # NaN anywhere stays NaN


def pass_function(
    pass_name: str, forward: Callable[[], Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], dy: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """A function that runs one pass of a differentiable call once.

    Args:
        pass_name: forward, grad_input, grad_weight, backward (both gradients) or forward+backward.
        forward: the call, on ``inputs`` and ``weights``, leaves of this pass alone.
        dy: the gradient of its output.

    A backward pass runs over a graph that its first run records, in which just the tensors it is about require grad.
    """
    wanted = {"grad_input": inputs, "grad_weight": weights}.get(pass_name, [*inputs, *weights])
    recorded: list[Tensor] = []

    def forward_only() -> Sequence[Tensor]:
        with torch.no_grad():
            return [forward()]

    def backward() -> Sequence[Tensor]:
        if not recorded:
            recorded.append(forward())
        return torch.autograd.grad(recorded[0], wanted, dy, retain_graph=True)

    def both() -> Sequence[Tensor]:
        output = forward()
        return [output, *torch.autograd.grad(output, wanted, dy)]

    if pass_name == "forward":
        return forward_only
    for tensor in wanted:
        tensor.requires_grad_()
    return both if pass_name == "forward+backward" else backward


@contextmanager
def native_calls() -> Iterator[list[str]]:
    """Collects what fastnn's logger says inside the block of calls that went to native PyTorch."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    dispatch._logged.clear()  # each reason is logged once a process
    level = dispatch.logger.level
    dispatch.logger.addHandler(handler)
    dispatch.logger.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        dispatch.logger.setLevel(level)
        dispatch.logger.removeHandler(handler)


def calls_a_sample(seconds: float) -> int:
    """Of a call that takes so long: as many as fill half a millisecond."""
    return max(1, math.ceil(5e-4 / seconds))


def sample(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds a call, over ``calls`` of them; what a call returns is freed inside the timed region."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def interleave(runs: Sequence[Callable[[], Any]], settings: Settings) -> list[list[float]]:
    """Seconds a call of each function, one sample of each a round: A B C A B C ...

    What else the machine does then hits all of them alike. A sample of a short call is several of them in a row.
    """
    device = settings.device
    once = [min(sample(run, 1, device) for _ in range(2)) for run in runs]
    calls = [calls_a_sample(seconds) for seconds in once]
    a_round = sum(n * seconds for n, seconds in zip(calls, once, strict=True))
    fewest, most = settings.rounds
    samples: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    try:
        for _ in range(min(most, max(fewest, round(settings.seconds / a_round)))):
            for run, n, mine in zip(runs, calls, samples, strict=True):
                mine.append(sample(run, n, device))
    finally:
        gc.enable()
    return samples


def touch_memory(size: int) -> None:
    """Touches so many bytes and gives them back, so that the memory which the rounds take is not new to this machine:
    where it is a virtual one, its host may take back what lies free, and a page then costs 20 times as much."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    with mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


@contextmanager
def tuned_cudnn(settings: Settings) -> Iterator[None]:
    """Native at its best on a GPU: cuDNN tries its algorithms for every shape inside the block."""
    torch._C._set_cudnn_benchmark(settings.device.type == "cuda")
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(False)


def _check(variant: Variant, case: Case, limit: float) -> Timing:
    """Runs a variant for the first time and compares its results with float64's."""
    note = None
    try:
        with native_calls() as messages:
            results = variant.run()
    except Exception as failure:  # a configuration that cannot run at all is a result too, of native and of ours
        first_line = str(failure).strip().split("\n")[0]
        return Timing(variant.name, math.nan, wrong=True, note=f"{type(failure).__name__}: {first_line}"[:200])
    distance = error(results, case.reference)
    if variant.ours and messages:
        note = "; ".join(messages)
    return Timing(variant.name, distance, wrong=not distance <= limit, note=note)


def measure(case: Case, settings: Settings) -> list[Row]:
    """Checks every variant of the case, times the ones that are right, and gives a row for each of ours. A call of ours
    is beside native's calls, a CUDA graph of ours beside native's graphs too."""
    if not any(v.ours for v in case.variants):
        return []
    tolerance = TOLERANCE[case.dtype]
    eager = next(v for v in case.variants if not v.ours)
    checked = {eager.name: _check(eager, case, math.inf)}
    limit = max(tolerance, 10 * checked[eager.name].error)  # a NaN is never the larger
    for variant in case.variants:
        if variant is not eager:
            checked[variant.name] = _check(variant, case, limit)
    right = [v for v in case.variants if not checked[v.name].wrong]
    if settings.device.type == "cpu":
        touch_memory(min(round(TOUCHED * case.bytes), MOST_TOUCHED))
    for variant, samples in zip(right, interleave([v.run for v in right], settings), strict=True):
        q1, median, q3 = (1e3 * q for q in statistics.quantiles(samples, n=4, method="inclusive"))
        was = checked[variant.name]
        checked[variant.name] = Timing(was.name, was.error, was.wrong, was.note, median, q1, q3, len(samples))
    dtype = str(case.dtype).removeprefix("torch.")
    return [
        Row(
            case.suite,
            case.layer,
            case.pass_name,
            dtype,
            case.bound,
            case.flops,
            case.bytes,
            ours=checked[mine.name],
            native=[checked[v.name] for v in case.variants if not v.ours and (mine.graph or not v.graph)],
        )
        for mine in case.variants
        if mine.ours
    ]


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios)) if ratios else math.nan
