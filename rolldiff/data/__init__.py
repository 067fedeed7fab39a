"""Sources of images."""

from rolldiff.data.digits import Digits
from rolldiff.data.folder import Folder
from rolldiff.data.hub import Hub
from rolldiff.data.images import Images

__all__ = ["Digits", "Folder", "Hub", "Images"]
