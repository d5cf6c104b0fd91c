"""What else makes a small model of some labels of a trained classifier: the other rows of `cutting.py`.

Torch-Pruning (arXiv 2301.12900) with group norms or Taylor importance; the first layers of the pretrained encoder
trained on the labels alone; a student of the source.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from cutting_fisher import fisher
from cutting_units import Job, cut, logits_of, restrict, site_paths, site_weights, unit_groups
from tasks import Split, collate
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

from nemo_hf.neurons.patterns import find_heads, find_sites
from nemo_hf.neurons.sites import AttentionSite

RATES = (1e-4, 2e-4, 5e-4, 1e-3)  # learning rates of what is trained, to choose from on validation data
TEMPERATURE = 2.0  # of the student's targets
RATIOS_TRIED = 8  # by bisection
NARROW_LAYERS = 2  # of encoders that are to be as large as a module


def truncated(job: Job, layers: int) -> PreTrainedModel:
    """The pretrained encoder's first layers with a new head, untrained."""
    if not job.encoder:
        raise SystemExit("Got a row of a truncated encoder or student for a source without a pretrained encoder.")
    set_seed(job.seed)
    sizes = {"num_hidden_layers": layers, "num_labels": len(job.labels), "ignore_mismatched_sizes": True}
    return AutoModelForSequenceClassification.from_pretrained(job.encoder, **sizes).eval()


def narrowed(job: Job) -> PreTrainedModel:
    """The first layers, with the heads and units of the largest weights: as many weights as the module."""
    model = truncated(job, NARROW_LAYERS)
    units = unit_groups(model)
    share = job.retention * site_weights(job.source, site_paths(job.source)) / sum(u.cost * u.count for u in units)
    kept = {}
    budget = 0.0
    for group in units:  # the units behind a block's attention take what its whole heads leave
        budget += share * group.cost * group.count
        count = min(group.count, max(1, int(budget / group.cost)))
        budget -= count * group.cost
        scores = torch.zeros(group.count).index_add_(0, group.of_input, group.norms(model))
        kept[group.site.key] = scores.topk(count).indices.sort().values
    return cut(model, range(len(job.labels)), units, kept)


def trained_encoder(job: Job, layers: int | None) -> PreTrainedModel:
    """The first layers of the encoder, or as many weights as the module has, trained on the labels."""
    model = narrowed(job) if layers is None else truncated(job, layers)
    train(model, job.train, job, job.rate)
    return model


def student(job: Job, on_all: bool) -> PreTrainedModel:
    """A truncated encoder as large as the module, trained to answer as the source, restricted to the labels."""
    data = job.train if on_all else job.calibration
    model = narrowed(job)
    targets = logits_of(job.source, data)[:, list(job.labels)]
    train(model, data, job, job.rate, targets)
    return model


def train(model: PreTrainedModel, data: Split, job: Job, rate: float, targets: Tensor | None = None) -> None:
    """Trains on labels, or on logits as targets (samples, labels): AdamW, cosine, batches of similar lengths."""
    set_seed(job.seed)
    with only_used_tokens(model, data) as own:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, job.steps)
        model.train()
        for _, indices in zip(range(job.steps), shuffled(own, job.batch), strict=False):
            inputs = collate([own[index] for index in indices.tolist()])
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            if targets is None:
                loss = F.cross_entropy(logits, labels)
            else:
                soft = (targets[indices] / TEMPERATURE).softmax(-1)
                loss = TEMPERATURE**2 * F.kl_div((logits / TEMPERATURE).log_softmax(-1), soft, reduction="batchmean")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


@contextmanager
def only_used_tokens(model: PreTrainedModel, data: Split) -> Iterator[Split]:
    """Leaves the embeddings of other tokens out of a training that would not change them, and makes it much faster."""
    if "input_ids" not in data.inputs:
        yield data
        return
    whole, ids = model.get_input_embeddings(), data.inputs["input_ids"]
    used = torch.cat([torch.tensor([0, whole.padding_idx or 0]), ids.flatten()]).unique()  # batches are padded with 0
    padding = None if whole.padding_idx is None else int(torch.searchsorted(used, whole.padding_idx))
    model.set_input_embeddings(nn.Embedding(len(used), whole.embedding_dim, padding, _weight=whole.weight.data[used]))
    try:
        yield replace(data, inputs={**data.inputs, "input_ids": torch.searchsorted(used, ids)})
    finally:
        whole.weight.data[used] = model.get_input_embeddings().weight.data
        model.set_input_embeddings(whole)


def shuffled(data: Split, batch: int) -> Iterator[Tensor]:
    """Indices of batches without end, each time in another order; texts of similar lengths stand together."""
    lengths = data.inputs["attention_mask"].sum(-1) if "attention_mask" in data.inputs else torch.zeros(len(data))
    while True:
        batches = []
        for part in torch.randperm(len(data)).split(8 * batch):
            batches += part[lengths[part].argsort(stable=True)].split(batch)
        yield from (batches[index] for index in torch.randperm(len(batches)).tolist())


def torch_pruning(job: Job, importance: str) -> PreTrainedModel:
    """Torch-Pruning's cut by group norms, or by weight times gradient of the labels' loss.

    Transformers lose whole heads and feed-forward units, their residual stream stays, as in the other rows; CNNs lose
    channels, also those that residual blocks add up. Each layer loses the same share, the smallest that fits the
    budget: with one ranking of all layers, the library leaves layers whole that would lose all.
    """
    import torch_pruning as tp

    model, paths = restrict(copy.deepcopy(job.source), job.labels), site_paths(job.source)
    for batch in job.calibration.batches(50) if importance == "taylor" else ():
        labels = batch.pop("labels")
        F.cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
    sample = next(iter(job.calibration.batches(2)))
    del sample["labels"]
    names = {"norm": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance"}
    scorer = getattr(tp.importance, names[importance])()
    low, high, found = 0.0, 1.0, None
    for _ in range(RATIOS_TRIED):
        ratio = (low + high) / 2
        pruned = prune(tp, model, sample, scorer, ratio)
        if site_weights(pruned, paths) <= job.retention * site_weights(job.source, paths):
            high, found = ratio, pruned
        else:
            low = ratio
    if found is None:
        raise SystemExit(f"Torch-Pruning found no cut to {job.retention} of the weights.")
    return found


def prune(tp, model: PreTrainedModel, sample: dict, importance: Callable, ratio: float) -> PreTrainedModel:
    """A copy of a model (with gradients) that lost a share of its heads and units, or channels."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.grad = None if gradients[name] is None else gradients[name].clone()
    sites = find_sites(model, ("attention", "ffn"))
    makers = {rows.layer for site in sites for rows, _ in site.produced()}
    kept = {path for path, layer in model.named_modules() if path not in makers and not any(layer.children())}
    kept = kept if sites else set(find_heads(model, len(model.config.id2label)))
    attention = [site for site in sites if isinstance(site, AttentionSite)]
    heads = {model.get_submodule(rows.layer): site.heads for site in attention for rows, _ in site.produced()}
    most = 1 - 1 / max(heads.values(), default=1) - 1e-6  # all heads of a layer would be none: it is left whole
    pruner = tp.pruner.BasePruner(
        model, sample, importance, pruning_ratio=ratio, head_pruning_ratio=min(ratio, most), prune_num_heads=True,
        prune_head_dims=False, num_heads=heads, ignored_layers=[model.get_submodule(path) for path in kept],
        output_transform=lambda output: output.logits,
    )  # fmt: skip
    pruner.step()
    for site in attention:
        for name in site.width_attributes:
            setattr(model.get_submodule(site.name), name, model.get_submodule(site.value.layer).out_features)
    return model.requires_grad_(False).eval()


BASELINES: dict[str, Callable[[Job], PreTrainedModel]] = {
    "truncated, 2 layers": lambda job: trained_encoder(job, 2),
    "truncated, 3 layers": lambda job: trained_encoder(job, 3),
    "truncated, 4 layers": lambda job: trained_encoder(job, 4),
    "truncated": lambda job: trained_encoder(job, None),
    "student, calibration": lambda job: student(job, on_all=False),
    "student": lambda job: student(job, on_all=True),
    "fisher": lambda job: fisher(job, tunes=False),
    "fisher, mask tuning": fisher,
    "torch-pruning, norm": lambda job: torch_pruning(job, "norm"),
    "torch-pruning, taylor": lambda job: torch_pruning(job, "taylor"),
}
"""Makes a model of some labels by the name of the row; those of N layers take no notice of the retention."""

TUNED = {
    name: "student" if name.startswith("student") else "truncated, 2 layers"
    for name in BASELINES
    if name.startswith(("truncated", "student"))
}
"""For each row that is trained the row whose learning rate is chosen on validation data, and taken over."""
