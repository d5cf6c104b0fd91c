"""What a module does without besides neurons: whole parts of its layers, and directions of its residual stream."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nemo_hf.neurons.sites import UnsupportedArchitectureError
from nemo_hf.pruning.depth import part_scores
from nemo_hf.pruning.stream import (
    Stream,
    find_stream,
    narrowed_state,
    read_norms,
    stream_basis,
    stream_moments,
)

from .base import NeMoPreTrainedModel
from .batches import sample_count
from .cut_source import TRIAL_SAMPLES, CutTask, Source
from .equivalence import EQUIVALENCE_TOLERANCE
from .head_outputs import answers
from .rebuilding import replace_module

AUTO = "auto"
TRIED_SHARES = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the parts, that "auto" drops
SCORED_SAMPLES = 256


def check_structure(drop_parts: Any, stream: Any, reconstruct: bool) -> None:
    """Refuses options of `extract_module` that are out of range, with a `ValueError`."""
    is_count = type(drop_parts) is int and drop_parts >= 0
    if not (is_count or drop_parts == AUTO):
        raise ValueError(f"Got drop_parts={drop_parts!r}; expected a number of parts, such as 2, or {AUTO!r}.")
    if drop_parts == AUTO and not reconstruct:
        raise ValueError("Got drop_parts='auto' and reconstruct=False; expected a number of parts. Pass drop_parts=2.")
    is_share = isinstance(stream, (int, float)) and not isinstance(stream, bool)
    if stream is not None and not (is_share and 0 < stream <= 1):
        raise ValueError(f"Got stream={stream!r}; expected a share of the stream's width in (0, 1], such as 0.75.")


def dropped_parts(source: Source, task: CutTask, drop_parts: int | str) -> list[dict[str, float]]:
    """The sets of parts to try a module without: site key to score, lowest first."""
    if drop_parts == 0:
        return [{}]
    pairs = list(zip(source.batches, source.answers, strict=True))
    enough = -(-SCORED_SAMPLES // max(1, sample_count(source.batches[0])))
    scores = part_scores(source.plain, source.means, pairs[:: max(1, len(pairs) // enough)],
                         lambda outputs: answers(outputs, task.label_ids, task.count))  # fmt: skip
    keys = {site.output: site.key for site in source.sites}
    parts = {keys[path]: score for path, score in scores.items()}
    if isinstance(drop_parts, int) and drop_parts >= len(parts):
        raise ValueError(
            f"Got drop_parts={drop_parts} for a model of {len(parts)} attention and feed-forward parts that can be "
            "dropped; expected fewer. Pass a smaller number."
        )
    counts = {int(share * len(parts)) for share in TRIED_SHARES} if isinstance(drop_parts, str) else {drop_parts}
    return [dict(islice(parts.items(), count)) for count in sorted(counts)]


@dataclass(frozen=True)
class Narrowing:
    """How the stream of a source becomes narrower: (width, new width), and at full width, which changes nothing."""

    basis: Tensor
    full_basis: Tensor
    lost_variance: float

    @property
    def share(self) -> float:
        """The share of the width that is left."""
        return self.basis.shape[1] / self.basis.shape[0]

    @classmethod
    def of(cls, source: Source, share: float) -> "Narrowing":
        """Measures the stream of a source; one that can't be rotated is an `UnsupportedArchitectureError`."""
        stream = find_stream(source.plain, source.sites)
        moments = stream_moments(source.plain, stream, source.batches)
        (basis, lost), (full, _) = (
            stream_basis(source.plain, stream, moments, width)
            for width in (max(2, round(share * stream.width)), stream.width)
        )
        found = cls(basis, full, lost)
        first = {name: value[:TRIAL_SAMPLES] for name, value in source.batches[0].items()}
        found._rotated(source.plain, stream, first)
        return found

    def _rotated(self, plain: Any, stream: Stream, inputs: Mapping[str, Any]) -> Mapping[str, str]:
        """Checks that a model computes the same in another basis; returns the norm of each reader of its stream."""
        norm_of = read_norms(plain, stream, inputs)
        state = narrowed_state(plain, stream, norm_of, self.full_basis)
        expected = answers(plain(**inputs, return_dict=True))
        got = answers(functional_call(plain, state, (), {**inputs, "return_dict": True}))
        difference, tolerance = (
            (got - expected).abs().max().item(),
            EQUIVALENCE_TOLERANCE * max(1.0, expected.abs().max().item()),
        )
        if not difference <= tolerance:
            raise UnsupportedArchitectureError(
                f"Got a {type(plain).__name__} whose answers change by {difference:.1e} when its residual stream is "
                f"rotated, over {tolerance:.1e}, and stream=; expected none. Its stream passes through norms, as in "
                "BERT, or is read otherwise than behind norms. Leave stream out."
            )
        return norm_of

    def apply(self, module: NeMoPreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Narrows the stream of a module in place; returns what the report says of it."""
        stream = find_stream(module.model, module.sites)
        first = {name: value[:TRIAL_SAMPLES] for name, value in batches[0].items()}
        norm_of = self._rotated(module.model, stream, first)
        before = [answers(module.model(**inputs, return_dict=True)) for inputs in batches]
        flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        state = narrowed_state(module.model, stream, norm_of, self.basis)
        config: Any = copy.deepcopy(module.config)
        config.stream_width = self.basis.shape[1]
        equivalence = module.config.equivalence
        replace_module(module, config, {f"model.{name}": tensor for name, tensor in state.items()}, ())
        module.config.equivalence = equivalence
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags[name])
        changes = [
            (answers(module.model(**inputs, return_dict=True)) - known).square().flatten().double()
            for inputs, known in zip(batches, before, strict=True)
        ]
        distance = torch.cat(changes).mean().item()
        found = {"share": self.share, "width": self.basis.shape[1]}
        return {**found, "lost_variance": self.lost_variance, "distance": distance}
