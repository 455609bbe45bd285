"""Datasets: torch Datasets of (x float32, label int), images in [-1, 1]; and images on disk."""

from steadyflow.data.digits import Digits
from steadyflow.data.gaussian_mixture import GaussianMixtureSamples
from steadyflow.data.image_files import ImageFiles, open_images
from steadyflow.data.image_folder import ImageFolder
from steadyflow.data.image_writing import save_grid, write_png_zip, write_shard
from steadyflow.data.images import InMemoryImages, from_uint8, nothing, to_uint8
from steadyflow.data.points import InMemoryPoints
from steadyflow.data.shards import Shards, write_shards
from steadyflow.data.torchvision_sets import CIFAR10, MNIST
from steadyflow.data.toy2d import Toy2D

__all__ = [
    "CIFAR10",
    "MNIST",
    "Digits",
    "GaussianMixtureSamples",
    "ImageFiles",
    "ImageFolder",
    "InMemoryImages",
    "InMemoryPoints",
    "Shards",
    "Toy2D",
    "from_uint8",
    "nothing",
    "open_images",
    "save_grid",
    "to_uint8",
    "write_png_zip",
    "write_shard",
    "write_shards",
]
