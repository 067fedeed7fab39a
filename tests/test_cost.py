import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from rolldiff import Euler, Heun, Multistep, RollingSchedule
from rolldiff.cost import predict


@pytest.mark.parametrize(("causal", "cache"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("step", [Euler(), Heun(), Multistep()], ids=repr)
def test_the_formula_is_the_count(make, step, causal, cache):
    decoder = make(causal=causal)

    @run_settings(max_examples=15)
    @given(st.integers(1, 16), st.floats(0, 1), st.integers(1, 5), st.booleans())
    def agree(num_groups, overlap, steps, guidance):
        cost = decoder.decode(
            [1],
            num_groups=num_groups,
            overlap=overlap,
            steps=steps,
            step=step,
            guidance=1.0 if guidance else 0.0,
            cache=cache,
            seed=0,
        ).cost
        assert (cost.nfe, cost.tokens) == predict(
            16,
            RollingSchedule(num_groups, overlap),
            steps,
            calls=step.calls,
            guidance=guidance,
            causal=causal,
            cache=cache,
        )

    agree()


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_the_meter_sees_what_a_hook_on_the_backbone_sees(make, guidance):
    decoder, calls, tokens = make(), [], []

    def hook(module, inputs, output):
        calls.append(module)
        tokens.append(output.shape[0] * output.shape[1])

    decoder.backbone.register_forward_hook(hook)
    settings = {"num_groups": 4, "steps": 3, "guidance": guidance, "seed": 0}
    image = torch.rand(1, *decoder.layout.image_shape)
    mask = torch.zeros(image.shape[2:], dtype=torch.bool)
    mask[-4:] = True

    def check(cost):
        assert (cost.nfe, cost.tokens) == (len(calls), sum(tokens))
        calls.clear(), tokens.clear()

    check(decoder.decode([1], overlap=0.5, step=Heun(), **settings).cost)
    check(decoder.inpaint(image, mask, [1], **settings | {"num_groups": 2}).cost)
    check(decoder.variations(image, [2], [1], iterations=2, **settings).cost)
    *_, last = decoder.stream([1], **settings)
    assert last.nfe == len(calls) > 12, "previews count too"


def test_two_streams_at_once_count_their_own_calls(make):
    decoder = make()
    streams = [decoder.stream(num_groups=2, steps=2, seed=s, preview=False) for s in (0, 1)]
    assert [[a.nfe, b.nfe] for a, b in zip(*streams, strict=True)] == [[n, n] for n in range(1, 5)]
