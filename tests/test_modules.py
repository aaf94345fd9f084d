"""The modules against their torch counterparts: values and gradients, state_dict, repr, copies and pickles."""

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn as native
from torch.profiler import ProfilerActivity, profile

import fastnn
import fastnn.nn as nn

pytestmark = pytest.mark.one_tier

PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


def pair(cls, *args, **kwargs):
    """A fastnn module and the native modules that compute the same, on the same weights, in float64."""
    ours = cls(*args, **kwargs).double()
    pool = [native.MaxPool2d(kwargs.pop("pool_kernel_size", 2), kwargs.pop("pool_stride", None))]
    conv = native.Conv2d(*args, **kwargs).double()
    conv.load_state_dict(ours.state_dict())
    after = {nn.Conv2d: [], nn.ConvReLU2d: [native.ReLU()], nn.ConvReLUMaxPool2d: [native.ReLU(), *pool]}[cls]
    return ours, native.Sequential(conv, *after)


def assert_same(ours, theirs, input):
    inputs = [input.clone().requires_grad_() for _ in range(2)]
    results = [module(x) for module, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*results)
    grad = torch.randn_like(results[0])
    grads = [
        torch.autograd.grad(result, [x, *module.parameters()], grad)
        for result, module, x in zip(results, (ours, theirs), inputs, strict=True)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.big
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_padding_modes(backend, cls, padding_mode, bias):
    ours, theirs = pair(cls, 3, 4, 3, padding=(1, 2), bias=bias, padding_mode=padding_mode)
    assert_same(ours, theirs, torch.randn(2, 3, 9, 8, dtype=torch.float64))


@pytest.mark.big
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": "same"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "valid"},
        {"stride": 2, "padding": 1, "groups": 2},
        {"stride": (1, 2), "dilation": (2, 1), "groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 4, 11, 10), (4, 11, 10)], ids=["batched", "unbatched"])
def test_arguments(backend, cls, kwargs, shape):
    ours, theirs = pair(cls, 4, 8, 3, **kwargs)
    assert_same(ours, theirs, torch.randn(shape, dtype=torch.float64))


@pytest.mark.big
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_autocast(backend, cls, lower, dtypes):
    ours, theirs = (module.to(dtypes[1]) for module in pair(cls, 3, 4, 3, padding=1))
    x = torch.randn(2, 3, 9, 8).to(dtypes[0]).requires_grad_()
    with torch.autocast(str(torch.get_default_device()), lower):
        results = [module(x) for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    grad = torch.randn_like(results[0])
    grads = [
        torch.autograd.grad(result, [x, *module.parameters()], grad)
        for result, module in zip(results, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


@pytest.mark.expects_native
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
def test_autocast_leaves_float64_alone(backend, cls):
    ours, theirs = pair(cls, 3, 4, 3)
    with torch.autocast(str(torch.get_default_device())):
        torch.testing.assert_close(*(module(torch.ones(1, 3, 8, 8, dtype=torch.float64)) for module in (ours, theirs)))
        for module in (ours, theirs):
            with pytest.raises(RuntimeError):
                module(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(("kernel_size", "stride"), [(2, None), (3, 2), ((2, 3), (1, 2))])
def test_pool_arguments(backend, kernel_size, stride):
    ours, theirs = pair(nn.ConvReLUMaxPool2d, 2, 3, 3, pool_kernel_size=kernel_size, pool_stride=stride)
    assert_same(ours, theirs, torch.randn(2, 2, 12, 11, dtype=torch.float64))


@pytest.mark.parametrize("inplace", [False, True])
def test_relu(backend, inplace):
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0, float("nan"), float("inf"), -float("inf")])
    ours, theirs = x.clone(), x.clone()
    result = nn.ReLU(inplace)(ours)
    torch.testing.assert_close(result, native.ReLU(inplace)(theirs), equal_nan=True)
    assert (result is ours) == inplace
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert repr(nn.ReLU(inplace)) == repr(native.ReLU(inplace))


@pytest.mark.parametrize("name", ["Conv2d", "ReLU", "MaxPool2d", "Sequential"])
def test_is_the_torch_class_with_its_signature(name):
    ours, theirs = getattr(nn, name), getattr(native, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
def test_copies_pickles_and_weights(cls):
    module = cls(2, 3, 3, padding=1)
    assert list(module.state_dict()) == ["weight", "bias"]
    x = torch.randn(1, 2, 6, 6)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is cls
        assert repr(other) == repr(module)
        assert torch.equal(other(x), module(x))
    native.Conv2d(2, 3, 3, padding=1).load_state_dict(module.state_dict())


# ---- Sequential ----


def operators(module, input):
    """The operators of fastnn and of native torch's convolution, ReLU and pooling that a call runs, in order."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        module(input)
    native_names = ("aten::conv2d", "aten::relu", "aten::relu_", "aten::max_pool2d")
    return [e.name.split("::")[1] for e in profiler.events() if e.name.startswith("fastnn::") or e.name in native_names]


def small(*layers):
    """fastnn's Sequential of these, and torch's of the same kind and weights, in float64."""
    ours = nn.Sequential(*layers).double()
    theirs = copy.deepcopy(ours)
    counterparts = {nn.Conv2d: native.Conv2d, nn.ReLU: native.ReLU, nn.MaxPool2d: native.MaxPool2d}
    for module in theirs.modules():
        module.__class__ = counterparts.get(type(module), type(module))
    theirs.__class__ = native.Sequential
    return ours, theirs


ALL = "conv2d_relu_max_pool2d"
SEQUENCES = {
    "all three": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)], [ALL]),
    "in place": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)], [ALL]),
    "twice": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1), nn.ReLU()], [ALL, "conv2d"]),
    "circular": (lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()], ["conv2d"]),
    "nested": (lambda: [nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), nn.MaxPool2d(2)], ["conv2d", "max_pool2d"]),
    "padded pool": (lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], ["conv2d", "max_pool2d"]),
    "something between": (lambda: [nn.Conv2d(2, 3, 3), nn.Identity(), nn.ReLU()], ["conv2d", "relu"]),
    "no convolution": (lambda: [nn.ReLU(), nn.MaxPool2d(2)], ["relu", "max_pool2d"]),
    "a class of one's own": (
        lambda: [nn.Conv2d(2, 3, 3), type("Own", (nn.ReLU,), {"forward": lambda self, x: x * 2})()],
        ["conv2d"],
    ),
    "nothing": (list, []),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequential_runs_layers_as_one(name):
    layers, expected = SEQUENCES[name]
    x = torch.randn(2, 2, 12, 11, dtype=torch.float64)
    with fastnn.backend("cpu"):
        ours, theirs = small(*layers())
        assert_same(ours, theirs, x)
        assert operators(ours, x) == expected
        assert_same(ours[:2], theirs[:2], x)
        ours.float(), theirs.float()
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                assert ours(x.float()).dtype is theirs(x.float()).dtype


HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(lambda module, args, output: output * 2),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda module, grads, _: tuple(g * 2 for g in grads)),
    "a _conv_forward of its own": lambda m: setattr(
        m, "_conv_forward", lambda *args: type(m)._conv_forward(m, *args) * 2
    ),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: type(m).forward(m, x) * 2),
    "parametrization": lambda m: native.utils.parametrize.register_parametrization(m, "weight", native.Tanh()),
    "weight norm": lambda m: native.utils.weight_norm(m),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_sequential_lets_hooks_see_what_is_between(place, hook):
    if place and hook in ("parametrization", "weight norm", "a _conv_forward of its own"):
        pytest.skip("of a convolution")
    ours, theirs = small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    for model in (ours, theirs):
        HOOKS[hook](model[place])
    with fastnn.backend("cpu"):
        assert_same(ours, theirs, torch.randn(2, 2, 12, 11, dtype=torch.float64))


def test_sequential_under_a_global_hook():
    seen = []
    handle = native.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())(torch.randn(1, 2, 6, 6))
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.ReLU, nn.Sequential]


def test_sequential_raises_as_torch_does():
    ours, theirs = small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(2, 8).double(), [1]):
        errors = []
        for model in (ours, theirs):
            with pytest.raises((RuntimeError, TypeError)) as error:
                model(x)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


def test_sequential_traced():
    ours, _ = small(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), ours(x))


# ---- TorchScript ----

IMAGE = torch.linspace(-1, 1, 162, dtype=torch.float64).view(1, 2, 9, 9)
SCRIPTED = {
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), IMAGE),
    "Conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "Conv2d, same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), IMAGE),
    "ReLU": (nn.ReLU, IMAGE),
    "ReLU, in place": (lambda: nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), IMAGE),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "MaxPool2d, indices": (lambda: nn.MaxPool2d(2, return_indices=True), IMAGE),
    "ConvReLU2d": (lambda: nn.ConvReLU2d(2, 3, 3), IMAGE),
    "ConvReLUMaxPool2d": (lambda: nn.ConvReLUMaxPool2d(2, 3, 3, pool_kernel_size=(2, 3), pool_stride=1), IMAGE),
    "Sequential": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), IMAGE),
    "CrossEntropyLoss": (
        lambda: nn.CrossEntropyLoss(torch.ones(2), label_smoothing=0.1),
        IMAGE,
        (IMAGE[:, 0] > 0).long(),
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_saved_and_loaded(name, tmp_path):
    build, *inputs = SCRIPTED[name]
    module = build().double()
    torch.jit.script(module).save(tmp_path / "module.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "module.pt")(*inputs), module(*inputs))


def test_repr():
    assert repr(nn.Sequential(nn.ReLU())) == repr(native.Sequential(native.ReLU()))
    assert repr(nn.Conv2d(2, 3, 3)) == repr(native.Conv2d(2, 3, 3))
    assert repr(nn.ConvReLU2d(2, 3, 3)) == "ConvReLU2d(2, 3, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(nn.ConvReLUMaxPool2d(2, 3, 3, pool_kernel_size=3)) == (
        "ConvReLUMaxPool2d(2, 3, kernel_size=(3, 3), stride=(1, 1), pool_kernel_size=3, pool_stride=3)"
    )


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d])
@pytest.mark.parametrize("kwargs", [{"groups": 2}, {"padding_mode": "other"}, {"padding": "other"}, {"groups": 0}])
def test_wrong_arguments_raise_as_torch_does(cls, kwargs):
    with pytest.raises(ValueError, match=r".") as theirs:
        native.Conv2d(3, 4, 3, **kwargs)
    with pytest.raises(ValueError, match=r".") as ours:
        cls(3, 4, 3, **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("input", [None, [1.0]], ids=str)
@pytest.mark.parametrize("forced", [None, "cpu"])
def test_what_is_no_tensor_raises_as_in_torch(forced, input):
    target = torch.tensor([0, 1])
    for name, args, *more in (
        ("Conv2d", (2, 3, 3)),
        ("ReLU", ()),
        ("MaxPool2d", (2,)),
        ("CrossEntropyLoss", (), target),
        ("CrossEntropyLoss", (torch.ones(2), None, -100, None, "mean", 0.1), target),
    ):
        errors = []
        for module in (nn, native):
            with fastnn.backend(forced) if forced else nullcontext(), pytest.raises(TypeError) as error:
                getattr(module, name)(*args)(input, *more)
            errors.append(str(error.value).splitlines()[0])
        assert errors[0] == errors[1]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8), (2, 3, 2, 2)])
def test_wrong_inputs_raise_as_torch_does(shape):
    with pytest.raises(RuntimeError) as theirs:
        native.Conv2d(3, 4, 3)(torch.zeros(shape))
    for cls in (nn.Conv2d, nn.ConvReLU2d, nn.ConvReLUMaxPool2d):
        with pytest.raises(RuntimeError) as ours:
            cls(3, 4, 3)(torch.zeros(shape))
        assert str(ours.value) == str(theirs.value)


def test_the_rest_is_torch_nn():
    assert nn.Linear is native.Linear
    assert nn.Module is native.Module
    assert nn.utils is native.utils
    assert nn.functional.conv2d is not native.functional.conv2d


def test_lazy_convolutions_become_fastnns():
    ours, theirs = nn.LazyConv2d(4, 3), native.LazyConv2d(4, 3)
    x = torch.randn(1, 3, 5, 5)
    for module in (ours, theirs):
        module(x)
    assert type(ours) is nn.Conv2d
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)
