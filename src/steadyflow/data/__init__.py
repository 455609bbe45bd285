"""Datasets: torch Datasets of (x float32, label int), images in [-1, 1]; and images on disk."""

from steadyflow.data.digits import Digits
from steadyflow.data.image_files import ImageFiles, open_images
from steadyflow.data.image_writing import save_grid, write_png_zip, write_shard
from steadyflow.data.images import InMemoryImages, from_uint8, to_uint8

__all__ = [
    "Digits",
    "ImageFiles",
    "InMemoryImages",
    "from_uint8",
    "open_images",
    "save_grid",
    "to_uint8",
    "write_png_zip",
    "write_shard",
]
