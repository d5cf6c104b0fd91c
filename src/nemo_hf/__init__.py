"""nemo_hf: train a transformers classifier so that it comes apart into small stand-alone modules.

Importing it registers parents and modules with the Auto classes of `transformers`.
"""

from .config import NeMoConfig
from .evaluation import ModuleReport, evaluate_module
from .extraction import ExtractionLawError, make_parent
from .losses import nemo_loss
from .modeling import (
    NeMoForAudioClassification,
    NeMoForImageClassification,
    NeMoForSequenceClassification,
    NeMoModelConfig,
)
from .relevance import compute_relevance
from .sites import UnsupportedArchitectureError
from .trainer import NeMoTrainer

__all__ = [
    "ExtractionLawError",
    "ModuleReport",
    "NeMoConfig",
    "NeMoForAudioClassification",
    "NeMoForImageClassification",
    "NeMoForSequenceClassification",
    "NeMoModelConfig",
    "NeMoTrainer",
    "UnsupportedArchitectureError",
    "compute_relevance",
    "evaluate_module",
    "make_parent",
    "nemo_loss",
]
