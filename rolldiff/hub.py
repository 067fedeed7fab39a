"""A decoder as a folder or a repository of the Hugging Face Hub.

It is two files: `model.safetensors`, and `config.json` with nothing but plain data. Nothing is
unpickled, and nothing is built from a configuration but classes of this library and those that the
caller trusts by name.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rolldiff.config import build, describe
from rolldiff.errors import reason

__all__ = ["Pretrained"]

M = TypeVar("M", bound="Pretrained")

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Pretrained(nn.Module, ModelHubMixin):
    """A module that can be written to a folder or to the hub, and read back.

    The module keeps its arguments in the dictionary `config`. `push_to_hub(repo_id)` is
    huggingface_hub's: it uploads what `save_pretrained` writes, and no card, so that a card written
    by hand stays.
    """

    config: dict[str, Any]

    def to_config(self) -> dict[str, Any]:
        """The arguments it was built with, as plain containers.

        Raises:
            ValueError: if one of them cannot be described.
        """
        description = describe(self)
        assert isinstance(description, dict)
        return description

    @classmethod
    def from_config(cls: type[M], config: dict[str, Any], *, trusted: Collection[str] = ()) -> M:
        """A module with fresh weights.

        Args:
            config: what `to_config` returned.
            trusted: see `rolldiff.config.build`.

        Raises:
            ValueError: if the configuration names a class that is neither of this library nor
                trusted, or something that is not a module of this class.
        """
        module = build(config, trusted=trusted)
        if not isinstance(module, cls):
            raise ValueError(f"config must describe a {cls.__name__}, got {config}")
        return module

    def save_pretrained(
        self, folder: str | Path, *, config: Any = None, model_card_kwargs: Any = None
    ) -> None:
        """Write the weights and the configuration; each file appears whole or not at all.

        Args:
            folder: where to; made if it is not there.
            config: None, for a decoder describes itself; `push_to_hub` hands it on.
            model_card_kwargs: None, for no card is written; likewise.

        Raises:
            ValueError: if an argument of the decoder cannot be described, before anything is
                written.
        """
        if config is not None or model_card_kwargs is not None:
            raise ValueError(
                "config and model_card_kwargs must be None, for a decoder describes itself and no "
                f"card is written, got {config} and {model_card_kwargs}"
            )
        text = json.dumps(self.to_config(), indent=2) + "\n"
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / f"{WEIGHTS}.part")
        (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_folder: str | Path,
        *,
        trusted: Collection[str] = (),
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> M:
        """Read what `save_pretrained` wrote, on the CPU and in evaluation mode.

        Args:
            name_or_folder: a folder, or else the name of a repository of the hub.
            trusted: dotted names of classes outside of this library that the configuration may
                name, such as `("mypackage.MyBackbone",)`.
            revision: branch, tag or commit of the repository.
            token: for a private repository; by default the one that is logged in.
            cache_dir: where downloads are kept.
            force_download: whether to download what is kept already.
            local_files_only: whether to do without the network.

        Raises:
            ValueError: if there is no such folder or repository, if a file is missing, truncated or
                not a decoder's, if the configuration names a class that is neither of this library
                nor trusted, or if weights and configuration disagree. No weight is read into a
                module before all of that has been seen to.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            try:
                found = snapshot_download(
                    str(name_or_folder),
                    allow_patterns=[WEIGHTS, CONFIG],
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            except Exception as error:  # whatever the name, the network or the cache provokes
                raise ValueError(
                    "name_or_folder must be a folder or a repository that can be fetched, got "
                    f"{str(name_or_folder)!r}: {reason(error)}"
                ) from error
            folder = Path(found)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise ValueError(
                    f"a saved decoder needs {WEIGHTS} and {CONFIG}, got {name_or_folder} "
                    f"without {name}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / CONFIG} is not JSON: {reason(error)}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{folder / CONFIG} must hold a dictionary, got {config!r}")
        try:
            weights = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged or no safetensors file: {reason(error)}"
            ) from error
        module = cls.from_config(config, trusted=trusted)
        if words := _disagreement(weights, module.state_dict()):
            raise ValueError(f"{folder}: weights and configuration disagree: {words}")
        module.load_state_dict(weights)
        return module.eval()


def _disagreement(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """The first weight that is not as the configuration wants it, in words."""
    for name in sorted(weights.keys() | wanted.keys()):
        shapes = [
            str(tuple(state[name].shape)) if name in state else "absent"
            for state in (weights, wanted)
        ]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in the weights and {shapes[1]} in the configuration"
    return None
