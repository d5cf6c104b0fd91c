"""Module rehearsal: which groups a step trains as the module that would be cut for them now, and its masks."""

import random
from collections.abc import Mapping, Sequence


def draw_groups(groups: Mapping[str, Sequence[int]], probability: float, seed: str) -> list[int] | None:
    """Draws the groups of one optimizer step: any number of them, but never all.

    Args:
        groups: Group name to label ids.
        probability: Chance in [0, 1] that the step rehearses a module at all.
        seed: Names the run and the step, so that its micro-batches and all processes draw the same.

    Returns:
        Sorted indices of groups, or `None` for a step without rehearsal.
    """
    most = len(groups) - 1
    draw = random.Random(seed)  # noqa: S311 - not for cryptography
    if draw.random() >= probability or most < 1:
        return None
    return sorted(draw.sample(range(len(groups)), draw.randint(1, most)))
