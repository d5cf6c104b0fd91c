"""What a trainer sends to the Hub: a loadable parent with its card, and no pickled arguments."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from .files import PROCESSOR_FILES, REPORT_NAME
from .modeling import NeMoPreTrainedModel
from .publishing import CARD_NAME, CardOptions, write_companions

MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", REPORT_NAME, "config.json", *PROCESSOR_FILES)


class HubTrainer(Trainer):
    """A `Trainer` of parents whose pushes hold what a parent's own push holds."""

    @property
    def parent(self) -> NeMoPreTrainedModel:
        """The parent in training."""
        raise NotImplementedError

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the parent's card and picture into the output directory.

        Args:
            language: Not used: the card's language is English; that of the data is not known.
            license: Identifier of the license.
            tags: Further tags.
            model_name: Name in the card's title, if there is no repository.
            finetuned_from: Not used: the parent knows the model that its training started from. `tasks` likewise.
            tasks: Not used.
            dataset_tags: Hub data sets that it was trained and measured on.
            dataset: Not used: names without address say less than `dataset_tags`. `dataset_args` likewise.
            dataset_args: Not used.
        """
        if not self.is_world_process_zero():
            return
        assert self.args.output_dir is not None
        output = Path(self.args.output_dir)
        repo_id = self.hub_model_id or model_name or output.absolute().name
        before = (output / CARD_NAME).read_text(encoding="utf-8") if (output / CARD_NAME).is_file() else None
        options = CardOptions(None, license, _listed(dataset_tags), _listed(tags))
        write_companions(self.parent, output, repo_id, options, before)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # That of `transformers` writes training_args.bin, a pickle, and no card.
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        assert args.output_dir is not None
        checkpoint, output = Path(checkpoint_folder), Path(args.output_dir)
        for pattern in MODEL_FILES:
            for old in output.glob(pattern):
                old.unlink()
            for file in checkpoint.glob(pattern):
                shutil.copy(file, output / file.name)
        self.create_model_card()
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(output, None, message, [f"{PREFIX_CHECKPOINT_DIR}-*"])]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else checkpoint.name
            jobs.append(self._upload(checkpoint, place, f"{message}, checkpoint", []))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment, arg-type]
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _upload(self, folder: Path, place: str | None, message: str, ignored: Sequence[str]) -> Any:
        return HfApi(token=self.args.hub_token).upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            path_in_repo=place,
            commit_message=message,
            run_as_future=True,
            ignore_patterns=["_*", ".*", "training_args.bin", *ignored],
            revision=self.args.hub_revision,
        )


def _listed(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
