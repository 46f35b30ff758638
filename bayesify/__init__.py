"""bayesify: turn a pretrained network into a rank-1 Bayesian one.

Importing the package loads torch only; evaluation, fine-tuning and the Hub load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayesify.config import Rank1Config as Rank1Config
from bayesify.convert import bayesify as bayesify
from bayesify.convert import inspect as inspect
from bayesify.errors import BayesifyError as BayesifyError
from bayesify.errors import ConfigError as ConfigError
from bayesify.errors import ConversionError as ConversionError
from bayesify.errors import DataError as DataError
from bayesify.errors import FormatError as FormatError
from bayesify.errors import TrainingError as TrainingError
from bayesify.graph.report import ConversionReport as ConversionReport
from bayesify.layers.registry import Rank1Layer as Rank1Layer
from bayesify.layers.registry import rank1 as rank1
from bayesify.model import BayesianModel as BayesianModel
from bayesify.objective import ELBO as ELBO
from bayesify.predictive import Predictive as Predictive

if TYPE_CHECKING:
    from bayesify.evaluation import evaluate as evaluate
    from bayesify.finetune import FineTuneConfig as FineTuneConfig
    from bayesify.finetune import FineTuner as FineTuner
    from bayesify.hub import from_pretrained as from_pretrained

__version__ = "0.1.0"

_LAZY = {
    "FineTuneConfig": "bayesify.finetune",
    "FineTuner": "bayesify.finetune",
    "evaluate": "bayesify.evaluation",
    "from_pretrained": "bayesify.hub",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
