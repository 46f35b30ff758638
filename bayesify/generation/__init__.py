"""Text from the predictive: `bnn.generate(...)` for transformers models."""

from bayesify.generation.generate import Generation as Generation
from bayesify.generation.generate import generate as generate

__all__ = ["Generation", "generate"]
