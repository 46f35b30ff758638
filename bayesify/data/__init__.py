"""Data sets: loading, preprocessing, and batches that any worker and process makes alike."""

from bayesify.data.inputs import HubImagePreprocessing, ImagePreprocessing, TextPreprocessing
from bayesify.data.loader import PreparedDataset, make_loader, prepare
from bayesify.data.preprocessing import Preprocessing, preprocessing_for, preprocessing_from_dict
from bayesify.data.source import load_data
from bayesify.data.splits import Splits

__all__ = [
    "HubImagePreprocessing",
    "ImagePreprocessing",
    "PreparedDataset",
    "Preprocessing",
    "Splits",
    "TextPreprocessing",
    "load_data",
    "make_loader",
    "prepare",
    "preprocessing_for",
    "preprocessing_from_dict",
]
