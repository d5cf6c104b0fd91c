"""What parents, modules and joined modules do alike with files: nothing is half-written, nothing unchecked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import resolve_revision

from .files import processor_files, replaced_directory, write_json
from .loading import build_on_meta, check_loaded, check_values, open_model
from .remote_files import REPORT_NAME, read_companions, recorded_names

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class FileMixin:
    """Saves and loads a model of `transformers` with its processor and report; stands before `PreTrainedModel`."""

    config: Any
    config_class: Any
    processor_files: dict[str, bytes]
    report: dict[str, Any] | None
    """What was measured of these weights; it is saved beside them."""

    def attach_processor(self, processor: Any) -> None:
        """Lets the model carry a tokenizer, image processor or feature extractor into its directories."""
        self.processor_files = processor_files(processor)

    def _save_files(
        self, directory: str | Path, writers: Sequence[Callable[[Path], object]] = (), **kwargs: Any
    ) -> None:
        """Saves all files, or none; `writers` add theirs to the directory that they get."""
        self.config.processor_files = recorded_names(self.processor_files)
        if not kwargs.get("is_main_process", True):
            return
        with replaced_directory(directory, stale=("model*.safetensors*", REPORT_NAME)) as temporary:
            super().save_pretrained(temporary, **kwargs)  # type: ignore[misc]
            for name, content in self.processor_files.items():
                (temporary / name).write_bytes(content)
            if self.report is not None:
                write_json(temporary / REPORT_NAME, self.report)
            for write in writers:
                write(temporary)

    @classmethod
    def _load_files(cls, source: str | Path | None, model_args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Loads what `_save_files` saved; arguments and result as those of `from_pretrained`."""
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        if source is not None:
            config = kwargs["config"] if isinstance(kwargs.get("config"), cls.config_class) else None
            build_on_meta(cls, *open_model(source, hub_options, config, kwargs.get("variant"), cls.config_class))
            hub_options["force_download"] = kwargs["force_download"] = False  # what is here now was checked
            kwargs["use_safetensors"] = True  # nothing is unpickled
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # told below, with the names, instead of drawn anew
        try:
            loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(
                f"Got a damaged or truncated weight file in {str(source)!r} ({error}); expected safetensors. "
                "Save or download it again."
            ) from error
        model, info = loaded
        check_loaded(str(source), info)
        for part in getattr(model, "parts", [model]):
            check_values(part)
        if source is not None:
            model.processor_files, model.report = read_companions(source, hub_options, model.config.processor_files)
        return loaded if wants_info else model


def pin_revision(source: str | Path, kwargs: dict[str, Any]) -> None:
    """Sets `revision` in the arguments of `from_pretrained` to one commit for all files."""
    where = {name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if kwargs.get(name)}
    kwargs["revision"] = resolve_revision(source, kwargs.get("revision"), **where)
