"""Calibration after training, or without any."""

from bayesify.calibration.sets import Conformal, fit_sets
from bayesify.calibration.spread import SpreadFit, fit_spread
from bayesify.calibration.temperature import fit_temperature

__all__ = ["Conformal", "SpreadFit", "fit_sets", "fit_spread", "fit_temperature"]
