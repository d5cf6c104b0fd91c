"""Cuts modules of any classifier on calibration samples: scores of its neurons, a cut, and reconstruction."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nemo_hf.config import LabelLike, NeMoConfig
from nemo_hf.pruning.budget import Cost, kept_share, plan_budget
from nemo_hf.pruning.plan import retained_neurons, static_masks

from .attach import attach_masks
from .base import NeMoPreTrainedModel
from .batches import Pair, sample_count
from .configuration import PLACE_TASKS
from .cut_samples import CutSamples, accuracy
from .cut_source import TRIAL_SAMPLES, Advance, CutTask, Score, Source, check_calibrated, prepare_source
from .extraction import CutSource, ModulePlan, build_module, check_module, read_tensor, restore_dtypes
from .extraction import extract_module as cut_by_relevance
from .finiteness import check_finite
from .held_out_reconstruction import reconstruct_module, warn_of_fit
from .processors import own_processor, padded
from .refine import refine_module
from .rejection_calibration import calibrate_on_samples
from .smaller_structure import Narrowing, check_structure, dropped_parts
from .vocabulary import check_positions, share_tokens, shorten_positions, shrink_vocabulary
from .weight_files import size_in_bytes

logger = logging.getLogger(__name__)

Keep = dict[str, dict[str, Tensor]]
Found = tuple[NeMoPreTrainedModel, dict[str, Any]]  # a module, and what `config.extraction` is to say of it
RETENTION = 0.2
VOCABULARIES = ("shared", "calibration")
TEXT_ENDS = ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token")  # what may stand around a text
EXTRA_TOKENS = 1000  # frequent words that keep embeddings of their own
LARGEST_EXCESS = 1.01  # of the weights over what is asked for, above which it is said
SMALLEST_RETENTION, HALVINGS = 0.02, 7  # of the search for the smallest module within a loss


@torch.inference_mode(False)  # whatever is around the call: gradients are needed, and full precision
def extract_module(
    model: PreTrainedModel,
    labels: LabelLike | Sequence[LabelLike],
    calibration: Any = None,
    retention: float | Sequence[float] | None = None,
    *,
    processing_class: Any = None,
    max_loss: float | None = None,
    validation: Any = None,
    label_groups: Mapping[str, Sequence[LabelLike]] | None = None,
    nemo_config: NeMoConfig | None = None,
    scores: Score = "activity",
    cost: Cost = "weights",
    drop_parts: int | Literal["auto"] = 0,
    stream: float | None = None,
    reconstruct: bool = True,
    refine_epochs: int = 0,
    vocabulary: str | None = None,
    max_positions: int | None = None,
    rejection: bool = True,
    max_samples: int = 1000,
    batch_size: int = 64,
    show_progress: bool = True,
) -> Any:
    """Cuts a small stand-alone module for some labels out of a trained classifier, without training.

    Neurons are scored by what they do on calibration samples; those of the highest scores stay. The cut is checked: the
    module's logits equal the model's with the other neurons closed. Then the layers are reconstructed by least squares,
    one after another, so that the module's hidden states come near those of the whole model. The model stays as it is.

    Args:
        model: A plain classifier of `transformers`, or a parent.
        labels: Label ids (int), label names or group names (str), in the order of the module's outputs.
        calibration: A few hundred samples, best with the module's labels: a data set, a `DataLoader` or another
            iterable of batches, or a list of texts, images or recordings. Labels are not needed; where there are, other
            labels' samples are not used for the cut but to calibrate rejection.
        retention: Share of the weights of attention, feed-forward layers and convolutions, in (0, 1], that the module
            keeps, or with `cost="operations"` of their multiplications; `None` is 0.2. A list gives a module for each.
        processing_class: Tokenizer, image processor or feature extractor for texts, images or audio, which the module
            carries from then on.
        max_loss: In place of `retention`: points of accuracy, from 0 to 100, that the module may lose against the model
            restricted to the labels, on labelled samples. The smallest module within it is searched.
        validation: Samples to measure the module on, as `calibration`, which are not used for the cut: with labels they
            give the accuracies of the module and of the model restricted to its labels in `config.extraction`, and
            `max_loss` its loss. `None` measures nothing, or for `max_loss` holds back a third of the calibration
            samples.
        label_groups: Groups that `labels` may name, a partition of the labels of a plain model.
        nemo_config: Which neurons may be cut: its `targets`, and `sites` for architectures of your own.
        scores: `"activity"` (what a neuron adds to the layers behind it), `"fisher"` (gradients of masks),
            `"magnitude"` (weights alone), or of parents `"relevance"` (what training with masks found).
        cost: What `retention` counts, and so what a neuron costs where layers compete: `"weights"` makes small modules,
            `"operations"` fast ones; they differ for convolutions, whose early layers have few weights and most
            operations.
        drop_parts: How many whole attention and feed-forward parts the module does without: those whose mean in their
            place changes the answers least. The others then keep more neurons. `"auto"` cuts a module without none,
            an eighth, a quarter, three eighths and a half of the parts and takes the one whose answers to held-out
            samples come nearest to the model's, in five times the time.
        stream: Share of the width of the residual stream to keep, in (0, 1], for models that read it behind norms alone
            (ViT, GPT-2, Llama). It is rotated, and the directions that say least are left out. The parts then keep
            more neurons for the same `retention`. `None` leaves it as it is.
        reconstruct: Whether to reconstruct the layers after the cut. A part of the samples judges that: where the
            answers to these get no nearer to the model's, the module stays as it was cut, with a warning.
        refine_epochs: Passes over the calibration samples in which the module is then trained towards the model's
            answers; 0 trains nothing.
        vocabulary: `"shared"` keeps the embeddings of those tokens of a text module that these samples have, and of
            1,000 frequent words; each other token shares that of the most similar one, and the tokenizer stays.
            `"calibration"` takes the other tokens out of the tokenizer, except single characters or bytes: texts with
            unseen words then lose more.
        max_positions: Tokens of the longest text to come; cuts the table of positions to it.
        rejection: Whether to calibrate rejection where samples have other labels as well, on those of `validation` if
            it is labelled: the module then has a last label for inputs that it rejects (see docs/rejection.md).
        max_samples: Most samples with the module's labels that are used.
        batch_size: Samples of a forward pass.
        show_progress: Whether to show a progress bar.

    Returns:
        The module, or a list of modules for a list of retentions. Its `config.extraction` tells how it was cut.

    Raises:
        TypeError: If the model or the samples are of the wrong kind.
        ValueError: If labels are unknown, an argument is out of range, samples are missing or can't be read, or the
            model can't be cut as it is (quantized, with adapters, on the meta device, with NaN).
        UnsupportedArchitectureError: If no neurons of the model can be cut exactly, or its stream can't be rotated.
        EquivalenceError: If the module before reconstruction is not exact.

    References:
        Scores as in Wanda (arXiv 2306.11695) for whole neurons, Fisher scores as in Kwon et al. (arXiv 2204.09656).
        Narrower streams as in SliceGPT (arXiv 2401.15024), with one basis for all layers.
    """
    given = (calibration, retention, max_loss, validation, vocabulary, max_positions, refine_epochs or None,
             drop_parts or None, stream)  # fmt: skip
    is_default = all(each is None for each in given) and (scores, cost) == ("activity", "weights")
    if isinstance(model, NeMoPreTrainedModel) and is_default:
        return cut_by_relevance(model, labels)
    start = time.perf_counter()
    retentions = _checked(retention, max_loss, refine_epochs, vocabulary, scores, cost)
    check_structure(drop_parts, stream, reconstruct)
    check_calibrated(model, calibration)
    task = CutTask.of(model, labels, label_groups, nemo_config)
    samples = CutSamples.read(model, task, calibration, validation, max_loss, processing_class, max_samples, batch_size)
    options = _Options(reconstruct, refine_epochs, vocabulary, max_positions, rejection, processing_class, scores, cost)
    _check_tables(model, samples, options)
    exactly = torch.autocast(model.device.type, enabled=False)  # it would keep old weights in half precision
    with tqdm(disable=not show_progress, desc="Measuring", leave=None) as bar, torch.no_grad(), exactly:

        def advance(phase: str) -> None:
            bar.set_description_str(phase)
            bar.update()

        source = prepare_source(model, [inputs for inputs, _ in samples.own], task, scores, advance)
        samples.warn_of_other_labels(source.likeliest)
        narrowing = None if stream is None else Narrowing.of(source, stream)
        parts = dropped_parts(source, task, drop_parts)
        source.targets = {} if max_loss is not None or len(retentions) * len(parts) > 1 else None
        cut = partial(_module, model, source, task, samples, options, advance, narrowing, parts)
        whole = accuracy(source.plain, task, samples.held_out, task.label_ids)
        modules = [_smallest(cut, task, samples, whole, max_loss)] if max_loss is not None else [*map(cut, retentions)]
        for (module, done), asked in zip(modules, retentions, strict=True):
            warn_of_fit(done)
            done["retention"] = asked if max_loss is None else None
            if max_loss is None and done[cost] > LARGEST_EXCESS * asked:
                logger.warning(
                    "The module keeps %.3g of the %s in place of %.3g, since each site keeps a neuron at least.",
                    *(done[cost], cost, asked),
                )
            held_out = _finish(module, model, done, samples, options, advance)
            if held_out:
                done["validation"] = {"samples": sum(sample_count(inputs) for inputs, _ in held_out)}
            if whole is not None and (own := accuracy(module.model, task, held_out)) is not None:
                done["validation"] |= {"accuracy": own, "source_accuracy": whole}
            module.config.extraction = {**done, "seconds": round(time.perf_counter() - start, 3)}
    found = [module for module, _ in modules]
    return found if isinstance(retention, Sequence) else found[0]


def _checked(retention: Any, max_loss: Any, refine_epochs: Any, vocabulary: Any, scores: Any, cost: Any) -> list[float]:
    """The retentions that are asked for; arguments out of range are a `ValueError`."""
    if retention is not None and max_loss is not None:
        raise ValueError(f"Got retention={retention!r} and max_loss={max_loss!r}; expected one of them. Leave one out.")
    given = list(retention) if isinstance(retention, Sequence) and not isinstance(retention, str) else [retention]
    retentions = [RETENTION if each is None else each for each in given]
    for each in retentions:
        if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 < each <= 1:
            raise ValueError(f"Got retention={each!r}; expected a share of the weights in (0, 1], such as 0.2.")
    if not retentions:
        raise ValueError("Got no retention; expected one or more shares of the weights, such as [0.3, 0.2, 0.1].")
    is_number = isinstance(max_loss, (int, float)) and not isinstance(max_loss, bool)
    if max_loss is not None and not (is_number and 0 <= max_loss <= 100):
        raise ValueError(f"Got max_loss={max_loss!r}; expected points of accuracy from 0 to 100, such as 1.0.")
    if isinstance(refine_epochs, bool) or not isinstance(refine_epochs, int) or refine_epochs < 0:
        raise ValueError(f"Got refine_epochs={refine_epochs!r}; expected a whole number of passes, 0 for none.")
    if vocabulary not in (None, *VOCABULARIES):
        raise ValueError(f"Got vocabulary={vocabulary!r}; expected one of {VOCABULARIES}, or None to keep all tokens.")
    if scores not in get_args(Score):
        raise ValueError(f"Got scores={scores!r}; expected one of {get_args(Score)}.")
    if cost not in get_args(Cost):
        raise ValueError(f"Got cost={cost!r}; expected one of {get_args(Cost)}.")
    return retentions


@dataclass(frozen=True)
class _Options:
    """What is done with a module after the cut."""

    reconstruct: bool
    refine_epochs: int
    vocabulary: str | None
    max_positions: int | None
    rejection: bool
    processing_class: Any
    scores: str
    cost: Cost


def _check_tables(model: PreTrainedModel, samples: CutSamples, options: _Options) -> None:
    """Refuses, before any work, smaller tables where the model can't have them, or has no tokenizer."""
    if not (options.vocabulary or options.max_positions is not None):
        return
    asked = f"vocabulary={options.vocabulary!r} and max_positions={options.max_positions!r}"
    if any("input_ids" not in inputs for inputs, _ in samples.own):
        raise ValueError(f"Got {asked} for a model of no token ids; expected None for both. Leave them out.")
    if options.processing_class is None:
        own_processor(model, "text")
    if options.max_positions is not None:
        plain = model.model if isinstance(model, NeMoPreTrainedModel) else model
        check_positions(plain, [inputs for inputs, _ in samples.own], options.max_positions)


def _module(
    model: PreTrainedModel, source: Source, task: CutTask, samples: CutSamples, options: _Options, advance: Advance,
    narrowing: Narrowing | None, parts: Sequence[Mapping[str, float]], retention: float,
) -> Found:  # fmt: skip
    """Cuts one module, checks and reconstructs it, and says how; of several sets of dropped parts, with the best."""
    found: dict[int, Found] = {}
    share = 1.0 if narrowing is None else narrowing.share
    for dropped in parts:
        keep = plan_budget(
            source.plain, source.sites, source.scores, source.costs[options.cost], min(1.0, retention / share), dropped
        )
        module = _cut(model, source, task, keep)
        done: dict[str, Any] = {"scores": options.scores, "samples": samples.count}
        for kind, costs in source.costs.items():
            done[kind] = kept_share(source.plain, source.sites, costs, keep) * share
        done |= {"neurons": retained_neurons(source.sites, keep), **({"dropped": dict(dropped)} if dropped else {})}
        if narrowing is not None:
            done["stream"] = narrowing.apply(module, source.batches)
        if options.reconstruct and (done["neurons"] < 1 or share < 1):
            basis = None if narrowing is None else narrowing.basis
            done |= reconstruct_module(module, source, task, keep, advance, basis)
        found[len(dropped)] = module, done
    distances = {count: done.get("distance", 0.0) for count, (_, done) in found.items()}
    module, done = found[min(found, key=distances.__getitem__)]
    if len(found) > 1:
        done["distances"] = {str(count): distance for count, distance in distances.items()}
    return module, done


def _cut(model: PreTrainedModel, source: Source, task: CutTask, keep: Keep) -> NeMoPreTrainedModel:
    """Cuts a module of a source with the bases that its heads have now, and checks that it is exact."""
    parent = attach_masks(source.plain, task.options, task.groups, source.sites)
    try:
        if isinstance(model, NeMoPreTrainedModel):
            config: Any = parent.config
            config.base_model, config.repository = model.config.base_model, model.config.repository
        static = static_masks(source.sites, keep)
        counts = {key: [sum(len(index) for index in parts.values())] for key, parts in keep.items()}
        retained = retained_neurons(source.sites, keep)
        plan = ModulePlan(task.label_ids, task.names, keep, static, None, None, retained, counts)
        read = partial(read_tensor, source.plain.state_dict())
        module = build_module(type(parent), CutSource.of_parent(parent), plan, read)
        module.to(source.plain.device)  # type: ignore[arg-type]
        check_module(parent, module, plan, {name: value[:TRIAL_SAMPLES] for name, value in source.batches[0].items()})
    finally:
        parent.detach_masks()
    return module


def _smallest(
    cut: Callable[[float], Found], task: CutTask, samples: CutSamples, whole: float | None, max_loss: float
) -> Found:
    """The smallest module that loses at most so many points of accuracy, `whole`, on the samples to measure on."""
    if whole is None:
        raise ValueError(
            "Got labels that are not of the shape of the model's answers; expected the same, to measure max_loss. Pass "
            "retention= in place of max_loss."
        )
    needed = whole - max_loss / 100
    low, high, best = math.log(SMALLEST_RETENTION), 0.0, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = cut(math.exp(middle))
        if (accuracy(found[0].model, task, samples.held_out) or 0.0) >= needed - 1e-9:
            high, best = middle, found
        else:
            low = middle
    return cut(1.0) if best is None else best


def _finish(
    module: NeMoPreTrainedModel, model: PreTrainedModel, done: dict[str, Any], samples: CutSamples, options: _Options,
    advance: Advance,
) -> list[Pair]:  # fmt: skip
    """What comes after the cut: precision, processor, refinement, vocabulary and rejection, recorded in `done`.

    Returns the samples to measure on, in the tokens that the module has now.
    """
    restore_dtypes(module, {name: tensor.dtype for name, tensor in _tensors(model).items()})
    module.drop_stale_results()
    check_finite(module)
    if isinstance(model, NeMoPreTrainedModel):
        module.processor_files = dict(model.processor_files)
    if options.processing_class is not None:
        module.attach_processor(options.processing_class)
    if options.refine_epochs:
        advance("Refining")
        refine_module(model, module, [*samples.own, *samples.others], options.refine_epochs, show_progress=False)
        done["refine_epochs"] = options.refine_epochs
    parts = [samples.own, samples.others, samples.held_out, samples.held_out_others]
    if options.vocabulary or options.max_positions:
        advance("Vocabulary")
        done["vocabulary"], tokenizer = {}, own_processor(module, "text")
        if options.max_positions:
            done["vocabulary"] |= shorten_positions(module, tokenizer, samples.own, options.max_positions)
            tokenizer = own_processor(module, "text")  # knows the new length
            parts = [list(_encoded_again(part, tokenizer, tokenizer, options.max_positions)) for part in parts]
        if options.vocabulary == "shared":
            done["vocabulary"] |= share_tokens(module, tokenizer, parts[0], EXTRA_TOKENS, parts[2])
        elif options.vocabulary:
            done["vocabulary"] |= shrink_vocabulary(module, tokenizer, parts[0], parts[2])
            reduced = own_processor(module, "text")
            parts = [list(_encoded_again(part, tokenizer, reduced)) for part in parts]
    own, others, held_out, held_out_others = parts
    others = held_out_others or others
    if options.rejection and others and module.task not in PLACE_TASKS:
        advance("Rejection")
        are_new = any(labels is not None for _, labels in held_out)
        calibrate_on_samples(module, [*(held_out if are_new else own), *others], are_new)
    done |= {"bytes": size_in_bytes(_tensors(module).values()), "source_bytes": size_in_bytes(_tensors(model).values())}
    return held_out


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers of the plain model, by name."""
    plain = model.model if isinstance(model, NeMoPreTrainedModel) else model
    return dict(plain.state_dict(keep_vars=True))


def _encoded_again(samples: Sequence[Pair], before: Any, after: Any, longest: int = 0) -> Iterator[Pair]:
    """Texts of batches in the tokens of a reduced vocabulary, or those over a length cut to that of a tokenizer.

    Labels of single tokens are left out, since these are others then.
    """
    ends = [token for name, token in before.special_tokens_map.items() if name in TEXT_ENDS]
    special = set(before.convert_tokens_to_ids(ends))
    for inputs, labels in samples:
        if inputs["input_ids"].shape[1] <= longest:
            yield inputs, labels
            continue
        encoded = []
        for row in inputs["input_ids"].tolist():
            parts = [list(part) for is_text, part in groupby(row, lambda index: index not in special) if is_text]
            first, *others = before.batch_decode(parts) or [""]
            encoded.append(after(first, " ".join(others) or None, truncation=True))
        is_of_tokens = labels is not None and labels.ndim > 1 and labels.dtype != torch.bool
        yield {k: v for k, v in padded(after, encoded).items() if k in inputs}, None if is_of_tokens else labels
