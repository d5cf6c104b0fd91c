"""Where a model's neurons are, and masks on them."""
