from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from rolldiff import (
    DDIM,
    AdamsBashforth2,
    DecodeConfig,
    Decoder,
    Euler,
    GroupSchedule,
    Heun,
    Midpoint,
    Rectified,
    Training,
)
from rolldiff.diffusion.process import Inverse, inverse, to_x_eps
from rolldiff.diffusion.sampler import Solver
from rolldiff.diffusion.schedule import attention_mask

LABEL = torch.tensor([3, 1, 4])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (torch.float64, 1e-12)],
)
@pytest.mark.parametrize(
    "solver", [Euler(), Heun(), Midpoint(), AdamsBashforth2(), DDIM()], ids=repr
)
def test_the_cache_is_exact(make, solver, dtype, tolerance):
    decoder = make(dtype=dtype)

    @run_settings(max_examples=15)
    @given(
        st.integers(1, 16),
        st.floats(0, 1),
        st.integers(1, 4),
        st.sampled_from([0.0, 1.5]),
        st.integers(1, 3),
        st.sampled_from(["top_to_bottom", "random:0"]),
    )
    def agree(num_groups, overlap, steps, guidance, batch, order):
        ask = {
            "num_groups": num_groups,
            "overlap": overlap,
            "steps": steps,
            "guidance": guidance,
            "order": order,
            "solver": solver,
            "seed": 0,
        }
        cached, plain = (decoder.decode(LABEL[:batch], cache=c, **ask) for c in (True, False))
        assert relative(cached.image, plain.image) < tolerance
        assert (cached.cost.cached, plain.cost.cached) == (True, False)
        assert cached.cost.nfe == plain.cost.nfe
        assert cached.cost.tokens <= plain.cost.tokens

    agree()


def test_one_group_is_ordinary_diffusion_bit_by_bit(make):
    """The same network and noise in a loop that knows nothing of groups."""
    decoder, steps = make(), 5
    noise = decoder.decode(LABEL, steps=steps, seed=1, solver=_Nothing()).image
    x = decoder.layout.tokens(noise)
    given = decoder.conditioning.validate(LABEL, len(LABEL), decoder.device)
    context = decoder.backbone.prepare(torch.arange(16), given)
    with torch.no_grad():
        time = decoder.backbone.embed_time(torch.arange(steps, -1, -1) / steps)
        for r in range(steps):
            t, s = (torch.tensor([[[steps - i]]]).double() / steps for i in (r, r + 1))
            y = decoder.backbone(x, time[r : r + 1], context)
            by = Inverse(*(number.float() for number in inverse("x", Rectified(), t)))
            x_0, eps = to_x_eps(y, x, by)
            alpha, sigma = Rectified().alpha(s).float(), Rectified().sigma(s).float()
            x = torch.addcmul(alpha * x_0, sigma, eps)
    ordinary = decoder.layout.image(x)
    assert torch.equal(decoder.decode(LABEL, steps=steps, seed=1).image, ordinary)


class _Nothing(Solver):
    """Leaves the noise where it is."""

    order = 0

    def step(self, denoise, x_t, interval):
        return x_t, denoise(x_t, interval.t)


def test_pixel_autoregression_is_the_chain_rule(make):
    """At num_groups = num_pixels a pixel depends on the noise of no later pixel."""
    decoder = make(patch=1, num_classes=0, dtype=torch.float64)
    with torch.no_grad():
        order = torch.arange(64)
        context = decoder.backbone.prepare(order)
        mask = attention_mask(order, order)
        x, t = torch.randn(1, 64, 1, dtype=torch.float64), torch.rand(64, dtype=torch.float64)
        time = decoder.backbone.embed_time(t)
        y = decoder.backbone(x, time, context, mask=mask)
        for pixel in (1, 20, 63):
            moved = x.clone()
            moved[:, pixel] += 1
            change = (decoder.backbone(moved, time, context, mask=mask) - y)[0, :, 0]
            assert (change[:pixel] == 0).all()
            assert (change[pixel:] != 0).all()
    cost = decoder.decode(num_groups=64, steps=2, seed=0).cost
    assert (cost.nfe, cost.tokens) == (128, 64 * 3 - 1)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 8, 16])
def test_grouping_costs_no_tokens(make, num_groups):
    cost = make().decode(num_groups=num_groups, steps=4, seed=0).cost
    last = 16 - GroupSchedule(num_tokens=16, num_groups=num_groups).ends[-2]
    assert cost.nfe == 4 * num_groups
    assert cost.tokens == 16 * (4 + 1) - last


@pytest.mark.parametrize("order", ["top_to_bottom", "random:0"])
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 0.0), (4, 0.0), (5, 0.5)])
def test_stream_equals_decode_and_finished_pixels_stay(make, order, num_groups, overlap):
    decoder = make()
    ask = {"num_groups": num_groups, "overlap": overlap, "steps": 4, "order": order, "seed": 0}
    frames = list(decoder.stream(LABEL, **ask))
    assert torch.equal(frames[-1].image, decoder.decode(LABEL, **ask).image)
    assert frames[-1].finished.all()
    assert frames[-1].tau == 0
    for a, b in pairwise(frames):
        assert torch.equal(a.image[..., a.finished], b.image[..., a.finished])
        assert (b.finished | ~a.finished).all()
        assert a.tau > b.tau
        assert a.nfe < b.nfe


def test_stream_shows_evenly_spaced_frames(make):
    decoder = make()
    frames = list(decoder.stream(LABEL, num_groups=4, steps=5, seed=0, frames=4))
    assert [round(f.tau, 9) for f in frames] == [0.75, 0.5, 0.25, 0]
    assert [int(f.finished.sum()) for f in frames] == [16, 32, 48, 64]


def test_previews_of_waiting_tokens_are_an_estimate(make):
    decoder = make()
    ask = {"num_groups": 4, "steps": 2, "seed": 0, "frames": 1 + 1}
    shown, hidden = (next(decoder.stream(LABEL, preview=p, **ask)) for p in (True, False))
    waiting = torch.zeros(8, 8, dtype=torch.bool)
    waiting[4:] = True
    assert (hidden.image[..., waiting] == 0).all()
    assert (shown.image[..., waiting] != 0).all()
    assert shown.nfe == hidden.nfe + 1
    assert torch.equal(shown.image[..., ~waiting], hidden.image[..., ~waiting])


def test_a_sample_is_the_same_alone_and_in_a_batch(make):
    decoder = make(dtype=torch.float64)
    ask = {"num_groups": 4, "overlap": 0.5, "steps": 3, "solver": DDIM()}
    together = decoder.decode(LABEL, seed=7, **ask).image
    for i in range(3):
        alone = decoder.decode(LABEL[i : i + 1], seed=7, start_index=i, **ask).image
        torch.testing.assert_close(alone[0], together[i])
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    batch = decoder.decode(LABEL, seed=generator, **ask).image
    generator.set_state(state)
    first = decoder.decode(LABEL[:1], seed=generator, **ask).image
    torch.testing.assert_close(first[0], batch[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_decoded_one_at_a_time_do_not_depend_on_their_batch(make, dtype):
    """As docs/conventions.md says."""
    decoder = make()
    ask = {"seed": 7, "num_groups": 4, "steps": 3, "dtype": dtype}

    def decoded(labels, start):
        return torch.cat(
            [
                decoder.decode(labels[i : i + 1], start_index=start + i, **ask).image
                for i in range(len(labels))
            ]
        )

    assert torch.equal(decoded(LABEL, 0)[1:], decoded(LABEL[1:], 1))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 8e-6), (torch.float16, 6e-3), (torch.bfloat16, 7e-2)]
)
def test_an_image_alone_in_a_batch_and_cached_agrees_as_documented(make, dtype, tolerance):
    decoder = make()
    ask = {"seed": 7, "num_groups": 4, "steps": 8, "dtype": dtype}
    together = decoder.decode(LABEL, **ask).image
    for cache in (True, False):
        alone = decoder.decode(LABEL[1:2], start_index=1, cache=cache, **ask).image[0]
        assert relative(alone, together[1]) < tolerance


def test_every_setting_starts_from_the_same_noise(make):
    decoder = make()
    ask = {"num_images": 2, "steps": 1, "solver": _Nothing(), "seed": 0}
    one = decoder.decode(**ask).image
    for num_groups, order in [(4, "top_to_bottom"), (16, "random:0")]:
        assert torch.equal(decoder.decode(num_groups=num_groups, order=order, **ask).image, one)


def test_guidance_moves_away_from_the_null_condition(make):
    decoder = make(dtype=torch.float64)
    ask = {"steps": 1, "seed": 0}
    with_label = decoder.decode(LABEL, **ask).image
    without = decoder.decode(None, num_images=3, **ask).image
    guided = decoder.decode(LABEL, guidance=2.0, **ask)
    torch.testing.assert_close(guided.image, with_label + 2 * (with_label - without))
    assert guided.cost.nfe == 1
    assert guided.cost.tokens == 2 * 16


def test_bidirectional_runs_without_a_cache_and_says_so(make):
    cost = make(causal=False).decode(num_groups=4, steps=2, seed=0).cost
    assert not cost.cached
    assert cost.tokens == 16 * 8


def test_loss_is_reproducible_and_learns():
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=8, channels=1, width=32, depth=1, num_classes=10, training=Training((1, 4))
    )
    image = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round() * 2 - 1
    label = torch.arange(64) % 10

    def loss():
        return decoder.loss(image, label, generator=torch.Generator().manual_seed(0))

    before = loss()
    assert torch.equal(before, loss())
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        decoder.loss(image, label).backward()
        optimizer.step()
    assert loss() < 0.8 * before


def test_clean_context_carries_no_loss(make, monkeypatch):
    decoder = make()
    draw = decoder.training_distribution.sample

    def clean(*arguments, **others):
        drawn = draw(*arguments, **others)
        return drawn._replace(clean=drawn.clean | True, t=torch.zeros_like(drawn.t))

    monkeypatch.setattr(Training, "sample", lambda _, *given, **others: clean(*given, **others))
    assert decoder.loss(torch.zeros(2, 1, 8, 8)) == 0


@pytest.mark.parametrize("num_groups", [(1,), (1, 4)])
def test_training_shows_every_token_its_own_time(make, monkeypatch, num_groups):
    """Also where a time that all tokens share is embedded once."""
    decoder, draws, times = make(), [], []
    sample, forward = Training.sample, decoder.backbone.forward

    def kept(self, *arguments, **others):
        draws.append(sample(self, *arguments, **others))
        return draws[-1]

    def shown(x_t, time, *arguments, **others):
        times.append(time)
        return forward(x_t, time, *arguments, **others)

    monkeypatch.setattr(Training, "sample", kept)
    monkeypatch.setattr(decoder.backbone, "forward", shown)
    decoder.training_distribution = Training(num_groups)
    decoder._groups = decoder.training_distribution.tables(decoder.layout.coords)[1]
    decoder.loss(torch.zeros(8, 1, 8, 8))
    assert times[0].shape[1] == (1 if num_groups == (1,) else 16)
    wanted = decoder.backbone.embed_time(draws[0].t)
    torch.testing.assert_close(times[0].expand_as(wanted), wanted)


def test_decoding_beyond_training_warns_and_names_the_setting():
    decoder = Decoder.build(
        image_size=8, channels=1, width=32, depth=1, training=Training(num_groups=(1, 4))
    )
    with pytest.warns(UserWarning, match=r"num_groups 2 \(trained: 1, 4\)"):
        decoder.decode(num_groups=2, steps=1)
    with pytest.warns(UserWarning, match="order bottom_to_top"):
        decoder.decode(num_groups=4, order="bottom_to_top", steps=1)


GOOD = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("image", "cond", "word"),
    [
        (torch.zeros(2, 3, 8, 8), None, "image must have shape"),
        (torch.zeros(2, 8, 8), None, "image must have shape"),
        (torch.zeros(0, 1, 8, 8), None, "image must have shape"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, "floating point"),
        (torch.full((2, 1, 8, 8), 255.0), None, r"image must be in \[-1, 1\]"),
        (torch.full((2, 1, 8, 8), float("nan")), None, r"image must be in \[-1, 1\]"),
        (GOOD, [0, 10], "cond must be in 0 … 9"),
        (GOOD, [-1, 0], "cond must be in 0 … 9"),
        (GOOD, [0], "cond must have shape"),
        (GOOD, torch.zeros(2), "whole numbers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_training_input(make, image, cond, word):
    with pytest.raises(ValueError, match=word):
        make().loss(image, cond)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 17}, "num_groups"),
        ({"overlap": 1.5}, "overlap"),
        ({"overlap": -0.5}, "overlap"),
        ({"steps": 0}, "steps"),
        ({"num_images": 0}, "num_images"),
        ({"order": "sideways"}, "order"),
        ({"guidance": 1.0}, "guidance needs a condition"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"cond": [12]}, "cond"),
        ({"cond": [1, 2], "num_images": 3}, "cond must have shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_decode_input(make, arguments, word):
    decoder = make()
    with pytest.raises(ValueError, match=word):
        decoder.decode(**arguments)
    with pytest.raises(ValueError, match=word):
        decoder.stream(**arguments)


@pytest.mark.parametrize("frames", [0, 100, 1.5])
@pytest.mark.usefixtures("unchecked")
def test_bad_frames(make, frames):
    with pytest.raises(ValueError, match="frames"):
        make().stream(num_groups=2, steps=2, frames=frames)


def test_one_type_holds_the_settings(make):
    """`decode` and `stream` take a config, keywords, or a config with keywords that replace it."""
    decoder = make()
    config = DecodeConfig(num_groups=4, overlap=0.5, steps=3, guidance=1.5, solver=Heun())
    keywords = {"num_groups": 4, "overlap": 0.5, "steps": 3, "guidance": 1.5, "solver": Heun()}
    image = decoder.decode(LABEL, config, seed=0).image
    assert torch.equal(decoder.decode(LABEL, seed=0, **keywords).image, image)
    other = DecodeConfig(num_groups=2, overlap=0.5, steps=3, guidance=1.5, solver=Heun())
    assert torch.equal(decoder.decode(LABEL, other, seed=0, num_groups=4).image, image)
    *_, last = decoder.stream(LABEL, other, seed=0, num_groups=4)
    assert torch.equal(last.image, image)
    for call in (decoder.decode, decoder.stream):
        with pytest.raises(ValueError, match="got 'num_group'; did you mean num_groups"):
            call(LABEL, num_group=4)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"num_groups": 0}, "num_groups must be"),
        ({"num_groups": 2.5}, "num_groups must be"),
        ({"overlap": 2}, "overlap must be"),
        ({"steps": True}, "steps must be"),
        ({"solver": "euler"}, "solver must be a Solver"),
        ({"guidance": "strong"}, "guidance must be"),
        ({"guidance": float("inf")}, "guidance must be"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(setting, word):
    with pytest.raises(ValueError, match=word):
        DecodeConfig(**setting)


def test_given_noise_is_where_decoding_starts(make):
    decoder = make()
    seeded = decoder.decode(LABEL, steps=1, seed=0, solver=_Nothing()).image
    ask = {"num_groups": 4, "steps": 3, "seed": 0}
    again = decoder.decode(LABEL, noise=seeded, **ask | {"seed": 5}).image
    assert torch.equal(again, decoder.decode(LABEL, **ask).image)
    with pytest.raises(ValueError, match="agree on the number of images"):
        decoder.decode(LABEL, noise=seeded, num_images=2)


def test_a_preview_changes_nothing_in_the_cache(make):
    """Frames with previews and without have the same final image and final rows, bit for bit."""
    decoder = make()
    ask = {"num_groups": 5, "overlap": 0.4, "steps": 4, "seed": 0, "guidance": 1.0}
    pairs = zip(
        decoder.stream(LABEL, **ask), decoder.stream(LABEL, preview=False, **ask), strict=True
    )
    for shown, hidden in pairs:
        assert torch.equal(shown.finished, hidden.finished)
        assert torch.equal(shown.image[..., shown.finished], hidden.image[..., shown.finished])


def test_labels_for_a_decoder_without(make):
    with pytest.raises(ValueError, match="built without a condition"):
        make(num_classes=0).decode([1])


def test_any_image_size():
    decoder = Decoder.build(image_size=(6, 10), channels=3, patch=2, width=32, depth=1)
    assert decoder.loss(torch.rand(2, 3, 6, 10)).isfinite()
    with pytest.warns(UserWarning, match="num_groups"):
        assert decoder.decode(num_groups=7, steps=1).image.shape == (1, 3, 6, 10)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 0.0), (4, 0.5), (16, 0.0)])
def test_the_network_in_bfloat16_and_the_state_in_float32(make, num_groups, overlap, guidance):
    """Cached and plain differ by no more than what the network rounds: 2^-9 an operation."""
    decoder = make()
    ask = {
        "num_groups": num_groups,
        "overlap": overlap,
        "steps": 4,
        "seed": 0,
        "guidance": guidance,
    }
    full = decoder.decode(LABEL, **ask).image
    kept = decoder.decode(LABEL, dtype=torch.bfloat16, **ask).image
    plain = decoder.decode(LABEL, dtype=torch.bfloat16, cache=False, **ask).image
    assert kept.dtype == torch.float32
    assert 1e-5 < relative(kept, full) < 0.1, "the network did round, and no more"
    assert relative(kept, plain) < 0.1
    *_, last = decoder.stream(LABEL, dtype=torch.bfloat16, **ask)
    assert torch.equal(last.image, kept)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("preview", [True, False])
def test_images_may_go_into_a_loss(make, dtype, preview):
    """Steps run in inference mode; what comes out of them is a tensor like any other."""
    decoder, modes = make(), []
    decoder.backbone.register_forward_hook(
        lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    ask = {"num_groups": 3, "steps": 2, "seed": 0, "dtype": dtype}
    images = [decoder.decode(LABEL, **ask).image]
    assert set(modes) == {(False, dtype is None)}, "under autocast casts of weights are kept"
    for frame in decoder.stream(LABEL, preview=preview, **ask):
        assert torch.is_grad_enabled(), "whoever takes frames goes on as before"
        images.append(frame.image)
    assert not any(grad for grad, _ in modes)
    scale = torch.ones((), requires_grad=True)
    for image in images:
        assert not image.requires_grad
        (image * scale).sum().backward()
    assert scale.grad == pytest.approx(sum(image.sum().item() for image in images), rel=1e-4)


def test_weights_in_bfloat16(make):
    """Angles of places and times stay exact, and so does the state."""
    decoder = make()
    full = decoder.decode(LABEL, num_groups=4, seed=0).image
    half = decoder.to(torch.bfloat16).decode(LABEL, num_groups=4, seed=0)
    assert half.image.dtype == torch.float32
    assert relative(half.image, full) < 0.2


def test_bad_dtype(make):
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16 or .* got torch\.float64"):
        make().decode(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float64 with"):
        make(dtype=torch.float64).decode(dtype=torch.bfloat16)


@pytest.fixture
def interpreted(monkeypatch):
    """Traces as `torch.compile` does, and runs what it traced without generating code."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_shapes_serve_every_span(make, interpreted):
    """One token or many, one time or many, with a cache or none; never one for each span."""
    decoder, plain = make(), make()
    names = list(decoder.state_dict())
    decoder.compile()
    assert list(decoder.state_dict()) == names

    def agree(num_groups, overlap):
        ask = {"num_groups": num_groups, "overlap": overlap, "steps": 4, "seed": 0}
        compiled, eager = decoder.decode(LABEL, **ask), plain.decode(LABEL, **ask)
        assert relative(compiled.image, eager.image) < 1e-5
        assert compiled.cost.tokens == eager.cost.tokens

    for num_groups, overlap in [(1, 0.0), (2, 0.0), (2, 1.0), (3, 0.0), (5, 0.5), (16, 0.0)]:
        agree(num_groups, overlap)
    traced = interpreted["unique_graphs"]
    assert 1 <= traced <= 12
    for num_groups, overlap in [(4, 0.25), (6, 0.0), (7, 0.5), (11, 0.75), (8, 1.0)]:
        agree(num_groups, overlap)
    assert interpreted["unique_graphs"] == traced, "other spans, nothing compiled again"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by the tracer
def test_a_compiled_decoder_guides_streams_and_does_without_a_cache(make, interpreted):
    decoder, plain = make(dtype=torch.float64), make(dtype=torch.float64)
    decoder.compile()
    ask = {"num_groups": 5, "overlap": 0.5, "steps": 3, "seed": 0, "guidance": 2.0}
    expected = plain.decode(LABEL, **ask).image
    assert relative(decoder.decode(LABEL, **ask).image, expected) < 1e-12
    assert relative(decoder.decode(LABEL, cache=False, **ask).image, expected) < 1e-12
    *_, last = decoder.stream(LABEL, **ask)
    assert relative(last.image, expected) < 1e-12
    assert decoder.loss(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).isfinite()
