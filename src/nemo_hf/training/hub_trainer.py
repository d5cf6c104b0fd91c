"""What a trainer sends to the Hub: a loadable parent with its card, and no pickled arguments."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from nemo_hf.auto_classes import NeMoClassifier
from nemo_hf.hub.publish import CARD_NAME, STALE, CardOptions, fetch_text, write_companions
from nemo_hf.models.files import REPORT_NAME

logger = logging.getLogger(__name__)

MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", REPORT_NAME, "config.json")


class HubTrainer(Trainer):
    """A `Trainer` of parents whose pushes hold what a parent's own push holds."""

    @property
    def parent(self) -> NeMoClassifier:
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
        before = None
        if self.hub_model_id is not None:
            before = fetch_text(self.hub_model_id, CARD_NAME, self.args.hub_revision, self.args.hub_token)
        if before is None and (output / CARD_NAME).is_file():
            before = (output / CARD_NAME).read_text(encoding="utf-8")
        options = CardOptions(None, license, _listed(dataset_tags), _listed(tags))
        write_companions(self.parent, output, repo_id, options, before)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads the parent with its processor, report, card and picture; files of older pushes go.

        Args:
            commit_message: As in `Trainer`; all arguments likewise.
            blocking: Whether to wait for the upload.
            token: Token of the Hub; `None` takes `TrainingArguments.hub_token`.
            revision: Branch; `None` takes `TrainingArguments.hub_revision`.
            private: Whether to create a private repository.
            **kwargs: Options of `create_model_card`.

        Returns:
            The commit, or a `Future` of it; nothing on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        assert self.args.output_dir is not None
        return self._upload(Path(self.args.output_dir), None, commit_message, blocking, token, revision)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.parent.report = None  # it is of the last weights, not of these

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
        try:
            self.create_model_card()
        except OSError as error:  # training goes on without the Hub; the next push has all of it
            logger.warning("Got no answer of the Hub, so this checkpoint is not pushed: %s", error)
            return
        for pattern in (*MODEL_FILES, *self.parent.processor_files):
            for old in output.glob(pattern):
                old.unlink()
            for file in checkpoint.glob(pattern):
                shutil.copy(file, output / file.name)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(output, None, message)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else checkpoint.name
            jobs.append(self._upload(checkpoint, place, f"{message}, checkpoint"))
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment, arg-type]
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _upload(
        self,
        folder: Path,
        place: str | None,
        message: str | None,
        blocking: bool = False,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        return HfApi(token=token or self.args.hub_token).upload_folder(  # type: ignore[call-overload]
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            path_in_repo=place,
            commit_message=message,
            run_as_future=not blocking,
            ignore_patterns=["_*", ".*", "training_args.bin", f"{PREFIX_CHECKPOINT_DIR}-*"],
            delete_patterns=STALE if place is None else None,
            revision=revision or self.args.hub_revision,
        )


def _listed(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
