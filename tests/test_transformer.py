"""Block-causal means it."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rolldiff import ClassLabels, Grouping, Patches, Transformer
from rolldiff.nn.blocks import FEW, LINE, apart, gelu


def network(patch=1, **arguments):
    torch.manual_seed(0)
    layout = Patches(4, channels=1, patch=patch)
    net = Transformer(layout, width=16, depth=2, heads=2, **arguments).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def prepared(net, num_groups, batch=None):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    return net.prepare(order, Grouping(16, num_groups).group, batch=batch, dtype=torch.float64)


@run_settings(max_examples=30)
@given(st.integers(1, 16), st.integers(0, 15), st.booleans())
def test_a_later_token_changes_no_earlier_group(num_groups, token, batched):
    net, group = network(), Grouping(16, num_groups).group
    order, many = torch.arange(16), group
    if batched:  # the path of training: a mask for each example
        order, many = order.expand(2, 16), group.expand(2, 16)
    context = net.prepare(order, many)
    x = torch.randn(2, 16, 1, dtype=torch.float64)
    t = torch.rand(2, 16, dtype=torch.float64)
    y = net(x, net.embed_time(t), context)
    x[:, token] += 1
    t[:, token] = 0.5
    moved = (net(x, net.embed_time(t), context) - y).abs().amax((0, 2)) > 0
    assert not moved[group < group[token]].any()
    assert moved[group >= group[token]].all(), "those that may see it do"


@pytest.mark.parametrize("num_groups", [2, 5, 16])
def test_the_gradient_to_later_groups_is_zero(num_groups):
    net, group = network(), Grouping(16, num_groups).group
    context = prepared(net, num_groups)
    t = torch.rand(16, dtype=torch.float64)
    x = torch.randn(1, 16, 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, net.embed_time(t), context), x)
    reached = jacobian[0, :, 0, 0, :, 0] != 0
    assert torch.equal(reached, group[:, None] >= group[None])


def test_bidirectional_sees_all():
    net = network(causal=False)
    x = torch.randn(1, 16, 1, dtype=torch.float64, requires_grad=True)
    net(x, net.embed_time(torch.rand(16).double()), prepared(net, 4))[0, 0].sum().backward()
    assert (x.grad != 0).all()
    assert prepared(net, 4, batch=1).cached is None


def test_a_span_with_the_cache_equals_the_whole():
    net = network()
    x, t = torch.randn(3, 16, 1, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    whole = net(x, net.embed_time(t), prepared(net, 4))
    context = prepared(net, 4, batch=3)
    parts = [
        net(x[:, a:b], net.embed_time(t[a:b]), context, a) for a, b in [(0, 4), (4, 12), (12, 16)]
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_the_cache_is_as_large_as_documented():
    context = prepared(network(), 4, batch=3)
    depth, width = 2, 16
    kept = sum(part.numel() for layer in context.memory for part in layer)
    assert kept == 2 * depth * 16 * width * 3
    assert prepared(network(), 1, batch=3).memory is None, "a single group is never read again"


def test_places_follow_the_order():
    """The same tokens in another order, all in one group, give the same outputs."""
    net = network()
    x, t = torch.randn(1, 16, 1, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    one = Grouping(16, 1).group
    order = torch.randperm(16)
    y = net(x, net.embed_time(t), net.prepare(torch.arange(16), one))
    shuffled = net(x[:, order], net.embed_time(t[order]), net.prepare(order, one))
    torch.testing.assert_close(shuffled, y[:, order])


def test_places_are_rotations():
    """The product of a query and a key depends on how far apart they are, not on where."""
    context = network().prepare(torch.arange(16), Grouping(16, 1).group)
    q, k = torch.randn(2, 8)

    def turned(x, place):
        return torch.addcmul(x * context.cos[place], x.roll(4), context.sin[place])

    # A row down and a column to the right, from three corners of the 4 x 4 grid.
    products = [turned(q, place) @ turned(k, place + 5) for place in (0, 2, 10)]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-4, atol=1e-5)
    assert (turned(q, 0) @ turned(k, 1) - products[0]).abs() > 1e-3


def test_labels_and_times_matter():
    net = network(condition=ClassLabels(3))
    x, one = torch.randn(2, 16, 1, dtype=torch.float64), Grouping(16, 1).group
    labels = net.condition.check([0, 1], 2, torch.device("cpu"))
    context = net.prepare(torch.arange(16), one, labels)
    t = torch.full((16,), 0.5, dtype=torch.float64)
    y = net(x[:1].expand(2, -1, -1), net.embed_time(t), context)
    assert not torch.allclose(y[0], y[1])
    assert not torch.allclose(y, net(x[:1].expand(2, -1, -1), net.embed_time(t / 2), context))


@pytest.mark.parametrize("arguments", [{"width": 18}, {"depth": 0}, {"heads": 0}])
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match="width"):
        Transformer(Patches(4, channels=1), **({"width": 16, "heads": 2} | arguments))


def test_rows_a_page_long_are_moved_apart():
    weight = torch.randn(8, 1024)
    copy = apart(weight)
    assert torch.equal(copy, weight)
    assert copy.stride(0) * 4 == 4096 + LINE
    assert apart(weight[:, :768].contiguous()) is None


def test_a_decode_with_rows_apart_is_the_same(make):
    decoder = make(width=256, depth=1, heads=4)
    context = decoder.backbone.prepare(
        torch.arange(16), Grouping(16, 4).group, batch=1, dtype=torch.float32
    )
    assert context.up[0] is not None
    kept, plain = (
        decoder.decode([1], num_groups=4, steps=3, seed=0, cache=cache).image
        for cache in (True, False)
    )
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("rows", [1, 3, FEW // 8, FEW // 8 + 1])
def test_gelu_is_the_same_for_few_rows_and_many(rows):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    found = gelu(x)
    assert found.is_contiguous()
    exact = x.double() * torch.special.ndtr(x.double())
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-6)


class Casts(TorchDispatchMode):
    """Counts the casts of weights as large as one of a block."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, arguments=(), others=None):
        cast = function is torch.ops.aten._to_copy.default
        self.count += cast and arguments[0].shape == self.shape
        return function(*arguments, **(others or {}))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_weight_is_cast_once_a_decode(make, steps):
    decoder = make()
    with Casts(decoder.backbone.blocks[0].qkv.weight.shape) as casts:
        decoder.decode(0, num_groups=2, steps=steps, seed=0, dtype=torch.bfloat16)
    assert casts.count == len(decoder.backbone.blocks)
