"""The models that users load, one class per task: they cut, export and publish, and the Auto classes know them."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .config import LabelLike
from .export import onnx, openvino, plain_model
from .hub.publish import CardOptions, push_model
from .models.base import NeMoPreTrainedModel
from .models.calibrated_cut import extract_module as cut_on_samples
from .models.calls import positional_as_plain
from .models.composed_model import NeMoComposedModel
from .models.cut_saved import cut_saved
from .models.extraction import cut_on_load, extract_module
from .models.head_outputs import NeMoOutput
from .models.save_identity import load_whole
from .models.saved_model import pin_revision

AUTO_CLASSES: dict[str, Any] = {
    "image-classification": AutoModelForImageClassification,
    "text-classification": AutoModelForSequenceClassification,
    "audio-classification": AutoModelForAudioClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-segmentation": AutoModelForSemanticSegmentation,
    "object-detection": AutoModelForObjectDetection,
}


def push_to_hub(  # noqa: D417 - a method of two classes
    self: NeMoPreTrainedModel | NeMoComposedModel,
    repo_id: str,
    *,
    parent: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
) -> str:
    """Uploads the model with its processor, report, card and picture, in one commit.

    Files of an older push that this one does not write are deleted. Text below the marked line of the repository's card
    is kept. A push that changes nothing makes no commit.

    Args:
        repo_id: Repository, such as `"me/cat-dog"`; it is created if need be.
        parent: Module: repository of the parent, for the card; `None`: the one that it was cut from, if on the Hub.
        license: Identifier of the license, for the card.
        datasets: Hub data sets that the model was trained and measured on, for the card.
        tags: Further tags of the card.
        commit_message: As in `transformers`, like all arguments below.
        commit_description: Description of the commit.
        private: Whether to create a private repository.
        token: Token of the Hub.
        revision: Branch.
        create_pr: Whether to open a pull request instead.
        max_shard_size: Largest size of one weight file.

    Returns:
        The address of the commit.
    """
    card = CardOptions(parent, license, tuple(datasets), tuple(tags or ()))
    about = {"commit_description": commit_description, "create_pr": create_pr}
    shards = "50GB" if max_shard_size is None else max_shard_size
    return str(push_model(self, repo_id, card, commit_message, private, token, revision, shards, **about))


class NeMoClassifier(NeMoPreTrainedModel):
    """A parent or a module, with the methods to cut, export and publish it."""

    push_to_hub = push_to_hub  # type: ignore[assignment]
    save_plain = plain_model.save_plain
    export_onnx = onnx.export_onnx
    export_openvino = openvino.export_openvino

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        labels: LabelLike | Sequence[LabelLike] | None = None,
        threshold: float | None = None,
        round_to: int | None = None,
        verify: bool = False,
        calibration: Any = None,
        retention: float | None = None,
        max_loss: float | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a parent or a module, or cuts a module on load from a parent or a plain classifier.

        Args:
            pretrained_model_name_or_path: Directory or Hub repository.
            *model_args: As in `transformers`.
            labels: Read only the module for these labels, as `extract_module` takes them.
            threshold: With `labels` and a parent: as in `extract_module`.
            round_to: With `labels` and a parent: as in `extract_module`.
            verify: With `labels`: load the parent too and run the equivalence check, instead of trusting the check that
                was made when the parent was saved. A cut on calibration samples is always checked.
            calibration: With `labels`: samples that the module is cut on, as in `nemo_hf.extract_module`, whose further
                options may be named too. The model may then be a plain classifier, whose processor is read with it.
            retention: With `calibration`: as in `nemo_hf.extract_module`, one number.
            max_loss: With `calibration`: as in `nemo_hf.extract_module`.
            **kwargs: As in `transformers`, with attributes of the plain model's configuration such as
                `hidden_dropout_prob`. With `labels`, `device_map` names one device. `verify_files=True` compares all
                files with the digests that were saved, to find flipped bytes; that takes as long as reading them.

        Returns:
            The model in eval mode.

        Raises:
            OSError: If a file is missing or damaged, or of another save than the others.
            ValueError: If a tensor is missing or has another shape than the configuration says, or if an argument
                would change the structure of the weights, such as `hidden_size`, or of the head, such as `num_labels`.
        """
        source = pretrained_model_name_or_path
        samples = {"calibration": calibration, "retention": retention, "max_loss": max_loss}
        given = {"threshold": threshold, "round_to": round_to, "verify": verify or None, **samples}
        given = {name: value for name, value in given.items() if value is not None}
        if labels is None and given:
            raise ValueError(
                f"Got {sorted(given)} without labels; expected labels. Pass labels=[...], or leave these out."
            )
        if labels is None or source is None:
            return super().from_pretrained(source, *model_args, **kwargs)
        if given.keys() & samples.keys():
            _check_one_way(threshold, round_to)
            load_plain = AUTO_CLASSES[cls.task].from_pretrained
            module: Self = cut_saved(super().from_pretrained, load_plain, source, labels, samples, kwargs)
            return module
        pin_revision(source, kwargs)
        cut = partial(cut_on_load, cls, source, labels, threshold, round_to, verify, **kwargs)
        return load_whole(source, kwargs, cut)

    def extract_module(
        self,
        labels: LabelLike | Sequence[LabelLike],
        calibration: Any = None,
        retention: float | Sequence[float] | None = None,
        *,
        threshold: float | None = None,
        round_to: int | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Cuts the module for some labels out of a parent and runs the equivalence check.

        By itself it keeps the neurons that training with masks found relevant. With `calibration` it does what
        `nemo_hf.extract_module` does: it keeps the share of the weights that is asked for, and reconstructs layers.

        Args:
            labels: Label ids (int), label names or group names (str), in the order of the module's outputs.
            calibration: Samples that the module is cut on, as in `nemo_hf.extract_module`.
            retention: With `calibration`: share of the weights of the masked layers, or a list of shares.
            threshold: Without `calibration`: share of a group's samples that must open a neuron; `None`: the parent's
                `relevance_threshold`.
            round_to: Without `calibration`: fills widths up to multiples of this, such as 8 or 16, with the next most
                relevant neurons.
            inputs: Without `calibration`: a few samples to check on; `None` draws random ones.
            **options: With `calibration`: further ones of `nemo_hf.extract_module`, such as `max_loss`.

        Returns:
            A stand-alone module that shares no memory with the parent; for a list of shares a list.

        Raises:
            ValueError: If the labels are unknown, repeated or none, no neuron is left, or layers of the parent were
                changed since it was made.
            EquivalenceError: If the module's logits are not the parent's under the same mask.
        """
        if calibration is None and retention is None and not options:
            return extract_module(self, labels, threshold=threshold, round_to=round_to, inputs=inputs)
        _check_one_way(threshold, round_to, inputs)
        return cut_on_samples(self, labels, calibration, retention, **options)


def _check_one_way(threshold: float | None, round_to: int | None, inputs: Any = None) -> None:
    """Refuses options of the cut by relevance beside those of the cut on calibration samples."""
    given = {"threshold": threshold, "round_to": round_to, "inputs": inputs}
    if mixed := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"Got {mixed} beside calibration samples or a retention; expected one or the other, since these choose the "
            f"neurons. Leave {' and '.join(mixed)} out."
        )


class _OfImages(NeMoClassifier):
    """A parent or a module whose inputs are images."""

    main_input_name = "pixel_values"

    @positional_as_plain
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None,
        static_masks: Mapping[str, Tensor] | None = None, static_samples: Tensor | None = None,
        output_neuron_masks: bool | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Runs the model on images.

        Args:
            pixel_values: Shape (batch, channels, height, width).
            labels: Label ids, shape (batch,), or of pixels (batch, height, width); adds the loss to the output.
                Detectors take none.
            static_masks: Parents: site key to masks of shape (neurons,) or (batch, neurons), values in [0, 1], in place
                of the generated ones.
            static_samples: Samples that take the static masks, boolean, shape (batch,); `None`: all.
            output_neuron_masks: Parents: whether to return the soft masks; `None`: in training mode only.
            return_dict: `False` for a plain tuple.
            **kwargs: Passed on to the plain model.

        Returns:
            A `NeMoOutput`.
        """
        inputs = {"pixel_values": pixel_values}
        return self._run(inputs, labels, static_masks, static_samples, output_neuron_masks, return_dict, kwargs)


class NeMoForImageClassification(_OfImages):
    """Parent or module that classifies images."""

    task = "image-classification"


class NeMoForSemanticSegmentation(_OfImages):
    """Parent (with static masks) or module that labels pixels; logits have shape (batch, labels, height, width)."""

    task = "image-segmentation"


class NeMoForObjectDetection(_OfImages):
    """Parent (with static masks) or module that detects objects; its output has `pred_boxes` beside the logits."""

    task = "object-detection"


class _OfTexts(NeMoClassifier):
    """A parent or a module whose inputs are texts."""

    main_input_name = "input_ids"

    @positional_as_plain
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, bbox: Tensor | None = None, labels: Tensor | None = None,
        static_masks: Mapping[str, Tensor] | None = None, static_samples: Tensor | None = None,
        output_neuron_masks: bool | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Runs the model on texts.

        Args:
            input_ids: Token ids, shape (batch, tokens).
            attention_mask: 1 for tokens, 0 for padding, shape (batch, tokens).
            token_type_ids: Shape (batch, tokens); left out where the plain model takes none. It and `bbox` are named
                here since `Trainer` drops columns that the signature does not name.
            bbox: Boxes of the tokens, shape (batch, tokens, 4); left out likewise.
            labels: Label ids, shape (batch,), or of tokens (batch, tokens). All below as in
                `NeMoForImageClassification.forward`.
            static_masks: Parents: masks in place of the generated ones.
            static_samples: Samples that take the static masks.
            output_neuron_masks: Parents: whether to return the soft masks.
            return_dict: `False` for a plain tuple.
            **kwargs: Passed on to the plain model.

        Returns:
            A `NeMoOutput`.
        """
        known = inspect.signature(self.model.forward).parameters
        extras = {"token_type_ids": token_type_ids, "bbox": bbox}
        extras = {name: value for name, value in extras.items() if name in known}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **extras}
        return self._run(inputs, labels, static_masks, static_samples, output_neuron_masks, return_dict, kwargs)


class NeMoForSequenceClassification(_OfTexts):
    """Parent or module that classifies texts."""

    task = "text-classification"


class NeMoForTokenClassification(_OfTexts):
    """Parent (with static masks) or module that labels tokens; logits have shape (batch, tokens, labels)."""

    task = "token-classification"


class NeMoForAudioClassification(NeMoClassifier):
    """Parent or module that classifies recordings."""

    main_input_name = "input_values"
    task = "audio-classification"

    @positional_as_plain
    def forward(
        self, input_values: Tensor | None = None, input_features: Tensor | None = None, labels: Tensor | None = None,
        static_masks: Mapping[str, Tensor] | None = None, static_samples: Tensor | None = None,
        output_neuron_masks: bool | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Classifies recordings.

        Args:
            input_values: Waveforms, shape (batch, samples), or spectrograms, as the plain model takes them.
            input_features: Features of models that take these instead, such as (batch, mel bins, frames).
            labels: This and all below as in `NeMoForImageClassification.forward`.
            static_masks: Parents: masks in place of the generated ones.
            static_samples: Samples that take the static masks.
            output_neuron_masks: Parents: whether to return the soft masks.
            return_dict: `False` for a plain tuple.
            **kwargs: Passed on to the plain model.

        Returns:
            A `NeMoOutput`.
        """
        inputs = {"input_values": input_values, "input_features": input_features}
        return self._run(inputs, labels, static_masks, static_samples, output_neuron_masks, return_dict, kwargs)


class NeMoComposedClassifier(NeMoComposedModel):
    """Modules that form one classifier, with the method to publish it."""

    push_to_hub = push_to_hub  # type: ignore[assignment]


class NeMoComposedForImageClassification(NeMoComposedClassifier):
    """Modules that classify images together; `labels` are joint label ids, shape (batch,)."""

    main_input_name = "pixel_values"
    task = "image-classification"

    @positional_as_plain
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Returns joint logits, and the loss if there are `labels`; inputs as for the modules."""
        return self._run({"pixel_values": pixel_values}, labels, return_dict, kwargs)


class NeMoComposedForSequenceClassification(NeMoComposedClassifier):
    """Modules that classify texts together; `labels` are joint label ids, shape (batch,)."""

    main_input_name = "input_ids"
    task = "text-classification"

    @positional_as_plain
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, labels: Tensor | None = None, return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Returns joint logits, and the loss if there are `labels`; inputs as for the modules."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self._run(inputs, labels, return_dict, kwargs)


class NeMoComposedForAudioClassification(NeMoComposedClassifier):
    """Modules that classify recordings together; `labels` are joint label ids, shape (batch,)."""

    main_input_name = "input_values"
    task = "audio-classification"

    @positional_as_plain
    def forward(
        self, input_values: Tensor | None = None, input_features: Tensor | None = None, labels: Tensor | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> NeMoOutput | tuple[Any, ...]:  # fmt: skip
        """Returns joint logits, and the loss if there are `labels`; inputs as for the modules."""
        return self._run({"input_values": input_values, "input_features": input_features}, labels, return_dict, kwargs)


for base in (NeMoClassifier, NeMoComposedClassifier):
    AutoConfig.register(base.config_class.model_type, base.config_class)
for model_class in (
    NeMoForImageClassification, NeMoForSequenceClassification, NeMoForAudioClassification,
    NeMoForTokenClassification, NeMoForSemanticSegmentation, NeMoForObjectDetection,
    NeMoComposedForImageClassification, NeMoComposedForSequenceClassification, NeMoComposedForAudioClassification,
):  # fmt: skip
    AUTO_CLASSES[model_class.task].register(model_class.config_class, model_class)
