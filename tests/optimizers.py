"""The body of the optimizers' tests: ours and torch's, built alike and fed the same gradients."""

import copy

import torch
from hypothesis import strategies as st

import fastnn.optim

CLASSES = ("Adam", "AdamW", "SGD")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (7,), (64,), (3, 0, 2), (13, 17), (2, 3, 5, 4), (1, 8, 1, 3), (40_009,))
# How a parameter or a gradient lies in memory.
LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "offset")


def laid_out(values, layout):
    """A tensor of these values with the strides `layout` names."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and values.dim() >= 1:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), 7)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    return values.clone()


def expanded(values):
    """A gradient as `x.sum().backward()` leaves it: one element for all."""
    return values.flatten()[:1].sum().expand(values.shape)


def special(values):
    """Puts inf, NaN and -0 among the values."""
    flat = values.flatten()
    for i, x in enumerate((float("inf"), float("-inf"), float("nan"), -0.0)):
        flat[i::11] = x
    return flat.view(values.shape)


class Pair:
    """An optimizer of ours and the same one of torch's, on equal parameters."""

    def __init__(self, name, values, layouts=None, native_kwargs=None, **kwargs):
        layouts = layouts or ["contiguous"] * len(values)
        self.ours_params = [torch.nn.Parameter(laid_out(v, x)) for v, x in zip(values, layouts, strict=True)]
        self.native_params = [torch.nn.Parameter(v.clone()) for v in values]
        self.ours = getattr(fastnn.optim, name)(self.ours_params, **copy.deepcopy(kwargs))
        kwargs = {**kwargs, **(native_kwargs or {})}
        self.native = getattr(torch.optim, name)(self.native_params, **copy.deepcopy(kwargs))

    def set_grads(self, grads, layouts=None):
        layouts = layouts or ["contiguous"] * len(grads)
        for p, q, g, layout in zip(self.ours_params, self.native_params, grads, layouts, strict=True):
            p.grad = None if g is None else expanded(g) if layout == "expanded" else laid_out(g, layout)
            q.grad = None if g is None else p.grad.clone(memory_format=torch.contiguous_format)

    def step(self):
        self.ours.step()
        self.native.step()

    def assert_equal(self, rtol=1e-12, atol=1e-14):
        for p, q in zip(self.ours_params, self.native_params, strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=atol, equal_nan=True, check_stride=False)
        assert_states_equal(self.ours, self.native, rtol, atol)


def assert_states_equal(a, b, rtol=1e-12, atol=1e-14):
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        for key in a[i]:
            if a[i][key] is None or b[i][key] is None:
                assert a[i][key] is b[i][key]
            else:
                torch.testing.assert_close(
                    a[i][key], b[i][key], rtol=rtol, atol=atol, equal_nan=True, check_stride=False
                )


def options(name):
    """Constructor arguments of the optimizer, as torch accepts them."""
    if name == "SGD":
        return st.fixed_dictionaries(
            {
                "lr": st.sampled_from([0.0, 0.1, 1.5]),
                "weight_decay": st.sampled_from([0, 0.1]),
                "maximize": st.booleans(),
            }
        ).flatmap(
            lambda base: st.sampled_from(
                [
                    {**base, **more}
                    for more in (
                        {},
                        {"momentum": 0.9},
                        {"momentum": 0.5, "dampening": 0.3},
                        {"momentum": 0.9, "nesterov": True},
                    )
                ]
            )
        )
    return st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 1e-3, 0.5]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.3, 0.0), (0.99, 0.5)]),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0, 0.1]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    )


# One demanding configuration of each, for the tests that are about something else.
TYPICAL = {
    "Adam": {"lr": 0.05, "weight_decay": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
}


def values_of(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
