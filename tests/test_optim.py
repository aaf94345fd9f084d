"""Adam, AdamW and SGD against torch's own: one body for all three.

Everything here compares two optimizers on equal parameters and gradients (optimizers.Pair), in float64 unless a dtype
is the point. What is only Adam's or SGD's is in test_adam.py and test_sgd.py.
"""

import contextlib
import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import CLASSES, DTYPES, LAYOUTS, SHAPES, TYPICAL, Pair, options, special, values_of
from reference import mostly_big
from torch.autograd.profiler import profile
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from wheel import optimizer_info

import fastnn.optim

pytestmark = pytest.mark.kernels

each = pytest.mark.parametrize("name", CLASSES)


def test_everything_else_is_torchs():
    import fastnn.optim.lr_scheduler as scheduler

    assert scheduler is torch.optim.lr_scheduler
    for name in torch.optim.__all__:
        if name in CLASSES:
            assert issubclass(getattr(fastnn.optim, name), getattr(torch.optim, name))
        else:
            assert getattr(fastnn.optim, name) is getattr(torch.optim, name)
    with pytest.raises(AttributeError):
        fastnn.optim.no_such_name  # noqa: B018


# ---- the arithmetic ----


@each
@given(data=st.data())
@settings(max_examples=25)
def test_equals_native(backend, name, data):
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in shapes]
    pair = Pair(name, values_of(shapes), layouts, **data.draw(options(name)))
    addresses = [p.data_ptr() for p in pair.ours_params]
    for step in range(3):
        grads = values_of(shapes, seed=step + 1)
        absent = data.draw(st.sampled_from([None, *range(len(shapes))]))
        if absent is not None:
            grads[absent] = None
        pair.set_grads(grads, [data.draw(st.sampled_from([*LAYOUTS, "expanded"])) for _ in shapes])
        pair.step()
    pair.assert_equal(rtol=1e-13, atol=1e-14)
    assert addresses == [p.data_ptr() for p in pair.ours_params]


@each
def test_special_values(backend, name):
    pair = Pair(name, [special(v) if i else v for i, v in enumerate(values_of([(45,), (45,)]))], **TYPICAL[name])
    for seed in range(3):
        grads = values_of([(45,), (45,)], seed=seed)
        pair.set_grads([special(grads[0]), grads[1]])
        pair.step()
    pair.assert_equal()


@each
def test_twenty_steps(backend, name):
    shapes = [(64, 33), (33,), (16, 3, 3, 3)]
    pair = Pair(name, values_of(shapes), **TYPICAL[name])
    for seed in range(20):
        pair.set_grads(values_of(shapes, seed=seed))
        pair.step()
    pair.assert_equal(rtol=1e-12, atol=1e-14)


@each
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_no_less_exact_than_native(backend, name, dtype):
    """Against float64 from the same (rounded) start, the error is within native's, plus an eighth of an ulp."""
    shapes = [(1031,), (65, 7)]
    values = values_of(shapes, dtype)
    kwargs = {**TYPICAL[name], **({"eps": 1e-4} if name != "SGD" else {})}
    pair = Pair(name, values, **kwargs)
    exact = Pair(name, [v.double() for v in values], **kwargs)
    for seed in range(4):
        grads = values_of(shapes, dtype, seed=seed)
        pair.set_grads(grads)
        exact.set_grads([g.double() for g in grads])
        pair.step()
        exact.step()
    for ours, native, truth in zip(pair.ours_params, pair.native_params, exact.native_params, strict=True):
        slack = torch.finfo(dtype).eps / 8 * truth.abs().max()
        error, allowed = ((p.double() - truth).abs().max() for p in (ours, native))
        assert error <= allowed * 1.05 + slack


@each
def test_mixed_dtypes_and_sizes(backend, name):
    values = [v.to(d) for v, d in zip(values_of([(70_001,), (5,), (0,), (300, 41)]), DTYPES, strict=True)]
    kwargs = {**TYPICAL[name], **({"eps": 1e-3} if name != "SGD" else {})}
    pair = Pair(name, values, **kwargs)
    for seed in range(3):
        pair.set_grads(
            [g.to(v.dtype) for g, v in zip(values_of([v.shape for v in values], seed=seed), values, strict=True)]
        )
        pair.step()
    for p, q, dtype in zip(pair.ours_params, pair.native_params, DTYPES, strict=True):
        if dtype in (torch.float64, torch.float32):  # native's 16-bit results are no oracle
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for key, value in pair.ours.state[p].items():
            assert value.dtype is pair.native.state[q][key].dtype


@each
def test_parameters_that_share_memory(backend, name):
    """Views of one storage are updated one after the other, whatever the number of threads."""
    base = values_of([(60_000,)])[0]
    kwargs = TYPICAL[name]
    results = []
    for module in (fastnn.optim, torch.optim):
        storage = base.clone()
        params = [torch.nn.Parameter(storage[:50_000]), torch.nn.Parameter(storage[10_000:])]
        optimizer = getattr(module, name)(params, **kwargs)
        for p in params:
            p.grad = torch.linspace(-1, 1, 50_000, dtype=torch.float64)
        optimizer.step()
        optimizer.step()
        results.append(storage)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@each
def test_same_parameter_twice(backend, name):
    results = []
    for module in (fastnn.optim, torch.optim):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
        # torch's SGD gives the first step's two momentum buffers to one state, so without momentum there.
        kwargs = {"lr": 0.05, "weight_decay": 0.1} if name == "SGD" else TYPICAL[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = getattr(module, name)([p, p], foreach=False, **kwargs)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(p)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@each
@pytest.mark.parametrize("shapes", mostly_big([[(5_001,), (5,), (33, 7)], [(70_001,), (5,), (333, 77)]], 0), ids=str)
def test_bitwise_deterministic(backend, name, shapes):
    def run():
        pair = Pair(name, values_of(shapes, torch.float32), **TYPICAL[name])
        for seed in range(2):
            pair.set_grads(values_of(shapes, torch.float32, seed=seed))
            pair.ours.step()
        return torch.cat([p.detach().flatten() for p in pair.ours_params])

    expected = run()
    threads = torch.get_num_threads()
    try:
        for i in range(20):
            torch.set_num_threads(1 + i % 2)
            assert torch.equal(run(), expected)
    finally:
        torch.set_num_threads(threads)


@each
@pytest.mark.big
def test_python_threads(backend, name):
    shapes = [(40_009,), (31,)]
    pairs = [Pair(name, values_of(shapes, seed=i), **TYPICAL[name]) for i in range(4)]

    forced = fastnn.dispatch.forced()

    def work(pair):
        with fastnn.dispatch.forced_to(forced):
            for _ in range(5):
                pair.ours.step()

    for pair in pairs:
        pair.set_grads(values_of(shapes, seed=9))
    threads = [threading.Thread(target=work, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair in pairs:
        for _ in range(5):
            pair.native.step()
        pair.assert_equal()


# ---- state ----


@each
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_both_ways_mid_training(backend, name, through_file):
    shapes = [(9,), (4, 5)]
    pair = Pair(name, values_of(shapes), **TYPICAL[name])

    def exchange():
        states = [o.state_dict() for o in (pair.ours, pair.native)]
        if through_file:
            for i, state in enumerate(states):
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                states[i] = torch.load(file)
        states = copy.deepcopy(states)
        pair.native.load_state_dict(states[0])
        pair.ours.load_state_dict(states[1])

    exchange()
    for seed in range(4):
        pair.set_grads(values_of(shapes, seed=seed))
        pair.step()
        pair.assert_equal()
        exchange()
    ours, native = (o.state_dict()["param_groups"][0] for o in (pair.ours, pair.native))
    assert set(ours) - {"lr_in_velocity"} == set(native) - {"lr_in_velocity"}


@each
def test_deepcopy_and_pickle(backend, name):
    pair = Pair(name, values_of([(9,)]), **TYPICAL[name])
    pair.set_grads(values_of([(9,)], seed=1))
    pair.step()
    for clone in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        assert type(clone) is type(pair.ours)
        (p,) = clone.param_groups[0]["params"]
        p.grad = pair.ours_params[0].grad.clone()
        clone.step()
        assert not torch.equal(p, pair.ours_params[0])
    pair.step()
    pair.assert_equal()
    assert torch.equal(p, pair.ours_params[0])


@each
def test_parameters_added_later(backend, name):
    shapes = [(9,), (4, 5), (3,)]
    pair = Pair(name, values_of(shapes)[:2], **TYPICAL[name])
    for params in (pair.ours_params, pair.native_params):
        params.append(torch.nn.Parameter(values_of(shapes)[2]))
    pair.ours_params[2].grad = pair.native_params[2].grad = torch.ones(3, dtype=torch.float64)
    pair.set_grads([*values_of(shapes, seed=1)[:2], torch.ones(3, dtype=torch.float64)])
    pair.step()
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.native, pair.native_params)):
        optimizer.add_param_group({"params": [params[2]], "lr": 0.3, "maximize": True})
    for _ in range(2):
        pair.step()
        pair.assert_equal()


def replace_state(optimizer, p):
    optimizer.state[p] = {k: v + 1 for k, v in optimizer.state[p].items()}


def replace_parameter(optimizer, p):
    del optimizer.state[p]
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(2, dtype=p.dtype))


def remove_parameter(optimizer, p):
    del optimizer.state[p]
    del optimizer.param_groups[0]["params"][0]


def resize(optimizer, p):
    p.grad = None
    del optimizer.state[p]
    p.requires_grad_(False).resize_(3).fill_(0.25).requires_grad_()


# Everything that may move, reshape or retype what a step reads and writes, done to one of two parameters.
CHANGES = {
    "data": lambda o, p: setattr(p, "data", torch.arange(16.0, dtype=p.dtype).view(4, 4)),
    "transposed data": lambda o, p: setattr(p, "data", p.data.clone().t()),
    "set_": lambda o, p: p.set_(torch.arange(16.0, dtype=p.dtype).view(4, 4)),
    "storage": lambda o, p: p.untyped_storage().resize_(1 << 20),
    "resize_": resize,
    "state": replace_state,
    "state dropped": lambda o, p: o.state.pop(p),
    "state reordered": lambda o, p: o.state.update({p: o.state.pop(p)}),
    "load_state_dict": lambda o, p: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "parameter replaced": replace_parameter,
    "parameter removed": remove_parameter,
}


@each
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_outlives_a_step(backend, name, change):
    pair = Pair(name, values_of([(4, 4), (5,)]), **TYPICAL[name])
    pair.set_grads(values_of([(4, 4), (5,)], seed=1))
    pair.step()
    pair.step()
    for optimizer, params in ((pair.ours, pair.ours_params), (pair.native, pair.native_params)):
        with torch.no_grad():
            change(optimizer, params[0])
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5)
    for _ in range(2):
        pair.step()
        ours, theirs = (o.param_groups[0]["params"] for o in (pair.ours, pair.native))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        pair.assert_equal()


def lazily_negated(shape: tuple[int, ...]) -> torch.Tensor:
    """What is in its memory has the other sign."""
    return torch.ones(shape, dtype=torch.complex128).mul(2 + 3j).conj().imag


@each
@pytest.mark.expects_native
@pytest.mark.parametrize(
    "grad",
    [
        "sparse",
        "float32",
        "expanded state",
        "negated parameter",
        "negated state",
        "negated",
        "negated whole",
        "negated, profiled",
    ],
)
def test_becomes_uncovered(backend, name, grad):
    """What the kernels took in one step and do not in the next."""
    shape = (4,)
    pair = Pair(name, values_of([shape]), **(TYPICAL[name] if grad != "sparse" else {"lr": 0.1}))
    pair.set_grads(values_of([shape], seed=1))
    pair.step()
    errors = []
    for optimizer, p in ((pair.ours, pair.ours_params[0]), (pair.native, pair.native_params[0])):
        if grad == "sparse":
            p.grad = torch.ones_like(p).to_sparse()
        elif grad == "float32":
            p.grad_dtype = None
            p.grad = torch.ones(shape)
        elif grad == "expanded state":
            key = "momentum_buffer" if name == "SGD" else "exp_avg"
            optimizer.state[p][key] = torch.ones(1, dtype=p.dtype).expand(shape)
        elif grad == "negated parameter":
            p.data = lazily_negated(shape)
            assert p.is_neg()
        elif grad == "negated state":
            optimizer.state[p]["momentum_buffer" if name == "SGD" else "exp_avg"] = lazily_negated(shape)
        else:
            p.grad = lazily_negated(shape)
            if grad == "negated whole":
                p.grad = p.grad.as_strided(shape, (1,), 0)
            assert p.grad.is_neg()
        try:
            with profile() if grad == "negated, profiled" else contextlib.nullcontext():
                optimizer.step()
        except RuntimeError as e:
            errors.append(str(e))
    assert not errors or errors[0] == errors[1]
    torch.testing.assert_close(pair.ours_params, pair.native_params, rtol=1e-12, atol=1e-14)


@each
@pytest.mark.expects_native
def test_dispatch_mode_sees_the_step(backend, name):
    class Seen(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    pair = Pair(name, values_of([(9,)]), **TYPICAL[name])
    pair.set_grads(values_of([(9,)], seed=1))
    with Seen() as seen:
        pair.ours.step()
    pair.native.step()
    pair.assert_equal()
    assert seen.calls > 0


@each
def test_version_counters(backend, name):
    pair = Pair(name, values_of([(9,)]), native_kwargs={"fused": False, "foreach": False}, **TYPICAL[name])
    pair.set_grads(values_of([(9,)], seed=1))
    pair.step()
    before = pair.ours_params[0]._version
    states = {k: v._version for k, v in pair.ours.state[pair.ours_params[0]].items()}
    x = torch.ones(9, dtype=torch.float64, requires_grad=True)
    product = (x * pair.ours_params[0]).sum()
    pair.ours.step()
    assert pair.ours_params[0]._version > before
    assert all(v._version > states[k] for k, v in pair.ours.state[pair.ours_params[0]].items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---- what calls a step ----


@each
def test_closure(backend, name):
    pair = Pair(name, values_of([(9,)]), **TYPICAL[name])

    def closure(optimizer, p):
        optimizer.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            ours = pair.ours.step(lambda: closure(pair.ours, pair.ours_params[0]))
        native = pair.native.step(lambda: closure(pair.native, pair.native_params[0]))
        torch.testing.assert_close(ours, native, rtol=1e-12, atol=0)
    assert torch.is_grad_enabled()
    pair.assert_equal()


@each
@pytest.mark.expects_native
@pytest.mark.parametrize("native", [False, True])
def test_hooks_run_once(backend, name, native):
    getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1))])  # wraps torch's own step in hooks
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128 if native else torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = getattr(fastnn.optim, name)([p], **({} if not native or name == "SGD" else {"amsgrad": True}))
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert calls == ["all pre", "pre", "post", "all post"]


@each
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
)
def test_lr_scheduler(backend, name, scheduler):
    pair = Pair(name, values_of([(9,)]), **TYPICAL[name])
    schedulers = [scheduler(o) for o in (pair.ours, pair.native)]
    for seed in range(6):
        pair.set_grads(values_of([(9,)], seed=seed))
        pair.step()
        for s in schedulers:
            s.step()
        pair.assert_equal()


# ---- automatic mixed precision ----


def set_amp(optimizer, grad_scale=None, found_inf=None):
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf


@each
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_scale(backend, name, layout):
    """The gradient is left unscaled, as torch's fused step leaves it."""
    pair = Pair(name, values_of([(4, 3, 2, 5)]), fused=True, **TYPICAL[name])
    for seed in range(2):
        pair.set_grads(values_of([(4, 3, 2, 5)], seed=seed), [layout])
        for o in (pair.ours, pair.native):
            set_amp(o, torch.tensor(8.0), torch.tensor(0.0))
        version = pair.ours_params[0].grad._version
        pair.step()
        pair.assert_equal()
        torch.testing.assert_close(
            pair.ours_params[0].grad, pair.native_params[0].grad, rtol=1e-15, atol=0, check_stride=False
        )
        assert pair.ours_params[0].grad._version > version


@each
def test_grad_scale_of_expanded_gradient(backend, name):
    pair = Pair(name, values_of([(4, 6)]), fused=True, **TYPICAL[name])
    pair.set_grads(values_of([(4, 6)], seed=1), ["expanded"])
    expected = pair.ours_params[0].grad.clone() / 8
    for o in (pair.ours, pair.native):
        set_amp(o, torch.tensor(8.0))
    pair.step()
    pair.assert_equal()
    torch.testing.assert_close(pair.ours_params[0].grad, expected)


@each
@pytest.mark.parametrize("found", [1.0, 2.0, 0.5, float("nan")])
@pytest.mark.parametrize("scale", [None, torch.tensor(4.0)])
def test_found_inf_skips(backend, name, found, scale):
    pair = Pair(name, values_of([(9,)]), fused=True, **TYPICAL[name])
    pair.set_grads([torch.full((9,), float("inf"), dtype=torch.float64)])
    set_amp(pair.ours, scale, torch.tensor(found))
    pair.ours.step()  # the first step is skipped: no buffer may come of it
    assert torch.equal(pair.ours_params[0], pair.native_params[0])
    set_amp(pair.ours)
    for seed in range(2):
        pair.set_grads(values_of([(9,)], seed=seed))
        pair.step()
        pair.assert_equal()
    set_amp(pair.ours, scale, torch.tensor(found))
    pair.ours.step()
    pair.assert_equal()


@each
def test_numbers_on_the_device_stay_there(backend, name, monkeypatch):
    """Kernels that can read lr, grad_scale and found_inf from the device's memory do: the host never does."""
    if backend.startswith("cpu"):
        pytest.skip("the CPU's kernels take these numbers from the host, where they are")
    lr = torch.tensor(0.05, dtype=torch.float64)
    pair = Pair(name, values_of([(9,)]), **{**TYPICAL[name], "lr": lr, "fused": True})
    first = pair.ours_params[0]
    fastnn.dispatch.choice(pair.ours._op, first.device, first.dtype)  # the first one tries Triton and waits
    for seed, found in enumerate((1.0, 0.0, 0.0)):
        pair.set_grads(values_of([(9,)], seed=seed))
        for o in (pair.ours, pair.native):
            set_amp(o, torch.tensor(4.0), torch.tensor(found))
        with monkeypatch.context() as patch:
            for read in ("__float__", "__bool__", "__int__", "__index__", "item", "tolist"):
                patch.setattr(torch.Tensor, read, lambda self, read=read: pytest.fail(f"{read} of {self.shape}"))
            pair.ours.step()
        if not found:
            pair.native.step()
            pair.assert_equal()


@each
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(backend, name, fused):
    results = []
    for module in (fastnn.optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=torch.float64)
        optimizer = getattr(module, name)(model.parameters(), fused=fused, **TYPICAL[name])
        scaler = torch.amp.GradScaler(str(torch.get_default_device()), init_scale=2.0**10, growth_interval=2)
        for i in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 5, dtype=torch.float64) * (float("inf") if i in (2, 3) else 1)
            scaler.scale(model(x).square().mean()).backward()
            if i == 4:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append((*model.parameters(), torch.tensor(scaler.get_scale())))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


# ---- what goes to torch ----


@each
@pytest.mark.expects_native
@pytest.mark.parametrize("what", ["complex", "sparse", "meta", "subclass", "differentiable", "mixed", "backend"])
def test_uncovered(backend, name, what):
    class Sub(torch.Tensor):
        pass

    results = []
    for module in (fastnn.optim, torch.optim):
        dtype = torch.complex128 if what == "complex" else torch.float64
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for _ in range(2)]
        kwargs = dict(TYPICAL[name])
        if what == "mixed":
            params.append(torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)))
        if what == "meta":
            params = [torch.nn.Parameter(p.to("meta")) for p in params]
        if what == "subclass":
            params = [p.detach().as_subclass(Sub).requires_grad_() for p in params]
        if what == "differentiable":
            kwargs["differentiable"] = True
            params = [p.detach().requires_grad_().clone() for p in params]
        if what == "sparse":
            kwargs = {"lr": 0.1}
        optimizer = getattr(module, name)(params, **kwargs)
        error = None
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p).detach()
                if what == "sparse":
                    p.grad = p.grad.to_sparse()
            try:
                with fastnn.backend("torch") if what == "backend" else contextlib.nullcontext():
                    optimizer.step()
            except RuntimeError as e:
                error = str(e)
        results.append((params, [dict(s) for s in optimizer.state.values()], error))
    (ours, our_states, our_error), (native, native_states, native_error) = results
    assert our_error == native_error
    if what != "meta":
        torch.testing.assert_close(list(ours), list(native))
        torch.testing.assert_close(our_states, native_states)
    else:
        assert [float(s.get("step", 0)) for s in our_states] == [float(s.get("step", 0)) for s in native_states]


# ---- the inputs torch ships ----


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_optim_db_inputs(backend, name, dtype, flags):
    for case in optimizer_info(name).optim_inputs_func(device="cpu", dtype=dtype):
        pair = Pair(name, values_of([(10, 5), (10,)], dtype), **{**case.kwargs, **flags})
        for seed in range(4):
            pair.set_grads(values_of([(10, 5), (10,)], dtype, seed=seed))
            pair.step()
        tolerance = 1e-7 if isinstance(case.kwargs.get("lr"), torch.Tensor) else 1e-12
        pair.assert_equal(*([tolerance] * 2 if dtype is torch.float64 else [1e-6, 1e-7]))


@each
def test_optim_db_error_inputs(backend, name):
    for case in optimizer_info(name).optim_error_inputs_func(device="cpu", dtype=torch.float64):
        raised = []
        for module in (fastnn.optim, torch.optim):
            given_params = case.optimizer_error_input.params
            params = [torch.nn.Parameter(torch.ones(2))] if given_params is None else given_params
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(case.error_type, match=case.error_regex) as e:  # noqa: PT012
                    optimizer = getattr(module, name)(params, **case.optimizer_error_input.kwargs)
                    optimizer.step()
            raised.append((type(e.value), str(e.value)))
        assert raised[0] == raised[1], case.optimizer_error_input.desc


@each
@pytest.mark.parametrize(
    "kwargs",
    [
        {"foreach": True, "fused": True},
        {"fused": True, "differentiable": True},
        {"lr": -1.0},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_constructor_errors(name, kwargs):
    raised = []
    for module in (fastnn.optim, torch.optim):
        with pytest.raises(Exception) as e:  # noqa: PT011
            getattr(module, name)([torch.nn.Parameter(torch.ones(2))], **kwargs)
        raised.append((type(e.value), str(e.value)))
    assert raised[0] == raised[1]


@each
@pytest.mark.expects_native
def test_fused_complex_and_capturable_raise_as_torch(backend, name):
    for kwargs in ({"fused": True}, {"capturable": True}):
        if name == "SGD" and "capturable" in kwargs:
            continue
        raised = []
        for module in (fastnn.optim, torch.optim):
            p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
            p.grad = torch.ones_like(p)
            optimizer = getattr(module, name)([p], **kwargs)
            with pytest.raises((RuntimeError, AssertionError)) as e:
                optimizer.step()
            raised.append((type(e.value), str(e.value)))
        assert raised[0] == raised[1]
