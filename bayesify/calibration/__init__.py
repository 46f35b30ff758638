"""Calibration after training, or without any."""

from bayesify.calibration.spread import SpreadFit, fit_spread

__all__ = ["SpreadFit", "fit_spread"]
