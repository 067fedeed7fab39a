"""Every kind of condition is validated, used, dropped, and may be streamed."""

from dataclasses import replace

import pytest
import torch

from rolldiff import (
    ClassLabels,
    Decoder,
    TokenGrid,
    TokenSequence,
    Training,
)
from rolldiff.conditioning import Conditioning

KINDS = {
    "label": ClassLabels(3),
    "codes": TokenGrid(4, 4, codebook_size=7),
    "latents": TokenGrid(2, 2, channels=3),
    "fine": TokenGrid(8, 8, channels=2),
    "text": TokenSequence(5, channels=6),
    "words": TokenSequence(8, codebook_size=11, ahead=0),
    "scene": TokenSequence(10, codebook_size=5, ahead=0, everywhere=2),
    "small": TokenGrid(2, 2, channels=1),
}
CPU = torch.device("cpu")


def example(kind, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    part = KINDS[kind]
    if kind == "label":
        return torch.randint(3, (batch,), generator=generator)
    if part.codebook_size:
        return torch.randint(part.codebook_size, (batch, *part.shape), generator=generator)
    return torch.randn(batch, *part.shape, part.channels, generator=generator)


def decoder_of(condition, *, dtype=torch.float64, causal=True, seed=0):
    torch.manual_seed(seed)
    decoder = Decoder.build(
        image_size=8,
        channels=1,
        patch=2,
        width=32,
        depth=2,
        heads=2,
        condition=condition,
        causal=causal,
        training=Training((1, 2, 4, 16), orders=("top_to_bottom", "bottom_to_top", "random:0")),
    )
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return decoder.to(dtype)


@pytest.fixture(scope="module")
def every():
    return decoder_of(KINDS)


def all_of(batch=2, seed=0):
    return {kind: example(kind, batch, seed) for kind in KINDS}


ASK = {"num_groups": 4, "overlap": 0.5, "steps": 3, "seed": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_each_condition_matters_alone(kind):
    decoder = decoder_of(KINDS[kind])
    cond = example(kind)
    image = decoder.decode(cond, **ASK).image
    assert image.shape == (2, 1, 8, 8)
    other = decoder.decode(example(kind, seed=1), **ASK).image
    assert not torch.allclose(image, other)
    assert not torch.allclose(image, decoder.decode(num_images=2, **ASK).image)


@pytest.mark.parametrize("kind", KINDS)
def test_each_condition_matters_among_others(every, kind):
    image = every.decode(all_of(), **ASK).image
    without = every.decode({**all_of(), kind: None}, **ASK).image
    assert not torch.allclose(image, without)


def test_cached_is_plain_with_guidance(every):
    for order in ("top_to_bottom", "random:0"):
        ask = ASK | {"guidance": 1.5, "order": order}
        kept = every.decode(all_of(), **ask).image
        plain = every.decode(all_of(), cache=False, **ask).image
        torch.testing.assert_close(kept, plain, rtol=1e-11, atol=1e-11)


def test_an_example_does_not_depend_on_its_batch(every):
    together = every.decode(all_of(3), **ASK).image
    alone = every.decode({k: v[1:2] for k, v in all_of(3).items()}, start_index=1, **ASK).image
    torch.testing.assert_close(together[1:2], alone, rtol=1e-11, atol=1e-11)


def test_the_loss_trains_encoders():
    decoder = decoder_of(
        {"grid": TokenGrid(2, 2, channels=3), "text": TokenSequence(4, channels=6)}
    )
    decoder.training_distribution = replace(decoder.training_distribution, drop_cond=0.0)
    grid = torch.randn(32, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    text = torch.randn(32, 4, 6, dtype=torch.float64, requires_grad=True)
    image = torch.rand(32, 1, 8, 8) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    decoder.loss(image, {"grid": grid, "text": text}, generator=generator).backward()
    # Where all tokens on a cell are context, it carries no loss.
    assert (grid.grad != 0).float().mean() > 0.5
    assert (text.grad != 0).float().mean() > 0.9


def test_dropped_conditions_are_null(every):
    before = every.training_distribution
    every.training_distribution = replace(before, drop_cond=1.0)
    image = torch.rand(2, 1, 8, 8) * 2 - 1
    losses = [
        every.loss(image, cond, generator=torch.Generator().manual_seed(3))
        for cond in (all_of(), all_of(seed=1))
    ]
    every.training_distribution = before
    assert torch.equal(*losses)


def test_dropping_is_as_often_as_asked():
    conditions = Conditioning.of({"a": ClassLabels(3), "b": TokenSequence(2, codebook_size=4)})
    count = 4000
    given = conditions.validate(
        {"a": torch.zeros(count, dtype=torch.long), "b": torch.zeros(count, 2, dtype=torch.long)},
        count,
        CPU,
    )
    kept = conditions.drop(given, 0.2, torch.Generator().manual_seed(0))
    a, b = ~kept["a"].mask, ~kept["b"].mask
    assert (b[:, 0] == b[:, 1]).all()
    # Together with 0.2, each alone with 0.2 more: 0.36 each, 0.2 + 0.8 x 0.04 both.
    error = 4 * (0.25 / count) ** 0.5
    assert a.float().mean() == pytest.approx(0.36, abs=error)
    assert (a & b[:, 0]).float().mean() == pytest.approx(0.232, abs=error)


@pytest.mark.parametrize("kind", ["codes", "latents", "fine", "words", "scene"])
def test_a_token_sees_no_condition_beyond_its_needs(kind):
    decoder = decoder_of(KINDS[kind])
    ask = ASK | {"overlap": 0.0}  # otherwise it sees later groups that move with its own
    cond = example(kind)
    needs = decoder.backbone.required_prefix()["cond"]
    image = decoder.decode(cond, **ask).image
    row = decoder.layout.tokens(image)
    for top in (1, 2, 3):  # rows of tokens
        known = int(needs[4 * top - 1])
        changed = cond.clone().flatten(1, -2 if KINDS[kind].channels else -1)
        if known == changed.shape[1]:  # the lowest row of a coarse grid
            assert (kind, top) == ("latents", 3)
            continue
        changed[:, known:] = example(kind, seed=5).reshape(changed.shape)[:, known:]
        other = decoder.layout.tokens(decoder.decode(changed.view(cond.shape), **ask).image)
        assert torch.equal(row[:, : 4 * top], other[:, : 4 * top])
        assert not torch.allclose(row[:, 4 * top :], other[:, 4 * top :])


def test_the_first_tokens_of_a_sequence_may_be_seen_everywhere():
    def prefixes(**settings):
        sequence = TokenSequence(10, codebook_size=5, **settings)
        return decoder_of(sequence).backbone.required_prefix()["cond"].view(4, 4)

    for columns in prefixes(ahead=0, everywhere=2).T:  # the other 8 are 2 for each row
        assert columns.tolist() == [4, 6, 8, 10]
    assert prefixes(ahead=1, everywhere=7)[:, 0].tolist() == [9, 10, 10, 10]
    assert (prefixes(ahead=0, everywhere=10) == 10).all()
    assert torch.equal(prefixes(ahead=1, everywhere=0), prefixes(ahead=1))


class Pieces:
    """An iterator that remembers how far it was read."""

    def __init__(self, cond, part, each):
        ends = -2 if part.channels else -1
        self.parts = cond.flatten(1, ends).split(each, dim=1)
        self.read = 0

    def __iter__(self):
        return self

    def __next__(self):
        assert not torch.is_inference_mode_enabled(), "what it makes may be trained on"
        if self.read == len(self.parts):
            raise StopIteration
        self.read += 1
        return self.parts[self.read - 1]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["codes", "latents", "fine", "text", "words", "scene"])
@pytest.mark.parametrize("each", [1, 3])
def test_arriving_conditions_give_the_same_image(kind, each, guidance):
    decoder = decoder_of(KINDS[kind])
    cond = example(kind)
    ask = ASK | {"guidance": guidance}
    whole = decoder.decode(cond, **ask).image
    pieces = Pieces(cond, KINDS[kind], each)
    assert torch.equal(decoder.decode(pieces, num_images=2, **ask).image, whole)
    pieces = Pieces(cond, KINDS[kind], each)
    stream = decoder.stream(pieces, num_images=2, preview=False, **ask)
    frames = [(frame.image, pieces.read / len(pieces.parts)) for frame in stream]
    assert torch.equal(frames[-1][0], whole)
    read = [share for _, share in frames]
    if kind != "text":  # the first group moves before the last token is there
        assert read[0] < 0.7 < read[-1]
    else:
        assert read[0] == 1


@pytest.mark.parametrize("order", ["bottom_to_top", "random:0"])
def test_conditions_may_arrive_under_any_order(order):
    """The last token of a group may look at less than one before it."""
    decoder = decoder_of(KINDS["codes"])
    for num_groups in (2, 16):
        ask = {"num_groups": num_groups, "steps": 2, "seed": 0, "order": order}
        pieces = Pieces(example("codes"), KINDS["codes"], 1)
        found = decoder.decode(pieces, num_images=2, **ask).image
        assert torch.equal(found, decoder.decode(example("codes"), **ask).image)


def test_what_arrives_keeps_its_digits():
    decoder, generator = decoder_of(KINDS["latents"]), torch.Generator().manual_seed(0)
    cond = torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64)
    pieces = Pieces(cond, KINDS["latents"], 1)
    found = decoder.decode(pieces, num_images=2, **ASK).image
    assert torch.equal(found, decoder.decode(cond, **ASK).image)


def test_what_a_short_sequence_lacks_is_not_there():
    value, mask = KINDS["text"].validate(example("text")[:, :3], 2, CPU)
    assert value.shape == (2, 5, 6)
    assert mask.tolist() == 2 * [[True, True, True, False, False]]


def test_a_preview_waits_for_nothing():
    decoder = decoder_of(KINDS["codes"])
    pieces = Pieces(example("codes"), KINDS["codes"], 4)
    ask = {"num_groups": 4, "steps": 2, "seed": 0}
    frames = [(frame, pieces.read) for frame in decoder.stream(pieces, num_images=2, **ask)]
    assert [read for _, read in frames] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(frames[-1][0].image, decoder.decode(example("codes"), **ask).image)


def test_a_bidirectional_backbone_waits_for_all():
    decoder = decoder_of(KINDS["codes"], causal=False)
    pieces = Pieces(example("codes"), KINDS["codes"], 4)
    frames = decoder.stream(pieces, num_images=2, num_groups=4, steps=2, seed=0, preview=False)
    next(frames)
    assert pieces.read == 4


def test_several_at_once_may_arrive(every):
    whole = every.decode(all_of(), **ASK).image
    cond = all_of()
    for kind in ("codes", "words"):
        cond[kind] = Pieces(cond[kind], KINDS[kind], 2)
    assert torch.equal(every.decode(cond, num_images=2, **ASK).image, whole)


def test_it_is_saved_and_read(every, tmp_path):
    every.float().save_pretrained(tmp_path)
    read = Decoder.from_pretrained(tmp_path)
    assert read.conditioning == every.conditioning
    assert torch.equal(read.decode(all_of(), **ASK).image, every.decode(all_of(), **ASK).image)
    every.double()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        ("label", [3], r"in 0 … 2, got 3"),
        ("label", [0.5], "whole numbers"),
        ("codes", torch.zeros(1, 4, 4), "whole numbers"),
        ("codes", torch.full((1, 4, 4), 7), r"in 0 … 6"),
        ("codes", torch.zeros(1, 4, 3, dtype=torch.long), r"shape \(1, 4, 4\)"),
        ("latents", torch.zeros(1, 2, 2, 4), r"shape \(1, 2, 2, 3\)"),
        ("latents", torch.zeros(1, 2, 2, 3, dtype=torch.long), "floating point"),
        ("text", torch.zeros(1, 6, 6), "1 … 5"),
        ("text", torch.zeros(1, 0, 6), "1 … 5"),
        ("text", torch.zeros(2, 5, 6), r"shape \(1, 5, 6\)"),
        ("small", torch.zeros(1, 1, 2, 2), "shape"),
        ("label", iter([torch.zeros(1, 1)]), "at once"),
        ("codes", iter([torch.zeros(1, 4, dtype=torch.long)]), "an end after 4"),
        ("words", iter([torch.zeros(1, 2, dtype=torch.long)]), "an end after 2"),
        ("codes", iter([torch.zeros(2, 4, dtype=torch.long)]), "pieces"),
        ("codes", iter([torch.zeros(1, 17, dtype=torch.long)]), "at most 16 tokens"),
        ("latents", iter([torch.zeros(1, 4)]), "pieces"),
        ("codes", iter([torch.full((1, 4), 9)]), "in 0 … 6"),
    ],
)
def test_bad_conditions(kind, wrong, words):
    decoder = decoder_of(KINDS[kind])
    with pytest.raises(ValueError, match=words):
        decoder.decode(wrong, num_images=1, **ASK)


@pytest.mark.usefixtures("unchecked")
def test_bad_names_and_sizes(every):
    with pytest.raises(ValueError, match="cond must be among"):
        every.decode({"colour": 1}, **ASK)
    with pytest.raises(ValueError, match="cond must be a dictionary"):
        every.decode([1], **ASK)
    with pytest.raises(ValueError, match="without a condition"):
        decoder_of(None).decode([1], **ASK)
    with pytest.raises(ValueError, match=r"cond\['codes'\] must be in"):
        every.decode({"codes": torch.full((1, 4, 4), 9)}, **ASK)
    for build in (
        lambda: TokenGrid(2, 2),
        lambda: TokenGrid(2, 2, codebook_size=3, channels=3),
        lambda: TokenGrid(0, 2, codebook_size=3),
        lambda: TokenSequence(0, codebook_size=3),
        lambda: TokenSequence(3, codebook_size=3, ahead=-1),
        lambda: TokenSequence(3, codebook_size=3, ahead=0, everywhere=4),
        lambda: TokenSequence(3, codebook_size=3, everywhere=2),
        lambda: ClassLabels(-1),
        lambda: decoder_of(TokenGrid(3, 4, codebook_size=2)),
        lambda: Decoder.build(image_size=8, num_classes=3, condition=ClassLabels(3)),
    ):
        with pytest.raises(ValueError, match=r"must|either"):
            build()
