"""Image sources as Lightning data modules."""

from rolldiff.data.module import Images
from rolldiff.data.photos import Photos
from rolldiff.data.sources import Digits, Folder, Hub

__all__ = ["Digits", "Folder", "Hub", "Images", "Photos"]
