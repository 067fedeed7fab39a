"""A decoder in somebody else's training: under autocast, recomputed, compiled, shared out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharing import batch, build

JOB = Path(__file__).with_name("sharing.py")


def gradients(decoder, seed=0):
    image, cond = batch()
    cond.requires_grad_()
    decoder.zero_grad()
    loss = decoder(image, cond, generator=torch.Generator().manual_seed(seed))
    loss.backward()
    named = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return loss.detach(), named | {"cond": cond.grad}


def test_recomputed_blocks_give_the_same_gradients():
    decoder = build()
    loss, plain = gradients(decoder)
    decoder.backbone.gradient_checkpointing = True
    again, recomputed = gradients(decoder)
    assert torch.equal(loss, again)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_autocast_is_near():
    decoder = build()
    loss, plain = gradients(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = gradients(decoder)
    assert rounded.dtype == torch.float32
    assert rounded == pytest.approx(float(loss), rel=0.02)
    assert (found["cond"] - plain["cond"]).norm() < 0.1 * plain["cond"].norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The .grad attribute")
def test_a_compiled_decoder_trains_the_same():
    decoder = build()
    loss, plain = gradients(decoder)
    decoder.compile()
    again, compiled = gradients(decoder)
    torch.testing.assert_close(again, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_share_a_batch(kind):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(JOB), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same gradients") == 2
