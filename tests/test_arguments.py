"""What users pass: numbers of every library are accepted, and mistakes are refused in one line."""

import math
import time

import numpy as np
import pytest
import torch

from rolldiff import (
    DDIM,
    ClassLabels,
    Conditioning,
    Cosine,
    DecodeConfig,
    Decoder,
    Euler,
    GroupSchedule,
    Guidance,
    Patches,
    Rectified,
    TokenGrid,
    TokenSequence,
    Training,
    Transformer,
)
from rolldiff.device import named_device, named_dtype
from rolldiff.diffusion.process import PerSampleNoise
from rolldiff.diffusion.timesteps import LogitNormal
from rolldiff.editing import group_mask, invert, row_mask
from rolldiff.errors import UsageError
from rolldiff.tokenizer import Encoder, Generation, Prior, Tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")

NAN, INF = math.nan, math.inf
NOT_WHOLE = [True, np.True_, 1.5, 2.0, np.float32(2), "2", None, NAN, INF, [2], 1j, torch.ones(2)]
NOT_REAL = [True, np.True_, "0.5", NAN, INF, -INF, None, [0.5], 1j, torch.zeros(2), 10**400]
NOT_BOOLEAN = [1, 0, "true", None, 1.0, [True], torch.ones(2, dtype=torch.bool)]
SMALL = {"image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 1}
IMAGE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(scope="module")
def decoder():
    return Decoder.build(**SMALL, num_classes=3, training=Training((1, 2, 4)))


@pytest.fixture(scope="module")
def grids():
    grid = Decoder.build(**SMALL, condition=TokenGrid(2, 2, channels=2))
    words = Decoder.build(**SMALL, condition=TokenSequence(3, codebook_size=5))
    return grid, words


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("vector_quantize_pytorch")
    decoder = Decoder.build(**SMALL, condition=TokenGrid(4, 4, channels=2))
    encoder = Encoder(8, in_channels=1, channels=2, width=4, depth=1)
    return Tokenizer(encoder, decoder, levels=(3, 4))


@pytest.fixture(scope="module")
def prior():
    return Prior(16, 12, num_classes=3, width=8, depth=1, heads=1)


def refused(call, word):
    """The call is refused at once, in one line that starts with the word."""
    start = time.perf_counter()
    with pytest.raises(UsageError) as error:
        call()
    assert time.perf_counter() - start < 2
    assert len(str(error.value).splitlines()) == 1
    assert word in str(error.value).split(" must ")[0], str(error.value)


WHOLE = {
    "num_groups": lambda v: DecodeConfig(num_groups=v),
    "steps": lambda v: DecodeConfig(steps=v),
    "num_tokens": lambda v: GroupSchedule(num_tokens=v),
    "num_known": lambda v: GroupSchedule(num_tokens=8, num_known=v),
    "image_size": lambda v: Patches(v) if v != [2] else Patches([2]),
    "channels": lambda v: Patches(8, channels=v),
    "patch": lambda v: Patches(8, patch=v),
    "width": lambda v: Transformer(Patches(8), width=v),
    "depth": lambda v: Transformer(Patches(8), depth=v),
    "heads": lambda v: Transformer(Patches(8), heads=v),
    "num_classes": lambda v: ClassLabels(v),
    "height": lambda v: TokenGrid(v, 2, channels=1),
    "codebook_size": lambda v: TokenGrid(2, 2, codebook_size=v),
    "length": lambda v: TokenSequence(v, channels=2),
    "seed": lambda v: PerSampleNoise("none" if v is None else v, 1),
    "start_index": lambda v: PerSampleNoise(0, 1, start_index=v),
    "num_images": lambda v: PerSampleNoise(0, v),
    "factor": lambda v: Encoder(8, factor=v),
    "num_tokens of a prior": lambda v: Prior(v, 4),
}


@pytest.mark.parametrize("value", [*NOT_WHOLE, -1], ids=repr)
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number(name, value):
    refused(lambda: WHOLE[name](value), name.split()[0])


@pytest.mark.parametrize("value", [np.int64(4), np.uint8(4), torch.tensor(4), np.array(4)])
def test_whole_numbers_of_other_libraries(value):
    assert DecodeConfig(num_groups=value, steps=value) == DecodeConfig(num_groups=4, steps=4)
    assert type(DecodeConfig(num_groups=value).num_groups) is int
    assert Patches(value, channels=value, patch=value) == Patches(4, channels=4, patch=4)
    assert Patches(np.array([4, 8])) == Patches((4, 8))
    assert TokenGrid(value, value, codebook_size=value) == TokenGrid(4, 4, codebook_size=4)
    assert TokenSequence(value, channels=value, ahead=value, everywhere=value) == TokenSequence(
        4, channels=4, ahead=4, everywhere=4
    )
    assert ClassLabels(value) == ClassLabels(4)
    assert Training(num_groups=(value, 2)) == Training((4, 2))
    noise = PerSampleNoise(value, 1, start_index=value).normal(3)
    assert torch.equal(noise, PerSampleNoise(4, 1, start_index=4).normal(3))


REAL = {
    "overlap": lambda v: DecodeConfig(overlap=v),
    "guidance": lambda v: DecodeConfig(guidance=v),
    "scale": lambda v: Guidance(v),
    "ramp_from": lambda v: Guidance(1.0, ramp_from=v),
    "each of interval": lambda v: Guidance(1.0, interval=(0.0, v)),
    "eta": lambda v: DDIM(v),
    "shift": lambda v: Rectified(v),
    "mlp_ratio": lambda v: Transformer(Patches(8), mlp_ratio=v),
    "mean": lambda v: LogitNormal(v),
    "std": lambda v: LogitNormal(0.0, v),
    "context_time": lambda v: DecodeConfig(context_time=v),
    "each of overlap": lambda v: Training(overlap=(v,)),
    "clean_context": lambda v: Training(clean_context=v),
    "independent": lambda v: Training(independent=v),
    "context_noise": lambda v: Training(context_noise=v),
    "drop_cond": lambda v: Training(drop_cond=v),
    "dropout": lambda v: Prior(16, 12, dropout=v),
}


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("name", REAL)
def test_what_is_no_real_number(name, value):
    refused(lambda: REAL[name](value), name)


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_real_numbers_of_other_libraries(value):
    assert DecodeConfig(overlap=value, guidance=value) == DecodeConfig(overlap=0.5, guidance=0.5)
    assert type(DecodeConfig(overlap=value).overlap) is float
    assert Guidance(value, interval=np.array([0, 0.5])) == Guidance(0.5, interval=(0.0, 0.5))
    assert (DDIM(value), Cosine(value)) == (DDIM(0.5), Cosine(0.5))
    assert Training(drop_cond=value) == Training(drop_cond=0.5)


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("steps", lambda: DecodeConfig(steps=10**9)),
        ("depth", lambda: Transformer(Patches(8), depth=10**6)),
        ("width", lambda: Transformer(Patches(8), width=2**20, heads=1)),
        ("mlp_ratio", lambda: Transformer(Patches(8), mlp_ratio=0)),
        ("shift", lambda: Rectified(1e30)),
        ("shift", lambda: Rectified(0.0)),
        ("image_size", lambda: Patches(10**6)),
        ("image_size", lambda: Patches((8, 8, 8))),
        ("image_size", lambda: Patches(())),
        ("height", lambda: TokenGrid(0, 0, channels=1)),
        ("height", lambda: TokenGrid(10**5, 10**5, channels=1)),
        ("num_groups", lambda: Training(num_groups=4)),
        ("num_groups", lambda: Training(num_groups="4")),
        ("num_groups", lambda: Training(num_groups=(1, 2.0))),
        ("num_groups", lambda: Training(num_groups={1, 2})),
        ("num_groups", lambda: Training(num_groups=[1] * 5000)),
        ("num_groups", lambda: Training(orders=["random:0"] * 5000)),
        ("num_groups", lambda: Training([1] * 4000).tables(torch.zeros(2**13, 3))),
        ("orders", lambda: Training(orders="top_to_bottom")),
        ("orders", lambda: Training(orders=(0, 1, 2))),
        ("orders", lambda: Training(orders=("sideways",))),
        ("density", lambda: Training(density=Rectified())),
        ("density", lambda: Training(density=LogitNormal)),
        ("overlap", lambda: Training(overlap=0.5)),
        ("overlap", lambda: Training(overlap="0..1")),
        ("overlap", lambda: Training(overlap=())),
        ("overlap", lambda: Training(overlap=("1..0",))),
        ("overlap", lambda: Training(overlap=("0..2",))),
        ("overlap", lambda: Training(overlap=("0-1",))),
        ("overlap", lambda: Training(overlap=("...1",))),
        ("context_noise", lambda: Training(context_noise=1.0)),
        ("context_time", lambda: DecodeConfig(context_time=1.0)),
        ("slices", lambda: Training(slices=0)),
        ("std", lambda: LogitNormal(0.0, 0.0)),
        ("solver", lambda: DecodeConfig(solver="euler")),
        ("solver", lambda: DecodeConfig(solver=Euler)),
        ("order", lambda: DecodeConfig(order="sideways")),
        ("order", lambda: DecodeConfig(order="random:")),
        ("order", lambda: DecodeConfig(order="random:²")),
        ("order", lambda: DecodeConfig(order="random:" + "9" * 5000)),
        ("order", lambda: DecodeConfig(order="top_to_bottom:3")),
        ("order", lambda: DecodeConfig(order=(0, 2))),
        ("order", lambda: DecodeConfig(order=(0.0, 1.0))),
        ("order", lambda: DecodeConfig(order=())),
        ("order", lambda: DecodeConfig(order=3)),
        ("interval", lambda: Guidance(1.0, interval=(0.0,))),
        ("interval", lambda: Guidance(1.0, interval="01")),
        ("layout", lambda: Transformer(8)),
        ("layout", lambda: Transformer(Patches)),
        ("condition", lambda: Transformer(Patches(8), condition="labels")),
        ("condition", lambda: Transformer(Patches(8), condition={"a": 3})),
        ("names", lambda: Conditioning(("a",), ())),
        ("names", lambda: Conditioning(("a", "a"), (ClassLabels(2), ClassLabels(3)))),
        ("causal", lambda: Transformer(Patches(8), causal="no")),
        ("num_classes", lambda: Decoder.build(image_size=8, num_classes="3")),
        ("encoder", lambda: Tokenizer(None, None, levels=(3,))),
        ("dropout", lambda: Prior(16, 12, dropout=1.0)),
        ("device", lambda: named_device("gpu")),
        ("device", lambda: named_device("meta")),
        ("device", lambda: named_device("cuda:99")),
        ("device", lambda: named_device(True)),
        ("dtype", lambda: named_dtype("int8")),
        ("dtype", lambda: named_dtype(16)),
        ("dtype", lambda: named_dtype("nn")),
    ],
)
def test_other_wrong_constructions(word, call):
    refused(call, word)


@pytest.mark.parametrize("order", [np.arange(16)[::-1].copy(), torch.arange(16).flip(0)])
def test_a_permutation_of_another_library(decoder, order):
    expected = DecodeConfig(order=tuple(range(15, -1, -1)))
    assert DecodeConfig(order=order) == expected
    assert Training(orders=(order,)).orders == (expected.order,)
    with pytest.warns(UserWarning, match="order"):
        image = decoder.decode([1], num_groups=2, steps=1, seed=0, order=order).image
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("word", "ask"),
    [
        ("num_images", {"num_images": 1.0}),
        ("num_images", {"num_images": True}),
        ("num_images", {"num_images": 10**10}),
        ("num_images", {"num_images": 2**20 + 1}),
        ("seed", {"seed": 0.5}),
        ("seed", {"seed": True}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": "0"}),
        ("seed", {"seed": 2**128}),
        ("start_index", {"start_index": 1.0}),
        ("start_index", {"start_index": -1}),
        ("start_index", {"start_index": None}),
        ("dtype", {"dtype": "bfloat16"}),
        ("dtype", {"dtype": torch.int8}),
        ("dtype", {"dtype": [torch.float32]}),
        ("cache", {"cache": 1}),
        ("cache", {"cache": "no"}),
        ("config", {"config": {}}),
        ("config", {"config": "fast"}),
        ("config", {"config": DecodeConfig}),
        ("arguments", {"num_group": 4}),
        ("arguments", {"num_image": 4}),
        ("cond", {"cond": "cat"}),
        ("cond", {"cond": 1.5}),
        ("cond", {"cond": True}),
        ("cond", {"cond": [1, True]}),
        ("cond", {"cond": [[1], [1, 2]]}),
        ("cond", {"cond": [10**30]}),
        ("cond", {"cond": {1, 2}}),
        ("cond", {"cond": {"label": [1]}}),
        ("cond", {"cond": torch.tensor([True])}),
        ("cond", {"cond": torch.tensor([1.0])}),
        ("cond", {"cond": torch.tensor([1 + 0j])}),
        ("cond", {"cond": torch.zeros(1, dtype=torch.int64).to_sparse()}),
        ("cond", {"cond": np.array(["a"])}),
        ("cond", {"cond": np.array([1, None], dtype=object)}),
        ("cond", {"cond": np.array([np.nan])}),
        ("num_images", {"cond": iter([1])}),
        ("image", {"image": np.zeros((2, 1, 8, 8)), "mask": torch.ones(8, 8, dtype=torch.bool)}),
        ("image", {"image": IMAGE * NAN, "mask": torch.ones(8, 8, dtype=torch.bool)}),
        ("mask", {"image": IMAGE, "mask": np.ones((8, 8), bool)}),
        ("mask", {"image": IMAGE, "mask": torch.ones(8, 8)}),
        ("noise", {"noise": np.zeros((2, 1, 8, 8))}),
        ("noise", {"noise": IMAGE * NAN}),
        ("noise", {"noise": IMAGE + INF}),
        ("noise", {"noise": IMAGE.double() + 1e300}),
        ("noise", {"noise": IMAGE[:0]}),
        ("noise", {"noise": IMAGE.int()}),
        ("noise", {"noise": IMAGE.to(torch.float8_e4m3fn)}),
        ("noise", {"noise": IMAGE.to("meta")}),
        ("noise", {"noise": IMAGE.to_sparse()}),
        ("num_images, image, noise and seed", {"noise": IMAGE, "num_images": 3}),
        ("guidance needs", {"guidance": 1.0, "cond": {}}),
    ],
)
@pytest.mark.parametrize("call", ["decode", "stream"])
def test_wrong_decodings(decoder, call, word, ask):
    refused(lambda: getattr(decoder, call)(**ask), word)


def test_more_images_than_memory_holds():
    decoder = Decoder.build(**SMALL | {"image_size": 64, "patch": 16})
    refused(lambda: decoder.decode(num_images=2**20), "num_images")
    refused(lambda: decoder.decode(num_images=2**19), "num_images")
    large = Prior(1024, 12, width=128, depth=4, heads=1)
    refused(lambda: large.generate(num_images=2**14), "num_images")


@pytest.mark.parametrize("frames", [True, 1.0, "2", 0, 99, NAN])
def test_wrong_frames(decoder, frames):
    refused(lambda: decoder.stream([1], steps=2, frames=frames), "frames")
    refused(lambda: decoder.stream([1], steps=2, preview="no"), "preview")


def test_a_long_schedule_starts_at_once():
    decoder = Decoder.build(**SMALL | {"image_size": 64, "patch": 1}, training=Training((4096,)))
    start = time.perf_counter()
    next(decoder.stream(num_groups=4096, steps=1000, seed=0, preview=False))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_grid_holds_finite_numbers(grids, value):
    grid, _ = grids
    cond = torch.zeros(2, 2, 2, 2)
    cond[1, 0, 1, 1] = value
    for wrong in (cond, cond.tolist(), cond.numpy(), cond.double()):
        refused(lambda wrong=wrong: grid.decode(wrong, steps=1), "cond")
    refused(lambda: grid.loss(IMAGE, cond), "cond")
    pieces = iter(cond.flatten(1, 2).split(1, dim=1))
    refused(lambda: grid.decode(pieces, num_images=2, steps=1), "cond")
    sequence = TokenSequence(3, channels=2)
    refused(lambda: sequence.validate(cond[:, 0], 2, cond.device), "cond")


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
)
def test_indices_of_any_whole_type(decoder, grids, dtype):
    _, words = grids
    for model, cond in ((decoder, torch.tensor([0, 2])), (words, torch.tensor([[0, 4]]))):
        expected = model.decode(cond, steps=1, seed=0).image
        assert torch.equal(model.decode(cond.to(dtype), steps=1, seed=0).image, expected)
        assert torch.equal(model.decode(cond.numpy(), steps=1, seed=0).image, expected)
        assert torch.equal(model.decode(cond.tolist(), steps=1, seed=0).image, expected)


@pytest.mark.parametrize(
    ("word", "image", "generator"),
    [
        ("image", IMAGE.numpy(), None),
        ("image", IMAGE.tolist(), None),
        ("image", None, None),
        ("image", IMAGE.to("meta"), None),
        ("image", IMAGE.to(torch.complex64), None),
        ("image", IMAGE.bool(), None),
        ("generator", IMAGE, 0),
        ("generator", IMAGE, torch.Generator),
    ],
)
def test_wrong_training_input(decoder, word, image, generator):
    refused(lambda: decoder.loss(image, generator=generator), word)


def test_a_layout_refuses_other_shapes():
    layout = Patches(8, channels=1, patch=2)
    refused(lambda: layout.tokens(torch.zeros(1, 1, 8, 6)), "image")
    refused(lambda: layout.tokens(torch.zeros(1, 8, 8)), "image")
    refused(lambda: layout.image(torch.zeros(1, 15, 4)), "tokens")


def test_parts_of_a_decoder():
    layout = Patches(8, channels=1, patch=2)
    backbone = Transformer(layout, width=16, depth=1, heads=1)
    assert Decoder(Patches((8, 8), channels=1, patch=2), backbone).layout == layout
    for wrong in (Patches(8, channels=4), Patches((4, 16), channels=1, patch=2)):
        refused(lambda wrong=wrong: Decoder(wrong, backbone), "layout")
    refused(lambda: Decoder(layout, torch.nn.Linear(2, 2)), "backbone")
    refused(lambda: Decoder(layout, backbone, noise=LogitNormal()), "noise")
    refused(lambda: Decoder(layout, backbone, training=None), "training")
    refused(lambda: Decoder(layout, backbone, prediction="score"), "prediction")
    refused(lambda: Decoder(layout, backbone, loss_space=1), "loss_space")


def test_wrong_editing(decoder):
    ask = {"num_groups": 4, "steps": 1}
    refused(lambda: row_mask(IMAGE, 0, 2.0), "stop")
    refused(lambda: row_mask(IMAGE.numpy(), 0, 2), "image")
    refused(lambda: group_mask(decoder, 2, **ask), "groups")
    refused(lambda: group_mask(decoder, [1.0], **ask), "groups")
    refused(lambda: group_mask(decoder, [True], **ask), "groups")
    refused(lambda: group_mask("decoder", [1], **ask), "decoder")
    refused(lambda: group_mask(decoder, [1], num_group=4), "arguments")
    refused(lambda: invert(decoder, IMAGE, iterations=1.5, **ask), "iterations")
    refused(lambda: invert(decoder, IMAGE * NAN, **ask), "image")
    assert torch.equal(group_mask(decoder, np.array([1]), **ask), group_mask(decoder, [1], **ask))
    assert torch.equal(row_mask(IMAGE, np.int64(1), torch.tensor(3)), row_mask(IMAGE, 1, 3))


def test_wrong_tokens(tokenizer, prior):
    codes = torch.zeros(2, 16, dtype=torch.long)
    for wrong in (codes.float(), codes.bool(), codes.numpy(), codes[0], codes[:0], codes + 12):
        refused(lambda wrong=wrong: prior.loss(wrong), "codes")
        refused(lambda wrong=wrong: tokenizer.dequantize(wrong), "codes")
    assert torch.equal(tokenizer.dequantize(codes.int()), tokenizer.dequantize(codes))
    refused(lambda: tokenizer.stream_latents(codes), "codes")
    refused(lambda: next(tokenizer.stream_latents(iter([codes]))), "codes")
    refused(lambda: tokenizer.encode(IMAGE.numpy()), "image")
    refused(lambda: prior.loss(codes, generator=3), "generator")
    for name, values in {
        "temperature": [0.0, -1.0, *NOT_REAL],
        "guidance": NOT_REAL,
        "seed": [-1, 0.5, True, "0", 2**128],
        "num_images": [0, True, 1.0, 10**10],
    }.items():
        for value in values:
            if name == "seed" or value is not None:
                refused(lambda n=name, v=value: prior.generate([1], **{n: v}), name)
                refused(lambda n=name, v=value: Generation(prior, tokenizer, **{n: v}), name)
    refused(lambda: Generation(tokenizer, prior), "prior")
    refused(lambda: Generation(prior, tokenizer, config={}), "config")
    refused(lambda: Generation(prior, tokenizer, cond=[7]), "cond")
    refused(lambda: Generation(prior, tokenizer, guidance=1.0), "guidance needs")


@pytest.mark.parametrize("value", NOT_BOOLEAN, ids=repr)
def test_what_is_neither_true_nor_false(decoder, value):
    refused(lambda: decoder.decode([1], cache=value), "cache")
    refused(lambda: Transformer(Patches(8), gradient_checkpointing=value), "gradient_checkpointing")
    assert Transformer(Patches(8), causal=np.False_).causal is False


@pytest.mark.parametrize(
    ("cond", "ask", "words"),
    [
        ([1], {"guidance": 2.0}, r"guidance 2 \(trained: drop_cond=0"),
        (None, {}, r"no cond \(trained: drop_cond=0"),
        ({"cond": None}, {}, r"no cond \(trained: drop_cond=0"),
    ],
)
def test_a_null_condition_that_was_never_trained(cond, ask, words):
    decoder = Decoder.build(**SMALL, num_classes=3, training=Training(drop_cond=0.0))
    with pytest.warns(UserWarning, match=words):
        decoder.decode(cond, steps=1, **ask)
    decoder.decode([1], steps=1)  # as trained: no warning
    prior = Prior(4, 5, num_classes=3, width=8, depth=1, heads=1, drop_cond=0.0)
    with pytest.warns(UserWarning, match=words):
        prior.generate(cond, **ask)
    prior.generate([1])
    Prior(4, 5, width=8, depth=1, heads=1, drop_cond=0.0).generate()


def test_one_of_several_conditions_that_was_never_absent():
    condition = {"a": ClassLabels(2), "b": ClassLabels(3)}
    decoder = Decoder.build(**SMALL, condition=condition, training=Training(drop_cond=0.0))
    with pytest.warns(UserWarning, match=r"no cond for b \(trained"):
        decoder.decode({"a": [1]}, steps=1)
    never = Decoder.build(**SMALL, num_classes=2, training=Training(drop_cond=1.0))
    with pytest.warns(UserWarning, match="always without"):
        never.decode([1], steps=1)


OLD_NOISE = {  # of version 0.1, by seed and index
    (3, 0): [0.32948657870292664, -0.8419119119644165],
    (3, 1): [-0.8185847401618958, -0.21339473128318787],
    (2**32 - 1, 5): [-1.4678236246109009, -1.0840132236480713],
    (0, 2**40): [0.6585843563079834, -1.0465824604034424],
}


@pytest.mark.parametrize("pair", OLD_NOISE)
def test_seeds_of_one_word_give_the_noise_that_they_always_gave(pair):
    seed, index = pair
    assert PerSampleNoise(seed, 1, start_index=index).normal(2)[0].tolist() == OLD_NOISE[pair]


def test_no_two_pairs_of_seed_and_index_share_their_noise():
    words = [0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    seeds = [*words, 2**64, 2**96, 2**128 - 1]
    drawn = {
        tuple(PerSampleNoise(seed, 1, start_index=index).normal(4)[0].tolist())
        for seed in seeds
        for index in words
    }
    assert len(drawn) == len(seeds) * len(words)
    large = 2**40 + 3
    together = PerSampleNoise(large, 3).normal(4)
    alone = PerSampleNoise(large, 1, start_index=2).normal(4)
    assert torch.equal(together[2:], alone)
