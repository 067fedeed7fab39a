"""The measured cost of decoding: what a hook on the backbone counts."""

import pytest
import torch

from rolldiff import Heun
from rolldiff.editing import row_mask


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_the_cost_is_what_a_hook_on_the_backbone_sees(make, guidance):
    decoder, calls, tokens = make(), [], []

    def hook(module, inputs, output):
        calls.append(module)
        tokens.append(output.shape[0] * output.shape[1])

    decoder.backbone.register_forward_hook(hook)
    settings = {"num_groups": 4, "steps": 3, "guidance": guidance, "seed": 0}
    image = torch.rand(1, *decoder.layout.image_shape)
    mask = row_mask(image, 4, 8)

    def check(cost):
        assert (cost.nfe, cost.tokens) == (len(calls), sum(tokens))
        calls.clear(), tokens.clear()

    check(decoder.decode([1], overlap=0.5, solver=Heun(), **settings).cost)
    check(decoder.decode([1], image=image, mask=mask, **settings | {"num_groups": 2}).cost)
    *_, last = decoder.stream([1], **settings)
    assert last.nfe == len(calls) > 12, "previews count too"


def test_two_streams_at_once_count_their_own_calls(make):
    decoder = make()
    streams = [decoder.stream(num_groups=2, steps=2, seed=s, preview=False) for s in (0, 1)]
    assert [[a.nfe, b.nfe] for a, b in zip(*streams, strict=True)] == [[n, n] for n in range(1, 5)]
