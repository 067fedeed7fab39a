"""Latents of an autoencoder: decoded, read from folders, trained on, and seen as pictures."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import tiny_kl
from PIL import Image
from runs import ALLOWED
from safetensors.torch import load_file, save_file

from oracles import masked_decoder, natural_covariance
from rolldiff import Decoder, TokenGrid, Training
from rolldiff.cli import main
from rolldiff.data import Digits, Folder, Hub, Latents, Photos, module
from rolldiff.errors import UsageError
from rolldiff.evaluation.images import as_pictures, labelled_rows, to_bytes
from rolldiff.integrations.autoencoder import Autoencoder
from rolldiff.integrations.diffusers import DiffusersDecoder
from rolldiff.serving import Served
from rolldiff.tokenizer import Encoder, Tokenizer
from rolldiff.training import decoder_of

pytestmark = ALLOWED
SHAPE = (4, 4, 4)
TINY = [
    "max_steps=4",
    "batch_size=4",
    "progress=false",
    "nn.width=16",
    "nn.depth=1",
    "nn.heads=1",
    "training.num_groups=[1,2]",
    "report.samples=8",
    "report.steps=1",
    "lit.warmup_steps=1",
    "trainer.val_check_interval=2",
]


def decoder_of_latents(**arguments):
    torch.manual_seed(0)
    settings = {"image_size": 4, "channels": 4, "patch": 1, "width": 16, "depth": 1, "heads": 1}
    return Decoder.build(**settings | {"latents": True} | arguments)


def test_latents_may_hold_any_finite_values():
    latents = 5 * torch.randn(2, *SHAPE)
    decoder = decoder_of_latents()
    assert decoder.loss(latents).isfinite()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    decoded = decoder.decode(image=latents, mask=mask, steps=1, seed=0).image
    assert torch.equal(decoded[:, :, :2], latents[:, :, :2])
    assert decoder.encode(latents, steps=1).isfinite().all()
    with pytest.raises(UsageError, match=r"image must be in \[-1, 1\]"):
        decoder_of_latents(latents=False).loss(latents)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_must_be_finite(wrong):
    latents = torch.zeros(2, *SHAPE)
    latents[1, 0, 0, 0] = wrong
    with pytest.raises(UsageError, match="image must be finite"):
        decoder_of_latents().loss(latents)


def test_latents_have_no_likelihood_in_bits():
    with pytest.raises(UsageError, match="dequantization must be None for latents"):
        decoder_of_latents().log_likelihood(torch.zeros(1, *SHAPE))


def test_latents_have_a_density():
    """That of a Gaussian of standard deviation 3, most of which is outside of [-1, 1]."""
    covariance = 9 * natural_covariance(2)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    torch.manual_seed(0)
    x = gaussian.sample((5,))
    assert x.abs().max() > 3
    decoder = Decoder(**masked_decoder(covariance).config | {"latents": True})
    found = decoder.log_likelihood(
        x.view(-1, 1, 2, 2), num_groups=2, method="ode", dequantization=None, tolerance=1e-4
    )
    # 1e-4 bits per dimension of the solver; the first noise, 1e-3, adds some 1e-6 to the variances.
    torch.testing.assert_close(found.nats, gaussian.log_prob(x), rtol=0, atol=1e-3)


def test_a_saved_decoder_keeps_that_it_is_one_of_latents(tmp_path):
    decoder_of_latents().save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).latents
    older = decoder_of_latents(latents=False).to_config()
    del older["latents"]
    assert not Decoder.from_config(older).latents


@pytest.mark.parametrize(("given", "found"), [(None, True), (False, False)])
def test_a_further_training_keeps_that_images_are_latents(tmp_path, given, found):
    decoder_of_latents().save_pretrained(tmp_path)
    further = decoder_of(str(tmp_path), training=Training((1, 2)), latents=given)
    assert further.latents is found


def test_what_makes_pictures_refuses_a_decoder_of_latents():
    grid = TokenGrid(4, 4, channels=2)
    decoder = decoder_of_latents(condition=grid)
    with pytest.raises(UsageError, match="must be one of pictures, got one of latents"):
        DiffusersDecoder(decoder)
    with pytest.raises(UsageError, match="must be a decoder of pictures, got one of latents"):
        Served(decoder=decoder_of_latents())
    encoder = Encoder(image_size=4, in_channels=4, factor=1, channels=2, width=8, depth=1)
    with pytest.raises(UsageError, match="must be one of pictures, got one of latents"):
        Tokenizer(encoder, decoder, levels=[3, 3])


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    """A saved autoencoder; its pictures have twice the sides of its latents."""
    folder = tmp_path_factory.mktemp("kl")
    tiny_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def autoencoder():
    return Autoencoder(tiny_kl())


def pictures(count, size=8, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, generator=generator) * 2 - 1


def test_latents_are_those_of_the_module_shifted_and_scaled(autoencoder):
    kl, image = autoencoder.module, pictures(3)
    latents = autoencoder.encode(image)
    expected = (kl.encode(image).latent_dist.mean - 0.25) * 0.5
    assert latents.shape == (3, *autoencoder.latent_shape((3, 8, 8))) == (3, *SHAPE)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    bright = 40 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    decoded, raw = autoencoder.decode(bright), kl.decode(bright / 0.5 + 0.25).sample
    assert raw.abs().max() > 1  # otherwise nothing is clipped
    torch.testing.assert_close(decoded, raw.clamp(-1, 1), rtol=0, atol=1e-5)


def test_factors_that_are_given_replace_those_of_the_module():
    image = pictures(1)
    plain = Autoencoder(tiny_kl(), scaling_factor=1.0, shift_factor=0.0).encode(image)
    torch.testing.assert_close(plain, tiny_kl().encode(image).latent_dist.mean)


def test_parts_do_not_change_what_comes_out():
    image, seed = pictures(5), lambda: torch.Generator().manual_seed(3)
    whole, parts = (Autoencoder(tiny_kl(), batch_size=n) for n in (5, 2))
    latents = whole.encode(image)
    # To rounding of sums of about a hundred numbers of about 1.
    torch.testing.assert_close(parts.encode(image), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.decode(latents), whole.decode(latents), rtol=0, atol=1e-5)
    drawn = whole.encode(image, generator=seed())
    torch.testing.assert_close(parts.encode(image, generator=seed()), drawn, rtol=0, atol=1e-5)
    noise = torch.randn(5, *SHAPE, generator=seed())
    spread = tiny_kl().encode(image).latent_dist.std
    torch.testing.assert_close(drawn, latents + 0.5 * spread * noise, rtol=0, atol=1e-5)


def test_an_autoencoder_is_frozen_and_read_as_it_was_saved(kl_folder, tmp_path):
    read = Autoencoder.from_pretrained(kl_folder, device="cpu")
    shutil.copytree(kl_folder, tmp_path / "pipeline/vae")
    part = Autoencoder.from_pretrained(tmp_path / "pipeline", subfolder="vae", device="cpu")
    image = pictures(2).requires_grad_()
    latents = read.encode(image)
    assert not latents.requires_grad
    assert not read.module.training
    assert not any(p.requires_grad for p in read.module.parameters())
    assert torch.equal(latents, part.encode(image))
    assert torch.equal(latents, Autoencoder(tiny_kl()).encode(image))


def broken(kl_folder, folder, fault):
    shutil.copytree(kl_folder, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif fault == "pickled":
        torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
        weights.unlink()
    elif fault in ("deeper", "unet"):
        change = {"deeper": {"layers_per_block": 2}, "unet": {"_class_name": "UNet2DModel"}}
        config = json.loads((folder / "config.json").read_text()) | change[fault]
        (folder / "config.json").write_text(json.dumps(config))
    elif fault == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "must hold an AutoencoderKL of diffusers in safetensors"),
        ("pickled", "must hold an AutoencoderKL of diffusers in safetensors"),
        ("empty", "must hold an AutoencoderKL of diffusers in safetensors"),
        ("deeper", "must hold all weights and no others"),
        ("unet", "must be an AutoencoderKL, got a UNet2DModel"),
    ],
)
def test_what_is_no_autoencoder_is_refused(kl_folder, tmp_path, fault, words):
    broken(kl_folder, tmp_path / "broken", fault)
    with pytest.raises(UsageError, match=words):
        Autoencoder.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("path", ["/nowhere", "nowhere", "", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(UsageError, match="must be a folder or the name of a repository"):
        Autoencoder.from_pretrained(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: a.encode(pictures(1, size=7)), "multiples of 2, got"),
        (lambda a: a.encode(pictures(1, channels=1)), "of 3 channels"),
        (lambda a: a.encode(2 * pictures(1)), r"image must be in \[-1, 1\]"),
        (lambda a: a.encode(pictures(1) * torch.nan), r"image must be in \[-1, 1\]"),
        (lambda a: a.decode(torch.zeros(1, 3, 4, 4)), "3 channels, got one of 4"),
        (lambda a: a.decode(torch.full((1, *SHAPE), torch.inf)), "latents must be finite"),
        (lambda a: a.decode(torch.zeros(0, *SHAPE)), "latents must have shape"),
        (lambda a: Autoencoder(torch.nn.Linear(1, 1)), "module must be an AutoencoderKL"),
        (lambda a: Autoencoder(a.module, scaling_factor=0), "scaling_factor must be above 0"),
        (lambda a: Autoencoder(a.module, batch_size=0), "batch_size must be"),
        (lambda a: Autoencoder(tiny_kl(out_channels=1)), "module must be of pictures"),
        (lambda a: Autoencoder(tiny_kl(latents_mean=[0.0] * 4)), "no latents_mean of its own"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_an_autoencoder_refuses(autoencoder, call, words):
    with pytest.raises(UsageError, match=words):
        call(autoencoder)


def arrays(folder, count=4, shape=SHAPE, dtype=np.float32):
    """Latents of one image per file, each with numbers of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    found = [5 * generator.standard_normal(shape).astype(dtype) for _ in range(count)]
    for i, array in enumerate(found):
        np.save(folder / f"{i}.npy", array)
    return torch.from_numpy(np.stack(found).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_a_folder_of_arrays(tmp_path, dtype):
    stored = arrays(tmp_path, dtype=dtype)
    data = Latents(path=tmp_path, scaling_factor=0.5, batch_size=4, max_steps=1)
    assert data.shape == SHAPE
    assert data.latents
    assert data.num_classes == 0
    assert torch.equal(data.image, 0.5 * stored)
    ((batch, label),) = data.train_dataloader()
    assert sorted(batch.sum((1, 2, 3)).tolist()) == sorted(data.image.sum((1, 2, 3)).tolist())
    assert not label.any()


def test_subfolders_are_classes(tmp_path):
    arrays(tmp_path / "cat", 2)
    arrays(tmp_path / "dog/young", 3)
    data = Latents(path=tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.label.tolist() == [0, 0, 1, 1, 1]


def test_files_of_many_latents_with_labels(tmp_path):
    latents = torch.randn(5, 3, 2, 6)
    label = torch.tensor([0, 4, 1, 0, 2])
    save_file({"latents": latents[:3], "labels": label[:3]}, tmp_path / "a.safetensors")
    stored = {"latents": latents[3:].bfloat16(), "labels": label[3:].int()}
    save_file(stored, tmp_path / "b.safetensors")
    data = Latents(path=tmp_path)
    assert data.shape == (3, 2, 6)
    assert data.num_classes == 5
    assert data.class_names is None
    assert torch.equal(data.label, label)
    assert torch.equal(data.image[:3], latents[:3])
    assert torch.equal(data.image[3:], latents[3:].bfloat16().float())


def test_labels_in_a_folder_of_their_own(tmp_path):
    """As the scripts of fast-DiT write features: `[1, C, h, w]`, and labels `[1]` beside them."""
    arrays(tmp_path / "features", 3, (1, *SHAPE))
    (tmp_path / "labels").mkdir()
    for i, label in enumerate([7, 0]):
        np.save(tmp_path / f"labels/{i}.npy", np.array([label]))
    data = Latents(path=tmp_path / "features", labels=tmp_path / "labels")
    with pytest.warns(UserWarning, match=r"2\.npy: no label"):
        assert data.label.tolist() == [7, 0]
    assert data.num_classes == 8
    np.save(tmp_path / "labels/1.npy", np.array([0.5]))
    with pytest.raises(UsageError, match="one whole number of 0 or more per file"):
        Latents(path=tmp_path / "features", labels=tmp_path / "labels").label  # noqa: B018


def test_large_folders_are_read_while_training(tmp_path, monkeypatch):
    stored = arrays(tmp_path)
    save_file({"latents": stored + 1}, tmp_path / "more.safetensors")
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 0)
    data = Latents(path=tmp_path, reference_images=8)
    assert type(data._dataset).__name__ == "LazyImages"
    assert torch.equal(data.image, torch.cat([stored, stored + 1]))


def wrong_file(folder, fault):
    """Something beside sound latents that is none."""
    file = folder / "wrong.npy"
    match fault:
        case "shape":
            np.save(file, np.zeros((4, 2, 2), np.float32))
        case "flat":
            np.save(file, np.zeros((4, 4), np.float32))
        case "nan":
            np.save(file, np.full(SHAPE, np.nan))
        case "large":
            np.save(file, np.full(SHAPE, 1e300))
        case "whole":
            np.save(file, np.zeros(SHAPE, np.int64))
        case "object":
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        case "text":
            file.write_text("no array")
        case "cut":
            np.save(file, np.zeros(SHAPE, np.float32))
            file.write_bytes(file.read_bytes()[:-8])
        case "link":
            file.symlink_to("nowhere")
        case "tensors":
            file.with_suffix(".safetensors").write_text("no tensors")
        case "name":
            save_file({"z": torch.zeros(1, *SHAPE)}, file.with_suffix(".safetensors"))
        case "dimensions":
            save_file({"latents": torch.zeros(*SHAPE)}, file.with_suffix(".safetensors"))
        case "integers":
            save_file({"latents": torch.zeros(1, *SHAPE).int()}, file.with_suffix(".safetensors"))
        case "labels":
            wrong = {"latents": torch.zeros(2, *SHAPE), "labels": torch.tensor([0, -1])}
            save_file(wrong, file.with_suffix(".safetensors"))


FAULTS = {
    "shape": r"of one shape, \(4, 4, 4\) as the first",
    "flat": r"latents \[C, h, w\]",
    "nan": "finite latents",
    "large": "finite latents",
    "whole": "floating point, got .*int64",
    "object": "arrays of latents",
    "text": "arrays of latents",
    "cut": "arrays of latents",
    "link": "arrays of latents",
    "tensors": "must be latents, got",
    "name": "must be latents, got",
    "dimensions": r"latents \[n, C, h, w\]",
    "integers": "floating point, got .*int32",
    "labels": "labels must be whole numbers of 0 or more",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_holds_no_latents(tmp_path, fault):
    stored = arrays(tmp_path)
    wrong_file(tmp_path, fault)
    with pytest.warns(UserWarning, match=FAULTS[fault]) as warned:
        assert torch.equal(Latents(path=tmp_path).image, stored)
    assert len(warned) == 1
    with pytest.raises(UsageError, match=FAULTS[fault]):
        Latents(path=tmp_path, on_error="raise").image  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "/nowhere"}, "data.path must be a folder of latents, got /nowhere"),
        ({"path": ""}, "data.path must be a folder of latents, got ''"),
        ({"labels": "/nowhere"}, "data.labels must be a folder of labels, got /nowhere"),
        ({"scaling_factor": 0.0}, "scaling_factor must be another number than 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be a finite number"),
        ({}, "data must hold latents, got none in"),
        ({"both": True}, "got two of them in"),
    ],
)
def test_a_folder_without_latents(tmp_path, settings, words):
    if settings.pop("both", False):
        arrays(tmp_path / "cat", 1)
        (tmp_path / "dog").mkdir()
        labelled = {"latents": torch.zeros(1, *SHAPE), "labels": torch.tensor([3])}
        save_file(labelled, tmp_path / "dog/a.safetensors")
    with pytest.raises(UsageError, match=words):
        Latents(**{"path": tmp_path} | settings).shape  # noqa: B018


@pytest.fixture
def photos(tmp_path):
    """Eight pictures of 8 x 8 pixels in two classes; the left half of each is brighter."""
    generator = np.random.default_rng(0)
    for i in range(8):
        where = tmp_path / "photos" / ("cat" if i < 4 else "dog")
        where.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (8, 8, 3), dtype=np.uint8)
        pixels[:, :4] += 127
        Image.fromarray(pixels).save(where / f"{i}.png")
    return tmp_path / "photos"


def test_pictures_are_encoded_when_they_are_loaded(photos, autoencoder):
    settings = {"path": photos, "image_size": 8, "channels": 3, "held_out": 0.25}
    plain, encoded = Folder(**settings), Folder(**settings, autoencoder=autoencoder)
    assert encoded.shape == SHAPE
    assert encoded.latents
    assert not plain.latents
    assert encoded.class_names == ("cat", "dog")
    assert torch.equal(encoded.label, plain.label)
    torch.testing.assert_close(encoded.image, autoencoder.encode(plain.image))
    held_out, label = plain.held_out_images
    torch.testing.assert_close(encoded.held_out_images[0], autoencoder.encode(held_out))
    assert torch.equal(encoded.held_out_images[1], label)


def test_latents_of_mirror_images_are_not_mirrored_latents(photos, autoencoder):
    settings = {"path": photos, "image_size": 8, "channels": 3, "batch_size": 16, "max_steps": 1}
    image = Folder(**settings).image
    ((batch, _),) = Folder(**settings, flip=True, autoencoder=autoencoder).train_dataloader()
    latents = autoencoder.encode(image)
    expected = torch.cat([latents, autoencoder.encode(image.flip(-1))])
    assert (expected[8:] - latents.flip(-1)).abs().max() > 1e-2  # otherwise nothing is shown
    nearest = torch.cdist(batch.flatten(1), expected.flatten(1)).min(1)
    assert nearest.values.max() < 1e-4
    assert sorted(nearest.indices.tolist()) == list(range(16))


def test_photographs_are_held_out_as_a_whole(photos, autoencoder):
    settings = {"path": photos, "image_size": 4, "channels": 3, "crops": 40, "held_out": 0.25}
    plain, encoded = Photos(**settings), Photos(**settings, autoencoder=autoencoder)
    torch.testing.assert_close(
        encoded.held_out_images[0], autoencoder.encode(plain.held_out_images[0])
    )


def test_what_cannot_be_encoded_is_refused(autoencoder, tmp_path):
    with pytest.raises(UsageError, match="needs pictures of 3 channels"):
        Digits(autoencoder=autoencoder).shape  # noqa: B018
    with pytest.raises(UsageError, match="streaming must be false with an autoencoder"):
        Hub(
            path=tmp_path, image_size=8, channels=3, streaming=True, reference_images=2,
            autoencoder=autoencoder,
        )  # fmt: skip
    arrays(tmp_path, shape=(3, 4, 4))
    with pytest.raises(UsageError, match="3 channels, got one of 4"):
        Latents(path=tmp_path, autoencoder=autoencoder).shape  # noqa: B018


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (16, 3)])
def test_latents_without_an_autoencoder_are_shown_by_their_first_channels(channels, shown):
    latents = torch.randn(2, channels, 4, 4)
    assert torch.equal(as_pictures(latents), latents[:, :shown] / 3)
    assert torch.equal(as_pictures(latents, lambda z: z + 1), latents + 1)


def test_latents_are_never_written_as_pixels():
    with pytest.raises(UsageError, match="image must have 1 or 3 channels, got 4"):
        to_bytes(torch.zeros(1, *SHAPE))


def test_a_training_on_pictures_through_an_autoencoder(photos, kl_folder, tmp_path, capsys):
    run = tmp_path / "run"
    encoder = ["autoencoder=kl", f"autoencoder.path={kl_folder}"]
    data = ["data=folder", f"data.path={photos}", "data.image_size=8", "decoder.latents=true"]
    main(["train", *data, *encoder, *TINY, f"run_dir={run}"])
    decoder = Decoder.from_pretrained(run)
    assert decoder.latents
    assert decoder.layout.image_shape == SHAPE
    assert not any("autoencoder" in name for name in load_file(run / "model.safetensors"))
    with Image.open(run / "samples/step-000004.png") as page:  # ten pictures of 8, enlarged to 48
        assert page.width > 10 * 48
    rows = ("data", "num_groups 1", "num_groups 2")  # without an autoencoder, the first is longer
    with Image.open(run / "samples.png") as page:
        assert page.size == labelled_rows({row: torch.zeros(20, 3, 8, 8) for row in rows}).size
    out = tmp_path / "out"
    main(["decode", f"ckpt={run}", f"out={out}", "num_images=2", "steps=2", *encoder])
    latents = decoder.decode(torch.tensor([0, 1]), num_images=2, steps=2, seed=0).image
    expected = Autoencoder(tiny_kl()).decode(latents)
    for i, picture in enumerate(expected):
        pixels = np.asarray(Image.open(out / f"{i:06d}.png"))
        assert np.abs(pixels / 127.5 - 1 - picture.permute(1, 2, 0).numpy()).max() < 0.5 / 127
    file = tmp_path / "decoded/latents.safetensors"
    file.parent.mkdir()
    main(["decode", f"ckpt={run}", f"out={file}", "num_images=2", "steps=2"])
    torch.testing.assert_close(load_file(file)["latents"], latents)
    assert torch.equal(Latents(path=file.parent).image, load_file(file)["latents"])
    with pytest.raises(SystemExit):
        main(["decode", f"ckpt={run}", f"out={tmp_path / 'x.png'}"])
    assert "autoencoder must make pictures of latents" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("wrong", [3, float("inf"), "kl", {"path": "vae"}], ids=str)
def test_an_autoencoder_must_be_one(wrong, unchecked):
    with pytest.raises(UsageError, match="autoencoder must be an Autoencoder"):
        Digits(image_size=8, channels=1, autoencoder=wrong)


@pytest.mark.slow
def test_a_training_on_stored_latents_is_resumed(kl_folder, tmp_path, monkeypatch):
    arrays(tmp_path / "data/a")
    arrays(tmp_path / "data/b")
    shutil.copytree(kl_folder, tmp_path / "kl")
    monkeypatch.chdir(tmp_path)
    data = ["data=latents", "data.path=data", "decoder.latents=true", *TINY]
    data += ["autoencoder=kl", "autoencoder.path=kl"]
    main(["train", *data, f"run_dir={tmp_path / 'whole'}"])
    main(["train", *data, f"run_dir={tmp_path / 'part'}", "time_limit=00:00:00:00"])
    assert not (tmp_path / "part/summary.json").exists()
    monkeypatch.chdir("/")
    main(["train", f"resume={tmp_path / 'part'}"])
    assert (tmp_path / "part/samples.png").exists()
    whole, part = (tmp_path / name / "model.safetensors" for name in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data=latents", "data.path=DATA"], "decoder.latents must be true for data of latents"),
        (["decoder.latents=true"], "decoder.latents must be false for data of pictures"),
        (
            ["data=latents", "data.path=DATA", "decoder.latents=true", "layout.channels=3"],
            "layout must be of the latents, layout.image_size=[4,4] layout.channels=4",
        ),
        (
            ["data=latents", "data.path=DATA", "experiment=tokenizer"],
            "data must be pictures for a Tokenizer, got latents",
        ),
        (
            ["autoencoder=kl", "autoencoder.path=DATA", "data.autoencoder=null"],
            "autoencoder must be null for data that take none",
        ),
        (
            ["data=latents", "data.path=DATA", "autoencoder=kl", "autoencoder.path=DATA"],
            "autoencoder.path must hold an AutoencoderKL",
        ),
    ],
)
def test_a_training_that_does_not_fit_its_data_is_refused(tmp_path, capsys, settings, words):
    arrays(tmp_path / "data")
    settings = [word.replace("DATA", str(tmp_path / "data")) for word in settings]
    with pytest.raises(SystemExit):
        main(["train", *settings, *TINY, f"run_dir={tmp_path / 'run'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("out", "autoencoder", "words"),
    [
        ("x.safetensors", [], "out must be of pictures for a decoder of pictures"),
        ("x.png", ["autoencoder=kl", "autoencoder.path=a/b"], "autoencoder must be null for a"),
    ],
)
def test_a_decoder_of_pictures_needs_no_autoencoder(tmp_path, capsys, out, autoencoder, words):
    decoder_of_latents(latents=False).save_pretrained(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["decode", f"ckpt={tmp_path / 'run'}", f"out={tmp_path / out}", *autoencoder])
    assert words in capsys.readouterr().err


DOCS = (Path(__file__).parents[1] / "docs/command-line.md").read_text(encoding="utf-8")


def documented():
    """The commands of the documents and their Python, about latents."""
    section = DOCS[DOCS.index("### Latents") : DOCS.index("### Resuming")]
    commands = re.findall(r"^    rolldiff ((?:.*\\\n)*.*)$", section, re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return [command.replace("\\\n", " ").split() for command in commands], code


def test_the_snippet_of_the_documents(kl_folder, tmp_path, monkeypatch):
    shutil.copytree(kl_folder, tmp_path / "VAE")
    monkeypatch.chdir(tmp_path)
    names = {"images": pictures(2)}
    exec(documented()[1], names)
    assert names["pictures"].shape == (2, 3, 8, 8)


@pytest.mark.slow
def test_the_commands_of_the_documents(photos, kl_folder, tmp_path, monkeypatch):
    arrays(tmp_path / "LATENTS")
    shutil.copytree(kl_folder, tmp_path / "VAE")
    photos.rename(tmp_path / "PHOTOS")
    monkeypatch.chdir(tmp_path)
    commands, _ = documented()
    assert [command[0] for command in commands] == ["train", "train", "decode"]
    for command in commands:
        quick = [w if w != "data.image_size=256" else "data.image_size=8" for w in command]
        main([*quick, *(TINY if command[0] == "train" else ["num_images=2", "steps=1"])])
    with Image.open(tmp_path / "pictures.png") as page:
        assert page.size[0] > 48


@pytest.mark.slow
def test_a_benchmark_of_latents(photos, kl_folder, tmp_path, capsys):
    encoder = ["autoencoder=kl", f"autoencoder.path={kl_folder}"]
    data = ["data=folder", f"data.path={photos}", "data.image_size=8", "decoder.latents=true"]
    run = tmp_path / "run"
    main(["train", *data, *encoder, *TINY, f"run_dir={run}"])
    quick = ["bench.samples=8", "bench.seeds=[0]", "bench.steps=[1]", "bench.joint_steps=[]"]
    bench = ["bench", f"ckpt={run}", "progress=false", *quick]
    main([*bench, "bench.features=pixels"])
    assert (run / "bench/samples_equal_nfe.png").exists()
    for wrong, words in (
        (["bench.features=efficientnet_lite0"], "bench.features must be of any image for latents"),
        (["bench.likelihood=bound"], "likelihood.dequantization must be null for a decoder of"),
        (["data=digits"], "data must be latents, as the decoder's, got pictures"),
    ):
        with pytest.raises(SystemExit):
            main([*bench, *wrong, f"run_dir={tmp_path / 'other'}"])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["likelihood", f"ckpt={run}"])
    assert "likelihood.dequantization must be null for a decoder of" in capsys.readouterr().err
