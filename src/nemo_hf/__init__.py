"""nemo_hf: train a transformers classifier so that it comes apart into small stand-alone modules."""

from .config import NeMoConfig
from .modeling import NeMoForImageClassification, NeMoForSequenceClassification, NeMoModelConfig
