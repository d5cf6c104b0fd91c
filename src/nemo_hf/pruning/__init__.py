"""From relevance to smaller layers: which neurons stay, what that leaves of each layer, its new shape and tensors."""
