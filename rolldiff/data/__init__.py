"""Sources of images, and of their latents, as Lightning data modules."""

from rolldiff.data.latents import Latents
from rolldiff.data.module import Images, Source
from rolldiff.data.photos import Photos
from rolldiff.data.sources import Digits, Folder, Hub

__all__ = ["Digits", "Folder", "Hub", "Images", "Latents", "Photos", "Source"]
