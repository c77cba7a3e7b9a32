"""Models: `build_model` and everything a forward takes and returns."""

from models.attention import StatisticsRequest
from models.classifier import ModelOutput, SequenceClassifier, build_model
from models.config import ModelConfig

__all__ = [
    "ModelConfig",
    "ModelOutput",
    "SequenceClassifier",
    "StatisticsRequest",
    "build_model",
]
