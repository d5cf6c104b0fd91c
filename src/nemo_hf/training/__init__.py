"""Training with neuron masks: trainer, losses, rehearsal, relevance."""
