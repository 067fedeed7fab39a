"""Servers of random weights, for tests."""

import threading
import time
from contextlib import contextmanager

import torch
import uvicorn

from rolldiff import ClassLabels, Decoder, TokenGrid, Training
from rolldiff.serving import Limits, create_app
from rolldiff.tokenizer import Encoder, Tokenizer

SIDE = 8


def random_decoder(**settings):
    torch.manual_seed(0)
    options = {"image_size": SIDE, "channels": 1, "width": 16, "depth": 1, "heads": 1}
    options |= {
        "condition": ClassLabels(3, names=("ant", "bee", "cat")),
        "training": Training((1, 2, 4), orders=("top_to_bottom", "random:0")),
    }
    decoder = Decoder.build(**options | settings)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


def random_tokenizer():
    decoder = random_decoder(condition=TokenGrid(4, 4, channels=2))
    encoder = Encoder(8, in_channels=1, factor=2, channels=2, width=8, depth=1)
    torch.nn.init.normal_(encoder.layers[-1].weight, std=4.0)
    return Tokenizer(encoder, decoder, levels=(3, 3)).eval()


@contextmanager
def running(served, limits=Limits(), **options):
    """A server on a free port."""
    config = uvicorn.Config(create_app(served, limits, **options), log_level="critical", port=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
