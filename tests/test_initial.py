"""A training that starts from other weights: what fits is taken, and another network refused."""

import pytest
import torch
from runs import composed

from rolldiff import (
    ClassLabels,
    Cosine,
    Decoder,
    DiT,
    LinearBeta,
    Patches,
    TokenGrid,
    Training,
)
from rolldiff.errors import UsageError
from rolldiff.training import decoder_of, train
from rolldiff.training.initial import start_from
from rolldiff.training.run import resumed_config

SMALL = {"image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 1}


def build(seed, **settings):
    torch.manual_seed(seed)
    decoder = Decoder.build(**SMALL | {"num_classes": 3} | settings)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder


def assert_loaded(model, source, *, but=()):
    for name, value in model.state_dict().items():
        same = torch.equal(value, source.state_dict()[name]) if name not in but else None
        assert same in (True, None), name


LABELS = "backbone.cond_embedder.parts.0.embedding.weight"


def test_everything_is_taken_of_the_same_network():
    model, source = build(0, training=Training((1, 2, 4))), build(1)
    assert start_from(model, source) == []
    assert_loaded(model, source)
    assert model.training_distribution.num_groups == (1, 2, 4)


def test_other_classes_and_conditions_begin_anew():
    for settings in (
        {"num_classes": 5},
        {"num_classes": 0, "condition": TokenGrid(2, 2, channels=3)},
    ):
        model, source = build(0, **settings), build(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        left = start_from(model, source)
        fresh = [name for name in before if "cond_embedder" in name]
        assert len(left) == len(fresh)
        assert all(any(text.startswith(name) for text in left) for name in fresh)
        assert_loaded(model, source, but=fresh)
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in fresh)
    assert start_from(build(0, num_classes=5), build(1)) == [
        f"{LABELS} (6, 96) here, (4, 96) in init"
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 32}, "same network: .*attn.out.bias .32,. here, .16,. in init.*; and 20 more"),
        ({"depth": 3}, "blocks.2.* here, none in init"),
        ({"depth": 1}, "blocks.1.* none here"),
        ({"patch": 4}, r"backbone.embed.weight \(16, 16\) here, \(16, 4\) in init"),
        ({"channels": 3}, r"backbone.embed.weight \(16, 12\) here"),
        ({"prediction": "eps"}, "decoder.prediction must be that of the weights of init, x, got"),
    ],
)
def test_another_network_is_refused_and_nothing_loaded(settings, words):
    model, source = build(0, **settings), build(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        start_from(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_noise_is_said():
    with pytest.warns(UserWarning, match=r"noise is Cosine.* here and Rectified.* in init"):
        start_from(build(0, noise=Cosine()), build(1))


TINY = [
    "max_steps=2",
    "max_time=null",
    "batch_size=4",
    "progress=false",
    "nn.width=16",
    "nn.depth=1",
    "nn.heads=1",
    "report.num_groups=[1]",
    "report.samples=8",
    "report.steps=1",
    "callbacks.samples=null",
]


def test_a_decoder_of_other_weights_keeps_all_but_what_is_drawn(tmp_path):
    source = build(1, noise=Cosine(), prediction="v", num_classes=4)
    source.save_pretrained(tmp_path)
    decoder = decoder_of(str(tmp_path), training=Training((1, 4)), loss_space="eps")
    assert_loaded(decoder, source)
    assert decoder.training
    assert (decoder.noise, decoder.prediction, decoder.loss_space) == (Cosine(), "v", "eps")
    assert decoder.training_distribution == Training((1, 4))
    assert decoder.conditioning.num_classes == 4
    with pytest.raises(UsageError, match="of the weights of init, v, got eps.* ~recipe"):
        decoder_of(str(tmp_path), training=Training(), prediction="eps")
    with pytest.raises(UsageError, match="init must be given with decoder=init, got null"):
        decoder_of(None, training=Training())
    with pytest.raises(UsageError, match="init must be weights to start from"):
        decoder_of(str(tmp_path / "none"), training=Training())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, about two steps
def test_a_dit_is_trained_further_without_naming_its_settings_and_resumed_without_it(tmp_path):
    layout = Patches(8, channels=1, patch=2)
    net = DiT(layout, width=16, depth=2, heads=2, condition=ClassLabels(12), timestep=(-1.0, 1.0))
    Decoder(layout, net, noise=LinearBeta(), prediction="eps").save_pretrained(tmp_path / "dit")
    settings = ["~recipe", "decoder=init", "training.num_groups=[1,2]", "max_steps=40"]
    settings = [each for each in [*TINY, *settings] if not each.startswith("nn.")]
    first = composed(
        *settings,
        f"init={tmp_path / 'dit'}",
        f"run_dir={tmp_path / 'run'}",
        "time_limit=00:00:00:00",
    )
    assert train(first) is None
    (tmp_path / "dit").rename(tmp_path / "gone")
    again = composed(f"resume={tmp_path / 'run'}", "progress=false")
    assert train(resumed_config(again)).steps == 40
    decoder = Decoder.from_pretrained(tmp_path / "run")
    assert decoder.backbone.config["timestep"] == (-1.0, 1.0)
    assert (decoder.noise, decoder.prediction) == (LinearBeta(), "eps")
    assert decoder.training_distribution.num_groups == (1, 2)
    assert not torch.equal(decoder.backbone.head.weight, torch.zeros(4, 16))


@pytest.mark.filterwarnings("ignore")  # Lightning's, about two steps
def test_a_training_starts_where_another_has_ended(tmp_path, capsys):
    def run(name, *overrides):
        train(composed(*TINY, f"run_dir={tmp_path / name}", *overrides))
        return Decoder.from_pretrained(tmp_path / name)

    first = run("first", "training.num_groups=[1]")
    again = run("again", f"init={tmp_path / 'first'}", "optimizer.lr=0", "num_classes=12")
    assert f"Starts from the weights of {tmp_path / 'first'}, without:" in capsys.readouterr().out
    assert isinstance(again.conditioning.parts[0], ClassLabels)
    assert_loaded(again, first, but=[LABELS])
    for name, words in (("none", "does not exist"), ("first/config.yaml", "init must be weights")):
        with pytest.raises(UsageError, match=words):
            run("refused", f"init={tmp_path / name}")
        assert not (tmp_path / "refused").exists()
