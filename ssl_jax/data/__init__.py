"""Data: images in memory or read one by one, from a prepared TFDS set or a folder, and the order of training."""

from ssl_jax.data.dataset import Dataset as Dataset
from ssl_jax.data.dataset import Part as Part
from ssl_jax.data.dataset import Reading as Reading
from ssl_jax.data.dataset import batch_indices as batch_indices
from ssl_jax.data.dataset import epoch_order as epoch_order
from ssl_jax.data.folder import load_folder as load_folder
from ssl_jax.data.image import read_image as read_image
from ssl_jax.data.prepared import load as load

__all__ = ["Dataset", "Part", "Reading", "batch_indices", "epoch_order", "load", "load_folder", "read_image"]
