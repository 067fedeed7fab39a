import csv
from itertools import pairwise

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rolldiff import Decoder, TokenGrid, Training
from rolldiff.cli import config_dir
from rolldiff.data import Digits
from rolldiff.errors import UsageError
from rolldiff.hub import read_checkpoint
from rolldiff.tokenizer import Encoder, Prior, Tokenizer
from rolldiff.training import (
    AveragedWeights,
    Clock,
    LitDecoder,
    LitPrior,
    LitTokenizer,
    SampleGrid,
    train,
)

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder.build(image_size=8, channels=1, width=16, depth=1, heads=1, num_classes=10)


def test_a_checkpoint_holds_averaged_weights_and_plain_containers(decoder, tmp_path):
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[AveragedWeights(decay=0.5)])
    lit = LitDecoder(decoder, warmup_steps=0)
    start = {n: p.clone() for n, p in lit.named_parameters()}
    trainer.fit(lit, Digits(batch_size=8, max_steps=4))
    assert any(not torch.equal(p, start[n]) for n, p in lit.named_parameters())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    read = read_checkpoint(path, Decoder)
    assert read.to_config() == decoder.to_config()
    for name, value in lit.model.state_dict().items():
        assert torch.equal(value, read.state_dict()[name])
    assert isinstance(LitDecoder.load_from_checkpoint(path, weights_only=True), LitDecoder)


def test_a_loss_that_is_not_finite_stops_with_the_step_named(decoder):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, lit, batch, batch_idx):
            if batch_idx == 2:
                lit.model.backbone.head.bias.data.fill_(float("nan"))

    trainer = L.Trainer(**QUIET, max_steps=5, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="nan at step 2"):
        trainer.fit(LitDecoder(decoder), Digits(batch_size=8, max_steps=5))


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_learning_rate(decoder, decay):
    lit = LitDecoder(decoder, warmup_steps=9, decay=decay)
    lit.trainer = L.Trainer(**QUIET, max_steps=100)
    rates = [lit.learning_rate_factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert rates[99] == 1 if decay == "constant" else rates[99] < 0.001


def test_foreign_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt", Decoder)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "cut.ckpt", Decoder)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of this library"):
        read_checkpoint(tmp_path / "foreign.ckpt", Decoder)
    with pytest.raises(ValueError, match="without model.safetensors"):
        read_checkpoint(tmp_path, Decoder)


@pytest.mark.parametrize("arguments", [{"decay": "steps"}, {"warmup_steps": -1}])
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(decoder, arguments):
    with pytest.raises(ValueError, match="decay|warmup_steps"):
        LitDecoder(decoder, **arguments)


def test_samples_are_drawn_with_the_averaged_weights(decoder, tmp_path):
    class Watch(SampleGrid):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.model.backbone.head.weight.clone())
            super().on_validation_epoch_end(trainer, pl_module)

    seen = []
    watch = Watch(str(tmp_path), num_groups=(1,), steps=1, count=2)
    average = AveragedWeights(decay=0.5)
    trainer = L.Trainer(
        **QUIET,
        max_steps=3,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[watch, average],
    )
    lit = LitDecoder(decoder, warmup_steps=0)
    trainer.fit(lit, Digits(batch_size=8, max_steps=3))
    # The trainer ends with the average in place.
    assert torch.equal(seen[0], lit.model.backbone.head.weight)
    assert (tmp_path / "step-000003.png").stat().st_size


def test_samples_are_drawn_as_was_trained(tmp_path):
    """A setting that was not trained would warn, and tests turn warnings into errors."""
    training = Training((4,), orders=("bottom_to_top",), overlap=(0.5,))
    sizes = {"image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 1, "heads": 1}
    decoder = Decoder.build(**sizes, training=training)
    grid = SampleGrid(str(tmp_path), num_groups=(4,), steps=1, count=2)
    sanity = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=[grid], **sanity)
    trainer.fit(LitDecoder(decoder), Digits(batch_size=8, max_steps=1))
    assert (tmp_path / "step-000001.png").stat().st_size


def test_what_does_not_change_is_its_own_average():
    """Lightning's average, `decay * mean + (1 - decay) * value`, rounds 11 to 10 at this decay."""
    torch.manual_seed(0)
    training = Training((1, 4), orders=("top_to_bottom", "random:1"))
    sizes = {"image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 1, "heads": 1}
    decoder = Decoder.build(**sizes, training=training)
    decoder.backbone.embed.weight.requires_grad_(False)
    orders, frozen = decoder.orders.clone(), decoder.backbone.embed.weight.clone()
    trainer = L.Trainer(**QUIET, max_steps=3, callbacks=[AveragedWeights(decay=0.9999)])
    trainer.fit(LitDecoder(decoder, warmup_steps=0), Digits(batch_size=8, max_steps=3))
    assert torch.equal(decoder.orders, orders)
    assert torch.equal(decoder.backbone.embed.weight, frozen)


def test_the_default_callbacks_draw_before_the_average_steps_back():
    names = list(OmegaConf.load(config_dir() / "callbacks/default.yaml"))
    assert names.index("samples") < names.index("ema")


@pytest.fixture
def tokenizer():
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    grid = TokenGrid(4, 4, channels=2)
    arguments = {"channels": 1, "width": 16, "depth": 1, "heads": 1, "condition": grid}
    decoder = Decoder.build(image_size=8, **arguments)
    encoder = Encoder(8, in_channels=1, channels=2, width=8, depth=1)
    return Tokenizer(encoder, decoder, levels=[3, 4])


def make_prior(num_tokens, codebook_size):
    return Prior(num_tokens, codebook_size, num_classes=10, width=16, depth=1, heads=2)


def test_a_tokenizer_is_trained_as_a_whole(tokenizer):
    lit = LitTokenizer(tokenizer, warmup_steps=0)
    before = {name: p.clone() for name, p in tokenizer.named_parameters()}
    L.Trainer(**QUIET, max_steps=2).fit(lit, Digits(batch_size=8, max_steps=2))
    changed = {n.split(".")[0] for n, p in tokenizer.named_parameters() if (p != before[n]).any()}
    assert changed == {"encoder", "decoder"}


def test_each_module_refuses_other_models(decoder, tokenizer):
    with pytest.raises(UsageError, match="model must be a Tokenizer, got a Decoder"):
        LitTokenizer(decoder)
    with pytest.raises(UsageError, match="same codes"):
        LitPrior(make_prior(16, 13), tokenizer=tokenizer)
    with pytest.raises(UsageError, match="compile must be false"):
        LitPrior(make_prior, tokenizer=tokenizer).compile_model()


def test_the_tokenizer_of_a_prior_is_frozen_and_not_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lit = LitPrior(make_prior, tokenizer=tmp_path / "tokenizer", warmup_steps=0)
    before = {name: p.clone() for name, p in lit.tokenizer.named_parameters()}
    trainer = L.Trainer(**QUIET, max_steps=2, callbacks=[AveragedWeights(decay=0.5)])
    trainer.fit(lit, Digits(batch_size=8, max_steps=2))
    assert all(torch.equal(p, before[name]) for name, p in lit.tokenizer.named_parameters())
    assert all(name.startswith("model.") for name in lit.state_dict())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    read = read_checkpoint(tmp_path / "last.ckpt", Prior)
    assert (read.num_tokens, read.codebook_size) == (16, 12)
    for name, value in lit.model.state_dict().items():
        assert torch.equal(value, read.state_dict()[name])


def test_samples_need_a_decoder(tokenizer, tmp_path):
    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=[SampleGrid(tmp_path, num_groups=(1,))])
    with pytest.raises(UsageError, match="callbacks.samples must be null"):
        trainer.fit(LitTokenizer(tokenizer), Digits(batch_size=8, max_steps=1))


@pytest.mark.parametrize("limit", ["5", "00:00:00", "00:00:00:-1", "one hour"])
def test_bad_time_limits(limit, tmp_path):
    with pytest.raises(UsageError, match="time_limit must be a time DD:HH:MM:SS"):
        Clock(limit, tmp_path / "last.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.usefixtures("unchecked")  # jaxtyping cannot be compiled
def test_a_compiled_training_is_the_plain_one(tmp_path):
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        words = [f"run_dir={folder}", f"compile={compiled}", "max_steps=30", "max_time=null"]
        words += ["nn.width=24", "nn.heads=1", "nn.depth=1", "trainer.log_every_n_steps=10"]
        words += ["report.samples=20", "report.steps=2", "progress=false"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            train(compose("train", words))
        with (folder / "logs/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses.append([float(row["loss"]) for row in rows if row["loss"]])
        assert any(float(row["images_per_second"] or 0) > 0 for row in rows)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
