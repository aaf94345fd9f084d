"""fastnn.convert: what it swaps, what it fuses, what it leaves alone, that no result depends on it, and its undoing."""

import copy
import os
import pickle
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fastnn
import fastnn.nn
import fastnn.optim
from fastnn.convert import FusedConv2d, _Ahead

pytestmark = [pytest.mark.big, pytest.mark.one_tier]


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


def state(model):
    """The classes and the names of the attributes of every module, and what it says of itself."""
    return [(type(module), list(vars(module)), module.extra_repr()) for module in model.modules()]


def assert_converts(model, fused, input=None, left_alone=()):
    """Converts the model and checks what was fused, that every result is the native model's, and that revert leaves
    nothing of it behind."""
    input = image() if input is None else input
    model = model.double()
    original = copy.deepcopy(model)
    fastnn.convert(model)
    fastnn.revert(model)
    assert state(model) == state(original)
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
    assert [type(m) for m in model[:3]] == [FusedConv2d, fastnn.nn.ReLU, fastnn.nn.MaxPool2d]
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
    report, *_ = assert_converts(model, [], left_alone=["conv", "(model)"])
    assert report.left_alone[0][1] == "called 2 times, and its results go on differently"


def test_result_used_elsewhere_is_left_alone(backend):
    def residual(m, x):
        y = m.conv(x)
        return F.relu(y) + y

    report, *_ = assert_converts(WithForward(residual, conv=conv()), [], left_alone=["conv", "(model)"])
    assert report.left_alone[0] == ("conv", "what goes into ReLU is used elsewhere too")

    def two_pools(m, x):
        y = F.relu(m.conv(x))
        return F.max_pool2d(y, 2).sum() + y

    report, *_ = assert_converts(WithForward(two_pools, conv=conv()), ["conv"], left_alone=["conv", "(model)"])
    assert report.fused == [("conv", "Conv2d → ReLU")]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(3, ceil_mode=True),
        pytest.param(nn.MaxPool2d(16), marks=pytest.mark.expects_native),
    ],
    ids=repr,
)
def test_other_max_pools_stay(backend, pool):
    model = nn.Sequential(conv(), nn.ReLU(), pool)
    report, *_ = assert_converts(model, ["0"], image(1, 3, 18, 18), left_alone=["0"])
    assert report.fused == [("0", "Conv2d → ReLU")]
    assert "max-pool with padding" in report.left_alone[0][1]


@pytest.mark.expects_native
def test_max_pool_that_returns_indices_stays(backend):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)).double()
    original = copy.deepcopy(model)
    fastnn.convert(model)
    torch.testing.assert_close(model(x := image()), original(x))


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
@pytest.mark.parametrize("pool", [[], [2]], ids=["relu", "pool"])
def test_padding_modes_and_unbatched(backend, padding_mode, pool):
    model = nn.Sequential(conv(padding_mode=padding_mode), nn.ReLU(), *map(nn.MaxPool2d, pool))
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
        assert other[0]._fusion.passes_through == tuple(other)
        assert torch.equal(other(x), model(x))
    assert "runs Conv2d → ReLU → MaxPool2d(kernel_size=(2, 2), stride=(2, 2))" in repr(model)


def test_user_subclasses_are_left_alone():
    class Doubling(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(3, 3, 3, padding=1), nn.ReLU(), conv(), nn.ReLU())
    report, *_ = assert_converts(model, ["2"], left_alone=["0"])
    assert report.left_alone[0] == ("0", "its class Doubling is not torch.nn's own")
    assert [name for name, _ in report.swapped] == ["1", "2", "3"]


def spectral_normed(layer):
    """Its weight changes a buffer each time it is read in training."""
    torch.manual_seed(1)
    return parametrizations.spectral_norm(layer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_convolutions_are_swapped_but_not_fused(backend, when):
    ours, theirs = (nn.Sequential(conv(), nn.ReLU(), conv(4, 2)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    spectral_normed(theirs[0])
    if when == "before":
        spectral_normed(ours[0])
    report = fastnn.convert(ours)
    if when == "before":
        assert not report.fused
        assert report.left_alone[0][1].startswith("it is parametrized")
    else:
        spectral_normed(ours[0])
    x = image()
    torch.testing.assert_close(run(ours, x), run(theirs, x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    if when == "after":
        parametrize.remove_parametrizations(theirs[0], "weight")
        parametrize.remove_parametrizations(ours[0], "weight")
    fastnn.revert(ours)
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in theirs.modules()]
    torch.testing.assert_close(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_conv_forward_of_its_own_is_called(backend, when):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)).double()
    if when == "after":
        fastnn.convert(model)
    model[0]._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, 1, 1) * 2
    if when == "before":
        report = fastnn.convert(model)
        assert not report.fused
        assert report.left_alone[0][1].startswith("its _conv_forward was replaced")
    x = image()
    torch.testing.assert_close(model(x), F.max_pool2d(F.relu(F.conv2d(x, model[0].weight, model[0].bias, 1, 1) * 2), 2))


def data_dependent(m, x):
    y = m.features(x)
    return m.head(y) if y.sum() > 0 else -m.head(y)


def test_what_cannot_be_traced_is_fused_by_its_parts(backend):
    """A convolution whose result leaves the parts is reported, with the code that stops the trace of the whole."""
    features = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2))
    model = WithForward(data_dependent, features=features, head=nn.Sequential(conv(4, 4), nn.ReLU(), nn.Flatten()))
    assert_converts(model, ["features.0", "head.0"])
    inner = WithForward(data_dependent, features=nn.Sequential(conv(), nn.ReLU(), conv(4, 4)), head=nn.ReLU())
    report, *_ = assert_converts(nn.Sequential(nn.Sigmoid(), inner), ["1.features.0"], left_alone=["1"])
    assert report.left_alone[0][1].startswith("torch.fx cannot trace it (test_convert.py:")


def test_modules_without_a_forward_and_in_two_parts(backend):
    """Containers are looked into; a part that is used twice counts once."""
    block = nn.Sequential(conv(3, 3), nn.ReLU(), nn.Sigmoid())
    model = WithForward(
        lambda m, x: m.layers[1](m.again(m.layers[0](x))) if x.sum() > 0 else m.again(x),
        layers=nn.ModuleList([block, nn.Sequential(conv(3, 3), nn.ReLU(), nn.Flatten())]),
        again=block,
    )
    assert_converts(model, ["layers.0.0", "layers.1.0"])


def test_identities_are_seen_through(backend):
    assert_converts(nn.Sequential(conv(), nn.Identity(), nn.ReLU(), nn.Identity(), nn.MaxPool2d(2)), ["0"])
    shortcut = WithForward(lambda m, x: m.identity(y := m.conv(x)) + y, conv=conv(), identity=nn.Identity())
    assert_converts(shortcut, [])


def test_what_has_no_kernel_is_reported():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Linear(1, 1))
    assert fastnn.convert(model).left_alone == [
        ("0", "fastnn has no kernel for Conv1d"),
        ("1", "fastnn has no kernel for ConvTranspose2d"),
    ]


def test_trace_shares_what_cannot_be_copied(backend):
    model = nn.Sequential(conv(), nn.ReLU())
    model.lock = threading.Lock()
    assert len(fastnn.convert(model).fused) == 1


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


def ahead(pool=True):
    """A fused convolution and its native twin."""
    model = nn.Sequential(conv(), nn.ReLU(), *[nn.MaxPool2d(2)] * pool).double()
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

    ours, _ = ahead(pool=False)
    result = checkpoint(torch.relu, ours(image()), use_reentrant=True)  # an autograd.Function has no __torch_function__
    with pytest.raises(RuntimeError, match="a gradient reached the unfinished result"):
        result.sum().backward()
    result = checkpoint(ours, image().requires_grad_(), use_reentrant=True)
    for use in (F.relu, torch.exp):
        with pytest.raises(RuntimeError, match="a gradient would not reach the unfinished result"):
            use(result)

    for tensor in (ours.weight, ours.bias):
        y = ours(image())
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="was modified before"):
            y + 1


def test_stand_in_keeps_the_weights_of_its_call():
    ours, theirs = ahead()
    x = image()
    results = []
    for m in (ours, theirs):
        weights = {name: 2 * p for name, p in m.named_parameters()}
        results.append(torch.func.functional_call(m, weights, (x,)) + 0)
    torch.testing.assert_close(*results)


def test_stand_in_is_asked_what_it_is_without_being_computed(monkeypatch):
    ours, theirs = ahead()
    x = image()
    monkeypatch.setattr(_Ahead, "plain", None)
    y, z = ours(x), theirs(x)
    assert (y.dim(), y.ndim, y.dtype, y.device) == (z.dim(), z.ndim, z.dtype, z.device)


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
        m.last = F.relu(m.conv(x)) + 0 * torch.rand(1)
        return m.last

    model = WithForward(forward, conv=conv()).double()
    random = torch.get_rng_state()
    assert len(fastnn.convert(model).fused) == 1
    assert not hasattr(model, "last")
    assert torch.equal(torch.get_rng_state(), random)
    calls.clear()
    result = model(x := image())
    assert calls[0] is x
    assert model.last is result
    assert not fastnn.convert(model).left_alone, "a stored result is no obstacle"


def test_what_forward_stores_on_the_way_is_left_alone(backend):
    """Grad-CAM reads it and its gradient; a list that forward drops keeps nothing, a cycle through one included."""

    def stored(m, x):
        m.act = m.conv(x)
        return F.relu(m.act)

    report, model, original = assert_converts(WithForward(stored, conv=conv()), [], left_alone=["conv", "(model)"])
    assert report.left_alone[0] == ("conv", "what goes into ReLU is stored by forward")
    x = image()
    for m in (model, original):
        loss = m(x).sum()
        m.act.retain_grad()
        loss.backward()
    torch.testing.assert_close(model.act.grad, original.act.grad)

    kept = []
    model = WithForward(lambda m, x: kept.append(m.conv(x)) or F.relu(kept[-1]), conv=conv())
    assert not fastnn.convert(model).fused

    def dropped(m, x):
        results = [m.conv(x)]
        results.append(results)
        return F.relu(results[0])

    assert_converts(WithForward(dropped, conv=conv()), ["conv"])


def test_the_trace_changes_nothing(backend):
    """Neither the buffers and tensors that forward updates nor any generator of random numbers."""

    def forward(m, x):
        m.steps += 1
        m.average.mul_(0.5)
        if random.random() + np.random.rand() + torch.rand(()) < 3:
            return F.relu(m.conv(x))

    model = WithForward(forward, conv=conv()).double()
    model.register_buffer("steps", torch.zeros((), dtype=torch.long))
    model.average = torch.ones(2)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    assert len(fastnn.convert(model).fused) == 1
    assert before == (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    assert model.steps == 0
    assert torch.equal(model.average, torch.ones(2))
    model(image())
    assert model.steps == 1


def test_functions_that_stay_torchs_are_reported():
    """Neither those that are fused, nor fastnn's, nor those of a module that the report names already."""

    def forward(m, x):
        y = fastnn.nn.functional.relu(F.relu(m.conv(x)) - 1)
        y = (F.max_pool2d(y, 2) + 1).relu()
        return m.block(F.conv2d(y, m.other.weight))

    class Own(nn.ReLU):
        def forward(self, input):
            return super().forward(input)

    block = WithForward(lambda m, x: m.own(torch.relu(x) - torch.relu_(x - 1)), own=Own())
    model = WithForward(forward, conv=conv(), other=conv(4), block=block)
    first, in_block = (f.__code__.co_firstlineno for f in (forward, block.function))
    assert fastnn.convert(model).left_alone == [
        ("block.own", "its class Own is not torch.nn's own"),
        *(
            (name, f"its forward calls torch's {what}): call fastnn.nn.functional's")
            for name, what in (
                ("(model)", f"relu (test_convert.py:{first + 2}"),
                ("(model)", f"max_pool2d (test_convert.py:{first + 2}"),
                ("(model)", f"conv2d (test_convert.py:{first + 3}"),
                ("block", f"relu (test_convert.py:{in_block}, 2 calls"),
            )
        ),
    ]


def test_torchvisions_lines_are_not_torchs():
    file = os.path.dirname(torch.__file__) + "vision/resnet.py"
    forward = eval(compile("lambda m, x: torch.relu(m.conv(x) + 1)", file, "eval"), {"torch": torch})
    ((_, why),) = fastnn.convert(WithForward(forward, conv=conv())).left_alone
    assert "(resnet.py:1)" in why


def test_criterion_and_single_modules():
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    report = fastnn.convert(criterion)
    assert report.swapped == [("(model)", "fastnn.nn.CrossEntropyLoss")]
    assert type(criterion) is fastnn.nn.CrossEntropyLoss
    assert fastnn.convert(layer := conv()).swapped == [("(model)", "fastnn.nn.Conv2d")]
    assert type(layer) is fastnn.nn.Conv2d
    assert not fastnn.convert(nn.Linear(2, 3)).swapped
    for function in (fastnn.convert, fastnn.revert):
        with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module or a torch\.optim\.Optimizer, got int"):
            function(3)


def test_lazy_modules_are_left_alone():
    model = nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU())
    assert fastnn.convert(model).left_alone == [("0", "it is lazy: run the model once first")]
    model(torch.randn(1, 3, 5, 5))
    assert len(fastnn.convert(model).fused) == 1


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_was_compiled_to_torchs_operators_is_reported():
    model = nn.Sequential(conv(), nn.Flatten())
    assert fastnn.convert(torch.jit.script(model)).left_alone == [("0", "TorchScript runs torch's operators")]
    exported = torch.export.export(model, (image().float(),)).module()
    assert fastnn.convert(exported).left_alone == [
        ("(model)", "its graph calls torch's operators: convert what it was made from")
    ]
    fastnn.convert(model)
    exported = torch.export.export(model, (image().float(),), strict=True).module()
    assert not fastnn.convert(exported).left_alone


def test_report_is_a_table():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, padding=1))
    assert str(fastnn.convert(model)).splitlines() == [
        "fastnn.convert: 3 swapped, 1 fused, 1 left alone",
        "  swapped     0  fastnn.nn.Conv2d",
        "  swapped     1  fastnn.nn.ReLU",
        "  swapped     2  fastnn.nn.MaxPool2d",
        "  fused       0  Conv2d → ReLU",
        "  left alone  0  a max-pool with padding, dilation, ceil_mode, indices or over 255 elements is not fused",
    ]
    assert str(fastnn.convert(nn.Linear(1, 1))) == "fastnn.convert: 0 swapped, 0 fused, 0 left alone"


def test_stand_in_type_is_private():
    ours, _ = ahead()
    assert type(ours(image())) is _Ahead


# ---- wrapped models ----


def sharded(model, mesh, *layers):
    for layer in layers:
        fully_shard(model[layer], mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "to": lambda model, mesh: model.to(torch.float64, memory_format=torch.channels_last),
    "dp": lambda model, mesh: nn.DataParallel(model),
    "ddp": lambda model, mesh: DistributedDataParallel(model),
    "fully_shard": sharded,
    "fully_shard each": lambda model, mesh: sharded(model, mesh, 0, 1),
    "compile": lambda model, mesh: torch.compile(model, backend="aot_eager"),
    "compile in place": lambda model, mesh: model.compile(backend="aot_eager") or model,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after", "in use"])
def test_wrapped_models(mesh, wrapper, when):
    def results(model):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        return [output.detach(), *(getattr(g, "full_tensor", lambda g=g: g)() for g in grads)]

    torch._dynamo.reset()
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(120, 3)).double()
    parameters = dict(model.named_parameters())
    x = image()
    exact = results(copy.deepcopy(model))
    inside = model
    if when == "before":
        report = fastnn.convert(model)
    wrapped = WRAPPERS[wrapper](model, mesh)
    types = [type(m) for m in wrapped.modules()]
    if when == "in use":
        results(wrapped)
    if when != "before":
        report = fastnn.convert(wrapped)
    hooked = wrapper == "fully_shard each" and when != "before"
    assert len(report.swapped) == 3
    assert len(report.fused) == 1 - hooked
    assert len(report.left_alone) == hooked
    torch.testing.assert_close(results(wrapped), exact)
    fastnn.revert(wrapped)
    names = [type(m).__name__.removeprefix("FSDP") for m in inside.modules()]
    assert names == ["Sequential", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    assert not any(isinstance(m, (fastnn.nn.Conv2d, fastnn.nn.ReLU)) for m in inside.modules())
    if when != "before":
        assert [type(m) for m in wrapped.modules()] == types
    torch.testing.assert_close(results(wrapped), exact)
    if "fully_shard" not in wrapper:
        assert all(p is parameters[name] for name, p in inside.named_parameters())


@pytest.mark.parametrize("when", ["before", "after", "beside"])
@pytest.mark.parametrize("inplace", [False, True])
def test_parts_that_are_compiled_alone(when, inplace, caplog):
    """They are given the plain result."""
    torch._dynamo.reset()
    model = nn.Sequential(conv(), nn.Sequential(nn.ReLU(inplace), nn.MaxPool2d(2))).double()
    original = copy.deepcopy(model)
    if when == "before":
        model[1].compile(backend="aot_eager")
    report = fastnn.convert(model)
    if when == "before":
        assert report.left_alone == [("0", "a hook on 1, or its compiler, may see what goes into ReLU")]
    elif when == "after":
        model[1].compile(backend="aot_eager")
    else:  # in another module, which convert has not seen
        model[1] = torch.compile(model[1], backend="aot_eager")
    for height in (8, 10):
        torch.testing.assert_close(run(model, x := image(2, 3, height, 8)), run(original, x))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# ---- revert ----


def test_revert_leaves_what_was_fastnns_before(backend):
    layers = [fastnn.nn.Conv2d(3, 4, 3), fastnn.nn.ReLU(), conv(4, 4), nn.ReLU(), fastnn.nn.ConvReLU2d(4, 4, 1)]
    model = nn.Sequential(*layers).double()
    before = state(model)
    seen = []
    model[4].register_forward_hook(lambda m, i, o: seen.append(o))
    x = image()
    exact = run(model, x)
    assert len(fastnn.convert(model).fused) == 2
    fastnn.convert(model)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(copy.deepcopy(model).apply(lambda m: m._forward_hooks.clear()))),
    ]
    for each in (model, *twins):
        fastnn.revert(each)
        assert state(each) == before
        torch.testing.assert_close(run(each, x), exact)
    assert len(seen) == 3
    fastnn.revert(model)
    assert state(model) == before


# ---- folding of BatchNorm2d ----


def normed(*, bias=True, affine=True, seed=0):
    """Convolutions with batch normalization, whose statistics are some that a fresh model has not."""
    torch.manual_seed(seed)
    layers = [conv(bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(
        *layers, conv(4, 4), nn.BatchNorm2d(4), conv(4, 4), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, *module.parameters()):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double().eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folding(backend, bias, affine):
    """In eval mode, values and gradients; in train mode batch normalization is what it was."""
    ours, theirs = normed(bias=bias, affine=affine), normed(bias=bias, affine=affine)
    before = state(ours)
    report = fastnn.convert(ours, fold_batch_norm=True)
    assert [what for _, what in report.fused] == [
        "Conv2d → BatchNorm2d → ReLU → MaxPool2d(kernel_size=(2, 2), stride=(2, 2))",
        "Conv2d → BatchNorm2d",
        "Conv2d → BatchNorm2d → ReLU",
    ]
    x = image()
    for mode in (False, True, False):
        ours.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(run(ours, x), run(theirs, x))
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    fastnn.revert(ours)
    assert state(ours) == before
    torch.testing.assert_close(run(ours, x), run(theirs, x))


def test_folding_really_is_one_op():
    model = normed().float()
    fastnn.convert(model, fold_batch_norm=True)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model(x)  # folds
        with torch.profiler.profile() as profile:
            model(x)
    names = {event.key for event in profile.key_averages()}
    assert "fastnn::conv2d_relu_max_pool2d" in names
    assert not {"aten::batch_norm", "aten::relu", "aten::max_pool2d", "aten::mul", "aten::rsqrt"} & names


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(normed(seed=1).state_dict()),
    "in place": lambda m: [p.detach().mul_(2) for p in m.parameters()],
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "new tensors": lambda m: [setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)), setattr(m[4], "bias", None)],
    "data": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()],
    "data in place": lambda m: [p.data.mul_(2) for p in m.parameters()] and m.eval(),
    "dtype": lambda m: m.float().double(),
    "training": lambda m: m.train()(image()) is m.eval(),
    "training of the statistics alone": lambda m: m[1].train() and m(image()) is m[1].eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow_their_tensors(change):
    ours, theirs = normed(), normed()
    fastnn.convert(ours, fold_batch_norm=True)
    x = image()
    with torch.no_grad():
        ours(x)
        before = ours(x)
        for model in (ours, theirs):
            torch.manual_seed(0)
            CHANGES[change](model)
        torch.testing.assert_close(ours(x), theirs(x))
        assert change == "dtype" or not torch.allclose(ours(x), before)


def test_folding_in_inference_mode_and_with_frozen_weights():
    ours, theirs = normed().requires_grad_(False), normed().requires_grad_(False)
    fastnn.convert(ours, fold_batch_norm=True)
    x = image()
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))
    torch.testing.assert_close(run(ours, x), run(theirs, x))


def test_folding_in_low_precision():
    """One rounding of the folded weight; under autocast the convolution's own dtype."""
    x = torch.randn(2, 3, 12, 10)
    exact = normed().float()(x)
    for autocast in (False, True):
        errors = []
        for fold in (False, True):
            model = normed().to(torch.float32 if autocast else torch.bfloat16)
            fastnn.convert(model, fold_batch_norm=fold)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = model(x if autocast else x.bfloat16())
            assert result.dtype == torch.bfloat16
            errors.append((result - exact).norm() / exact.norm())
        assert errors[1] < 1.5 * errors[0] < 0.05


def test_what_is_not_folded(backend):
    with pytest.raises(RuntimeError, match=r"but 1 is in training mode, which does not use them: call model\.eval"):
        fastnn.convert(model := normed().train(), fold_batch_norm=True)
    assert type(model[0]) is nn.Conv2d, "nothing has changed"
    assert [what for _, what in fastnn.convert(normed()).fused] == []

    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return -super().forward(input)

    for norm in (nn.BatchNorm2d(4, track_running_stats=False), Own(4), nn.InstanceNorm2d(4)):
        ours = nn.Sequential(conv(), norm, nn.ReLU()).double().eval()
        theirs = copy.deepcopy(ours)
        assert not fastnn.convert(ours, fold_batch_norm=True).fused
        torch.testing.assert_close(ours(x := image()), theirs(x))

    def functional(m, x):
        return F.relu(F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var))

    model = WithForward(functional, conv=conv(), norm=nn.BatchNorm2d(4)).double().eval()
    assert not fastnn.convert(model, fold_batch_norm=True).fused


def test_folding_with_hooks(backend):
    ours, theirs = normed(), normed()
    fastnn.convert(ours, fold_batch_norm=True)
    for model in (ours, theirs):
        model[1].register_forward_hook(lambda m, i, o: o + i[0])
    torch.testing.assert_close(run(ours, x := image()), run(theirs, x))


# ---- optimizers ----

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_optimizers_keep_all_they_have(name, scheduled):
    """Two native steps, two of ours, two native ones after revert; hooks and schedulers before convert and after."""
    calls = {}

    def build():
        torch.manual_seed(0)
        weights = [
            nn.Parameter(torch.randn(3, 2, dtype=torch.float64)),
            nn.Parameter(torch.randn(2, dtype=torch.float64)),
        ]
        optimizer = OPTIMIZERS[name]([{"params": weights[:1], "lr": 0.2}, {"params": weights[1:]}])
        seen = calls.setdefault(len(calls), [])
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["lr"]))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(type(o).__mro__[1:]))
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)] if scheduled else []
        return weights, optimizer, schedulers

    def step(weights, optimizer, schedulers):
        for weight in weights:
            weight.grad = weight.detach().cos()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    ours, theirs = build(), build()
    optimizer, state = ours[1], ours[1].state
    before = set(vars(optimizer))
    for change in (lambda o: None, fastnn.convert, fastnn.revert):
        report = change(optimizer)
        cls = fastnn.optim if change is fastnn.convert else torch.optim
        assert type(optimizer) is getattr(cls, name)
        if change is fastnn.convert:
            assert report.swapped == [("(optimizer)", f"fastnn.optim.{name}")]
            assert not fastnn.convert(optimizer).swapped, "converted already"
            if scheduled:
                ours[2].append(torch.optim.lr_scheduler.ConstantLR(optimizer, 0.7, 2))
                theirs[2].append(torch.optim.lr_scheduler.ConstantLR(theirs[1], 0.7, 2))
        for _ in range(2):
            step(*ours)
            step(*theirs)
        assert optimizer.state is state
        torch.testing.assert_close(ours[0], theirs[0])
    assert [lr for lr in calls[0] if isinstance(lr, float)] == [lr for lr in calls[1] if isinstance(lr, float)]
    assert len(calls[0]) == len(calls[1]) == 12
    assert set(vars(optimizer)) - before <= {"_opt_called"}
    torch.testing.assert_close(optimizer.state_dict(), theirs[1].state_dict())


@pytest.mark.filterwarnings("error")
def test_schedulers_know_that_a_converted_optimizer_has_stepped():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fastnn.convert(optimizer)
    with torch.profiler.profile() as profile:
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()  # warns where step was not called, or is no longer the one it watches
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]


def test_optimizers_left_alone():
    weights = [nn.Parameter(torch.ones(1))]
    assert len(fastnn.convert(torch.optim.RMSprop(weights)).left_alone) == 1
    replaced = torch.optim.SGD(weights)
    replaced.step = lambda: None
    assert fastnn.convert(replaced).left_alone == [("(optimizer)", "its step was replaced")]
    assert type(replaced) is torch.optim.SGD
    own = fastnn.optim.SGD(weights, lr_in_velocity=True)
    fastnn.revert(own)
    assert type(own) is fastnn.optim.SGD
    assert str(fastnn.convert(own)) == "fastnn.convert: 0 swapped, 0 fused, 0 left alone"
    fastnn.convert(converted := torch.optim.SGD(weights))
    converted.param_groups[0]["lr_in_velocity"] = True
    with pytest.raises(ValueError, match="lr_in_velocity=True"):
        fastnn.revert(converted)
