"""Fine-tuning of the factors, and of slow weights if wanted, on Accelerate."""

from bayesify.finetune.config import FineTuneConfig as FineTuneConfig
from bayesify.finetune.groups import make_optimizer as make_optimizer
from bayesify.finetune.trainer import FineTuner as FineTuner
from bayesify.finetune.trainer import FineTuneResult as FineTuneResult
