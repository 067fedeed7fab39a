"""A folder of pictures; its folders, if it has any, are the classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rolldiff.data.images import Images
from rolldiff.data.records import Record

__all__ = ["Folder"]


@dataclass(kw_only=True, eq=False)
class Folder(Images):
    """Every file of a folder and of the folders in it, hidden ones left out.

    Args:
        path: the folder. The folders right in it are classes, numbered by their names in order;
            without any, every label is 0.
    """

    path: str

    def records(self) -> Sequence[Record]:
        root = Path(self.path)
        if not root.is_dir():
            raise ValueError(f"data.path must be a folder of pictures, got {self.path}")
        inside = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
        names = sorted(name for name in inside if not any(p.startswith(".") for p in name.parts))
        classes = sorted({name.parts[0] for name in names if len(name.parts) > 1})
        return [
            Record(
                str(root / name),
                root / name,
                classes.index(name.parts[0]) if len(name.parts) > 1 else 0,
            )
            for name in names
        ]
