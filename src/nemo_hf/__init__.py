"""nemo_hf: train a transformers classifier so that it comes apart into small stand-alone modules.

Importing it registers parents and modules with the Auto classes of `transformers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import (
    NeMoForAudioClassification,
    NeMoForImageClassification,
    NeMoForObjectDetection,
    NeMoForSemanticSegmentation,
    NeMoForSequenceClassification,
    NeMoForTokenClassification,
)
from .config import NeMoConfig
from .evaluation.report import ModuleReport, evaluate_module
from .hub.report_page import write_report_page
from .models.calibrated_cut import extract_module
from .models.composition import compose
from .models.configuration import NeMoModelConfig
from .models.equivalence import EquivalenceError
from .models.pruning_modes import make_parent
from .models.rejection_calibration import calibrate_rejection
from .neurons.proposals import propose_sites
from .neurons.sites import UnsupportedArchitectureError

if TYPE_CHECKING:
    from .training.losses import nemo_loss
    from .training.relevance import compute_relevance
    from .training.trainer import NeMoTrainer

__all__ = [
    "EquivalenceError",
    "ModuleReport",
    "NeMoConfig",
    "NeMoForAudioClassification",
    "NeMoForImageClassification",
    "NeMoForObjectDetection",
    "NeMoForSemanticSegmentation",
    "NeMoForSequenceClassification",
    "NeMoForTokenClassification",
    "NeMoModelConfig",
    "NeMoTrainer",
    "UnsupportedArchitectureError",
    "calibrate_rejection",
    "compose",
    "compute_relevance",
    "evaluate_module",
    "extract_module",
    "make_parent",
    "nemo_loss",
    "propose_sites",
    "write_report_page",
]

# Imported when they are asked for: `Trainer` brings in data libraries, 90 MB that a module in use has no need of.
_TRAINING = {"NeMoTrainer": "trainer", "compute_relevance": "relevance", "nemo_loss": "losses"}


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.training.{_TRAINING[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
