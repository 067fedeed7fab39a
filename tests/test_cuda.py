"""What only a CUDA device can show: `pytest -m gpu`."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = [(1, 0.0), (4, 0.0), (5, 0.5), (16, 0.0)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def on_cuda(make):
    return lambda: make().to("cuda")


@pytest.mark.parametrize(("num_groups", "overlap"), SETTINGS)
def test_the_cache_is_exact_and_equals_the_cpu(on_cuda, make, num_groups, overlap):
    ask = {"num_groups": num_groups, "overlap": overlap, "steps": 4, "seed": 0}
    kept = on_cuda().decode([1, 2], dtype=torch.float32, **ask).image
    plain = on_cuda().decode([1, 2], dtype=torch.float32, cache=False, **ask).image
    assert relative(kept, plain) < 1e-5
    assert relative(kept.cpu(), make().decode([1, 2], **ask).image) < 1e-4


def test_bfloat16_is_the_default(on_cuda):
    decoder = on_cuda()
    ask = {"num_groups": 4, "steps": 4, "seed": 0}
    default = decoder.decode(**ask).image
    assert default.dtype == torch.float32
    assert torch.equal(default, decoder.decode(dtype=torch.bfloat16, **ask).image)
    assert 1e-5 < relative(default, decoder.decode(dtype=torch.float32, **ask).image) < 0.1


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize(("num_groups", "overlap"), SETTINGS)
def test_replayed_graphs_equal_single_launches(on_cuda, num_groups, overlap, guidance):
    plain, compiled = on_cuda(), on_cuda()
    compiled.compile()
    ask = {"num_groups": num_groups, "overlap": overlap, "steps": 4, "guidance": guidance}
    for seed in range(2):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            expected = plain.decode([1, 2], seed=seed, dtype=dtype, **ask).image
            found = compiled.decode([1, 2], seed=seed, dtype=dtype, **ask)
            assert relative(found.image, expected) < tolerance
            *_, last = compiled.stream([1, 2], seed=seed, dtype=dtype, **ask)
            assert relative(last.image, expected) < tolerance


def test_a_replay_hides_no_operations(on_cuda):
    counts = []
    for decoder in (on_cuda(), on_cuda()):
        if counts:
            decoder.compile()
        with FlopCounterMode(display=False) as counter:
            decoder.decode(1, num_groups=1, steps=8, seed=0)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
