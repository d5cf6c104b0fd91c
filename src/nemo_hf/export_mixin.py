"""Methods of a model that lead to rooms above it: each imports its room when it is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from .config import LabelLike


@dataclass(frozen=True)
class PlainExport:
    """What `save_plain` wrote.

    Args:
        parameters: Number of parameters of the plain model in the files.
        module_parameters: Number of parameters of the module.
        full_parameters: Number of parameters of the plain model at full width, with the module's labels.
        changes: Widths that differ from the parent's configuration, by attribute; `text_config.head_dim` is
            an attribute of a part.
        difference: Largest difference between the logits of the two, both in float32: of the plain model before its
            weights are rounded to the module's dtype. It says whether the two compute the same function. Weights in
            which a scale is folded are rounded once more in a half-precision file, and its logits differ by that too.
        tolerance: Largest difference that was allowed: 1e-5 times max(1, largest logit).
    """

    parameters: int
    module_parameters: int
    full_parameters: int
    changes: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0
    tolerance: float = 0.0


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Args:
        inputs: Input name to its dimensions, names for the free ones.
        outputs: Names of the outputs: `"logits"` of shape (batch, labels), and `"rejection_scores"` of shape
            (batch,) where the module is calibrated.
        difference: Largest difference between onnxruntime's outputs and the module's, in float32.
        tolerance: Largest difference that was allowed: 1e-4 times max(1, largest logit).
    """

    inputs: dict[str, list[Any]]
    outputs: list[str]
    difference: float
    tolerance: float


class ExportMixin:
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

    def save_plain(self, directory: str | Path, inputs: Mapping[str, Tensor] | None = None) -> PlainExport:
        """Saves a module as a plain model of `transformers`, which loads without this library.

        A plain configuration says one width for all layers. So every feed-forward part gets the width of the
        widest one, filled up with zeros, where the configuration has a number for it; attention gets fewer or
        narrower heads where the configuration can say so (Llama, ViT, T5) and its full width otherwise (BERT,
        GPT-2). What differs in the softmax scale goes into q. The plain model is thus larger than the module,
        at most as large as the parent's.

        Args:
            directory: Where to; appears whole or not at all.
            inputs: A few samples to compare logits on; `None` draws random ones.

        Returns:
            Sizes, changed widths and the difference that was found before anything was written.

        Raises:
            ValueError: If this is a parent.
            UnsupportedArchitectureError: If no configuration of the plain class gives the module's logits.
        """
        from .exporting import save_plain

        module: Any = self
        return save_plain(module, directory, inputs)

    def export_onnx(self, directory: str | Path, inputs: Mapping[str, Tensor] | None = None) -> OnnxExport:
        """Writes a module as `model.onnx` with its processor's files and a plain `config.json`.

        The batch is a free dimension; so are the tokens of texts and the samples of waveforms. Weights are in
        float32. A calibrated module gives `rejection_scores` too, and `rejection` in `config.json` holds the
        threshold.

        Args:
            directory: Where to; appears whole or not at all.
            inputs: A few samples, at least 2, to trace and compare with; `None` draws random ones.

        Returns:
            Inputs, outputs and the largest difference that onnxruntime made on batches of several sizes and
            lengths, found before anything was moved into place.

        Raises:
            ValueError: If this is a parent, or has texts but no padding token.
            ImportError: If onnx, onnxscript or onnxruntime is missing.
            UnsupportedArchitectureError: If the model can't be traced, or onnxruntime computes something else.
        """
        from .tracing import export_onnx

        module: Any = self
        return export_onnx(module, directory, inputs)
