"""Images to codes, codes by a prior, and the images decoded from them."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from rolldiff import DecodeConfig, Decoder, TokenGrid, Training
from rolldiff.cli import config_dir, main
from rolldiff.data import Digits
from rolldiff.evaluation import report as reports
from rolldiff.evaluation.report import PriorReport, TokenizerReport
from rolldiff.tokenizer import Encoder, Generation, Prior, Tokenizer
from rolldiff.tokenizer.pipeline import measure_latency

pytest.importorskip("vector_quantize_pytorch")
LEVELS = [3, 4]


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    decoder = Decoder.build(
        image_size=8,
        channels=1,
        patch=2,
        width=32,
        depth=1,
        heads=2,
        condition=TokenGrid(4, 4, channels=2),
        training=Training((1, 2, 4, 16), drop_cond=0.0),
    )
    encoder = Encoder(8, in_channels=1, factor=2, channels=2, width=8, depth=1)
    made = Tokenizer(encoder, decoder, levels=LEVELS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(0)
    torch.nn.init.normal_(encoder.layers[-1].weight, std=4.0)  # or all codes would be one
    return made.eval()


@pytest.fixture
def prior():
    torch.manual_seed(1)
    made = Prior(16, 12, num_classes=3, width=16, depth=2, heads=2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def images(count=6):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


ASK = {"num_groups": 4, "steps": 2}


def test_codes_are_the_condition_of_the_decoder(tokenizer):
    image = images()
    codes = tokenizer.encode(image)
    assert codes.shape == (6, 16)
    assert 0 <= codes.min() <= codes.max() < tokenizer.codebook_size == 12
    assert len(codes.unique()) > 4
    torch.testing.assert_close(tokenizer.dequantize(codes), tokenizer.latents(image))
    pieces = torch.cat(list(tokenizer.stream_latents(iter(codes.unbind(1)))), dim=1)
    assert torch.equal(pieces.unflatten(1, (4, 4)), tokenizer.dequantize(codes))


def test_the_encoder_trains_through_the_decoder(tokenizer):
    loss = tokenizer.loss(images(32), generator=torch.Generator().manual_seed(0))
    loss.backward()
    for name, parameter in tokenizer.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_tokenizer_is_saved_and_read(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(images())
    assert torch.equal(codes, read.encode(images()))
    told = tokenizer.dequantize(codes)
    assert torch.equal(read.dequantize(codes), told)
    found, wanted = (made.decoder.decode(told, seed=3, **ASK) for made in (read, tokenizer))
    assert torch.equal(found.image, wanted.image)


def test_a_code_depends_on_no_later_one(prior):
    codes = torch.randint(12, (1, 16), generator=torch.Generator().manual_seed(0))

    def logits(codes):
        h = prior.embed(torch.cat([codes.new_full((1, 1), 12), codes[:, :-1]], dim=1))
        return prior._logits(h, torch.tensor([1]), start=0)

    for place in (0, 7, 15):
        other = codes.clone()
        other[0, place] = (codes[0, place] + 1) % 12
        same = (logits(codes) - logits(other)).abs().amax(-1)[0] == 0
        assert same.tolist() == [i <= place for i in range(16)]


def test_written_codes_are_the_likeliest_at_temperature_0(prior):
    """With the cache, one at a time, as without it, all at once."""
    written = torch.stack(list(prior.generate([0, 2], temperature=1e-9, seed=0)), dim=1)
    losses = []
    for label in ([0, 2], [1, 1]):
        prior.drop_cond, prior.dropout = 0.0, 0.0
        losses.append(prior.loss(written, label))
    assert losses[0] < losses[1]
    h = prior.embed(torch.cat([written.new_full((2, 1), 12), written[:, :-1]], dim=1))
    likeliest = prior._logits(h, torch.tensor([0, 2]), start=0).argmax(-1)
    assert torch.equal(likeliest, written)


def test_draws_follow_the_distribution(prior):
    """The first code's frequencies against the softmax, within four standard errors."""
    count = 4000
    first = next(iter(prior.generate([1] * count, seed=0)))
    h = prior.embed(torch.tensor([[12]]))
    p = prior._logits(h, torch.tensor([1]), start=0)[0, 0].softmax(-1)
    error = 4 * (p * (1 - p) / count).sqrt() + 1e-9
    assert ((first.bincount(minlength=12) / count - p).abs() < error).all()


def test_guidance_goes_towards_the_label(prior):
    h = prior.embed(torch.tensor([[12]]))
    told, null = (prior._logits(h, torch.tensor([i]), start=0)[0, 0] for i in (1, 3))
    for guidance in (0.5, 8.0):
        code = next(iter(prior.generate([1], guidance=guidance, temperature=1e-9, seed=0)))
        assert code == (told + guidance * (told - null)).argmax()


def test_what_training_drops(prior):
    """Without labels nothing is told of them; without codes, nothing of those before."""
    codes = torch.randint(12, (4, 16), generator=torch.Generator().manual_seed(0))
    prior.dropout, prior.drop_cond = 0.0, 1.0
    assert torch.equal(prior.loss(codes, [0, 1, 2, 0]), prior.loss(codes))
    assert not torch.allclose(prior.loss(codes), prior.loss(codes.roll(1, 1)))
    prior.drop_cond = 0.0
    assert not torch.allclose(prior.loss(codes, [0, 1, 2, 0]), prior.loss(codes))
    prior.dropout = 1.0
    nothing, null = torch.zeros(4, 16, 16), torch.full((4,), 3)
    logits = prior._logits(nothing, null, start=0)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(prior.loss(codes), wanted)


def test_an_image_gets_the_same_codes_alone_and_in_a_batch(prior):
    ask = {"seed": 5, "guidance": 0.5}
    together = torch.stack(list(prior.generate([0, 1, 2], **ask)), dim=1)
    alone = torch.stack(list(prior.generate([1], start_index=1, **ask)), dim=1)
    assert torch.equal(together[1:2], alone)


def test_a_prior_learns_what_it_is_shown(prior):
    codes = torch.randint(12, (3, 16), generator=torch.Generator().manual_seed(4))
    prior.dropout, prior.drop_cond = 0.0, 0.0
    optimizer = torch.optim.Adam(prior.parameters(), 0.01)
    for _ in range(80):
        loss = prior.loss(codes, [0, 1, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = torch.stack(list(prior.generate([0, 1, 2], seed=0, temperature=0.1)), dim=1)
    assert torch.equal(written, codes)


def test_decoding_while_codes_are_generated_is_decoding_after_them(tokenizer, prior):
    for settings in (ASK, {"num_groups": 1, "steps": 2}, ASK | {"overlap": 0.5}):
        config = DecodeConfig(**settings)
        generation = Generation(prior, tokenizer, cond=[0, 1], num_images=2, seed=7, config=config)
        whole = generation.images()
        frames = [(frame, generation.num_generated) for frame in generation.stream()]
        assert torch.equal(frames[-1][0].image, whole)
        (last,) = generation.stream(frames=1, wait=True)
        assert torch.equal(last.image, whole)
        assert frames[0][1] == {1: 16, 4: 4}[settings["num_groups"]]
        for a, b in pairwise(frames):
            done = a[0].finished
            assert torch.equal(a[0].image[..., done], b[0].image[..., done])


def test_the_first_row_needs_no_more_than_its_codes(tokenizer, prior):
    generation = Generation(prior, tokenizer, cond=[0], seed=7, config=DecodeConfig(**ASK))
    arriving, waiting = (
        measure_latency(generation, wait=False),
        measure_latency(generation, wait=True),
    )
    assert arriving.codes_at_first_row == 4
    assert waiting.codes_at_first_row == 16
    assert 0 < arriving.first_row < arriving.whole


def test_reports(tokenizer, prior, tmp_path):
    image, label = images(12), torch.arange(12) % 3
    report = TokenizerReport(num_groups=[1, 4], steps=1)
    report.validate(tokenizer)
    found = report(tokenizer, image, label=label, folder=tmp_path, seed=0).values
    assert set(found["psnr"]) == {"1", "4"}
    assert found["tokens_per_image"] == 16
    report = PriorReport(tokenizer=tokenizer, num_groups=4, steps=1)
    report.validate(prior)
    found = report(prior, image, label=label, folder=tmp_path, seed=0).values
    assert found["while_generated"]["codes_at_first_row"] == 4
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"reconstructions.png", "samples.png", "stream.gif"}


def test_reports_do_not_depend_on_their_batches(tokenizer, prior, tmp_path, monkeypatch):
    image, label = images(12), torch.arange(12) % 3
    found = []
    for batch in (5, 500):
        monkeypatch.setattr(reports, "BATCH", batch)
        ask = {"label": label, "folder": tmp_path, "seed": 0}
        tokens = TokenizerReport(num_groups=[2], steps=1)(tokenizer, image, **ask).values
        codes = PriorReport(tokenizer=tokenizer, num_groups=2, steps=1)(prior, image, **ask).values
        found.append([tokens["psnr"]["2"], tokens["fd_pixels"]["2"], codes["fd_pixels"]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    used = tokenizer.encode(image).flatten().bincount(minlength=12) / (12 * 16)
    perplexity = torch.distributions.Categorical(used).perplexity()
    assert tokens["codes_in_use"] == pytest.approx(float(perplexity), rel=1e-4)
    assert codes["sequences_in_data"] == 0  # of 12^16


@pytest.mark.parametrize("count", [1, 3])
def test_reports_of_few_images_have_no_distance(tokenizer, prior, tmp_path, count):
    ask = {"label": torch.arange(count), "folder": tmp_path, "seed": 0}
    found = TokenizerReport(num_groups=[2], steps=1)(tokenizer, images(count), **ask)
    assert found.values["fd_pixels"] == {"2": None}
    assert found.values["psnr"]["2"] > 0
    assert "too few images" in found.table
    found = PriorReport(tokenizer=tokenizer, steps=1)(prior, images(count), **ask)
    assert found.values["fd_pixels"] is found.values["fd_pixels_floor"] is None
    assert "fd_pixels too few images" in found.table


def test_reports_that_cannot_be_made_are_refused(tokenizer, prior):
    for wrong, words in (
        ({"num_groups": 17}, "in 1 … 16"),
        ({"overlap": 1.5}, "overlap must be"),
        ({"steps": 0}, "steps must be"),
        ({"samples": 3}, "samples must be a whole number of 4"),
    ):
        with pytest.raises(ValueError, match=words):
            PriorReport(tokenizer=tokenizer, **wrong).validate(prior)
        if "overlap" not in wrong:
            several = {"num_groups": [wrong.get("num_groups", 1)]}
            with pytest.raises(ValueError, match=words):
                TokenizerReport(**(wrong | several)).validate(tokenizer)


def test_what_does_not_belong_together(tokenizer, prior):
    with pytest.raises(ValueError, match="same codes"):
        Generation(Prior(16, 13), tokenizer)
    with pytest.raises(ValueError, match="must agree"):
        Tokenizer(tokenizer.encoder, tokenizer.decoder, levels=[3, 3, 3])
    with pytest.raises(ValueError, match="in 0 … 11"):
        tokenizer.dequantize(torch.full((1, 16), 12))
    with pytest.raises(ValueError, match=r"shape \(B, 16\)"):
        tokenizer.dequantize(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(B, 16\)"):
        prior.loss(torch.zeros(1, 15, dtype=torch.long))
    for wrong, words in (
        ({"temperature": 0.0}, "temperature"),
        ({"guidance": 1.0}, "guidance needs"),
        ({"cond": [3]}, "in 0 … 2"),
    ):
        with pytest.raises(ValueError, match=words):
            next(prior.generate(**wrong))
    for sizes in ({"width": 15}, {"dropout": 1.0}, {"depth": 0}):
        with pytest.raises(ValueError, match="must be"):
            Prior(16, 12, **({"width": 16, "heads": 2} | sizes))
    with pytest.raises(ValueError, match="power of 2"):
        Encoder(8, factor=3)


def test_a_prior_over_the_codes_of_a_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    ask = ["experiment=prior", f"tokenizer={tmp_path}", "prior_model.width=33", "num_classes=10"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ask)
    lit = instantiate(cfg.lit, _convert_="all")
    sizes = {"num_tokens": 16, "codebook_size": 12, "num_classes": 10, "width": 33}
    assert sizes.items() <= lit.model.config.items()
    assert torch.equal(lit.tokenizer.encode(images()), tokenizer.encode(images()))


@pytest.mark.slow
def test_the_whole_chain_from_the_command_line(tmp_path):
    rolldiff = str(Path(sys.executable).with_name("rolldiff"))
    short = ["max_steps=20", "report.samples=50", "report.steps=2"]
    tokens, codes = tmp_path / "tokens", tmp_path / "codes"
    for ask in (
        ["train", "experiment=tokenizer", *short, f"run_dir={tokens}"],
        ["train", "experiment=prior", f"tokenizer={tokens}", *short, f"run_dir={codes}"],
        ["generate", f"prior={codes}", f"tokenizer={tokens}", "label=3", "num_groups=4", "steps=2"],
    ):
        done = subprocess.run(
            [rolldiff, *ask], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tokens / "summary.json").read_text())["codes"] == 125
    summary = json.loads((codes / "summary.json").read_text())
    assert (summary["tokens_per_image"], summary["steps"]) == (16, 20)
    with Image.open(tmp_path / "stream.gif") as film:  # frames that are alike are one
        assert 1 <= film.n_frames <= 8


def test_reconstructions_are_of_images_that_are_held_out(tmp_path, monkeypatch):
    seen = []

    def look(self, model, image, **_):
        seen.append(image)
        return reports.Report({}, "", "")

    monkeypatch.setattr(TokenizerReport, "__call__", look)
    ask = ["train", "experiment=tokenizer", "max_steps=1", "batch_size=4", "progress=false"]
    ask += ["nn.width=8", "nn.depth=1", "nn.heads=1", "+trainer.limit_val_batches=1"]
    for held_out in (0.25, 0.0):
        main([*ask, f"data.held_out={held_out}", f"run_dir={tmp_path / str(held_out)}"])
    data = Digits(image_size=8, channels=1, held_out=0.25)
    assert torch.equal(seen[0], data.held_out_images[0])
    assert len(seen[0]) + len(data.image) == len(seen[1]) == 1797
