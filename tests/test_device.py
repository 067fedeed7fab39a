"""What would wait for an accelerator, or mix devices, found without one.

On the meta device tensors have no values: reading one, or copying it to the CPU, fails. So what
runs there runs without waiting on a GPU.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rolldiff.conditioning
import rolldiff.decoder
import rolldiff.diffusion.layout
from rolldiff import AdamsBashforth2, DecodeConfig, Decoder, Euler, Heun, Midpoint, Training
from rolldiff.conditioning import Conditioning

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Refuses copies from the CPU that would wait for the device."""

    def __torch_dispatch__(self, function, types, arguments=(), others=None):
        others = others or {}
        if function is torch.ops.aten._to_copy.default and others.get("device") == META:
            assert arguments[0].device == META or others.get("non_blocking"), "a copy that waits"
        return function(*arguments, **others)


@pytest.fixture
def meta(monkeypatch):
    """A decoder on the meta device, and what would otherwise refuse tensors without values."""
    for module in (rolldiff.conditioning, rolldiff.decoder, rolldiff.diffusion.layout):
        monkeypatch.setattr(module, "dense_tensor", lambda value, *_: value)
    unread = partial(Conditioning.validate, check_values=False)
    monkeypatch.setattr(Conditioning, "validate", lambda self, *a, **_: unread(self, *a))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def build(**settings):
        training = Training((1, 2, 4), orders=("top_to_bottom", "random:0"), context_noise=0.1)
        settings = {"num_classes": 3, "training": training} | settings
        with META:
            decoder = Decoder.build(image_size=8, channels=1, width=32, depth=1, **settings)
        return decoder.to(META)

    return build


@pytest.mark.parametrize("causal", [True, False])
def test_a_training_step_never_waits(meta, causal):
    decoder = meta(causal=causal)
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=False)
    image = torch.zeros(16, 1, 8, 8, device=META)
    label = torch.zeros(16, dtype=torch.long, device=META)
    with pytest.raises(RuntimeError, match="item"):  # the values are read once
        decoder.loss(image, label)
    decoder._values_checked = True
    with Copies():
        for _ in range(5):
            decoder.loss(image, label).backward()
            optimizer.step()
            optimizer.zero_grad()


SOLVERS = [Euler(), Midpoint(), AdamsBashforth2(), Heun()]
SPANS = [(1, 0.0), (3, 0.0), (3, 0.5), (3, 1.0)]


@pytest.mark.parametrize(
    ("solver", "guidance", "num_groups", "overlap"),
    [(solver, 0.0, *span) for solver in SOLVERS for span in SPANS]
    + [(Euler(), 1.0, *span) for span in SPANS],
    ids=repr,
)
def test_the_loop_of_a_decode_never_waits(meta, num_groups, overlap, solver, guidance):
    decoder = meta(training=Training((1, 3), orders=("top_to_bottom",)))
    config = DecodeConfig(
        num_groups=num_groups, overlap=overlap, steps=3, solver=solver, guidance=guidance
    )
    label = torch.zeros(2, dtype=torch.long, device=META)
    run = decoder.prepare(label, config, num_images=2, seed=0)
    with Copies():
        steps = sum(1 for _ in run.states())
    assert steps == run.schedule.num_steps + 1
