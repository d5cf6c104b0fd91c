"""Base of parents, modules and composed models: saving writes all files or none, loading checks them first."""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import resolve_revision

from .atomic_writes import STALE_WEIGHTS, replaced_directory, scratch_directory
from .config_checks import REMEDY, check_companion_files, check_companions, check_report, damaged, is_companion
from .configuration import MODEL_OPTIONS
from .files import REPORT_NAME, check_no_exports, clean_companion, read_companions, recorded_names
from .finiteness import check_finite
from .labels import settle_labels
from .load_options import open_configured
from .loading import HUB_OPTIONS, PROCESS_SETTINGS, build_on_meta, check_labels, check_loaded, check_values
from .privacy import clean, hub_name
from .save_identity import load_whole, own_report, write_identity

logger = logging.getLogger(__name__)

PUSH_OPTIONS = ("parent", "license", "datasets", "tags", "commit_message", "commit_description", "private", "revision",
                "create_pr")  # fmt: skip
# Saved all the same, a checkpoint of NaN would drive out the good ones that `save_total_limit` keeps.
KEEP_OTHERWISE = " To look into these weights, write them with safetensors.torch.save_model(model, path)."


class SavedModel(PreTrainedModel):
    """A model of `transformers` that is saved and loaded together with its processor and its report."""

    config: Any
    config_class: Any
    processor_files: dict[str, bytes]  # of the tokenizer, image processor or feature extractor, by name
    report: dict[str, Any] | None  # what was measured of these weights

    def _prepare_to_save(self) -> None:
        """Brings the configuration up to date with the weights."""

    def attach_processor(self, processor: Any) -> None:
        """Lets the model carry a tokenizer, image processor or feature extractor into its directories.

        Code of its own and `auto_map`, which names some, are left out with a warning.
        """
        with scratch_directory() as directory:
            processor.save_pretrained(directory)
            files = [file for file in sorted(directory.iterdir()) if file.is_file()]
            kept = [file for file in files if is_companion(file.name)]
            self.processor_files = {file.name: clean_companion(file.name, file.read_bytes()) for file in kept}
        if left := [file.name for file in files if file not in kept]:
            logger.warning("Left %s of the processor out: no code or weights go with a model.", left)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves weights, configuration, processor and report.

        The new files take the place of the old ones in one step, when all are on the disk: a process that is killed
        leaves the old model or the new one. Other files of the directory stay. Where the system can't exchange
        directories (Windows, some network file systems, a mount point, the working directory), a process killed within
        the last milliseconds leaves files that are refused until the model is saved again. All files carry one
        identity, and a mixture of saves is refused when it is loaded.

        Args:
            save_directory: Where to.
            **kwargs: As in `transformers`; with `push_to_hub=True` the main process uploads the model too, with the
                options of that method. `save_original_format` defaults to `False`, because `Trainer` resumes and
                loads its best model by the names that the weights have in memory.

        Raises:
            ValueError: If weights are not finite, the configuration could not be loaded, or the directory holds
                exported files, which need their own `config.json`.
        """
        self._prepare_to_save()
        check_finite(self, kwargs.get("state_dict"), also=KEEP_OTHERWISE)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        options: dict[str, Any] = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        options |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        with _refusing("processor_files"):
            check_companions(sorted(self.processor_files))
            check_companion_files({name: len(content) for name, content in self.processor_files.items()}, "the model")
        self.config.processor_files = recorded_names(self.processor_files)
        if not kwargs.get("is_main_process", True):
            return
        check_no_exports(save_directory)
        self.check_config()
        report = self._checked_report()
        companions = {name: clean_companion(name, content) for name, content in self.processor_files.items()}
        kwargs.setdefault("save_original_format", False)
        with replaced_directory(save_directory, stale=(*STALE_WEIGHTS, REPORT_NAME)) as temporary:
            super().save_pretrained(temporary, **kwargs)
            for name, content in companions.items():
                (temporary / name).write_bytes(content)
            identity = write_identity(temporary, companions, report)
        self.config.save_identity = identity
        if push:
            self.push_to_hub(str(repo_id or Path(save_directory).name), **options)  # type: ignore[arg-type]

    def check_config(self) -> None:
        """Reads the configuration as loading will; what it would refuse there can't be saved (`ValueError`)."""
        with _refusing("config"):
            entries = json.loads(self.config.to_json_string())
            type(self.config).from_dict(self.config._decode_special_floats(entries))  # infinity, as loading does
            for part in getattr(self, "parts", [self]):
                check_labels(part.config, part.model.config.num_labels)

    def _checked_report(self) -> dict[str, Any] | None:
        """Checks the report as loading will, and returns it as it is saved."""
        report: dict[str, Any] | None = clean(self.report)
        with _refusing("report"):
            if report is not None:
                check_report(json.loads(json.dumps(report)))
        return report

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads what `save_pretrained` saved, in eval mode.

        Args:
            pretrained_model_name_or_path: Directory or Hub repository.
            *model_args: As in `transformers`.
            **kwargs: As in `transformers`. `verify_files=True` compares all files with the digests that were saved, to
                find flipped bytes; that takes as long as reading them.

        Returns:
            The model.

        Raises:
            OSError: If a file is missing or damaged, or of another save than the others.
            ValueError: If a tensor is missing or has another shape than the configuration says.
        """
        source = pretrained_model_name_or_path
        return load_whole(source, kwargs, lambda: cls._load(source, *model_args, **kwargs))

    @classmethod
    def _load(cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any) -> Self:
        if cuts := sorted(MODEL_OPTIONS & kwargs.keys()):
            kind = cls.config_class.describes
            raise ValueError(f"Got {cuts} for {kind}; expected a parent. Cut the modules before compose(...).")
        source = pretrained_model_name_or_path
        if source is not None:
            pin_revision(source, kwargs)
        verify = bool(kwargs.pop("verify_files", False))
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if source is not None:
            config, weights = open_configured(cls, source, hub_options, kwargs, verify)
            checked = build_on_meta(partial(cls, copy.deepcopy(config)), weights)
            for part in getattr(checked, "parts", [checked]):
                check_labels(part.config, part.model.config.num_labels)
            if not model_args and (sites := getattr(checked, "sites", None)):
                model_args = (None, sites)  # found already
            hub_options["force_download"] = kwargs["force_download"] = False  # what is here now was checked
            kwargs["use_safetensors"] = True  # nothing is unpickled
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # check_loaded names them; transformers alone would draw them anew
        try:
            with PROCESS_SETTINGS:
                loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise damaged(f"truncated weights in {str(source)!r} ({error})", "safetensors", OSError) from error
        model, info = loaded
        check_loaded(str(source), info)
        for part in getattr(model, "parts", [model]):
            check_values(part)
            settle_labels(part.config)  # a file or an argument may have renamed them in one place alone
        if source is not None:
            model.config.repository = hub_name(source)
            model.processor_files, report = read_companions(source, hub_options, model.config.processor_files)
            model.report = own_report(source, hub_options, model.config, report, verify)
        result: Self = loaded if wants_info else model
        return result


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Says that what loading would refuse can't be saved, since nothing is damaged yet."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).removeprefix("Got ").replace(REMEDY, "").partition(" The files are damaged")[0]
        got, _, expected = reason[:1000].rstrip(". ").partition("; expected ")
        raise ValueError(
            f"Got a model that could not be loaded again: {got}; expected {expected or 'what loading accepts'}. "
            f"Correct model.{what}, and save again."
        ) from error


def pin_revision(source: str | Path, kwargs: dict[str, Any]) -> None:
    """Sets `revision` in the arguments of `from_pretrained` to one commit for all files."""
    where = {name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if kwargs.get(name)}
    kwargs["revision"] = resolve_revision(source, kwargs.get("revision"), **where)
