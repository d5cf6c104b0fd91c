"""nemo_hf: train a transformers classifier so that it comes apart into small stand-alone modules.

Importing it registers parents and modules with the Auto classes of `transformers`.
"""

from .calibration import calibrate_rejection
from .composition import compose
from .config import NeMoConfig
from .configuration import NeMoModelConfig
from .evaluation import ModuleReport, evaluate_module
from .law import ExtractionLawError
from .losses import nemo_loss
from .neurons import UnsupportedArchitectureError
from .probing import make_parent
from .proposing import propose_sites
from .relevance import compute_relevance
from .tasks import NeMoForAudioClassification, NeMoForImageClassification, NeMoForSequenceClassification
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
    "calibrate_rejection",
    "compose",
    "compute_relevance",
    "evaluate_module",
    "make_parent",
    "nemo_loss",
    "propose_sites",
]
