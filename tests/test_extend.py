"""The examples of docs/extend.md: what a solver, a backbone, … of one's own must fulfil.

The package `mypackage` is written from the page. To test a class of your own, copy its test.
"""

import json
import math
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_cli import TINY, rolldiff

from oracles import MaskedGaussian, covariance_of, decoded_covariance, natural_covariance
from rolldiff import (
    Cosine,
    DecodeConfig,
    Decoder,
    Euler,
    GroupSchedule,
    Heun,
    Midpoint,
    Patches,
    Rectified,
    Training,
    Transformer,
)
from rolldiff.errors import UsageError
from rolldiff.evaluation.features import as_extractor
from rolldiff.evaluation.measure import expected_cost

PAGE = (Path(__file__).parents[1] / "docs/extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)
# A block that begins with a path is a file, any other a script.
FILES = {found[1]: block for block in BLOCKS if (found := re.match(r"# (\S+/\S+)\n", block))}
SCRIPTS = [block for block in BLOCKS if block not in FILES.values()]
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
SLOW = pytest.mark.slow


def commands(section):
    """The command lines of a section, as lists of arguments."""
    lines = re.findall(r"^    rolldiff ((?:.*\\\n)*.*)$", section, re.MULTILINE)
    return [line.replace("\\\n", " ").split() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader of the page has: the package, files of settings, a run, and pictures."""
    folder = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 1}
    run = random_weights(Decoder.build(**sizes, num_classes=10)).float()
    run.save_pretrained(folder / "RUN")
    data = {"_target_": "rolldiff.data.Digits", "image_size": 8, "channels": 1}
    (folder / "RUN/config.yaml").write_text(OmegaConf.to_yaml({"data": data}))
    rows = ["file,label"]
    for number in range(12):
        name, colour = (("sea", "blue"), ("fire", "red"))[number % 2]
        Image.new("RGB", (8, 8 + number), colour).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{name}")
    (folder / "pictures.csv").write_text("\n".join(rows))
    forget()
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    forget()


def forget():
    """Other tests have a package of this name too."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture
def mine(folder):
    """A class of the package by its name in it."""

    def found(name):
        module, _, cls = name.rpartition(".")
        return getattr(import_module(f"mypackage.{module}"), cls)

    return found


def random_weights(decoder):
    """In float64, and without layers that are zero."""
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return decoder.double()


# The page


def test_examples_are_short_and_every_part_has_one():
    assert len(FILES) == 11
    assert len(SCRIPTS) == 6
    for block in BLOCKS:
        assert sum(map(bool, block.splitlines())) <= 30, block
    assert [len(commands(section)) for section in SECTIONS] == [0, 2, 1, 2, 0, 3, 1]


def test_the_table_names_what_exists():
    rows = re.findall(r"^\| \[.*?\]\(#.*?\) \| (.*?) \|", PAGE, re.MULTILINE)
    names = re.findall(r"`(rolldiff\.\S+)`", " ".join(rows))
    assert (len(rows), len(names)) == (6, 5)
    assert all(isinstance(resolve_name(name), type) for name in names)


def test_tests_to_copy_are_here():
    names = re.findall(r"`(test_\w+)`", PAGE)
    assert len(names) == 12
    assert all(name in globals() for name in names)


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=SLOW), 2, 3, 4, pytest.param(5, marks=SLOW)], ids=str
)
def test_scripts_run(number, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(SCRIPTS[number], "script", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if number == 0:
        assert printed == "18\n"
    if number == 1:
        pairs = re.findall(r"asked for (-[\d.]+), got (-[\d.]+)", printed)
        (on_page,) = re.findall(r"^It prints `(\S+)`, `(\S+)` and `(\S+)`", PAGE, re.MULTILINE)
        for (asked, got), said in zip(pairs, on_page, strict=True):
            assert float(got) == pytest.approx(float(asked), abs=0.05)
            assert float(got) == pytest.approx(float(said), abs=0.05)
    if number == len(SCRIPTS) - 1:
        words = r"half is (\S+) away, noise is (\S+) away, and the other half ([\d.]+\d)\."
        ((shifted, noise, half),) = re.findall(words, " ".join(PAGE.split()))
        halves, *others = map(float, printed.split())
        assert halves == pytest.approx(float(half), abs=0.002)
        assert others == [pytest.approx(float(said), rel=0.02) for said in (shifted, noise)]
        assert all(other > 5 * halves for other in others)


@SLOW
@pytest.mark.parametrize("section", [s for s in SECTIONS if commands(s)], ids=lambda s: s[:9])
def test_commands_run(section, folder):
    bench = ["bench.samples=40", "bench.seeds=[0]", "bench.steps=[2]", "bench.joint_steps=[]"]
    for command in commands(section):
        line = " ".join(command)
        short = {"train": TINY, "decode": ["num_images=2"], "bench": bench}[command[0]]
        if "nn=one_layer" in line:  # which has no depth
            short = [setting for setting in short if not setting.startswith("nn.")]
        if command[0] == "bench" and "bench.features" not in line:
            short = [*short, "bench.features=[pixels]"]
        done = rolldiff(*command, *short, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert (folder / re.search(r"\b(?:out|run_dir)=(\S+)", line)[1]).exists()
        if "trust=mypackage." in line:
            command.remove("trust=mypackage.")
            refused = rolldiff(*command, *short, cwd=folder)
            assert (refused.returncode, "trust=mypackage." in refused.stderr) == (2, True)


# A solver

COVARIANCE = natural_covariance(3)


def solver_error(solver, num_groups, overlap, steps, *, noise):
    """Of the covariance of all images that it decodes, relative to that of the data."""
    schedule = GroupSchedule(num_tokens=9, num_groups=num_groups, overlap=overlap, steps=steps)
    made = decoded_covariance(COVARIANCE, noise, solver, schedule)
    return float((made - COVARIANCE).norm() / COVARIANCE.norm())


@pytest.mark.parametrize("noise", [Rectified(), Cosine()], ids=repr)
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 1.0), (3, 0.0), (3, 0.5)])
def test_the_solver_has_the_order_that_it_declares(mine, noise, num_groups, overlap):
    solver = mine("solvers.Ralston3")()
    coarse, fine = (
        solver_error(solver, num_groups, overlap, steps, noise=noise) for steps in (12, 24)
    )
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.25)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_the_solver_costs_what_it_declares(mine, make, overlap):
    decoder, ask = make(), {"num_groups": 4, "overlap": overlap, "steps": 4}
    config = DecodeConfig(solver=mine("solvers.Ralston3")(), **ask)
    cost = decoder.decode(config=config, seed=0).cost
    assert (cost.nfe, cost.tokens) == expected_cost(config, decoder.layout)


def test_the_errors_of_solvers_are_those_of_the_page(mine):
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)
    known = {c.__name__: c for c in (Euler, Heun, Midpoint, mine("solvers.Ralston3"))}
    assert {name for name, *_ in rows} == set(known)
    for name, steps, error in rows:
        solver, steps = known[name](), int(steps)
        assert steps * solver.nfe_per_step == 48
        assert solver_error(solver, 1, 1.0, steps, noise=Cosine()) == pytest.approx(
            float(error), rel=0.05
        )


# A condition

ASK = {"num_groups": 4, "overlap": 0.5, "steps": 3, "seed": 0}


@pytest.fixture
def numbered(mine):
    """A decoder with the condition."""
    condition = mine("conditions.Number")(mean=-0.4, std=0.1)
    sizes = {"image_size": 8, "channels": 1, "width": 32, "depth": 1, "heads": 2}
    training = Training((1, 4), orders=("top_to_bottom", "random:0"))
    return random_weights(Decoder.build(**sizes, condition=condition, training=training))


def test_the_condition_matters(numbered):
    dark, bright, null = (
        numbered.decode(cond, num_images=2, **ASK).image for cond in (-0.5, [-0.3, -0.3], None)
    )
    assert not torch.allclose(dark, bright, atol=1e-3)
    assert not torch.allclose(dark, null, atol=1e-3)


def test_a_dropped_condition_has_no_effect(numbered):
    numbered.training_distribution = replace(numbered.training_distribution, drop_cond=1.0)
    image = torch.zeros(2, 1, 8, 8)
    losses = [
        numbered.loss(image, cond, generator=torch.Generator().manual_seed(0))
        for cond in (torch.tensor([-0.5, -0.3]), torch.tensor([-0.1, -0.9]), None)
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_an_image_with_the_condition_depends_on_nothing_else(numbered):
    cond = torch.tensor([-0.5, -0.3, -0.1])
    for order in ("top_to_bottom", "random:0"):
        ask = ASK | {"guidance": 1.5, "order": order}
        together = numbered.decode(cond, **ask).image
        plain = numbered.decode(cond, cache=False, **ask).image
        torch.testing.assert_close(together, plain, rtol=1e-11, atol=1e-11)
        alone = numbered.decode(cond[1:2], start_index=1, **ask).image
        torch.testing.assert_close(together[1:2], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wrong", [[0.0, 1.0], torch.zeros(3, 1), [0.0, math.nan, 0.0]], ids=str)
def test_a_wrong_value_is_the_users_mistake(numbered, wrong):
    with pytest.raises(UsageError, match="cond must be 3 finite numbers"):
        numbered.decode(wrong, num_images=3, **ASK)


# A backbone


def one_layer(mine):
    layout = Patches(8, channels=1, patch=2)
    training = Training(tuple(range(1, 17)), orders=("top_to_bottom", "random:0"))
    return random_weights(Decoder(layout, mine("backbones.OneLayer")(layout), training=training))


@pytest.mark.parametrize("order", ["top_to_bottom", "random:0"])
@pytest.mark.parametrize(("num_groups", "overlap"), [(1, 0.0), (4, 0.0), (5, 0.5), (16, 0.9)])
def test_the_cache_is_exact(mine, num_groups, overlap, order):
    decoder = one_layer(mine)
    ask = {"num_groups": num_groups, "overlap": overlap, "order": order, "steps": 3, "seed": 0}
    found = decoder.decode(num_images=2, **ask)
    plain = decoder.decode(num_images=2, cache=False, **ask)
    assert (found.cost.cached, plain.cost.cached) == (True, False)
    torch.testing.assert_close(found.image, plain.image, rtol=1e-12, atol=1e-12)
    *_, last = decoder.stream(num_images=2, **ask)  # previews leave no trace
    torch.testing.assert_close(last.image, plain.image, rtol=1e-12, atol=1e-12)
    alone = decoder.decode(num_images=1, start_index=1, **ask).image
    torch.testing.assert_close(found.image[1:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [None, 1, 2])
def test_no_token_sees_what_its_mask_hides(mine, parts):
    network, changed = one_layer(mine).backbone, 5
    sees = torch.rand(parts or 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    sees |= torch.eye(16, dtype=torch.bool)
    mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    x_t = torch.randn(4, 16, 4, dtype=torch.float64, requires_grad=True)
    time, context = network.embed_time(torch.rand(16).double()), network.prepare(torch.arange(16))
    before = network(x_t, time, context, mask=mask if parts else mask[0])
    other = x_t.detach().clone()
    other[:, changed] += 1
    after = network(other, time, context, mask=mask if parts else mask[0])
    same = (before == after).all(-1)  # [B, N]
    assert torch.equal(same, ~sees[:, :, changed].repeat_interleave(4 // len(sees), 0))


# A layout


def test_the_layout_is_orthonormal(mine):
    layout = mine("layouts.GreyFirst")(4)
    size = math.prod(layout.image_shape)
    assert size == layout.num_tokens * layout.token_dim
    unit = torch.eye(size, dtype=torch.float64).view(size, *layout.image_shape)
    tokens = layout.tokens(unit)
    assert tokens.shape == (size, layout.num_tokens, layout.token_dim)
    assert layout.coords.shape == (layout.num_tokens, 3)
    change = tokens.flatten(1)
    torch.testing.assert_close(change @ change.T, torch.eye(size).double())
    torch.testing.assert_close(layout.image(tokens), unit)


@pytest.mark.parametrize(("num_groups", "grouping"), [(1, "equal"), (2, "levels"), (3, "equal")])
def test_the_layout_samples_the_distribution_of_the_pixels(mine, num_groups, grouping):
    """With tokens of one number, for which the exact denoiser is known."""
    layout = mine("layouts.GreyFirst")(2, patch=1)
    factor = torch.randn(12, 24, generator=torch.Generator().manual_seed(0)).double()
    covariance = factor @ factor.T / 24
    change = layout.tokens(torch.eye(12).double().view(12, 3, 2, 2))[..., 0]
    oracle = MaskedGaussian(change.T @ covariance @ change, Rectified())
    decoder = Decoder(layout, oracle, training=Training((1, 2, 3), grouping=("equal", "levels")))
    found = covariance_of(
        decoder, num_groups=num_groups, grouping=grouping, solver=Heun(), steps=30
    )
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.02)


@pytest.mark.parametrize(("num_groups", "grouping"), [(2, "levels"), (4, "equal")])
def test_final_pixels_stay(mine, num_groups, grouping):
    layout = mine("layouts.GreyFirst")(8)
    training = Training((2, 4), orders=("bottom_to_top",), grouping=("equal", "levels"))
    network = Transformer(layout, width=16, depth=1, heads=1)
    decoder = random_weights(Decoder(layout, network, training=training))
    ask = {"num_groups": num_groups, "grouping": grouping, "order": "bottom_to_top", "steps": 2}
    frames = list(decoder.stream(num_images=2, seed=0, **ask))
    for frame in frames:
        image = frames[-1].image
        assert torch.equal(frame.image[..., frame.finished], image[..., frame.finished])
    assert frames[-1].finished.all()
    # Colours of all pixels come with the last groups.
    assert not frames[0].finished.any()
    if grouping == "equal":
        assert frames[-2].finished.any()


def test_the_first_level_is_grey(mine):
    layout = mine("layouts.GreyFirst")(8)
    tokens = layout.tokens(torch.rand(2, 3, 8, 8))
    tokens[:, layout.coords[:, 0] > 0] = 0
    red, green, blue = layout.image(tokens).unbind(1)
    torch.testing.assert_close(red, green)
    torch.testing.assert_close(red, blue)


# A data set


def test_the_data_are_the_pictures_of_the_table(mine, folder):
    table = mine("data.Table")
    settings = {"path": str(folder / "pictures.csv"), "image_size": 8, "channels": 3}
    data = [table(**settings, batch_size=4, max_steps=3, seed=seed) for seed in (0, 0, 1)]
    assert data[0].class_names == ("fire", "sea")
    assert (data[0].num_classes, data[0].shape) == (2, (3, 8, 8))
    batches = [[*each.train_dataloader()] for each in data]
    image, label = (torch.cat(parts) for parts in zip(*batches[0], strict=True))
    assert image.shape == (12, 3, 8, 8)
    assert label.tolist().count(0) == 6
    colour = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[label]
    assert torch.equal(image, colour[..., None, None].expand_as(image))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(batches[0], batches[1], strict=True))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(batches[0], batches[2], strict=True))


# Features


def test_the_features_are_those_of_each_image_in_every_process(mine):
    torch.manual_seed(1)
    features = as_extractor(mine("features.RandomFilters")())
    torch.manual_seed(2)
    again = as_extractor(mine("features.RandomFilters")())
    assert features.hash == again.hash
    assert features.distance_name == "fd_random_filters"
    for channels in (1, 3):
        image = torch.rand(5, channels, 8, 8) * 2 - 1
        found = features(image)
        assert found.shape == (5, 2 * 16 * channels)
        alone = torch.cat([features(each[None]) for each in image])
        torch.testing.assert_close(found, alone)


# Saved and read


def test_a_decoder_of_ones_own_parts_is_saved_and_read(mine, tmp_path):
    layout = mine("layouts.GreyFirst")(8)
    condition = {"brightness": mine("conditions.Number")(mean=0.5, std=0.1)}
    networks = [mine("backbones.OneLayer")(layout), Transformer(layout, condition=condition)]
    for network in networks:
        decoder = Decoder(layout, network, training=Training((1, 2)))
        decoder.save_pretrained(tmp_path)
        for trusted in ((), ["mypackage.layouts.GreyFirst"]):
            with pytest.raises(UsageError, match="must name a class of rolldiff, or one that"):
                Decoder.from_pretrained(tmp_path, trusted=trusted)
        read = Decoder.from_pretrained(tmp_path, trusted=["mypackage."])
        assert read.to_config() == json.loads((tmp_path / "config.json").read_text())
        assert read.layout == layout
        cond = {"brightness": 0.4} if network.conditioning.parts else None
        ask = {"num_groups": 2, "steps": 2, "num_images": 2, "seed": 0}
        assert torch.equal(read.decode(cond, **ask).image, decoder.decode(cond, **ask).image)
