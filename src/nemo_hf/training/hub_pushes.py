"""What a trainer sends to the Hub: a loadable parent with its card, and no pickled arguments."""

import json
import logging
import shutil
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from nemo_hf.hub.publish import CARD_NAME, STALE, CardOptions, fetch_text, write_companions
from nemo_hf.models.atomic_writes import STALE_WEIGHTS, linked_copy, replaced_directory, write_json
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.files import REPORT_NAME
from nemo_hf.models.privacy import clean

logger = logging.getLogger(__name__)

MODEL_FILES = (*STALE_WEIGHTS, REPORT_NAME, "config.json")
# Logs of TensorBoard hold all arguments, and their names that of the machine.
IGNORED = ("_*", ".*", "training_args.bin", f"{PREFIX_CHECKPOINT_DIR}-*", "*tfevents*")


def write_card(trainer: Trainer, parent: NeMoPreTrainedModel, model_name: str | None, options: CardOptions) -> None:
    """Writes card and picture into the output directory; the owner's text of an earlier card stays."""
    output = Path(str(trainer.args.output_dir))
    repo_id = trainer.hub_model_id or model_name or output.absolute().name
    before = None
    if trainer.hub_model_id is not None:
        before = fetch_text(trainer.hub_model_id, CARD_NAME, trainer.args.hub_revision, trainer.args.hub_token)
    if before is None and (output / CARD_NAME).is_file():
        before = (output / CARD_NAME).read_text(encoding="utf-8")
    write_companions(parent, output, repo_id, options, before)


def upload(trainer: Trainer, folder: str | Path, message: str | None, place: str | None = None, **options: Any) -> Any:
    """Uploads the output directory, in place of what older pushes left, or a checkpoint into a folder of the name."""
    with ExitStack() as stack:
        output = Path(str(trainer.args.output_dir)).absolute()
        copied = stack.enter_context(linked_copy(Path(folder), output, IGNORED))  # the next save may replace it
        for path in copied.rglob(TRAINER_STATE_NAME):  # it names the best checkpoint by its path
            write_json(path, clean(json.loads(path.read_text(encoding="utf-8"))))
        result = HfApi(token=options.get("token") or trainer.args.hub_token).upload_folder(  # type: ignore[call-overload]
            repo_id=str(trainer.hub_model_id),
            folder_path=copied,
            path_in_repo=place,
            commit_message=message,
            run_as_future=not options.get("blocking", False),
            ignore_patterns=list(IGNORED),
            delete_patterns=STALE,
            revision=options.get("revision") or trainer.args.hub_revision,
        )
        if isinstance(result, Future):
            release = stack.pop_all()
            result.add_done_callback(lambda _: release.close())
        return result


def push_checkpoint(trainer: Trainer, parent: NeMoPreTrainedModel, checkpoint: Path) -> None:
    """Uploads the model of a checkpoint, and as `hub_strategy` says the checkpoint, while training goes on."""
    strategy, output = trainer.args.hub_strategy, Path(str(trainer.args.output_dir))
    running: Any = trainer.push_in_progress
    is_busy = running is not None and not running.is_done()
    is_skipped = strategy == HubStrategy.END or (is_busy and not trainer.args.hub_always_push)
    if not trainer.is_world_process_zero() or is_skipped:
        return
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    try:
        trainer.create_model_card()
    except OSError as error:  # the next push has all of it
        logger.warning("This checkpoint is not pushed, since its card could not be made; training goes on. %s", error)
        return
    with replaced_directory(output, stale=MODEL_FILES) as temporary:
        for pattern in (*MODEL_FILES, *parent.processor_files):
            for file in checkpoint.glob(pattern):
                shutil.copy(file, temporary / file.name)
    message = f"Training in progress, step {trainer.state.global_step}"
    jobs = [upload(trainer, output, message)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(upload(trainer, checkpoint, f"{message}, checkpoint", place))
    if is_busy:
        running.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment, arg-type]
