"""One thread: on a busy machine two threads of small operations wait for each other."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import config

from rolldiff import Decoder, Training

torch.set_num_threads(1)
settings.register_profile("rolldiff", deadline=None, derandomize=True)
settings.load_profile("rolldiff")


@pytest.fixture
def make():
    """Decoders of 8 x 8 pixels with random weights, the zero-initialised ones too."""

    def build(*, dtype=torch.float32, patch=2, seed=0, **arguments):
        torch.manual_seed(seed)
        arguments = {"width": 32, "depth": 2, "heads": 2, "num_classes": 10} | arguments
        num_tokens = (8 // patch) ** 2
        training = Training(
            num_groups=tuple(range(1, num_tokens + 1)), orders=("top_to_bottom", "random:0")
        )
        decoder = Decoder.build(
            image_size=8, channels=1, patch=patch, training=training, **arguments
        )
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        return decoder.to(dtype)

    return build


@pytest.fixture
def unchecked():
    """Lets values of a wrong type through to the errors that users meet."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
