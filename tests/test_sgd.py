"""What is particular to SGD; the rest of its tests is in test_optim.py."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optimizers import TYPICAL, Pair, values_of

import fastnn.ops.sgd
import fastnn.optim

pytestmark = pytest.mark.kernels


def op_args(requires_grad=False):
    params = [torch.randn(5, 3, requires_grad=requires_grad), torch.randn(4, dtype=torch.float64)]
    state = [[torch.rand_like(p, requires_grad=False) for p in params] for _ in range(2)]
    return (params, *state, [1], 0.1, 0.9, 0.1, 0.1, False, False, True, 2.0)


@pytest.mark.one_tier
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastnn.sgd_.default, op_args())


def test_raw_operator_refuses_to_cut_the_graph(backend):
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.fastnn.sgd_(*op_args(requires_grad=True))


@pytest.mark.parametrize("first_steps", [[-1], [2]])
def test_first_steps_out_of_range(backend, first_steps):
    args = list(op_args())
    args[3] = first_steps
    with pytest.raises(RuntimeError, match="first_steps"):
        torch.ops.fastnn.sgd_(*args)


def numpy_classical(p, grads, lr, momentum, nesterov=False, weight_decay=0.0, dampening=0.0, maximize=False):
    v = None
    for lr_t, g in zip(lr, grads, strict=True):
        g = (-g if maximize else g) + weight_decay * p
        v = -lr_t * g if v is None else momentum * v - lr_t * (1 - dampening) * g
        p = p + (momentum * v - lr_t * g if nesterov else v)
    return p, v


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"dampening": 0.3}, {"maximize": True, "weight_decay": 0.1}],
)
def test_lr_in_velocity(backend, options):
    p, *grads = (x.cpu().numpy() for x in values_of([(13,)] * 6))
    lrs = [0.1, 0.1, 0.5, 0.01, 0.2]
    param = torch.nn.Parameter(torch.tensor(p))
    optimizer = fastnn.optim.SGD([param], lr=1, momentum=0.9, lr_in_velocity=True, **options)
    for lr, g in zip(lrs, grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.tensor(g)
        optimizer.step()
    expected, v = numpy_classical(p, grads, lrs, 0.9, **options)
    np.testing.assert_allclose(param.detach().cpu().numpy(), expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(optimizer.state[param]["momentum_buffer"].cpu().numpy(), v, rtol=1e-13, atol=1e-15)


@pytest.mark.expects_native
@pytest.mark.parametrize("nesterov", [False, True])
def test_lr_in_velocity_of_complex_parameters(backend, nesterov):
    """torch's path has no such option; it takes the same steps all the same."""
    real = [torch.view_as_complex(x) for x in values_of([(4, 2)] * 5)]
    param = torch.nn.Parameter(real[0].clone())
    optimizer = fastnn.optim.SGD(
        [param], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1, maximize=True, lr_in_velocity=True
    )
    for g in real[1:]:
        param.grad = g.clone()
        optimizer.step()
    p, *grads = (x.cpu().numpy() for x in real)
    expected, v = numpy_classical(p, grads, [0.1] * 4, 0.9, nesterov, weight_decay=0.1, maximize=True)
    np.testing.assert_allclose(param.detach().cpu().numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(optimizer.state[param]["momentum_buffer"].cpu().numpy(), v, rtol=1e-13)


def test_lr_in_velocity_is_a_group_option():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = fastnn.optim.SGD([{"params": [a]}, {"params": [b], "lr_in_velocity": False}], lr_in_velocity=True)
    optimizer.add_param_group({"params": [c]})
    expected = [True, False, True]
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [g["lr_in_velocity"] for g in o.param_groups] == expected
        assert o.defaults["lr_in_velocity"] is True
    other = fastnn.optim.SGD([{"params": [p]} for p in (a, b, c)])
    other.load_state_dict(optimizer.state_dict())
    assert [g["lr_in_velocity"] for g in other.param_groups] == expected
    # torch's state_dict has torch's form of the buffer.
    other.load_state_dict(torch.optim.SGD([{"params": [p]} for p in (a, b, c)]).state_dict())
    assert [g["lr_in_velocity"] for g in other.param_groups] == [False] * 3


def test_some_parameters_at_their_first_step(backend):
    pair = Pair("SGD", values_of([(5,), (6,), (7,)]), **TYPICAL["SGD"])
    for on in ((True, False, True), (True, True, True), (False, True, False)):
        grads = values_of([(5,), (6,), (7,)], seed=2)
        pair.set_grads([g if keep else None for g, keep in zip(grads, on, strict=True)])
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("dampening", [0, 0.3])
def test_first_step_after_a_skipped_one(backend, dampening):
    """Whoever reads found_inf, host or device, no momentum comes of the skipped step."""
    pair = Pair("SGD", values_of([(5,), (6,)]), lr=0.1, momentum=0.9, dampening=dampening, fused=True)
    for seed in range(3):
        pair.set_grads(values_of([(5,), (6,)], seed=seed))
        pair.ours.found_inf = torch.tensor(float(seed == 0))
        pair.ours.step()
        if seed > 0:
            pair.native.step()
            pair.assert_equal()


def test_tensor_lr_and_weight_decay(backend):
    lr, decay = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    pair = Pair("SGD", values_of([(7,)]), lr=lr, weight_decay=decay, momentum=0.9)
    for seed in range(3):
        pair.set_grads(values_of([(7,)], seed=seed))
        pair.step()
        pair.assert_equal()


@pytest.mark.one_tier
def test_a_step_may_be_captured(backend, monkeypatch):
    """torch asks before a capture for an option that SGD has not got. The capture itself: test_cuda.py."""
    capturing = SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: capturing)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    fastnn.optim.SGD([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
