"""fastnn.convert: what it swaps, what it fuses, what it leaves alone, and that no result depends on it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.convert import FusedConv2d, _Ahead

pytestmark = pytest.mark.big


def conv(inputs=3, outputs=4, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class WithForward(nn.Module):
    """The modules given, and a function of them and the input as forward."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def image(*shape):
    return torch.randn(*(shape or (2, 3, 12, 10)), dtype=torch.float64)


def run(model, input):
    """The result of forward, and the gradients of the input and of every Parameter."""
    input = input.clone().requires_grad_()
    result = model(input)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), [input, *parameters], allow_unused=True)]


def assert_converts(model, fused, input=None, left_alone=()):
    """Converts the model and checks what was fused, and that every result is the native model's."""
    input = image() if input is None else input
    model = model.double()
    original = copy.deepcopy(model)
    report = fastnn.convert(model)
    assert [name for name, _ in report.fused] == list(fused), str(report)
    assert [name for name, _ in report.left_alone] == list(left_alone), str(report)
    torch.testing.assert_close(run(model, input), run(original, input))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input), original.eval()(input))
    return report, model, original


FUNCTIONAL_RELUS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu_": lambda x: torch.relu_(x),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "fastnn relu": lambda x: fastnn.nn.functional.relu(x),
    "fastnn relu inplace": lambda x: fastnn.nn.functional.relu(x, True),
}
POOLS = {
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d(stride)": lambda x: F.max_pool2d(x, kernel_size=(3, 2), stride=[1, 2]),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, (2, 2)),
}


@pytest.mark.parametrize("relu", FUNCTIONAL_RELUS)
@pytest.mark.parametrize("pool", [None, *POOLS])
def test_functions(backend, relu, pool):
    pool = POOLS.get(pool, lambda x: x)
    model = WithForward(lambda m, x: pool(FUNCTIONAL_RELUS[relu](m.conv(x))), conv=conv())
    assert_converts(model, ["conv"])


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_in_a_sequential(backend, inplace):
    model = nn.Sequential(
        conv(), nn.ReLU(inplace), nn.MaxPool2d(2), conv(4, 5, bias=False), nn.ReLU(inplace), conv(5, 2)
    )
    report, model, _ = assert_converts(model, ["0", "3"])
    assert dict(report.fused) == {
        "0": "Conv2d → ReLU → MaxPool2d(kernel_size=(2, 2), stride=(2, 2))",
        "3": "Conv2d → ReLU",
    }
    assert [type(m) for m in model[:3]] == [FusedConv2d, fastnn.nn.ReLU, nn.MaxPool2d]
    assert type(model[5]) is fastnn.nn.Conv2d


def test_the_pass_really_is_one_op(monkeypatch):
    """Neither ReLU nor max-pool runs: only the stand-in meets them."""
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    fastnn.convert(model)
    with torch.profiler.profile() as profile:
        model(torch.randn(1, 3, 8, 8))
    names = {event.key for event in profile.key_averages()}
    assert "fastnn::conv2d_relu_max_pool2d" in names
    assert not {"aten::relu", "fastnn::relu", "aten::max_pool2d", "fastnn::conv2d"} & names


def test_max_pool_before_relu(backend):
    """relu(max_pool(x)) = max_pool(relu(x)), gradient included."""
    assert_converts(nn.Sequential(conv(), nn.MaxPool2d(2), nn.ReLU()), ["0"])
    assert_converts(WithForward(lambda m, x: F.relu_(F.max_pool2d(m.conv(x), 2)), conv=conv()), ["conv"])


def test_nested_and_shared_modules(backend):
    block = nn.Sequential(conv(3, 3), nn.ReLU(), nn.MaxPool2d(2))
    relu = nn.ReLU()
    model = nn.Sequential(block, nn.Sequential(conv(3, 3)), relu, block, conv(), relu, nn.ModuleList([relu])[0])
    assert_converts(model, ["0.0", "1.0", "4"])


def test_one_convolution_called_twice(backend):
    model = WithForward(lambda m, x: F.relu(m.conv(F.relu(m.conv(x)))), conv=conv(3, 3))
    assert_converts(model, ["conv"])
    model = WithForward(lambda m, x: m.conv(F.relu(m.conv(x))), conv=conv(3, 3))
    report, *_ = assert_converts(model, [], left_alone=["conv"])
    assert report.left_alone[0][1] == "called 2 times, and its results go on differently"


def test_result_used_elsewhere_is_left_alone(backend):
    def residual(m, x):
        y = m.conv(x)
        return F.relu(y) + y

    report, *_ = assert_converts(WithForward(residual, conv=conv()), [], left_alone=["conv"])
    assert report.left_alone == [("conv", "what goes into ReLU is used elsewhere too")]

    def two_pools(m, x):
        y = F.relu(m.conv(x))
        return F.max_pool2d(y, 2).sum() + y

    report, *_ = assert_converts(WithForward(two_pools, conv=conv()), ["conv"], left_alone=["conv"])
    assert report.fused == [("conv", "Conv2d → ReLU")]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(3, ceil_mode=True),
        nn.MaxPool2d((16, 1)),
    ],
    ids=repr,
)
def test_other_max_pools_stay(backend, pool):
    model = nn.Sequential(conv(), nn.ReLU(), pool)
    report, *_ = assert_converts(model, ["0"], image(1, 3, 18, 9), left_alone=["0"])
    assert report.fused == [("0", "Conv2d → ReLU")]
    assert "max-pool with padding" in report.left_alone[0][1]


def test_max_pool_that_returns_indices_stays(backend):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)).double()
    original = copy.deepcopy(model)
    fastnn.convert(model)
    torch.testing.assert_close(model(x := image()), original(x))


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
@pytest.mark.parametrize("pool", [[], [nn.MaxPool2d(2)]], ids=["relu", "pool"])
def test_padding_modes_and_unbatched(backend, padding_mode, pool):
    model = nn.Sequential(conv(padding_mode=padding_mode), nn.ReLU(), *pool)
    assert_converts(model, ["0"], image(3, 9, 8))


def test_what_the_user_holds_stays(backend):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(120, 3)).double()
    native = copy.deepcopy(model)
    modules, parameters, state = list(model.modules()), list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train(False)
    model[1].train()
    report = fastnn.convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    assert [m.training for m in model] == [False, True, False, False, False]
    assert all(isinstance(m, type(n)) for m, n in zip(model, native, strict=True))
    assert not fastnn.convert(model).fused, "converted already"
    assert len(report.fused) == 1

    theirs = torch.optim.SGD(native.parameters(), lr=0.1)
    for _ in range(3):
        x = image()
        for m, o in ((model, optimizer), (native, theirs)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    torch.testing.assert_close(model.state_dict(), native.state_dict())
    native.load_state_dict(model.state_dict())
    model.load_state_dict(native.state_dict())


def test_copies_and_pickles(backend):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)).double()
    fastnn.convert(model)
    x = image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(other) == repr(model)
        assert other[0].passes_through == tuple(other)
        assert torch.equal(other(x), model(x))
    assert "then ReLU, MaxPool2d(kernel_size=(2, 2), stride=(2, 2))" in repr(model)


def test_user_subclasses_are_left_alone():
    class Doubling(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(3, 3, 3, padding=1), nn.ReLU(), conv(), nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[2])
    report, *_ = assert_converts(model, [], left_alone=["0", "2"])
    assert report.left_alone[0] == ("0", "its class Doubling is not torch.nn's own")
    assert [name for name, _ in report.swapped] == ["1", "3"]


def test_what_cannot_be_traced_is_swapped_but_not_fused(backend):
    def data_dependent(m, x):
        return m.features(x) if x.sum() > 0 else -m.features(x)

    model = WithForward(data_dependent, features=nn.Sequential(conv(), nn.ReLU()))
    report, model, _ = assert_converts(model, [], left_alone=["(model)"])
    assert "test_convert.py" in report.left_alone[0][1]
    assert [name for name, _ in report.swapped] == ["features.0", "features.1"]
    assert_converts(model.features, ["0"])


def test_branches_that_the_trace_did_not_see(backend):
    """The trace sees one side of each branch; the stand-in takes care of the other."""

    def forward(m, x):
        y = m.conv(x)
        if not m.training:
            return torch.cat([y, F.relu(y)], 1)
        return F.max_pool2d(F.relu(y), 2 if m.window is None else m.window)

    model = WithForward(forward, conv=conv())
    model.window = None
    _, model, original = assert_converts(model, ["conv"])
    for m in (model, original):
        m.train()
        m.window = 3
    x = image()
    torch.testing.assert_close(run(model, x), run(original, x))
    torch.testing.assert_close(run(model.conv, x), run(original.conv, x))
    torch.testing.assert_close(model.conv(x).relu().add(1), original.conv(x).relu().add(1))


def ahead():
    """A fused convolution and its native twin."""
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)).double()
    original = copy.deepcopy(model)
    fastnn.convert(model)
    return model[0], original[0]


def test_stand_in_under_in_place_calls(backend):
    ours, theirs = ahead()
    x = image()
    for fn in (
        lambda y: (y.relu_(), y + 1),
        lambda y: (y.relu_(), F.max_pool2d(y, 2), y),
        lambda y: (y.sum(), y.relu_(), y + 1),
        lambda y: (y.add_(1), F.relu(y), y),
        lambda y: (y.relu_(), y.mul_(-1), y),
        lambda y: (y.shape, y.size(0), len(y), y.requires_grad, y.is_leaf),
        lambda y: (copy.copy(y).detach().numpy().sum(), y.tolist()),
        lambda y: torch.stack([y, y]),
    ):
        torch.testing.assert_close(fn(ours(x)), fn(theirs(x)))


def test_stand_in_keeps_the_grad_mode_of_its_convolution():
    ours, theirs = ahead()
    x = image()
    for m in (ours, theirs):
        with torch.no_grad():
            y, z = m(x), m(x)
        assert not (y * 1).requires_grad
        assert not F.max_pool2d(z.relu(), 2).requires_grad
        y, z = m(x), m(x)
        with torch.no_grad():
            assert not F.max_pool2d(y.relu(), 2).requires_grad
            assert not (z * 1).requires_grad
        assert z.requires_grad


def test_stand_in_refuses_what_it_cannot_get_right():
    ours, _ = ahead()
    x = image()
    y = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="was modified before"):
        y + 1
    assert type(F.max_pool2d(F.relu(y), 2)) is torch.Tensor

    with pytest.raises(RuntimeError, match="past __torch_function__"), torch._C.DisableTorchFunctionSubclass():
        ours(image()).add(1)


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda m, i, o: f(o)),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda m, i: f(*i)),
    "full_backward": lambda m, f: m.register_full_backward_hook(lambda m, i, o: f(*o)),
    "full_backward_pre": lambda m, f: m.register_full_backward_pre_hook(lambda m, o: f(*o)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["conv", "relu", "pool", "inner"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_saw(kind, place, when):
    def build():
        model = nn.Sequential()
        model.inner = nn.Sequential()
        model.inner.conv = conv()
        model.relu = nn.ReLU()
        model.pool = nn.MaxPool2d(2)
        return model.double()

    ours = build()
    theirs = build()
    theirs.load_state_dict(ours.state_dict())
    seen = {id(ours): [], id(theirs): []}
    x = image()
    for model in (ours, theirs):
        if when == "after" and model is ours:
            assert len(fastnn.convert(model).fused) == 1
        module = model.inner.conv if place == "conv" else getattr(model, place)
        handle = HOOKS[kind](module, lambda t, model=model: seen[id(model)].append(t.detach().clone()))
        if when == "before" and model is ours:
            report = fastnn.convert(model)
            assert report.left_alone, str(report)
    torch.testing.assert_close(run(ours, x), run(theirs, x))
    assert len(seen[id(ours)]) == 1
    torch.testing.assert_close(seen[id(ours)], seen[id(theirs)])
    handle.remove()


def test_forward_runs_as_written():
    """forward is still the user's own: what it stores and counts is stored and counted; the trace leaves nothing."""
    calls = []

    def forward(m, x):
        calls.append(x)
        m.last = F.relu(m.conv(x))
        return m.last

    model = WithForward(forward, conv=conv()).double()
    assert len(fastnn.convert(model).fused) == 1
    assert not hasattr(model, "last")
    calls.clear()
    result = model(x := image())
    assert calls[0] is x
    assert model.last is result
    assert not fastnn.convert(model).left_alone, "a stored result is no obstacle"


def test_criterion_and_single_modules():
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    report = fastnn.convert(criterion)
    assert report.swapped == [("(model)", "fastnn.nn.CrossEntropyLoss")]
    assert type(criterion) is fastnn.nn.CrossEntropyLoss
    assert fastnn.convert(layer := conv()).swapped == [("(model)", "fastnn.nn.Conv2d")]
    assert type(layer) is fastnn.nn.Conv2d
    assert not fastnn.convert(nn.Linear(2, 3)).swapped
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got int"):
        fastnn.convert(3)


def test_lazy_modules_are_left_alone():
    report = fastnn.convert(nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU()))
    assert [name for name, _ in report.left_alone] == ["0"]


def test_other_dtypes_devices_and_modes_take_the_plain_path():
    ours, theirs = (nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fastnn.convert(ours)
    x = torch.randn(2, 3, 8, 8)
    with fastnn.backend("torch"):
        assert torch.equal(ours(x), theirs(x))
    meta = copy.deepcopy(ours).to("meta")
    assert meta(x.to("meta")).shape == (2, 4, 4, 4)
    torch.testing.assert_close(torch.func.vmap(ours)(x), theirs(x))
    weights = dict(ours.named_parameters())
    loss = lambda w, m: torch.func.functional_call(m, w, (x,)).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(weights, ours), torch.func.grad(loss)(weights, theirs))
    exported = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(exported(x), theirs(x))


def test_autocast():
    """The stand-in's plain result is of the dtype that autocast gave where the convolution was called."""
    conv2d = fastnn.nn.Conv2d(3, 4, 3)
    model = nn.Sequential(copy.deepcopy(conv2d), nn.ReLU())
    fastnn.convert(model)
    x = torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, stand_in, plain = model(x), model[0](x), conv2d(x)
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(stand_in + 0, plain)


def test_report_is_a_table():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, padding=1))
    assert str(fastnn.convert(model)).splitlines() == [
        "fastnn.convert: 2 swapped, 1 fused, 1 left alone",
        "  swapped     0  fastnn.nn.Conv2d",
        "  swapped     1  fastnn.nn.ReLU",
        "  fused       0  Conv2d → ReLU",
        "  left alone  0  a max-pool with padding, dilation, ceil_mode, indices or a window over 15 is not fused",
    ]
    assert str(fastnn.convert(nn.Linear(1, 1))) == "fastnn.convert: 0 swapped, 0 fused, 0 left alone"


def test_stand_in_type_is_private():
    ours, _ = ahead()
    assert type(ours(image())) is _Ahead
