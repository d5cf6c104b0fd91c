"""Methods of a model that lead to rooms above it: each imports its room when it is called."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from .config import LabelLike


class Doors:
    """What `NeMoPreTrainedModel` can do beyond being a model."""

    def extract_module(
        self,
        labels: LabelLike | Sequence[LabelLike],
        threshold: float | None = None,
        round_to: int | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Cuts the module for some labels out of a parent and checks the extraction law.

        Args:
            labels: Label ids (int), label names or group names (str), in the order of the module's outputs.
            threshold: Share of a group's samples that must open a neuron; `None` takes the parent's
                `relevance_threshold`.
            round_to: Fills widths up to multiples of this, such as 8 or 16, with the next most relevant
                neurons.
            inputs: A few samples to check the law on; `None` draws random ones.

        Returns:
            A stand-alone module that shares no memory with the parent.

        Raises:
            ValueError: If the labels are unknown, repeated or none, or no neuron is left.
            ExtractionLawError: If the module's logits are not the parent's under the same mask.
        """
        from .extraction import extract_module

        parent: Any = self
        module: Self = extract_module(parent, labels, threshold=threshold, round_to=round_to, inputs=inputs)
        return module

    def push_to_hub(
        self,
        repo_id: str,
        *,
        parent: str | None = None,
        license: str | None = None,
        datasets: Sequence[str] = (),
        tags: Sequence[str] | None = None,
        with_code: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
    ) -> str:
        """Uploads the model with its processor, report, card and picture, in one commit.

        Files of an older push that this one doesn't write go. Text that stands in the repository's card below the
        line that says so stays. A push that changes nothing makes no commit.

        Args:
            repo_id: Repository, such as `"me/cat-dog"`; it is created if need be.
            parent: Module: repository of the parent, for the card; `None` takes the one that it was cut from, if that
                is on the Hub.
            license: Identifier of the license, for the card.
            datasets: Hub data sets that the model was trained and measured on, for the card.
            tags: Further tags of the card.
            with_code: Module: whether the repository gets code by which it loads without nemo_hf, through
                `trust_remote_code`.
            commit_message: As in `transformers`; all arguments below likewise.
            commit_description: Description of the commit.
            private: Whether to create a private repository.
            token: Token of the Hub.
            revision: Branch.
            create_pr: Whether to open a pull request instead.
            max_shard_size: Largest size of one weight file.

        Returns:
            The address of the commit.
        """
        from .publishing import CardOptions, push_model

        model: Any = self
        commit = push_model(
            model,
            repo_id,
            CardOptions(parent, license, tuple(datasets), tuple(tags or ())),
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size="50GB" if max_shard_size is None else max_shard_size,
            with_code=with_code,
        )
        return str(commit)
