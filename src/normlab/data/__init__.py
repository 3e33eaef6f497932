"""Images as tensors, and batches of them."""

from .datasets import DATASETS, ImageData, load_dataset
from .loaders import TensorBatches, TensorPairs

__all__ = ["DATASETS", "ImageData", "TensorBatches", "TensorPairs", "load_dataset"]
