import errno
import importlib
import json
import math
import os
import pickle
import random
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rolldiff import ClassLabels, Cosine, Decoder, Patches, Training, Transformer
from rolldiff.diffusion.timesteps import LogitNormal
from rolldiff.errors import UsageError
from rolldiff.hub import build, describe, read_checkpoint

FILES = ["config.json", "model.safetensors"]
built = []


class Foreign(Transformer):
    """A backbone of another library; it notes when it is built."""

    def __init__(self, layout, **arguments):
        super().__init__(layout, **arguments)
        built.append(self)


@dataclass(frozen=True)
class ForeignPatches(Patches):
    pass


def line(error):
    """The words of an error, which are a single line."""
    words = str(error.value)
    assert len(words.splitlines()) == 1
    return words


@pytest.fixture
def decoder():
    layout = Patches((4, 8), channels=3, patch=2)
    density = LogitNormal(-0.5, 2.0)
    return Decoder(
        layout,
        Transformer(layout, width=16, depth=1, heads=2, condition=ClassLabels(4)),
        noise=Cosine(2.0),
        prediction="v",
        training=Training((1, 2), orders=("cells:2", list(range(8))), density=density),
    )


def test_round_trip(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    read = Decoder.from_pretrained(tmp_path)
    assert (
        read.to_config()
        == decoder.to_config()
        == json.loads((tmp_path / "config.json").read_text())
    )
    assert read.training_distribution == decoder.training_distribution
    ask = {"num_groups": 2, "steps": 2, "seed": 0, "order": "cells:2"}
    assert torch.equal(read.decode(**ask).image, decoder.decode(**ask).image)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.nn.Linear",
        "rolldiff.hub.importlib.import_module",
        "rolldiff.cli.main",
        "rolldiff.__main__.main",
        "rolldiff.hub.Path",
        "rolldiff.nowhere.Thing",
        "rolldiff",
        None,
    ],
)
def test_a_configuration_names_nothing_but_our_classes(target):
    with pytest.raises(ValueError, match="_target_ must name a class of rolldiff"):
        build({"_target_": target, "x": 1})


@pytest.mark.usefixtures("unchecked")
def test_a_configuration_that_does_not_fit(decoder):
    with pytest.raises(ValueError, match="does not fit Patches"):
        build({"_target_": "rolldiff.Patches", "sides": 3})
    with pytest.raises(ValueError, match="must describe a Decoder"):
        Decoder.from_config(describe(Patches(8)))
    with pytest.raises(ValueError, match="cannot hold"):
        describe(object())


def test_damaged_folders(decoder, tmp_path):
    def broken(message, name, content):
        decoder.save_pretrained(tmp_path)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            Decoder.from_pretrained(tmp_path)
        line(error)

    weights = tmp_path / "model.safetensors"
    decoder.save_pretrained(tmp_path)
    whole = weights.read_bytes()
    broken("without model.safetensors", "model.safetensors", None)
    broken("without config.json", "config.json", None)
    broken("damaged", "model.safetensors", whole[: len(whole) // 2])
    broken("damaged", "model.safetensors", b"pickle")
    broken("damaged", "model.safetensors", pickle.dumps(decoder.state_dict()))
    broken("not JSON", "config.json", b"{")
    broken("not JSON", "config.json", b"\xff\xfe")
    broken("must hold a dictionary", "config.json", b"[]")
    broken("must name a class of rolldiff", "config.json", b'{"model_type": "gpt2"}')
    smaller = decoder.to_config()
    smaller["backbone"]["width"] = 8
    broken("disagree", "config.json", json.dumps(smaller).encode())


def test_no_pickle_is_ever_read(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(decoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="without model.safetensors") as error:
        Decoder.from_pretrained(tmp_path)
    line(error)


def test_weights_must_be_those_of_the_configuration(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    place = "backbone.pos_embed"

    def refused(state, words):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="disagree") as error:
            Decoder.from_pretrained(tmp_path)
        assert words in line(error)

    refused(state | {place: state[place][:1]}, "(1, 16) in the weights and (8, 16)")
    refused(state | {"more": torch.ones(1)}, "more is (1,) in the weights and absent")
    refused({n: v for n, v in state.items() if n != place}, f"{place} is absent in the weights")


def test_foreign_parts_are_read_only_where_they_are_trusted(tmp_path):
    layout = ForeignPatches(4, channels=1, patch=2)
    decoder = Decoder(layout, Foreign(layout, width=16, depth=1, heads=2))
    decoder.save_pretrained(tmp_path)
    names = f"{__name__}.ForeignPatches", f"{__name__}.Foreign"
    assert decoder.to_config()["backbone"]["_target_"] == names[1]
    built.clear()
    for trusted in [(), names[:1], names[1:], (__name__,), ("Foreign",)]:
        with pytest.raises(ValueError, match="must name a class of rolldiff, or one that") as error:
            Decoder.from_pretrained(tmp_path, trusted=trusted)
        assert any(name in line(error) for name in names)
    assert not built
    read = Decoder.from_pretrained(tmp_path, trusted=names)
    assert type(read.backbone) is Foreign
    assert type(read.layout) is ForeignPatches
    for ours, theirs in zip(decoder.parameters(), read.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="trusted must be a sequence"):
        Decoder.from_config(decoder.to_config(), trusted=names[0])
    with pytest.raises(ValueError, match="must name a class"):
        build({"_target_": "os.system"}, trusted=["os.system"])


def test_all_names_are_looked_up_before_anything_is_built(decoder):
    config = decoder.to_config()
    config["backbone"]["_target_"] = f"{__name__}.Foreign"
    config["training"]["density"]["_target_"] = "os.system"
    built.clear()
    with pytest.raises(ValueError, match=r"got 'os\.system'"):
        Decoder.from_config(config, trusted=[f"{__name__}.Foreign"])
    assert not built


def test_what_cannot_be_described_leaves_what_was_saved(decoder, tmp_path):
    class Local(Transformer):
        pass

    decoder.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    layout = Patches(4)
    local = Decoder(layout, Local(layout, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match="not at the top of its module"):
        local.save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_save_that_fails_leaves_what_was_saved(decoder, tmp_path, monkeypatch):
    decoder.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def half(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("rolldiff.hub.save_file", half)
    with pytest.raises(OSError, match="no space"):
        decoder.save_pretrained(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in FILES}


def test_push_uploads_two_files(decoder, tmp_path, monkeypatch):
    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            asked["private"] = private
            return SimpleNamespace(repo_id=f"somebody/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **more):
            for path in folder_path.iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return repo_id

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert isinstance(decoder, huggingface_hub.ModelHubMixin)
    assert decoder.push_to_hub("digits", private=True, token="t") == "somebody/digits"
    assert asked == {"token": "t", "private": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert Decoder.from_pretrained(tmp_path).to_config() == decoder.to_config()
    with pytest.raises(ValueError, match="model_card_kwargs must be None"):
        decoder.save_pretrained(tmp_path, model_card_kwargs={})


def test_a_name_is_fetched(decoder, tmp_path, monkeypatch):
    decoder.save_pretrained(tmp_path)

    def fetch(name, *, allow_patterns, revision, token, **more):
        assert (name, revision, token) == ("somebody/digits", "v1", None)
        assert sorted(allow_patterns) == FILES
        return str(tmp_path)

    monkeypatch.setattr("rolldiff.hub.snapshot_download", fetch)
    read = Decoder.from_pretrained("somebody/digits", revision="v1")
    assert read.to_config() == decoder.to_config()


@pytest.mark.parametrize("name", ["somebody/nothing", "no/such/folder", "a b"])
def test_a_name_that_cannot_be_fetched(name, tmp_path):
    with pytest.raises(ValueError, match="a folder or a repository that can be fetched") as error:
        Decoder.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)
    assert repr(name) in line(error)


# ---------------------------------------------------------------------------------------------
# Files from somebody else


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """Notices whatever a file may try to run: files, sockets, processes, imports of `os.system`."""
    marker = tmp_path / "ran"
    tried = []

    def note(*arguments, **keywords):
        tried.append(arguments)
        raise OSError("not in a test")

    monkeypatch.setattr("socket.socket", note)
    monkeypatch.setattr("os.system", note)
    monkeypatch.setattr("subprocess.Popen", note)
    monkeypatch.setattr("torch.hub.load", note)
    monkeypatch.setattr("rolldiff.hub.snapshot_download", note)
    yield marker
    assert not tried
    assert not marker.exists()


def payloads(marker):
    """What a configuration may name to run something, with its arguments."""
    path = str(marker)
    return [
        {"_target_": "os.system", "command": f"touch {path}"},
        {"_target_": "posix.system", "_args_": [f"touch {path}"]},
        {"_target_": "builtins.open", "file": path, "mode": "w"},
        {"_target_": "builtins.exec", "_args_": [f"open({path!r}, 'w')"]},
        {"_target_": "builtins.eval", "_args_": ["1"]},
        {"_target_": "io.open", "file": path, "mode": "w"},
        {"_target_": "pathlib.Path.touch", "_args_": [path]},
        {"_target_": "subprocess.run", "args": ["touch", path]},
        {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
        {"_target_": "torch.load", "f": path, "weights_only": False},
        {"_target_": "torch.save", "obj": 1, "f": path},
        {"_target_": "urllib.request.urlopen", "url": "http://127.0.0.1:9/"},
        {"_target_": "socket.create_connection", "address": ["127.0.0.1", 9]},
        {"_target_": "numpy.load", "file": path, "allow_pickle": True},
        {"_target_": "numpy.save", "file": path, "arr": [1]},
        {"_target_": "pickle.loads", "data": "cos\nsystem\n(S'true'\ntR."},
        {"_target_": "importlib.import_module", "name": "antigravity"},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system"}},
        {"_target_": "rolldiff.hub.importlib.import_module", "name": "antigravity"},
        {"_target_": "rolldiff.hub.os.system", "command": f"touch {path}"},
        {"_target_": "rolldiff.hub.torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
        {"_target_": "rolldiff.hub.Path", "_args_": [path]},
        {"_target_": "rolldiff.hub.snapshot_download", "repo_id": "a/b"},
        {"_target_": "rolldiff.hub.read_checkpoint", "path": path, "cls": None},
        {"_target_": "rolldiff.hub.Pretrained", "x": 1},
        {"_target_": "rolldiff.data.sources.Path", "_args_": [path]},
        {"_target_": "rolldiff.data.sources.ImageFolder", "path": "/"},
        {"_target_": "rolldiff.data.Hub", "name": "a/b"},
        {"_target_": "rolldiff.evaluation.networks.Inception", "path": None},
        {"_target_": "rolldiff.files.write_text", "path": path, "text": "x"},
        {"_target_": "rolldiff.files.written_whole", "path": path},
        {"_target_": "rolldiff.cli.main", "argv": ["train"]},
        {"_target_": "rolldiff.Decoder.from_pretrained", "name_or_folder": "a/b"},
        {"_target_": "rolldiff.Decoder.save_pretrained", "folder": path},
        {"_target_": "rolldiff.Patches.__init__", "image_size": 8},
        {"_target_": "rolldiff.Transformer.compile"},
        {"_target_": ["os.system"], "command": "true"},
        {"_target_": {"_target_": "os.system"}, "command": "true"},
        {"_target_": None, "command": "true"},
        {"_target_": "${oc.env:HOME}", "x": 1},
        {"_target_": "", "x": 1},
        {"no_target": 1},
    ]


PLACES = [
    ("noise",),
    ("layout",),
    ("backbone",),
    ("training", "density"),
    ("backbone", "condition"),
    ("layout", "image_size"),
    ("backbone", "depth"),
    ("prediction",),
    ("extra",),
]


def placed(config, place, payload):
    config = json.loads(json.dumps(config))
    part = config
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = payload
    return config


@pytest.mark.usefixtures("unchecked")
def test_a_configuration_runs_nothing(decoder, tmp_path, isolated):
    folder = tmp_path / "saved"
    decoder.save_pretrained(folder)
    config = decoder.to_config()
    tried = payloads(isolated)
    tried += [placed(config, place, p) for place in PLACES for p in payloads(isolated)]
    tried += [placed(config, place, [p]) for place in PLACES[-3:] for p in payloads(isolated)]
    for wrong in tried:
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UsageError) as error:
            Decoder.from_pretrained(folder)
        line(error)


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_runs_nothing(decoder, tmp_path, isolated):
    config = decoder.to_config()
    state = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    path = tmp_path / "last.ckpt"
    for payload in payloads(isolated):
        wrong = placed(config, ("noise",), payload)
        torch.save({"state_dict": state, "hyper_parameters": {"model": wrong}}, path)
        with pytest.raises(UsageError) as error:
            read_checkpoint(path, Decoder)
        line(error)
    for call, arguments in RUNS:
        bomb = Reduced(call, tuple(str(isolated) if a == "MARKER" else a for a in arguments))
        for place in ("model", "state", "weight", "other"):
            content = {"state_dict": dict(state), "hyper_parameters": {"model": config}}
            if place == "model":
                content["hyper_parameters"]["model"] = bomb
            elif place == "state":
                content["state_dict"] = bomb
            elif place == "weight":
                content["state_dict"]["model.backbone.pos_embed"] = bomb
            else:
                content["callbacks"] = [bomb]
            torch.save(content, path)
            with pytest.raises(UsageError, match=r"damaged or no checkpoint") as error:
                read_checkpoint(path, Decoder)
            line(error)
        path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(UsageError):
            read_checkpoint(path, Decoder)


RUNS = [
    (os.system, ("true",)),
    (open, ("MARKER", "w")),
    (eval, ("1",)),
    (exec, ("1",)),
    (os.mkdir, ("MARKER",)),
    (importlib.import_module, ("this",)),
    (torch.load, ("MARKER",)),
    (Path.touch, (Path("ran-here"),)),
]


class Reduced:
    """An object that calls something when it is unpickled."""

    def __init__(self, call, arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("backbone", "depth"), 10**6),
        (("backbone", "depth"), 1000),
        (("backbone", "depth"), 10**30),
        (("backbone", "width"), 65536),
        (("backbone", "width"), 2.0),
        (("backbone", "mlp_ratio"), 0),
        (("backbone", "mlp_ratio"), 1e30),
        (("backbone", "causal"), "no"),
        (("backbone", "condition"), 3),
        (("backbone", "layout", "channels"), 1),
        (("layout", "channels"), 1.5),
        (("layout", "patch"), True),
        (("layout", "patch"), "2"),
        (("layout", "image_size"), [10**6, 10**6]),
        (("layout", "image_size"), []),
        (("layout", "image_size"), None),
        (("layout",), None),
        (("noise", "shift"), 1e30),
        (("noise", "shift"), "1"),
        (("prediction",), "score"),
        (("prediction",), []),
        (("training", "density"), {"_target_": "rolldiff.Rectified"}),
        (("training", "times"), {"_target_": "rolldiff.Rectified"}),
        (("training", "num_groups"), 4),
        (("training", "num_groups"), list(range(1, 10**5))),
        (("training", "orders"), "top_to_bottom"),
        (("training", "orders"), ["cells:0"]),
        (("training", "drop_cond"), None),
        (("noise",), {"_target_": "rolldiff.Patches", "image_size": 8}),
        (("backbone",), {"_target_": "rolldiff.tokenizer.Prior", "num_tokens": 4}),
        (("extra",), 1),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_cannot_be_meant(decoder, tmp_path, place, value):
    """Refused in one line, before there is memory for what they ask."""
    decoder.save_pretrained(tmp_path)
    wrong = placed(decoder.to_config(), place, value)
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    start = time.perf_counter()
    with pytest.raises(UsageError) as error:
        Decoder.from_pretrained(tmp_path)
    assert str(tmp_path) in line(error)
    assert time.perf_counter() - start < 5


def test_no_memory_is_taken_for_weights_that_are_not_there(decoder, tmp_path, monkeypatch):
    decoder.save_pretrained(tmp_path)
    wrong = placed(decoder.to_config(), ("backbone", "width"), 65536)
    (tmp_path / "config.json").write_text(json.dumps(wrong))

    def allocated(*arguments, **keywords):
        raise AssertionError("weights were read")

    monkeypatch.setattr("rolldiff.hub.load_file", allocated)
    with pytest.raises(UsageError, match=r"in the weights and \("):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"_target_": "rolldiff.Decoder", "x": NaN}',
        '{"_target_": "rolldiff.Decoder", "x": Infinity}',
        '{"_target_": "rolldiff.Decoder", "x": 1e999}',
        '{"_target_": "rolldiff.Decoder", "x": ' + "9" * 5000 + "}",
        '{"_target_": "rolldiff.Decoder", "_target_": "os.system"}',
        "_target_: rolldiff.Decoder",
        "[" * 100_000,
        '{"a":' * 40 + "1" + "}" * 40,
        '{"x": [' + "1," * 2**21 + "1]}",
        "[]",
        "null",
        "",
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_configuration(decoder, tmp_path, text):
    decoder.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as error:
        Decoder.from_pretrained(tmp_path)
    assert str(tmp_path) in line(error)


def test_a_name_that_stands_twice_is_refused(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert text.count('"prediction": "v"') == 1
    for more in ('"prediction": "v"', '"prediction": "x", "prediction": "v"'):
        wrong = text.replace('"prediction": "v"', f'"prediction": "v", {more}')
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(UsageError, match="is not JSON: a name is repeated"):
            Decoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"prediction": "v"', '"prediction": NaN'))
    with pytest.raises(UsageError, match="is not JSON: numbers must be finite, got NaN"):
        Decoder.from_pretrained(tmp_path)


BAD_TYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def save_checkpoint(path, config, state):
    state = {f"model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model": config}}, path)


@pytest.mark.parametrize("dtype", BAD_TYPES)
def test_weights_of_other_kinds(decoder, tmp_path, dtype):
    decoder.save_pretrained(tmp_path)
    state = decoder.state_dict()
    name = "backbone.pos_embed"
    for wrong in (
        state | {name: state[name].to(dtype)},
        {n: value.to(dtype) for n, value in state.items()},
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        save_checkpoint(tmp_path / "a.ckpt", decoder.to_config(), wrong)
        for read in (Decoder.from_pretrained, partial(read_checkpoint, cls=Decoder)):
            path = tmp_path if read == Decoder.from_pretrained else tmp_path / "a.ckpt"
            with pytest.raises(UsageError, match="must be floating point") as error:
                read(path)
            line(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_weights_that_are_not_finite(decoder, tmp_path, value):
    decoder.save_pretrained(tmp_path)
    state = {n: v.double() for n, v in decoder.state_dict().items()}
    state["backbone.head.bias"][1] = value
    save_file(state, tmp_path / "model.safetensors")
    save_checkpoint(tmp_path / "a.ckpt", decoder.to_config(), state)
    for read in (
        lambda: Decoder.from_pretrained(tmp_path),
        lambda: read_checkpoint(tmp_path / "a.ckpt", Decoder),
    ):
        with pytest.raises(UsageError, match=r"infinity in backbone\.head\.bias"):
            read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_every_floating_type(decoder, tmp_path, dtype):
    decoder.to(dtype).save_pretrained(tmp_path)
    read = Decoder.from_pretrained(tmp_path)
    for name, value in read.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, decoder.state_dict()[name].float())
    mixed = decoder.state_dict()
    mixed["backbone.pos_embed"] = mixed["backbone.pos_embed"].to(
        torch.float32 if dtype != torch.float32 else torch.float16
    )
    save_file(mixed, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="weights must be of one type"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_checkpoints_of_a_wrong_form(decoder, tmp_path):
    config, state = decoder.to_config(), decoder.state_dict()
    cyclic = decoder.to_config()
    cyclic["noise"]["shift"] = [cyclic, cyclic]
    shared = [[1, 2]]
    for _ in range(40):
        shared = [shared, shared]
    model = {"model": config}
    wrong = [
        {"state_dict": None, "hyper_parameters": model},
        {"state_dict": torch.ones(3), "hyper_parameters": model},
        {"state_dict": {1: torch.ones(3)}, "hyper_parameters": model},
        {"state_dict": {"model.x": 3}, "hyper_parameters": model},
        {"state_dict": {"model.x": torch.ones(3).to_sparse()}, "hyper_parameters": model},
        {"state_dict": {}, "hyper_parameters": model},
        {"state_dict": {}, "hyper_parameters": None},
        {"state_dict": {}, "hyper_parameters": {"model": None}},
        {"state_dict": {}, "hyper_parameters": {"model": torch.ones(2)}},
        {"state_dict": {}, "hyper_parameters": {"model": cyclic}},
        {"state_dict": {}, "hyper_parameters": {"model": {"x": shared}}},
        {"hyper_parameters": model},
        {"state_dict": {}},
        {},
        [],
        None,
        torch.ones(3),
        state,
    ]
    path = tmp_path / "a.ckpt"
    for content in wrong:
        torch.save(content, path)
        with pytest.raises(UsageError) as error:
            read_checkpoint(path, Decoder)
        assert str(path) in line(error)


def test_a_flipped_bit_is_noticed(decoder, tmp_path):
    """In the weights of either kind of file, at many places; the padding of a zip may change."""
    decoder.save_pretrained(tmp_path)
    save_checkpoint(tmp_path / "a.ckpt", decoder.to_config(), decoder.state_dict())
    expected = decoder.state_dict()
    generator = random.Random(0)
    refused = 0
    for path, read in (
        (tmp_path / "model.safetensors", lambda: Decoder.from_pretrained(tmp_path)),
        (tmp_path / "a.ckpt", lambda: read_checkpoint(tmp_path / "a.ckpt", Decoder)),
    ):
        whole = path.read_bytes()
        for _ in range(60):
            place = generator.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            try:
                found = read().state_dict()
            except UsageError:
                refused += 1
            else:
                assert all(torch.equal(value, expected[n]) for n, value in found.items())
        path.write_bytes(whole)
        read()
    assert refused > 80


def test_a_compressed_checkpoint_is_refused(decoder, tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", decoder.to_config(), decoder.state_dict())
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in whole.namelist():
            compressed.writestr(name, whole.read(name))
    with pytest.raises(UsageError, match="must not be compressed"):
        read_checkpoint(tmp_path / "b.ckpt", Decoder)


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(decoder, tmp_path, name, monkeypatch):
    decoder.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"without {name}"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / name).rmdir()
    decoder.save_pretrained(tmp_path)
    if os.geteuid() == 0:  # who may read everything

        def forbidden(*arguments, **keywords):
            raise PermissionError(13, "Permission denied", name)

        where = "rolldiff.hub.safe_open" if name == FILES[1] else "pathlib.Path.read_text"
        monkeypatch.setattr(where, forbidden)
    else:
        (tmp_path / name).chmod(0)
    with pytest.raises(UsageError, match="Permission denied") as error:
        Decoder.from_pretrained(tmp_path)
    assert name in line(error)


def test_the_weights_have_the_permissions_of_any_new_file(decoder, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            decoder.save_pretrained(tmp_path / str(mask))
        finally:
            os.umask(before)
        for name in FILES:
            assert (tmp_path / str(mask) / name).stat().st_mode & 0o777 == mode


def test_a_full_disk_is_an_error_with_the_name_of_the_file(decoder, tmp_path, monkeypatch):
    def full(state, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rolldiff.hub.save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        decoder.save_pretrained(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_may_be_a_name_on_the_hub(decoder, tmp_path, monkeypatch):
    decoder.save_pretrained(tmp_path)
    asked = []

    def fetch(name, **more):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("rolldiff.hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("somebody/digits", Decoder).to_config() == decoder.to_config()
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", "typo.ckpt", "a/b/c", "./a/b", "../b", tmp_path / "none", "a b/c"):
        with pytest.raises(UsageError, match=r"ckpt must be a run folder|does not exist"):
            read_checkpoint(name, Decoder)
    assert asked == ["somebody/digits"]


@pytest.mark.parametrize("name", ["", None, 3, ["a/b"], b"a/b"])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_path(decoder, name):
    for call in (
        lambda: Decoder.from_pretrained(name),
        lambda: read_checkpoint(name, Decoder),
        lambda: decoder.save_pretrained(name),
    ):
        with pytest.raises(UsageError, match="must be a path"):
            call()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have(name):
    with pytest.raises(UsageError):
        read_checkpoint(name, Decoder)
