"""Cutting modules: from relevance to a plan of kept neurons, the cut of each layer, its new shape and its tensors."""
