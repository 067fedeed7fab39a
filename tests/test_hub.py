import json
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from rolldiff import ClassLabels, Cosine, Decoder, Patches, Training, Transformer
from rolldiff.diffusion.timesteps import Independent, LogitNormal, Mixture, Shared
from rolldiff.hub import build, describe

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
    times = Mixture((Shared(), Independent(LogitNormal(-0.5, 2.0))), (1.0, 3.0))
    return Decoder(
        layout,
        Transformer(layout, width=16, depth=1, heads=2, condition=ClassLabels(4)),
        noise=Cosine(2.0),
        prediction="v",
        training=Training((1, 2), orders=("cells:2", list(range(8))), times=times),
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
    with pytest.raises(ValueError, match="trusted must be a collection"):
        Decoder.from_config(decoder.to_config(), trusted=names[0])
    with pytest.raises(ValueError, match="must name a class"):
        build({"_target_": "os.system"}, trusted=["os.system"])


def test_all_names_are_looked_up_before_anything_is_built(decoder):
    config = decoder.to_config()
    config["backbone"]["_target_"] = f"{__name__}.Foreign"
    config["training"]["times"]["_target_"] = "os.system"
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

    def half(state, path):
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
