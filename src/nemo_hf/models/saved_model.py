"""Base of parents, modules and composed models: saving writes all files or none, loading checks them first."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import resolve_revision

from .config_checks import damaged
from .configuration import MODEL_OPTIONS
from .files import REPORT_NAME, read_companions, recorded_names, replaced_directory, write_json
from .finiteness import check_finite
from .loading import HUB_OPTIONS, build_on_meta, check_labels, check_loaded, check_values, open_model

PUSH_OPTIONS = ("parent", "license", "datasets", "tags", "commit_message", "commit_description", "private", "revision",
                "create_pr")  # fmt: skip
# Saved all the same, a checkpoint of NaN would drive out the good ones that `save_total_limit` keeps.
KEEP_OTHERWISE = " To look into these weights, write them with torch.save(model.state_dict(), path)."


class SavedModel(PreTrainedModel):
    """A model of `transformers` that is saved and loaded together with its processor and its report."""

    config: Any
    config_class: Any
    processor_files: dict[str, bytes]  # of the tokenizer, image processor or feature extractor, by name
    report: dict[str, Any] | None  # what was measured of these weights

    def _prepare_to_save(self) -> None:
        """Brings the configuration up to date with the weights."""

    def attach_processor(self, processor: Any) -> None:
        """Lets the model carry a tokenizer, image processor or feature extractor into its directories."""
        with tempfile.TemporaryDirectory() as directory:
            processor.save_pretrained(directory)
            files = [file for file in sorted(Path(directory).iterdir()) if file.is_file()]
            self.processor_files = {file.name: file.read_bytes() for file in files}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves weights, configuration, processor and report.

        A new directory appears whole or not at all. In one that is there already the files are replaced one
        by one when all are written, the configuration last.

        Args:
            save_directory: Where to.
            **kwargs: As in `transformers`; with `push_to_hub=True` the main process uploads the model too, with the
                options of that method. `save_original_format` defaults to `False`, because `Trainer` resumes and
                loads its best model by the names that the weights have in memory.
        """
        self._prepare_to_save()
        check_finite(self, kwargs.get("state_dict"), also=KEEP_OTHERWISE)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        options: dict[str, Any] = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        options |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        self.config.processor_files = recorded_names(self.processor_files)
        if not kwargs.get("is_main_process", True):
            return
        kwargs.setdefault("save_original_format", False)
        with replaced_directory(save_directory, stale=("model*.safetensors*", REPORT_NAME)) as temporary:
            super().save_pretrained(temporary, **kwargs)
            for name, content in self.processor_files.items():
                (temporary / name).write_bytes(content)
            if self.report is not None:
                write_json(temporary / REPORT_NAME, self.report)
        if push:
            self.push_to_hub(str(repo_id or Path(save_directory).name), **options)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Loads what `save_pretrained` saved, in eval mode; arguments as in `transformers`."""
        if cuts := sorted(MODEL_OPTIONS & kwargs.keys()):
            kind = cls.config_class.describes
            raise ValueError(f"Got {cuts} for {kind}; expected a parent. Cut the modules before compose(...).")
        source = pretrained_model_name_or_path
        if source is not None:
            pin_revision(source, kwargs)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if source is not None:
            config = kwargs["config"] if isinstance(kwargs.get("config"), cls.config_class) else None
            config, weights = open_model(source, hub_options, config, kwargs.get("variant"), cls.config_class)
            checked = build_on_meta(partial(cls, config), weights)
            for part in getattr(checked, "parts", [checked]):
                check_labels(part.config, part.model.config.num_labels)
            if not model_args and (sites := getattr(checked, "sites", None)):
                model_args = (None, sites)  # found already
            hub_options["force_download"] = kwargs["force_download"] = False  # what is here now was checked
            kwargs["use_safetensors"] = True  # nothing is unpickled
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # check_loaded names them; transformers alone would draw them anew
        try:
            loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise damaged(f"truncated weights in {str(source)!r} ({error})", "safetensors", OSError) from error
        model, info = loaded
        check_loaded(str(source), info)
        for part in getattr(model, "parts", [model]):
            check_values(part)
        if source is not None:
            model.processor_files, model.report = read_companions(source, hub_options, model.config.processor_files)
        result: Self = loaded if wants_info else model
        return result


def pin_revision(source: str | Path, kwargs: dict[str, Any]) -> None:
    """Sets `revision` in the arguments of `from_pretrained` to one commit for all files."""
    where = {name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if kwargs.get(name)}
    kwargs["revision"] = resolve_revision(source, kwargs.get("revision"), **where)
