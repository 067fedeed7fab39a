"""A decoder as a folder: `model.safetensors` and `config.json`."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rolldiff.config import build, describe

__all__ = ["Pretrained"]

M = TypeVar("M", bound="Pretrained")

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Pretrained(nn.Module):
    """A module that can be written to a folder and read back, with nothing but plain data in it.

    The module keeps its arguments in the dictionary `config`.
    """

    config: dict[str, Any]

    def to_config(self) -> dict[str, Any]:
        """The arguments it was built with, as plain containers."""
        description = describe(self)
        assert isinstance(description, dict)
        return description

    @classmethod
    def from_config(cls: type[M], config: dict[str, Any]) -> M:
        """A module with fresh weights.

        Raises:
            ValueError: if the configuration names anything outside of this library, or something
            that
                is not a module of this class.
        """
        module = build(config)
        if not isinstance(module, cls):
            raise ValueError(f"config must describe a {cls.__name__}, got {config}")
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights and the configuration; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / f"{WEIGHTS}.part")
        text = json.dumps(self.to_config(), indent=2) + "\n"
        (folder / f"{CONFIG}.part").write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path) -> M:
        """Read what `save_pretrained` wrote, on the CPU and in evaluation mode.

        Raises:
            ValueError: if a file is missing, truncated or not a decoder's, or the two disagree.
        """
        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise ValueError(
                    f"a saved decoder needs {WEIGHTS} and {CONFIG}, got {folder} without {name}"
                )
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
        module = cls.from_config(config)
        try:
            weights = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged or no safetensors file: {error}"
            ) from error
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights and configuration disagree: {error}") from error
        return module.eval()
