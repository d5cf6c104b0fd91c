"""From scores to smaller layers, as pure functions: plan, cut, resize, slice."""
