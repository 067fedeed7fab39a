"""Latents of an autoencoder: decoded, read from folders, trained on, and seen as pictures."""

import pytest
import torch

from rolldiff import Decoder, TokenGrid
from rolldiff.errors import UsageError
from rolldiff.integrations.diffusers import DiffusersDecoder
from rolldiff.serving import Served
from rolldiff.tokenizer import Encoder, Tokenizer

SHAPE = (4, 4, 4)


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
    with pytest.raises(UsageError, match="log_likelihood needs a decoder of pictures"):
        decoder_of_latents().log_likelihood(torch.zeros(1, *SHAPE))


def test_a_saved_decoder_keeps_that_it_is_one_of_latents(tmp_path):
    decoder_of_latents().save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).latents
    older = decoder_of_latents(latents=False).to_config()
    del older["latents"]
    assert not Decoder.from_config(older).latents


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
