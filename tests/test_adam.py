"""What is particular to Adam and AdamW; the rest of their tests is in test_optim.py."""

import pytest
import torch
from optimizers import Pair, values_of

import fastnn.ops.adam
import fastnn.optim

pytestmark = pytest.mark.kernels


def op_args(requires_grad=False):
    params = [torch.randn(5, 3, requires_grad=requires_grad), torch.randn(4, dtype=torch.float64)]
    state = [[torch.rand_like(p, requires_grad=False) for p in params] for _ in range(4)]
    steps = [torch.tensor(2.0), torch.tensor(0.0, dtype=torch.float64)]
    return (params, *state, steps, 0.1, 0.9, 0.99, 0.1, 1e-8, True, False, False, 2.0)


@pytest.mark.one_tier
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastnn.adam_.default, op_args())


def test_raw_operator_refuses_to_cut_the_graph(backend):
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.fastnn.adam_(*op_args(requires_grad=True))


@pytest.mark.parametrize("position", range(6))
def test_lists_of_different_lengths_are_refused_unchanged(backend, position):
    args = list(op_args())
    before = args[0][0].clone()
    args[position] = args[position][:1]
    with pytest.raises(RuntimeError, match=r"expected \d"):
        torch.ops.fastnn.adam_(*args)
    assert torch.equal(args[0][0], before)


def test_steps_of_each_parameter(backend):
    """Parameters at different steps, float32 and float64 counters."""
    pair = Pair("Adam", values_of([(5,), (6,)]), lr=0.1)
    for grads in ([True, False], [True, True], [False, True], [True, True]):
        pair.set_grads([g if on else None for g, on in zip(values_of([(5,), (6,)], seed=3), grads, strict=True)])
        pair.step()
        pair.assert_equal()
    for state in pair.ours.state.values():
        state["step"] = state["step"].double()
    pair.step()
    assert [float(s["step"]) for s in pair.ours.state.values()] == [4, 4]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)])
def test_tensor_lr_and_betas(backend, lr):
    betas = tuple(torch.tensor(beta, dtype=torch.float64, device="cpu") for beta in (0.9, 0.99))
    pair = Pair("AdamW", values_of([(7,)]), lr=lr, betas=betas, native_kwargs={"fused": True})
    for seed in range(3):
        pair.set_grads(values_of([(7,)], seed=seed))
        pair.step()
        pair.assert_equal()


@pytest.mark.expects_native
def test_betas_on_a_device_are_not_read_from_there(backend, monkeypatch):
    """The host would wait, which a step that is being captured must not: torch's own reads them where they are."""
    betas = torch.tensor(0.9, device="meta"), torch.tensor(0.99, device="meta")  # which cannot be read
    pair = Pair("Adam", values_of([(7,)]), lr=0.1)
    pair.set_grads(values_of([(7,)], seed=1))
    pair.ours.param_groups[0]["betas"] = betas
    native_steps = []
    monkeypatch.setattr(fastnn.optim.Adam, "_native_step", lambda self, group: native_steps.append(group["betas"]))
    pair.ours.step()
    assert native_steps == [betas]


def test_adamw_is_an_adam():
    assert issubclass(fastnn.optim.AdamW, torch.optim.AdamW)
    assert issubclass(fastnn.optim.AdamW, fastnn.optim.Adam)
