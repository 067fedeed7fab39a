"""The server: OpenAI's wire through its own client, limits, batches, and clients that leave."""

import base64
import http.client
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from servers import SIDE, random_decoder, random_tokenizer, running

from rolldiff import DecodeConfig
from rolldiff.cli import main
from rolldiff.decoder import DecodeRun
from rolldiff.errors import UsageError
from rolldiff.evaluation.images import to_bytes
from rolldiff.serving import Limits, Served, app
from rolldiff.tokenizer import Generation, Prior


@pytest.fixture(scope="module")
def served():
    return Served(
        decoder=random_decoder(), prompts={"a buzzing thing": "bee"}, config=DecodeConfig(steps=3)
    )


@pytest.fixture(scope="module")
def port(served):
    limits = Limits(requests=5, batch=4, body=2**20, seconds=1.0, steps=64)
    with running(served, limits) as port:
        yield port


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as c:
        yield c


@pytest.fixture
def gate(monkeypatch):
    """Steps of a server's decoding wait for the test: `gate.release(n)` lets n of them pass."""
    gate, steps = threading.Semaphore(0), DecodeRun.steps

    def gated(run):
        for state in steps(run):
            if state.step and threading.current_thread().name == "rolldiff-worker":
                assert gate.acquire(timeout=30)
            yield state

    monkeypatch.setattr(DecodeRun, "steps", gated)
    yield gate
    gate.release(10**6)


def pixels(b64_json):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def decoded(served, label, **options):
    output = served.decoder.decode([label] * options.get("num_images", 1), served.config, **options)
    return to_bytes(output.image)


def close(found, expected):
    """Equal but for rounding to another byte, where a batch changes the last bits."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def post(port, body, path="/v1/images/generations", **headers):
    """A request as it is, and the status and body of its answer."""
    headers = {"Content-Type": "application/json", **headers}
    body = body if isinstance(body, bytes | str) else json.dumps(body)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def get(port, path, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def metric(port, name):
    text = get(port, "/metrics")[1]
    return float(re.search(rf"^rolldiff_{name} (.*)$", text, re.MULTILINE).group(1))


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# The wire


def test_images_are_those_of_the_decoder(client, served):
    """Class by name, by number and by the table; several images; our settings as extra fields."""
    for prompt in ("bee", " BEE ", "1", "a buzzing thing"):
        found = client.images.generate(prompt=prompt, extra_body={"seed": 5})
        close(pixels(found.data[0].b64_json), decoded(served, 1, seed=5)[0])
    extra = {"seed": 5, "num_groups": 4, "overlap": 0.5, "num_inference_steps": 2}
    extra |= {"guidance_scale": 2.0, "order": "random:0"}
    found = client.images.generate(prompt="cat", n=3, size="8x8", extra_body=extra)
    options = {"num_groups": 4, "overlap": 0.5, "steps": 2, "guidance": 1.0, "order": "random:0"}
    expected = decoded(served, 2, seed=5, num_images=3, **options)
    for image, mine in zip(found.data, expected, strict=True):
        close(pixels(image.b64_json), mine)
    cost = served.decoder.decode(2, num_images=1, seed=5, **options).cost
    assert found.usage.output_tokens == 3 * cost.tokens
    assert found.rolldiff["seed"] == 5
    assert (found.size, found.output_format, found.background) == ("8x8", "png", "opaque")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats(client, output_format):
    found = client.images.generate(
        prompt="", output_format=output_format, output_compression=80, quality="low"
    )
    image = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json)))
    assert image.format.lower() == output_format
    assert (found.output_format, found.quality) == (output_format, "low")


def test_a_film_has_all_frames(client, served):
    extra = {"output_format": "gif", "partial_images": 4, "seed": 1, "num_groups": 2}
    found = client.images.generate(prompt="ant", extra_body=extra)
    film = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json)))
    durations = []
    for i in range(film.n_frames):  # equal frames in a row are stored once
        film.seek(i)
        durations.append(film.info["duration"])
    assert sum(durations) == 4 * 600 + 1500
    close(np.asarray(film.convert("RGB")), decoded(served, 0, seed=1, num_groups=2)[0])


def test_partial_images_arrive_while_it_decodes(client, served, gate):
    """Six steps: after three of them the third frame is there, and the fourth is not."""
    extra = {"seed": 2, "num_groups": 2, "order": "top_to_bottom"}
    found, options = queue.Queue(), {"stream": True, "partial_images": 5, "extra_body": extra}

    def read():
        for event in client.images.generate(prompt="ant", **options):
            found.put(event)

    thread = threading.Thread(target=read)
    thread.start()
    frames = list(served.decoder.stream([0], served.config, frames=6, seed=2, num_groups=2))
    for i, frame in enumerate(frames):
        gate.release()
        event = found.get(timeout=20)
        last = i == 5
        kind = "completed" if last else "partial_image"
        assert event.type == f"image_generation.{kind}"
        close(pixels(event.b64_json), to_bytes(frame.image)[0])
        assert event.rolldiff["tau"] == frame.tau
        assert event.rolldiff["nfe"] == frame.nfe
        assert event.rolldiff["finished_rows"] == int(frame.finished.all(1).sum())
        if last:
            assert event.usage.output_tokens > 0
        else:
            assert event.partial_image_index == i
            time.sleep(0.02)
            assert found.empty()
    thread.join()
    assert event.rolldiff["finished_rows"] == SIDE


def test_the_events_as_they_are_sent(port, gate, monkeypatch):
    monkeypatch.setattr(app, "KEEP_ALIVE", 0.05)
    body = {"prompt": "ant", "stream": True, "partial_images": 1, "steps": 2}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, port, body)
        time.sleep(0.3)
        gate.release(2)
        status, text = answer.result()
    assert status == 200
    comments, *events = re.split(r"(?=^event: )", text, flags=re.MULTILINE)
    assert re.fullmatch(r"(: keep-alive\n\n)+", comments)
    kinds = ["image_generation.partial_image", "image_generation.completed"]
    required = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    for kind, event, extra in zip(kinds, events, ("partial_image_index", "usage"), strict=True):
        (data,) = re.fullmatch(
            rf"event: {kind}\ndata: (.*)\n\n(?:: keep-alive\n\n)*", event
        ).groups()
        data = json.loads(data)
        assert data["type"] == kind
        assert data.keys() == required | {extra, "rolldiff"}
    assert set(data["usage"]) >= {"total_tokens", "input_tokens", "output_tokens"}


def test_edits_keep_what_is_not_masked(client, served):
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    image[:] = image[..., :1]  # grey, as the model
    mask = np.full((SIDE, SIDE, 4), 255, np.uint8)
    mask[2:5, 4:6, 3] = 0  # tokens are 2 x 2: the rows 2 … 5 of two columns of them are decoded
    extra = {"seed": 3, "num_groups": 2, "order": "random:0"}
    options = {"image": ("a.png", png(image)), "prompt": "cat", "extra_body": extra}
    found = client.images.edit(**options, mask=("m.png", png(mask)))
    edited = pixels(found.data[0].b64_json)
    masked = mask[..., 3] == 0
    assert (edited[~masked] == image[~masked]).all()
    assert (edited[masked] != image[masked]).any()
    original = torch.from_numpy(image[..., 0]).float()[None, None] / 127.5 - 1
    options |= {"image": original, "mask": torch.from_numpy(masked)}
    mine = {**extra, "image": original, "mask": torch.from_numpy(masked)}
    close(edited, decoded(served, 2, **mine)[0])
    # The picture's own transparency, and a stream.
    own = np.concatenate([image, mask[..., 3:]], axis=-1)
    stream = client.images.edit(
        image=("a.png", png(own)),
        prompt="cat",
        stream=True,
        partial_images=2,
        extra_body=extra,
    )
    *partial, completed = stream
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert completed.type == "image_edit.completed"
    assert (pixels(completed.b64_json) == edited).all()


def test_what_was_not_trained_is_said(client):
    found = client.images.generate(prompt="ant", extra_body={"num_groups": 8})
    assert found.rolldiff["warnings"] == ["num_groups 8 (trained: 1, 2, 4)"]
    assert "warnings" not in client.images.generate(prompt="ant").rolldiff


def test_models_and_schedules(client, port, served):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("rolldiff").id == "rolldiff"
    assert model.rolldiff["classes"] == ["ant", "bee", "cat"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    status, text = get(port, "/v1/schedule?num_groups=4&overlap=0.5&steps=2")
    matrix = DecodeConfig(num_groups=4, overlap=0.5, steps=2).schedule(served.decoder.layout).matrix
    assert status == 200
    torch.testing.assert_close(torch.tensor(json.loads(text)["matrix"]), matrix.float())
    assert get(port, "/v1/schedule?num_groups=5000")[0] == 400
    assert get(port, "/v1/schedule?prompt=ant")[0] == 400
    assert json.loads(get(port, "/healthz")[1]) == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt must be a text"),
        ({"prompt": 3}, "prompt", "prompt must be a text"),
        ({"prompt": "dog"}, "prompt", "one of a buzzing thing, ant, bee, cat"),
        ({"prompt": "3"}, "prompt", "a number below 3"),
        ({"prompt": "²"}, "prompt", "got '²'"),
        ({"prompt": "ant", "n": 11}, "n", "in 1 … 10"),
        ({"prompt": "ant", "n": True}, "n", "whole number"),
        ({"prompt": "ant", "n": 2, "stream": True}, "n", "n must be 1 with stream"),
        ({"prompt": "ant", "stream": "yes"}, "stream", "True or False"),
        ({"prompt": "ant", "size": "16x16"}, "size", "auto or 8x8"),
        ({"prompt": "ant", "size": "8x"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "ant", "size": [8, 8]}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "ant", "partial_images": 65}, "partial_images", "in 0 … 64"),
        ({"prompt": "ant", "output_format": "bmp"}, "output_format", "png or jpeg"),
        ({"prompt": "ant", "output_format": ["png"]}, "output_format", "png or jpeg"),
        ({"prompt": "ant", "output_compression": 101}, "output_compression", "in 0 … 100"),
        ({"prompt": "ant", "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": "ant", "background": "transparent"}, "background", "auto or opaque"),
        ({"prompt": "ant", "quality": 3}, "quality", "short text"),
        ({"prompt": "ant", "seed": -1}, "seed", "whole number"),
        ({"prompt": "ant", "seed": 10**30}, "seed", "whole number"),
        ({"prompt": "ant", "num_groups": 17}, "num_groups", "in 1 … 16"),
        ({"prompt": "ant", "num_groups": 4.0}, "num_groups", "whole number"),
        ({"prompt": "ant", "overlap": "1"}, "overlap", "number in [0, 1]"),
        ({"prompt": "ant", "steps": 65}, "steps", "in 1 … 64"),
        ({"prompt": "ant", "steps": 20, "num_groups": 4}, "steps", "at most 64 in all"),
        ({"prompt": "ant", "steps": 2, "num_inference_steps": 3}, "steps", "num_inference_steps"),
        ({"prompt": "ant", "order": "up"}, "order", "order must be one of"),
        ({"prompt": "ant", "order": [0, 1]}, "order", "order must be a text"),
        ({"prompt": "ant", "grouping": "levels", "num_groups": 2}, "num_groups", "levels"),
        ({"prompt": "", "guidance_scale": 2}, "guidance_scale", "without a class"),
        ({"prompt": "ant", "guidance_scale": "x"}, "guidance_scale", "number"),
        ({"prompt": "ant", "step": 3}, None, "did you mean steps?"),
        ({"prompt": "ant", "model": "gpt-image-1"}, "model", "model must be rolldiff"),
    ],
)
def test_bad_fields(unchecked, port, body, param, words):
    status, text = post(port, body)
    error = json.loads(text)["error"]
    assert status == (404 if "model" in body else 400)
    assert words in error["message"]
    assert error["param"] == param
    assert error.keys() == {"message", "type", "param", "code"}


def test_the_client_sees_the_reason(client):
    with pytest.raises(openai.BadRequestError, match="prompt must be one of") as caught:
        client.images.generate(prompt="dog")
    assert caught.value.param == "prompt"


def test_bad_files(unchecked, port, client):
    fine, small = np.zeros((SIDE, SIDE, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    solid = np.full((SIDE, SIDE, 4), 255, np.uint8)
    for files, words in (
        ({"image": b"not a picture"}, "image must be a picture"),
        ({"image": b""}, "image must be a picture"),
        ({"image": png(fine)[:-30]}, "image"),
        ({"image": png(small)}, "auto or 8x8"),
        ({"image": png(fine), "mask": png(small)}, "mask must have the size of the image"),
        ({"image": png(fine), "mask": b"x"}, "mask must be a picture"),
        ({"image": png(solid)}, "image must be transparent"),
        ({"image": png(fine), "mask": png(solid)}, "mask must be transparent"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(words)):
            client.images.edit(prompt="ant", **{k: (f"{k}.png", v) for k, v in files.items()})
    for extra in ({"steps": "many"}, {"n": "2"}, {"stream": "maybe"}, {"overlap": "[1]"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(extra))):
            client.images.edit(prompt="ant", image=("a.png", png(fine)), extra_body=extra)


# ---------------------------------------------------------------------------------------------
# Whatever arrives, the server answers and lives


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"prompt": "ant", "steps": NaN}', 400),
        (b'{"prompt": "ant", "steps": 1e999}', 400),
        (b'{"prompt": "ant", "seed": ' + b"9" * 6000 + b"}", 400),
        (b"[" * 20_000, 400),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', 400),
        (b" " * (2**20 + 1), 413),
    ],
)
def test_bad_bodies(port, body, status):
    found, text = post(port, body)
    assert found == status
    assert json.loads(text)["error"]["message"]
    assert "Traceback" not in text
    assert get(port, "/healthz")[0] == 200


def test_bodies_of_many_parts(port):
    assert post(port, b"x=1", **{"Content-Type": "text/plain"})[0] == 415
    assert post(port, b"{}", "/v1/images/edits")[0] == 415
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert post(port, b"--b\r\nrubbish", "/v1/images/edits", **kind)[0] == 400
    assert post(port, b"", "/v1/images/edits", **kind)[0] == 400
    assert post(port, b"x", "/v1/images/edits", **{"Content-Type": "multipart/form-data"})[0] == 400
    many = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="x%d"\r\n\r\n1\r\n' % i for i in range(99)
    )
    assert post(port, many + b"--b--", "/v1/images/edits", **kind)[0] == 400


def test_a_body_of_50_megabytes_is_refused(port):
    assert post(port, b"x" * 50_000_000)[0] == 413

    def chunks():
        for _ in range(40):
            yield b"x" * 2**16

    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    with (
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection,
        suppress(OSError),  # refused before all was sent
    ):
        connection.request("POST", "/v1/images/generations", chunks(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert get(port, "/healthz")[0] == 200


def test_a_half_sent_request_is_told_so(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as half:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        half.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert get(port, "/healthz")[0] == 200
        assert half.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/..%2f..%2f..%2fpyproject.toml",
        "/%2e%2e/model.py",
        "//etc/passwd",
        "/..\\app.py",
        "/v1/models/../../etc/passwd",
        "/page.js%00.html",
        "/nothing",
    ],
)
def test_paths_lead_nowhere_else(port, path):
    status, text = get(port, path)
    assert status in (400, 404)
    assert "Traceback" not in text
    assert "import" not in text


def test_other_methods(port):
    assert get(port, "/v1/images/generations")[0] == 405
    assert post(port, b"", "/healthz")[0] == 405


def test_a_failed_decoding_leaves_the_server_alive(port, monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("a secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(DecodeRun, "steps", broken)
        status, text = post(port, {"prompt": "ant"})
        assert status == 500
        assert "secret" not in text
        status, text = post(port, {"prompt": "ant", "stream": True})
        assert status == 200  # it had begun
        (data,) = re.fullmatch("event: error\ndata: (.*)\n\n", text).groups()
        assert json.loads(data)["error"]["type"] == "server_error"
    assert "a secret of the server" in caplog.text
    assert post(port, {"prompt": "ant"})[0] == 200


# ---------------------------------------------------------------------------------------------
# Many at a time


def test_a_client_that_leaves_stops_its_decoding(port, gate):
    """With the gate open by one step, the decoding ends although 63 steps are left."""
    for stream in (True, False):
        body = json.dumps({"prompt": "ant", "steps": 64, "stream": stream, "partial_images": 1})
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as leaving:
            leaving.sendall((head + body).encode())
            until(lambda: metric(port, "running") == 1)
        time.sleep(0.2)
        gate.release()
        until(lambda: metric(port, "running") == 0)
    gate.release(10)
    assert post(port, {"prompt": "ant", "steps": 2})[0] == 200


def test_a_full_queue_says_so(port, gate):
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "ant", "steps": 2}
        fine = [pool.submit(post, port, body) for _ in range(5)]
        until(lambda: metric(port, "running") + metric(port, "waiting") == 5)
        status, text = post(port, body)
        assert status == 429
        assert json.loads(text)["error"]["type"] == "rate_limit_error"
        gate.release(100)
        assert {answer.result()[0] for answer in fine} == {200}


def test_requests_share_a_batch_and_keep_their_images(port, served, gate, monkeypatch):
    """What waits behind a decoding is decoded together, as far as it fits; each as if alone."""
    batches, prepare = [], Served.prepare

    def watched(self, labels, config, **options):
        batches.append(options["seeds"])
        return prepare(self, labels, config, **options)

    monkeypatch.setattr(Served, "prepare", watched)
    bodies = [{"prompt": "ant", "seed": 0}]  # holds the worker
    bodies += [{"prompt": "bee", "seed": 1, "n": 2}, {"prompt": "cat", "seed": 2}]
    bodies += [{"prompt": "", "seed": 3}, {"prompt": "ant", "seed": 4}]
    with ThreadPoolExecutor() as pool:
        answers = []
        for i, body in enumerate(bodies):
            answers.append(pool.submit(post, port, body))
            until(lambda i=i: (metric(port, "running"), metric(port, "waiting")) == (1, i))
        gate.release(100)
        found = [json.loads(answer.result()[1]) for answer in answers]
    # Without a class there is no condition, so that the fourth goes alone.
    assert batches == [[(0, 1)], [(1, 2), (2, 1), (4, 1)], [(3, 1)]]
    labels = {"ant": 0, "bee": 1, "cat": 2}
    for body, answer in zip(bodies, found, strict=True):
        n = body.get("n", 1)
        label = labels.get(body["prompt"])
        cond = None if label is None else [label] * n
        alone = served.decoder.decode(cond, served.config, num_images=n, seed=body["seed"])
        for image, mine in zip(answer["data"], to_bytes(alone.image), strict=True):
            close(pixels(image["b64_json"]), mine)


def test_a_server_that_ends_says_so(served, gate):
    with ThreadPoolExecutor() as pool:
        with running(served) as port:
            answer = pool.submit(post, port, {"prompt": "ant", "stream": True})
            until(lambda: metric(port, "running") == 1)
            gate.release(100)
        assert "image_generation.completed" in answer.result()[1]


# ---------------------------------------------------------------------------------------------
# Keys, names, models


def test_a_key(served):
    with running(served, api_key="open sesame") as port:
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}):
            headers = {name: value.encode("latin-1") for name, value in headers.items()}
            assert get(port, "/v1/models", **headers)[0] == 401
            assert post(port, {"prompt": "ant"}, **headers)[0] == 401
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="open sesame") as client:
            assert client.images.generate(prompt="ant").data


def test_a_page_of_another_site_is_refused(served):
    with running(served, hosts=app.LOCAL_NAMES) as port:
        assert get(port, "/v1/models", Host=f"localhost:{port}")[0] == 200
        assert get(port, "/v1/models", Host=f"[::1]:{port}")[0] == 200
        assert get(port, "/v1/models", Host="somewhere.example")[0] == 421


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "api_key must be set to listen on 0.0.0.0"),
        ({"host": "::"}, "api_key must be set"),
        ({"api_key": " "}, "api_key must be a text"),
        ({"port": 70000}, "port must be a whole number"),
        ({"host": "no.such.host.invalid", "api_key": "x"}, "host must be an address"),
    ],
)
def test_bad_addresses(served, options, words):
    with pytest.raises(UsageError, match=words):
        app.run(served, **options)


def test_any_size_with_a_window():
    served = Served(decoder=random_decoder(window=1))
    with running(served, Limits(pixels=400)) as port:
        status, text = post(port, {"prompt": "ant", "size": "12x6", "seed": 1})
        assert status == 200
        mine = served.decoder.decode([0], seed=1, image_size=(6, 12)).image
        close(pixels(json.loads(text)["data"][0]["b64_json"]), to_bytes(mine)[0])
        for size, words in (("7x8", "multiple of the patch"), ("100x100", "at most 400 pixels")):
            status, text = post(port, {"prompt": "ant", "size": size})
            assert (status, words in text) == (400, True)


def test_a_prior_and_its_tokenizer():
    torch.manual_seed(0)
    tokenizer = random_tokenizer()
    prior = Prior(16, 9, num_classes=3, width=16, depth=1, heads=1)
    served = Served(decoder=tokenizer.decoder, prior=prior, tokenizer=tokenizer)
    with running(served) as port:
        body = {"prompt": "2", "seed": 4, "n": 2, "guidance_scale": 1.5}
        status, text = post(port, body)
        assert status == 200
        mine = Generation(prior, tokenizer, cond=[2, 2], num_images=2, seed=4, guidance=0.5)
        mine.config = served.config
        for image, expected in zip(json.loads(text)["data"], to_bytes(mine.images()), strict=True):
            close(pixels(image["b64_json"]), expected)


def test_models_that_cannot_be_served():
    tokenizer = random_tokenizer()
    with pytest.raises(UsageError, match="a tokenizer beside prior=RUN, got a decoder of cond"):
        Served(decoder=tokenizer.decoder)
    with pytest.raises(UsageError, match="prompts"):
        Served(decoder=random_decoder(), prompts={"a dog": "dog"})
    with pytest.raises(UsageError, match="steps must be a whole number"):
        Limits(steps=0)


def test_the_command_refuses_a_missing_checkpoint(capsys):
    with pytest.raises(SystemExit):
        main(["serve"])
    assert "ckpt must be a run folder or a checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Load, and the command


@pytest.mark.slow
def test_32_clients_at_once(served):
    """All are answered or told 429, and no image differs from the same seed decoded alone."""
    bodies = [
        {"prompt": ("ant", "bee", "cat")[i % 3], "seed": i, "num_groups": (1, 2, 4)[i // 3 % 3]}
        for i in range(32)
    ]
    bodies = [{**body, "stream": i % 2 == 0, "steps": 40} for i, body in enumerate(bodies)]
    with running(served, Limits(requests=24)) as port, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: post(port, body), bodies))
        until(lambda: metric(port, "running") == metric(port, "waiting") == 0)
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 24
    for body, (status, text) in zip(bodies, answers, strict=True):
        if status == 429:
            continue
        if body["stream"]:
            text = json.loads(text.rpartition("data: ")[2])["b64_json"]
        else:
            text = json.loads(text)["data"][0]["b64_json"]
        label = ("ant", "bee", "cat").index(body["prompt"])
        options = {"seed": body["seed"], "num_groups": body["num_groups"], "steps": 40}
        close(pixels(text), decoded(served, label, **options)[0])


@pytest.mark.slow
def test_who_does_not_read_blocks_nobody():
    """A stream of 64 large frames that nobody reads fills its socket; the others go on."""
    served = Served(decoder=random_decoder(image_size=256, patch=32), config=DecodeConfig(steps=80))
    body = json.dumps({"prompt": "ant", "stream": True, "partial_images": 64})
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with running(served) as port, socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.connect(("127.0.0.1", port))
        idle.sendall((head + body).encode())
        for _ in range(3):
            start = time.monotonic()
            assert post(port, {"prompt": "bee", "steps": 2})[0] == 200
        assert time.monotonic() - start < 5
        until(lambda: metric(port, "running") == 0)  # the idle one's decoding has ended too
        received = b""
        while b"image_generation.completed" not in received[-2_000_000:]:
            received += idle.recv(2**20)
        assert received.count(b"event: image_generation.partial_image") == 64


@contextmanager
def ending(process):
    """A process that does not outlive its test, even if that fails."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_what_it_has_begun(tmp_path, signum):
    random_decoder().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rolldiff", "serve", f"ckpt={tmp_path}", "port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads may wait long on a busy machine
    with subprocess.Popen(command, **pipes, env=alone) as ran, ending(ran):
        port = int(re.search(r":(\d+)/", ran.stdout.readline()).group(1))
        status, text = get(port, "/v1/models")
        assert status == 200
        assert json.loads(text)["data"][0]["rolldiff"]["defaults"]["num_groups"] == 4
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            seconds = []
            for _ in range(20):
                start = time.monotonic()
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                seconds.append(time.monotonic() - start)
            # Answers are not held back for 40 ms each; the median, for the machine may be busy.
            assert median(seconds) < 0.03
        body = {"prompt": "ant", "num_groups": 4, "steps": 200, "stream": True, "partial_images": 1}
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(post, port, body)
            until(lambda: metric(port, "running") == 1)
            ran.send_signal(signum)
            assert "image_generation.completed" in answer.result()[1]
        assert ran.wait(timeout=20) == 0
        assert ran.stdout.read() == "rolldiff: stopped\n"
        assert ran.stderr.read() == ""


@pytest.mark.slow
def test_the_command_serves_a_prior(tmp_path):
    tokenizer, prior = random_tokenizer(), Prior(16, 9, num_classes=3, width=16, depth=1, heads=1)
    tokenizer.save_pretrained(tmp_path / "tokens")
    prior.eval().save_pretrained(tmp_path / "codes")
    models = [f"ckpt={tmp_path / 'tokens'}", f"prior={tmp_path / 'codes'}"]
    command = [sys.executable, "-m", "rolldiff", "serve", *models, "port=0", "prompts={a two: 2}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ran, ending(ran):
        port = int(re.search(r":(\d+)/", ran.stdout.readline()).group(1))
        status, text = post(port, {"prompt": "A two", "seed": 1, "num_groups": 4, "steps": 2})
    assert status == 200
    config = DecodeConfig(num_groups=4, steps=2)
    mine = Generation(prior.eval(), tokenizer, cond=[2], config=config, seed=1)
    close(pixels(json.loads(text)["data"][0]["b64_json"]), to_bytes(mine.images())[0])


@pytest.mark.slow
def test_a_taken_port_is_one_line(tmp_path, capsys):
    random_decoder().save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        main(["serve", f"ckpt={tmp_path}", f"port={taken.getsockname()[1]}"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("rolldiff: Address already in use")
    for bad in ("limits.steps=0", "prompts=[a]", "prompts={x: dog}", "name=''", "host=0.0.0.0"):
        with pytest.raises(SystemExit):
            main(["serve", f"ckpt={tmp_path}", "port=0", bad])
        assert len(capsys.readouterr().err.splitlines()) == 1


def blocks(language):
    """The code of docs/serving.md."""
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_client_of_the_documentation(port, capsys):
    (code,) = (block for block in blocks("python") if "openai" in block)
    names = {}
    exec(code.replace(":8000/", f":{port}/").replace('prompt="3"', 'prompt="2"'), names)
    names["client"].close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("image_generation.completed")


@pytest.mark.slow
def test_gradio(tmp_path):
    pytest.importorskip("gradio")
    random_decoder().save_pretrained(tmp_path)
    (code,) = (block for block in blocks("python") if "gradio" in block)
    names = {"__name__": "documentation"}
    exec(code.replace('"RUN"', repr(str(tmp_path))), names)
    pictures = list(names["watch"](2, 4))
    assert len(pictures) == 20
    assert pictures[-1].size == (256, 256)
    assert names["demo"].fn is names["watch"]
