"""Scales and frequencies as tokens: the same images and likelihoods, coarse before fine."""

import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from oracles import covariance_of, masked_decoder, natural_covariance
from rolldiff import (
    DCT,
    ClassLabels,
    DecodeConfig,
    Decoder,
    Euler,
    Haar,
    Heun,
    Patches,
    TokenGrid,
    Training,
    Transformer,
)
from rolldiff.cli import main
from rolldiff.conditioning import Embedded
from rolldiff.diffusion.layout import highest, touched
from rolldiff.editing import group_mask
from rolldiff.errors import UsageError
from rolldiff.evaluation.measure import Evaluator, Processes, expected_cost
from rolldiff.evaluation.sweep import grid

LAYOUTS = [
    Haar((8, 16), channels=2, levels=1),
    Haar((8, 8), channels=1, levels=2, patch=2),
    Haar((8, 16), channels=3, levels=3),
    DCT((8, 8), channels=1, block=4),
    DCT((8, 16), channels=2, block=2, patch=2),
    DCT((3, 6), channels=1, block=3),
]
SMALL = [Haar(4, channels=1, levels=2), DCT(4, channels=1, block=2)]


def images(layout, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *layout.image_shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_are_an_orthonormal_change_of_coordinates(layout):
    image = images(layout)
    tokens = layout.tokens(image)
    assert tokens.shape == (2, layout.num_tokens, layout.token_dim)
    torch.testing.assert_close(layout.image(tokens), image, rtol=0, atol=1e-12)
    products = torch.einsum("bnd,cnd->bc", tokens, tokens)
    torch.testing.assert_close(products, image.flatten(1) @ image.flatten(1).T)


def test_the_first_tokens_of_haar_are_a_coarse_image():
    layout = Haar((8, 16), channels=3, levels=3)
    image = images(layout)
    tokens = layout.tokens(image)
    level = layout.coords[:, 0]
    assert [int((level == i).sum()) for i in range(4)] == [2, 6, 24, 96]
    means = image.unflatten(3, (2, 8)).mean((2, 4)) * 8
    torch.testing.assert_close(tokens[:, level == 0], means.mT)
    # Without the details of the last level it is the image of half the size, twice as large.
    coarse = layout.image(tokens * (level < 3)[:, None])
    halved = torch.nn.functional.avg_pool2d(image, 2).repeat_interleave(2, 2)
    torch.testing.assert_close(coarse, halved.repeat_interleave(2, 3))
    # The directions of one level: below (rows differ), across (columns differ), both.
    rows = torch.tensor([1.0, -1]).repeat(4)[:, None].expand(3, 8, 16).double()[None]
    (here,) = layout.tokens(rows)[0].abs().sum(1).view(-1, 32)[1:2]
    assert torch.equal(here > 0, torch.ones(32, dtype=torch.bool))
    assert layout.tokens(rows)[0, 64:].abs().sum() == 0


@pytest.mark.parametrize("block", [2, 3, 4, 8])
def test_dct_is_that_of_scipy(block):
    layout = DCT((2 * block, 3 * block), channels=2, block=block)
    image = images(layout)
    frequencies = sorted(
        ((u, v) for u in range(block) for v in range(block)), key=lambda f: (sum(f), f)
    )
    found = layout.tokens(image).unflatten(1, (block**2, 2, 3))
    for row in range(2):
        for column in range(3):
            part = image[:, :, row * block :, column * block :][..., :block, :block]
            expected = torch.from_numpy(dctn(part.numpy(), axes=(2, 3), norm="ortho"))
            for i, (u, v) in enumerate(frequencies):
                torch.testing.assert_close(found[:, i, row, column], expected[:, :, u, v])
    assert layout.coords[:, 0].unique().tolist() == list(range(2 * block - 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_are_places_of_the_finest_tokens(layout):
    """A token covers the square from its place on, so many finest tokens wide as its scale says."""
    level, row, column = layout.coords.long().T
    assert torch.equal(level, level.sort().values)
    index = torch.arange(layout.num_tokens)
    finest = index[level == level.max()]
    side = layout.image_shape[1] // (int(row.max()) + 1)
    for n in [0, len(index) // 2, int(finest[0]), int(finest[-1])]:
        where = highest(layout, (index == n).long()).nonzero()
        assert where.min(0).values.tolist() == [int(row[n]) * side, int(column[n]) * side]


@pytest.mark.parametrize(
    # Some cosines of an odd block are 0.
    "layout",
    [*LAYOUTS[:-1], Patches((4, 6), channels=2, patch=2)],
    ids=str,
)
def test_which_pixels_depend_on_which_tokens(layout):
    unit = torch.eye(layout.num_tokens, dtype=torch.float64)[:, :, None]
    depends = torch.zeros(layout.num_tokens, *layout.image_shape[1:], dtype=torch.bool)
    for d in range(layout.token_dim):
        tokens = unit * torch.nn.functional.one_hot(torch.tensor(d), layout.token_dim)
        depends |= layout.image(tokens.double()).abs().amax(1) > 1e-12
    value = torch.randperm(layout.num_tokens, generator=torch.Generator().manual_seed(1))
    expected = torch.where(depends, value[:, None, None], -1).amax(0)
    assert torch.equal(highest(layout, value), expected)
    mask = torch.zeros(layout.image_shape[1:], dtype=torch.bool)
    mask[:2, :4] = mask[-1, -1] = True  # details of a constant are 0, and touched all the same
    assert torch.equal(touched(layout, mask), depends[:, mask].any(1))


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param({"num_groups": 1}, marks=pytest.mark.slow),
        pytest.param({"num_groups": 4, "order": "random:0"}, marks=pytest.mark.slow),
        {"num_groups": 3, "grouping": "levels"},
        {"num_groups": 2, "grouping": "levels", "overlap": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_distributions_and_likelihoods_are_those_of_the_pixels(layout, ask):
    covariance = natural_covariance(4)
    decoder = masked_decoder(covariance, layout=layout)
    found = covariance_of(decoder, **ask, solver=Heun(), steps=50)
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.02)
    small = masked_decoder(0.04 * covariance, layout=layout)
    noise = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = (noise @ torch.linalg.cholesky(0.04 * covariance).T).clamp(-1, 1)
    normal = torch.distributions.MultivariateNormal(torch.zeros(16).double(), 0.04 * covariance)
    likelihood = small.log_likelihood(
        image.view(3, 1, 4, 4), **ask, dequantization=None, tolerance=1e-4, divergence="exact"
    )
    nats = likelihood.nats
    # The density ends at the first noise, which adds some thousandths of a bit per dimension.
    assert torch.allclose(nats, normal.log_prob(image), atol=0.02 * 16 * math.log(2), rtol=0)


@settings(max_examples=30)
@given(
    num_groups=st.integers(1, 16),
    overlap=st.sampled_from([0.0, 0.5, 1.0]),
    order=st.sampled_from(["top_to_bottom", "random:0"]),
    grouping=st.sampled_from(["equal", "levels"]),
    which=st.integers(0, 1),
)
def test_the_cache_is_exact_and_pixels_are_final_when_they_are_said_to_be(
    num_groups, overlap, order, grouping, which
):
    decoder = decoders()[which]
    if grouping == "levels":
        num_groups = min(num_groups, 3)
    ask = {"num_groups": num_groups, "overlap": overlap, "order": order, "steps": 2, "seed": 0}
    ask["grouping"] = grouping
    whole = decoder.decode([1, 2], **ask, cache=False).image
    frames = list(decoder.stream([1, 2], **ask))
    assert (frames[-1].image - whole).abs().max() < 1e-10
    before = torch.zeros(8, 8, dtype=torch.bool)
    for frame in frames:
        assert (frame.finished | ~before).all()
        assert torch.equal(frame.image[..., frame.finished], whole_at(frames, frame.finished))
        before = frame.finished
    assert before.all()
    if num_groups > 1 and overlap == 0 and order == "top_to_bottom":
        # The last details are everywhere, so nothing is final before they come.
        assert not frames[0].finished.any()


def whole_at(frames, mask):
    return frames[-1].image[..., mask]


@cache
def decoders():
    """With random weights, the zero-initialised ones too."""
    return [built(Haar(8, channels=1, levels=2, patch=2)), built(DCT(8, channels=1, block=2))]


def built(layout):
    torch.manual_seed(0)
    training = Training(
        tuple(range(1, 17)),
        orders=("top_to_bottom", "random:0"),
        grouping=("equal", "levels"),
    )
    backbone = Transformer(layout, width=16, depth=2, heads=2, condition=ClassLabels(10))
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return Decoder(layout, backbone, training=training).double()


@pytest.mark.parametrize("number", [0, 1])
def test_an_image_is_inpainted_on_all_tokens_that_a_mask_touches(number):
    decoder = decoders()[number]
    image = images(decoder.layout)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:3, 2:6] = True
    config = DecodeConfig(num_groups=2, steps=2, order="random:0")
    run = decoder.prepare([1, 2], config, image=image, mask=mask, seed=0)
    made = run.finish().image
    assert torch.equal(made[..., ~mask], image[..., ~mask])
    assert not torch.isclose(made[..., mask], image[..., mask]).any()
    # The tokens that are kept are those on which no pixel of the mask depends.
    kept = touched(decoder.layout, mask).logical_not()
    assert 0 < kept.sum() == run.schedule.num_known


@pytest.mark.parametrize("number", [0, 1])
def test_groups_of_scales_have_no_seams_and_share_pixels(number):
    decoder = decoders()[number]
    first, last = (group_mask(decoder, [g], num_groups=16) for g in (0, 15))
    # The coarse token is everywhere; a row of the lowest frequency is in two rows of pixels.
    assert first.nonzero().max(0).values.tolist() == ([7, 7] if number == 0 else [1, 7])
    assert (first & last).any() == (number == 0)
    config = DecodeConfig(num_groups=4)
    assert evaluator(decoder)._pixel_groups(config) is None
    patches = built(Patches(8, channels=1, patch=2))
    assert evaluator(patches)._pixel_groups(config).unique().tolist() == [0, 1, 2, 3]


def evaluator(decoder):
    image = torch.zeros(4, 1, 8, 8)
    return Evaluator(
        decoder=decoder,
        image=image,
        label=None,
        extractors={},
        features={},
        samples=4,
        seeds=[0],
        batch_size=4,
        pairs=4,
        dtype=None,
        processes=Processes(),
    )


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (Haar(8, channels=1, levels=3), {1: (64,), 2: (4, 60), 3: (4, 12, 48), 4: (1, 3, 12, 48)}),
        (DCT(4, channels=1, block=2), {1: (16,), 2: (12, 4), 3: (4, 8, 4)}),
        (Patches(4, channels=1), {1: (16,)}),
    ],
    ids=str,
)
def test_groups_of_levels(layout, sizes):
    for num_groups, expected in sizes.items():
        for order in ("top_to_bottom", "random:3"):
            config = DecodeConfig(num_groups=num_groups, grouping="levels", order=order)
            assert config.schedule(layout).group.bincount().tolist() == list(expected)
    config = DecodeConfig(num_groups=len(sizes) + 1, grouping="levels")
    with pytest.raises(UsageError, match=f"num_groups must be in 1 … {len(sizes)}, the levels"):
        config.schedule(layout)
    mixed = DecodeConfig(order=[1, *range(layout.num_tokens - 1, 1, -1), 0], grouping="levels")
    if len(sizes) > 1:
        with pytest.raises(UsageError, match="one level after another"):
            mixed.schedule(layout)


@pytest.mark.parametrize("number", [0, 1])
def test_a_coarse_image_is_final_first(number):
    decoder = decoders()[number]
    ask = {"num_groups": 3, "grouping": "levels", "steps": 3, "seed": 0}
    frames = list(decoder.stream([1, 2], **ask))
    coarse = [torch.nn.functional.avg_pool2d(f.image, 4 if number == 0 else 2) for f in frames]
    assert not torch.allclose(coarse[0], coarse[-1])
    for average in coarse[2:]:  # the first group is done
        torch.testing.assert_close(average, coarse[-1])
    assert not torch.allclose(frames[2].image, frames[-1].image)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("solver", [Heun(), Euler()], ids=str)
def test_the_cost_of_groups_of_levels(number, solver):
    decoder = decoders()[number]
    for overlap in (0.0, 0.5):
        for cached in (True, False):
            config = DecodeConfig(
                num_groups=3, overlap=overlap, grouping="levels", steps=4, solver=solver
            )
            cost = decoder.decode([1], config, cache=cached, seed=0).cost
            found = expected_cost(config, decoder.layout, cache=cached)
            assert (cost.nfe, cost.tokens) == found


def test_levels_are_inpainted():
    decoder = decoders()[0]
    image = images(decoder.layout)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :2] = True
    config = DecodeConfig(num_groups=3, steps=2, order="random:0", grouping="levels")
    run = decoder.prepare([1, 2], config, image=image, mask=mask, seed=0)
    # One coarse token, three details of it, and three of the finest: with patches of 2 x 2 they
    # hold two coefficients of each direction.
    assert run.schedule.sizes == (1, 3, 3)
    assert torch.equal(run.finish().image[..., ~mask], image[..., ~mask])


def test_training_draws_groups_of_levels():
    layout = Haar(8, channels=1, levels=2)
    sizes = [(64,), (16, 48), (4, 12, 48)]
    for grouping, rows in (
        ("levels", sizes),
        (("levels",), sizes),
        (("equal", "levels"), [(64,), (32, 32), (16, 48), (22, 21, 21), (4, 12, 48)]),
        (("equal",), [(64,), (32, 32), (22, 21, 21)]),
    ):
        training = Training((1, 2, 3), grouping=grouping, orders=("top_to_bottom", "random:0"))
        _, groups = training.tables(layout.coords)
        assert [tuple(row.bincount().tolist()) for row in groups] == rows
        draws = [training.sample(64, groups, torch.Generator().manual_seed(i)) for i in range(20)]
        drawn = {tuple(g.bincount().tolist()) for draw in draws for g in draw.group}
        assert drawn == set(rows)
    many = Training((1, 4), grouping=("equal", "levels")).tables(layout.coords)[1]
    assert many[:, -1].tolist() == [0, 3]
    with pytest.raises(UsageError, match="num_groups must be in 1 … 3, the levels"):
        Training((1, 4), grouping="levels").tables(layout.coords)
    orders = (tuple(range(64)), tuple(range(63, -1, -1)))
    with pytest.raises(UsageError, match="levels in the same order"):
        Training((2,), grouping="levels", orders=orders).tables(layout.coords)


def test_a_grouping_that_was_not_trained_warns():
    layout = Haar(8, channels=1, levels=2)
    decoder = Decoder(
        layout, Transformer(layout, width=8, depth=1, heads=1), training=Training((1, 3))
    )
    with pytest.warns(UserWarning, match="grouping levels .trained: equal"):
        decoder.decode(num_groups=3, grouping="levels", steps=1)


def test_every_setting_of_levels_once():
    ask = {
        "num_groups": [1, 3, 4],
        "overlap": [0.0],
        "steps": [4],
        "order": ["top_to_bottom"],
        "solver": [Euler()],
        "guidance": [0.0],
    }
    layout = Haar(8, channels=1, levels=2)
    found = grid(layout, **ask, grouping=["equal", "levels"])
    assert [(c.num_groups, c.grouping) for c in found] == [
        (1, "equal"),
        (3, "equal"),
        (3, "levels"),
        (4, "equal"),
    ]
    with pytest.raises(UsageError, match="1 … 3, the levels"):
        grid(layout, **ask, grouping=["levels"])


@pytest.mark.slow
def test_a_training_on_levels_from_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    ask = ["layout=haar", "training.num_groups=[1,3]", "training.grouping=[levels]", "nn.width=8"]
    ask += ["nn.depth=1", "nn.heads=1", "batch_size=8", "progress=false", "report.samples=8"]
    ask += ["report.steps=1", "data.held_out=0.1", f"run_dir={run}"]
    main(["train", *ask, "max_steps=2", "trainer.val_check_interval=2"])
    values = json.loads((run / "summary.json").read_text())["fd_pixels"]
    assert list(values) == ["1", "3"]
    printed = capsys.readouterr()
    assert "num_groups=3 grouping=levels overlap=0.5" in printed.out
    assert "beyond" not in printed.err
    assert list((run / "samples").iterdir())
    out = tmp_path / "coarse.gif"
    main(["decode", f"ckpt={run}", "num_groups=3", "grouping=levels", "steps=1", f"out={out}"])
    assert out.exists()
    bench = ["bench.steps=[1]", "bench.samples=8", "bench.features=[pixels]", "bench.seeds=[0]"]
    main(["bench", f"ckpt={run}", *bench, "bench.joint_steps=[]", "progress=false"])
    text = (run / "bench" / "results.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["num_groups"], line["grouping"]) for line in lines] == [
        (1, "equal"),
        (3, "levels"),
    ]
    assert "3 groups, overlap 0, 1 steps, by levels" in (run / "bench" / "report.md").read_text()
    capsys.readouterr()
    ask = ["likelihood.method=bound", "likelihood.samples=1", "likelihood.levels=17", "images=4"]
    main(["likelihood", f"ckpt={run}", *ask])
    assert "| 3 groups, overlap 0, by levels |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", f"ckpt={run}", "bench.num_groups=[4]", "progress=false"])
    assert "num_groups must be in 1 … 3, the levels of the layout" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 1])
def test_a_decoder_of_scales_is_saved_and_read(number, tmp_path):
    decoder = decoders()[number]
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path).double()
    assert again.layout == decoder.layout
    made = [d.decode([3], num_groups=4, steps=2, seed=0).image for d in (decoder, again)]
    assert torch.equal(*made)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Haar(12, levels=3), "2^levels patch must divide image_size, got 8"),
        (lambda: Haar((8, 12), patch=2), "2^levels patch must divide image_size, got 8"),
        (lambda: Haar(8, levels=0), "levels must be a whole number"),
        (lambda: Haar(8, levels=1.5), "levels must be a whole number"),
        (lambda: Haar(8, levels=65), "levels must be a whole number"),
        (lambda: DCT(8, block=3), "block patch must divide image_size, got 3"),
        (lambda: DCT(8, block=0), "block must be a whole number"),
        (lambda: DCT(2**11, block=8), "at most 1048576 tokens"),
        (lambda: Haar(8, channels=0), "channels"),
        (lambda: DCT("8"), "image_size"),
        (lambda: Haar(8).tokens(torch.zeros(1, 3, 8, 4)), r"shape \(B, 3, 8, 8\)"),
        (lambda: DCT(8).image(torch.zeros(1, 3, 8)), r"shape \(B, 64, 3\)"),
        (lambda: decoders()[0].decode([1], image_size=16), "image_size must be"),
        (lambda: Transformer(Haar(8), width=16, heads=2, window=2), "window"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UsageError, match=message.replace("^", r"\^")):
        make()


def test_a_coarse_token_is_given_the_mean_of_the_cells_that_it_covers():
    layout = Haar((8, 16), channels=1, levels=2, patch=2)  # one coarse row of two tokens
    for sides, per_place in (((2, 4), 1), ((4, 8), 2), ((1, 2), 1)):
        grid = TokenGrid(*sides, channels=3)
        embedder = grid.embedder(layout, width=5, modulation=4).double()
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(2, *sides, 3, generator=generator, dtype=torch.float64)
        seen = embedder(grid.validate(value, 2, torch.device("cpu")), Embedded(torch.zeros(())))
        assert seen.tokens.shape == (2, 32, 5)
        places = embedder.tokens(grid.validate(value, 2, torch.device("cpu")))
        if per_place == 2:
            cells = places.unflatten(1, (2, 2)).unflatten(3, (4, 2)).transpose(2, 3)
            places = embedder.join(cells.flatten(3))
        places = places.repeat_interleave(2 // min(2, sides[0]), 1)
        places = places.repeat_interleave(4 // min(4, sides[1]), 2)  # [2, 2, 4, 5]
        for n, (level, row, column) in enumerate(layout.coords.long().tolist()):
            side = 2 if level < 2 else 1
            under = places[:, row : row + side, column : column + side]
            torch.testing.assert_close(seen.tokens[:, n], under.mean((1, 2)))
        # Streaming waits for the last cell under a token.
        needs = embedder.required_prefix()
        coarse = sides[0] * sides[1] - sides[1] // 2
        assert needs[:2].tolist() == [coarse, coarse + sides[1] // 2]


def test_a_coarse_image_waits_for_all_cells_under_it():
    layout, grid = Haar(8, channels=1, levels=2, patch=2), TokenGrid(4, 4, channels=3)
    torch.manual_seed(0)
    backbone = Transformer(layout, width=16, depth=1, heads=2, condition=grid)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    decoder = Decoder(layout, backbone, training=Training((1, 3), grouping="levels")).double()
    cells = torch.randn(1, 4, 4, 3, dtype=torch.float64)
    ask = {"num_groups": 3, "grouping": "levels", "steps": 2, "seed": 0, "num_images": 1}
    whole = decoder.decode(cells, **ask).image
    pieces = iter(cells.flatten(1, 2).split(4, dim=1))
    frames = decoder.stream(pieces, preview=False, **ask)
    next(frames)
    assert next(pieces, None) is None  # the coarse token has read all of them
    *_, last = frames
    assert torch.equal(last.image, whole)
    other = cells.clone()
    other[0, 3, 3] += 1
    coarse = [
        torch.nn.functional.avg_pool2d(decoder.decode(c, **ask).image, 4) for c in (cells, other)
    ]
    assert not torch.allclose(*coarse)
