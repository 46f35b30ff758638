"""Errors of bayesify. Every one is a `ValueError`, so existing handlers keep working."""

from __future__ import annotations


class BayesifyError(ValueError):
    """Base class. The message says what was found, what was expected and what to try."""


class ConfigError(BayesifyError):
    """An option has a value or a combination of values that has no meaning."""


class ConversionError(BayesifyError):
    """A model could not be converted. The model is left bit for bit as it was."""


class DataError(BayesifyError):
    """A data set, a batch or a label does not fit the model."""


class RowsError(BayesifyError):
    """A layer got rows that its factors do not fit: its input has the batch elsewhere than was thought."""


class FormatError(BayesifyError):
    """A file or folder is missing, truncated, foreign or of a newer format."""


class TrainingError(BayesifyError):
    """Training cannot go on, e.g. the loss is not finite."""
