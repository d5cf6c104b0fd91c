"""Module rehearsal: draws the label groups that a training step runs as the module cut for them."""

import random
from collections.abc import Mapping, Sequence


def draw_groups(groups: Mapping[str, Sequence[int]], probability: float, seed: str) -> list[int] | None:
    """Draws sorted indices of some groups but never all, or with 1 - `probability` none (`None`).

    `seed` names the run and the step, so that all micro-batches of a step and all processes draw the same.
    """
    most = len(groups) - 1
    draw = random.Random(seed)  # noqa: S311 - not for cryptography
    if draw.random() >= probability or most < 1:
        return None
    return sorted(draw.sample(range(len(groups)), draw.randint(1, most)))
