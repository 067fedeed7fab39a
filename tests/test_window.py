"""Local attention: the rule, the exact cache in bounded memory, and images of any size."""

import shutil

import pytest
import torch
from PIL import Image

from rolldiff import (
    ClassLabels,
    DecodeConfig,
    Decoder,
    Heun,
    Midpoint,
    Patches,
    TokenGrid,
    TokenSequence,
    Training,
    Transformer,
)
from rolldiff.cli import main
from rolldiff.diffusion.schedule import (
    GroupSchedule,
    Visibility,
    attention_mask,
    decode_order,
)
from rolldiff.errors import UsageError
from rolldiff.nn import window as windows
from rolldiff.nn.window import Neighbourhood

ORDERS = ("top_to_bottom", "bottom_to_top", "left_to_right", "centre_out", "cells:2", "random:0")


def local(image_size=(10, 6), *, window=2, **settings):
    """A decoder with random weights in float64, one pixel per token."""
    torch.manual_seed(0)
    sizes = {"channels": 1, "patch": 1, "width": 16, "depth": 2, "heads": 2} | settings
    tokens = Patches(image_size, patch=sizes["patch"]).num_tokens
    training = Training([g for g in (1, 2, 3, 5, 10, 60) if g <= tokens], orders=ORDERS)
    decoder = Decoder.build(
        image_size=image_size, window=window, training=training, **sizes
    ).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


@pytest.mark.parametrize("window", [1, 2, 5, 20])
@pytest.mark.parametrize("order", ORDERS)
def test_tiles_are_attention_under_the_mask_of_all_pairs(order, window):
    decoder = local()
    places = decoder.layout.coords[:, 1:].long()[torch.from_numpy(permutation(order))]
    near = Neighbourhood(places, window)
    schedule = GroupSchedule(num_tokens=60, num_groups=7)
    torch.manual_seed(0)
    for span, rule in [
        (slice(0, 60), None),
        (slice(0, 27), Visibility(schedule, 18, 27)),
        (slice(18, 60), Visibility(schedule, 18, 27)),
        (slice(30, 31), None),
    ]:
        n, m = span.stop - span.start, span.stop
        q, k, v = (torch.randn(2, 3, size, 4, dtype=torch.float64) for size in (n, m, m))
        sees = windows.near(places[span], places[:m], window)
        if rule is not None:
            sees &= attention_mask(rule.blocks[span], rule.blocks[:m]) == 0
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        tiles = near.tiles(span, torch.arange(span.start), rule)
        torch.testing.assert_close(tiles.attend(q, k, v), expected, rtol=1e-12, atol=1e-12)
        assert tiles.mask is None or (tiles.mask.amax(-1) == 0).all()


def permutation(order):
    return decode_order(order, Patches((10, 6), channels=1).coords).numpy()


def test_a_wide_window_is_global_attention():
    wide = local(window=20)
    whole = local(window=None)
    weights = wide.state_dict()
    table = torch.zeros(60, 16, dtype=torch.float64)
    whole.load_state_dict(weights | {"backbone.pos_embed": table})
    for settings in ({}, {"num_groups": 5}, {"num_groups": 3, "overlap": 0.5, "solver": Heun()}):
        images = [d.decode(seed=0, steps=3, **settings).image for d in (wide, whole)]
        torch.testing.assert_close(*images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_groups": 5},
        {"num_groups": 60, "steps": 1},
        {"num_groups": 5, "overlap": 0.5, "solver": Midpoint()},
        {"num_groups": 3, "overlap": 0.75, "guidance": 1.0},
        {"num_groups": 10, "overlap": 0.5, "solver": Heun()},
    ],
    ids=str,
)
def test_the_cache_is_exact(order, settings):
    decoder = local(condition=ClassLabels(3))
    options = {"num_images": 2, "seed": 0, "order": order, "steps": 4} | settings
    cached, whole = (decoder.decode(1, cache=cache, **options) for cache in (True, False))
    assert cached.cost.cached
    assert cached.cost.tokens < whole.cost.tokens
    torch.testing.assert_close(cached.image, whole.image, rtol=1e-9, atol=1e-9)


def test_the_cache_is_exact_for_an_inpainted_image():
    decoder = local()
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[3:8, 1:4] = True
    image = torch.rand(1, 1, 10, 6).double() * 2 - 1
    options = {"image": image, "mask": mask, "num_groups": 4, "steps": 3, "seed": 0}
    with pytest.warns(UserWarning, match="trained"):
        cached, whole = (decoder.decode(cache=cache, **options).image for cache in (True, False))
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)


def test_a_token_sees_its_window_and_no_further():
    """A change of the noise of a token reaches those within depth windows of it, no others."""
    decoder = local((12, 12), window=2)
    noise = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    other = noise.clone()
    other[0, 0, 0, 0] += 1
    first, second = (decoder.decode(noise=n, steps=1).image[0, 0] for n in (noise, other))
    changed = first != second
    assert changed[:5, :5].all()  # two blocks of two places each
    assert not changed[5:].any()
    assert not changed[:, 5:].any()


def peak(decoder, height, **settings):
    """The largest cache of a decoding, in bytes."""
    run = decoder.prepare(None, configured(**settings), image_size=(height, 8), seed=0)
    return max(run.cache.nbytes for _ in run.states())


def configured(**settings):
    return DecodeConfig(steps=2, **settings)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_another_size_is_inpainted_after_training_on_a_permutation():
    decoder = local((4, 6))
    decoder.training_distribution = Training((1, 2), orders=("top_to_bottom", list(range(24))))
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[3:8] = True
    image = torch.rand(1, 1, 10, 6).double() * 2 - 1
    out = decoder.decode(image=image, mask=mask, image_size=(10, 6), steps=1, seed=0).image
    assert torch.equal(out[..., :3, :], image[..., :3, :])


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_the_memory_does_not_grow_with_the_height():
    decoder = local(8)
    numbers = 2 * 2 * 16 * 8  # bytes of keys and values of a token: depth 2, width 16, float64
    for overlap, moving in ((0.0, 1), (0.5, 2)):
        sizes = [
            peak(decoder, height, num_groups=height // 2, overlap=overlap)
            for height in (8, 32, 128)
        ]
        assert len(set(sizes)) == 1
        # Two rows of the window, the group that was finished last, and those that move.
        rows = 2 + 2 + 2 * moving
        assert sizes[0] == rows * 8 * numbers
    # From left to right the window closes as well, and the columns are as high as the image.
    columns = peak(decoder, 32, num_groups=4, order="left_to_right")
    assert columns < 32 * 8 * numbers
    # Random orders do not close it.
    assert peak(decoder, 32, num_groups=4, order="random:0") > 0.9 * 32 * 8 * numbers


@pytest.mark.usefixtures("unchecked")
def test_images_of_any_size_from_the_command_line(tmp_path, capsys):
    local((4, 6)).float().save_pretrained(tmp_path)
    out = tmp_path / "images"
    ask = ["decode", f"ckpt={tmp_path}", "num_images=1", "steps=1", f"out={out}"]
    for size, sides in (("image_size=[8,10]", (10, 8)), ("image_size=6", (6, 6)), ("", (6, 4))):
        main([word for word in [*ask, size] if word])
        with Image.open(next(out.iterdir())) as image:
            assert image.size == sides
        shutil.rmtree(out)
    capsys.readouterr()
    for wrong in ("image_size=7.5", "image_size=[8,x]", "image_size=[8,8,8]", "image_size={a:1}"):
        with pytest.raises(SystemExit):
            main([*ask, wrong])
        assert "image_size must be" in capsys.readouterr().err


def test_another_size_may_have_other_numbers_of_groups():
    decoder = local((4, 6))
    assert decoder.unseen(DecodeConfig(num_groups=7)) == ["num_groups 7 (trained: 1, 2, 3, 5, 10)"]
    assert not decoder.resized((14, 6)).unseen(DecodeConfig(num_groups=7))
    decoder.training_distribution = Training((1,))
    assert decoder.resized((14, 6)).unseen(DecodeConfig(num_groups=7))


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_a_preview_leaves_the_cache_as_it_is():
    decoder = local(8)
    run = decoder.prepare(None, configured(num_groups=16), image_size=(32, 8), seed=0)
    sizes = {run.cache.nbytes for _ in run.frames()}
    assert max(sizes) == 6 * 8 * 2 * 2 * 16 * 8
    options = {"num_groups": 16, "image_size": (32, 8), "seed": 0, "steps": 2}
    *_, last = decoder.stream(**options)
    assert torch.equal(last.image, decoder.decode(**options).image)


@pytest.mark.filterwarnings("ignore:decoding beyond")
def test_conditions_grow_with_the_image():
    grid, text = TokenGrid(4, 4, codebook_size=9), TokenSequence(5, channels=2, ahead=0)
    decoder = local((8, 8), condition={"grid": grid, "text": text})
    torch.manual_seed(0)
    cells = torch.randint(9, (2, 6, 10))
    cond = {"grid": cells, "text": torch.rand(2, 5, 2, dtype=torch.float64)}
    options = {"image_size": (12, 20), "num_groups": 6, "seed": 0, "steps": 2}
    whole = decoder.decode(cond, **options).image
    assert whole.shape == (2, 1, 12, 20)
    rows = iter(cells.flatten(1).split(10, dim=1))
    *_, last = decoder.stream(cond | {"grid": rows}, num_images=2, **options)
    torch.testing.assert_close(last.image, whole, rtol=1e-9, atol=1e-9)
    again = decoder.resized((12, 20))
    assert again.conditioning.parts[0] == TokenGrid(6, 10, codebook_size=9)
    assert decoder.conditioning.parts[0] == grid
    other = cells.clone()
    other[:, 5, 9] = (other[:, 5, 9] + 1) % 9
    changed = (decoder.decode(cond | {"grid": other}, **options).image != whole)[0, 0]
    assert changed[10:, 18:].all()
    assert not changed[:8].any()


def test_a_resized_decoder_shares_its_weights():
    decoder = local(8)
    other = decoder.resized(16)
    assert other.resized(8).layout == decoder.layout
    ours, theirs = dict(decoder.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(parameter is theirs[name] for name, parameter in ours.items())
    assert decoder.resized(8) is decoder
    with pytest.raises(UsageError, match="loss must be that of the decoder itself"):
        other.loss(torch.zeros(1, 1, 16, 16))


def test_training_sees_what_decoding_sees():
    """Tiles, masks of all pairs, and orders of single examples give the same, and its gradient."""
    decoder = local((7, 6), window=1)
    backbone, order = decoder.backbone, torch.arange(42)
    torch.manual_seed(0)
    x = torch.randn(2, 42, 1, dtype=torch.float64, requires_grad=True)
    time = backbone.embed_time(torch.rand(1, dtype=torch.float64)).detach()
    context, batched = backbone.prepare(order), backbone.prepare(order.expand(2, -1))
    found = []
    for y in (
        backbone(x, time, context),
        backbone(x, time, batched),
        backbone(x, time, context, mask=torch.zeros(42, 42)),
    ):
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y, slope))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_examples_of_one_order_share_the_masks_of_their_slices(monkeypatch):
    """A mask of all pairs for every example would be most of the memory of a training."""
    decoder = local((8, 6)).float()
    image = torch.rand(16, 1, 8, 6) * 2 - 1
    losses, masks, made = [], [], Neighbourhood.mask

    def watched(self, *args, **options):
        masks.append(made(self, *args, **options))
        return masks[-1]

    monkeypatch.setattr(Neighbourhood, "mask", watched)
    for orders in (["bottom_to_top"], ["bottom_to_top", "bottom_to_top"]):
        training = Training([2, 4, 8], orders=orders)
        trained = Decoder(decoder.layout, decoder.backbone, training=training)
        generator = torch.Generator().manual_seed(0)
        losses.append(trained.loss(image, generator=generator).item())
    shared, single = masks
    assert len(shared) < len(single) == 16
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_windowed_decoder_trains_and_keeps_its_window(tmp_path):
    decoder = local((6, 6), num_classes=3).float()
    image = torch.rand(8, 1, 6, 6) * 2 - 1
    decoder.loss(image, [0, 1, 2, 0, 1, 2, 0, 1]).backward()
    weight = decoder.backbone.blocks[0].attn.qkv.weight
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.backbone.window == 2
    options = {"num_images": 1, "seed": 0, "steps": 2, "image_size": (9, 7)}
    with torch.no_grad():
        assert torch.equal(decoder.decode(**options).image, again.decode(**options).image)


@pytest.mark.slow
def test_a_windowed_likelihood_is_that_of_its_decoding():
    decoder = local((4, 6), prediction="velocity")
    hidden = decoder.backbone.time_embed.hidden.weight.data.view(-1, 2, 32)
    hidden[..., 12:] = 0  # of the 32 octaves of Fourier features, for a smooth velocity
    image = torch.rand(1, 1, 4, 6).double() * 2 - 1
    for settings in ({}, {"num_groups": 2}, {"num_groups": 2, "overlap": 0.5}):
        noise = decoder.encode(image, steps=24, **settings)
        again = decoder.decode(noise=noise, steps=100, solver=Midpoint(), **settings).image
        assert (again - image).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"window": None}, 16, "image_size must be the one that the network was made for"),
        ({"patch": 2}, (16, 15), r"multiple of the patch, 2: got \(16, 15\); the nearest is"),
        ({"condition": TokenGrid(2, 2, channels=1)}, 12, None),
        ({"condition": TokenGrid(2, 2, channels=1)}, (10, 8), "image_size must give whole cells"),
        ({}, (0, 8), "image_size"),
        ({}, "large", "image_size"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(unchecked, settings, size, message):
    decoder = local(8, **settings)
    if message is None:
        assert decoder.resized(size).layout.size == (size, size)
        return
    with pytest.raises(UsageError, match=message):
        decoder.decode(image_size=size, steps=1)


@pytest.mark.parametrize("window", [0, -1, 1.5, "wide", True])
def test_windows_out_of_range(unchecked, window):
    with pytest.raises(UsageError, match="window must be"):
        Transformer(Patches(8, channels=1), width=16, heads=1, depth=1, window=window)
