"""A token sees what its mask allows, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rolldiff import ClassLabels, GroupSchedule, Patches, TokenSequence, Transformer
from rolldiff.diffusion.schedule import attention_mask
from rolldiff.nn.transformer import MLP, Attention, ColumnLinear


def network(patch=1, **arguments):
    torch.manual_seed(0)
    layout = Patches(4, channels=1, patch=patch)
    net = Transformer(layout, width=16, depth=2, heads=2, **arguments).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def group_of(num_groups):
    return GroupSchedule(num_tokens=16, num_groups=num_groups).group


def prepared(net):
    return net.prepare(torch.randperm(16, generator=torch.Generator().manual_seed(1)))


def mask_of(num_groups):
    return attention_mask(group_of(num_groups), group_of(num_groups))


@run_settings(max_examples=30)
@given(st.integers(1, 16), st.integers(0, 15), st.sampled_from([None, 1, 2, 4]))
def test_a_later_token_changes_no_earlier_group(num_groups, token, slices):
    net, group, mask = network(), group_of(num_groups), mask_of(num_groups)
    order = torch.arange(16)
    if slices:  # the path of training: a mask for each part of the batch
        order, mask = order.expand(4, 16), mask.expand(slices, 16, 16)
    context = net.prepare(order)
    x = torch.randn(4, 16, 1, dtype=torch.float64)
    t = torch.rand(4, 16, dtype=torch.float64)
    y = net(x, net.embed_time(t), context, mask=mask)
    x[:, token] += 1
    t[:, token] = 0.5
    moved = (net(x, net.embed_time(t), context, mask=mask) - y).abs().amax((0, 2)) > 0
    assert not moved[group < group[token]].any()
    assert moved[group >= group[token]].all(), "those that may see it do"


@pytest.mark.parametrize("num_groups", [2, 5, 16])
def test_the_gradient_to_later_groups_is_zero(num_groups):
    net, group, mask = network(), group_of(num_groups), mask_of(num_groups)
    context = prepared(net)
    t = torch.rand(16, dtype=torch.float64)
    x = torch.randn(1, 16, 1, dtype=torch.float64)

    def call(x):
        return net(x, net.embed_time(t), context, mask=mask)

    jacobian = torch.autograd.functional.jacobian(call, x)
    reached = jacobian[0, :, 0, 0, :, 0] != 0
    assert torch.equal(reached, group[:, None] >= group[None])


def test_bidirectional_sees_all():
    net = network(causal=False)
    x = torch.randn(1, 16, 1, dtype=torch.float64, requires_grad=True)
    t = torch.rand(16, dtype=torch.float64)
    net(x, net.embed_time(t), prepared(net), mask=mask_of(4))[0, 0].sum().backward()
    assert (x.grad != 0).all()
    assert net.make_cache(1, prepared(net)) is None


def test_a_span_with_the_cache_equals_the_whole():
    net, mask = network(), mask_of(4)
    x, t = torch.randn(3, 16, 1, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    context = prepared(net)
    whole = net(x, net.embed_time(t), context, mask=mask)
    cache = net.make_cache(3, context)
    parts = []
    for a, b in [(0, 4), (4, 12), (12, 16)]:
        time, here = net.embed_time(t[a:b]), mask[a:b, :b]
        parts.append(net(x[:, a:b], time, context, start=a, mask=here, cache=cache))
        cache.commit(b)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_the_cache_is_as_large_as_documented():
    net = network()
    depth, width = 2, 16
    kept = sum(part.numel() for layer in net.make_cache(3, prepared(net)).layers for part in layer)
    assert kept == 2 * depth * 16 * width * 3


def test_places_follow_the_order():
    """The same tokens in another order, all in one group, give the same outputs."""
    net = network()
    x, t = torch.randn(1, 16, 1, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    order = torch.randperm(16)
    y = net(x, net.embed_time(t), net.prepare(torch.arange(16)))
    shuffled = net(x[:, order], net.embed_time(t[order]), net.prepare(order))
    torch.testing.assert_close(shuffled, y[:, order])


def test_places_are_rotations():
    """The product of a query and a key depends on how far apart they are, not on where."""
    context = network().prepare(torch.arange(16))
    q, k = torch.randn(2, 8)

    def turned(x, place):
        return torch.addcmul(x * context.rope[0, place], x.roll(4), context.rope[1, place])

    # A row down and a column to the right, from three corners of the 4 x 4 grid.
    products = [turned(q, place) @ turned(k, place + 5) for place in (0, 2, 10)]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-4, atol=1e-5)
    assert (turned(q, 0) @ turned(k, 1) - products[0]).abs() > 1e-3


def test_labels_and_times_matter():
    net = network(condition=ClassLabels(3))
    x = torch.randn(2, 16, 1, dtype=torch.float64)
    labels = net.conditioning.validate([0, 1], 2, torch.device("cpu"))
    context = net.prepare(torch.arange(16), labels)
    t = torch.full((16,), 0.5, dtype=torch.float64)
    y = net(x[:1].expand(2, -1, -1), net.embed_time(t), context)
    assert not torch.allclose(y[0], y[1])
    assert not torch.allclose(y, net(x[:1].expand(2, -1, -1), net.embed_time(t / 2), context))


@pytest.mark.parametrize("arguments", [{"width": 18}, {"depth": 0}, {"heads": 0}])
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match="width|depth|heads"):
        Transformer(Patches(4, channels=1), **({"width": 16, "heads": 2} | arguments))


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(8, 1024, True), (32, 24, False)])
def test_column_copies_are_the_layer(inputs, outputs, bias):
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    columns = ColumnLinear(linear)
    x = torch.randn(2, 3, inputs)
    torch.testing.assert_close(columns(x), linear(x))
    gap = ColumnLinear.LINE // 4 if outputs == 1024 else 0
    assert columns.weight.stride() == (1, outputs + gap)


def test_only_plain_layers_are_copied(make):
    """Layers with hooks and layers of other classes stay, and everything else is shared."""
    block = make().backbone.blocks[0]
    block.mlp.up.register_forward_hook(lambda *_: None)

    class Adapter(torch.nn.Linear):
        pass

    block.attn.out = Adapter(32, 32)
    copied = ColumnLinear.replace(block, (type(block), Attention, MLP))
    assert copied.mlp.up is block.mlp.up
    assert copied.attn.out is block.attn.out
    assert isinstance(copied.attn.qkv, ColumnLinear)
    assert isinstance(block.attn.qkv, torch.nn.Linear), "the network itself is as it was"
    assert copied.attn.qk_scale is block.attn.qk_scale


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_an_example_with_its_own_order_is_as_alone(causal, slices):
    """A batch of different orders, in parts with a mask each, against each example by itself."""
    net = network(causal=causal)
    orders = torch.stack([torch.randperm(16), torch.arange(16), torch.arange(16).flip(0)] * 2)[:4]
    masks = torch.stack([mask_of(g) for g in (4, 1, 16, 2)])[:slices]
    x, t = torch.randn(4, 16, 1, dtype=torch.float64), torch.rand(4, 16, dtype=torch.float64)
    together = net(x, net.embed_time(t), net.prepare(orders), mask=masks)
    for i in range(4):
        mask = masks[i * slices // 4]
        alone = net(x[i : i + 1], net.embed_time(t[i]), net.prepare(orders[i]), mask=mask)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_a_call_has_no_effect_but_its_scratch_memory():
    """The same call twice gives the same output, and only `commit` moves the cache."""
    net = network()
    context = prepared(net)
    cache = net.make_cache(1, context)
    x, t = torch.randn(1, 8, 1, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    first = net(x, net.embed_time(t), context, cache=cache)
    net(x + 1, net.embed_time(t), context, cache=cache)  # a preview, say
    assert cache.length == 0
    assert torch.equal(net(x, net.embed_time(t), context, cache=cache), first)


def test_modules_are_called_so_hooks_run(make):
    """Forward hooks see every attention, MLP and linear layer of a decoding."""
    decoder = make(condition=TokenSequence(3, channels=4), num_classes=0)
    seen = set()
    names = {
        name: module
        for name, module in decoder.backbone.blocks.named_modules()
        if name and not isinstance(module, torch.nn.ModuleList)
    }
    for name, module in names.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    decoder.decode(torch.randn(1, 3, 4), num_groups=4, steps=2, seed=0)
    assert {n for n in names if not n.endswith("kv")} <= seen
    assert any(n.endswith("cross_attn.kv") for n in seen)


def test_lora_adapts_the_linear_layers(make):
    """`peft` wraps the layers; its adapters change the image, and train alone."""
    peft = pytest.importorskip("peft")
    decoder = make()
    before = decoder.decode([1], num_groups=4, steps=2, seed=0).image
    config = peft.LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, decoder)
    after = adapted.decode([1], num_groups=4, steps=2, seed=0).image
    assert not torch.allclose(before, after)
    adapted.loss(torch.zeros(2, 1, 8, 8), [1, 2]).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


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
    with Casts(decoder.backbone.blocks[0].attn.qkv.weight.shape) as casts:
        decoder.decode(0, num_groups=2, steps=steps, seed=0, dtype=torch.bfloat16)
    assert casts.count == len(decoder.backbone.blocks)
