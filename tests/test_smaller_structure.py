"""Modules without whole parts and with narrower residual streams compute what they should; the rest is refused."""

import copy

import pytest
import torch
from conftest import fresh
from cutting_helpers import assert_untouched, batches_for, cut, everything_about, seen_by
from test_reconstruction import RIDGE, ridge_change
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_hf import UnsupportedArchitectureError, extract_module
from nemo_hf.models.cut_source import CutTask, prepare_source
from nemo_hf.models.smaller_structure import Narrowing
from nemo_hf.pruning.depth import part_scores
from nemo_hf.pruning.reconstruct import Reconstruction
from nemo_hf.pruning.stream import find_stream, stream_basis, stream_moments

PRE_NORM = ("vit", "deit", "gpt2", "llama")
LABELS = (3, 1)


@torch.no_grad()
def logits(model, batches, labels=slice(None)):
    return torch.cat([model(**batch).logits[:, labels] for batch in batches])


def source_of(family, count=64):
    model, batches = fresh(family), batches_for(family, count)
    task = CutTask.of(model, list(LABELS), None, None)
    with torch.no_grad():
        return prepare_source(model, batches, task, "activity", lambda phase: None), task


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_stream_that_is_only_rotated_changes_no_answer(family):
    model, batches = fresh(family), batches_for(family)
    module = cut(model, batches, 1.0, stream=1.0, reconstruct=False)
    expected = logits(model, batches, list(LABELS))
    torch.testing.assert_close(logits(module, batches), expected, atol=1e-5, rtol=1e-5)
    assert module.config.extraction["stream"]["lost_variance"] == pytest.approx(0, abs=1e-9)
    norms = [
        p
        for name, p in module.model.named_parameters()
        if name in find_stream(module.model, module.sites).axes(module.model) and "norm" in name
    ]
    assert all(bool((p == 1).all() or (p == 0).all()) for p in norms)


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_narrower_stream_is_saved_loaded_and_exported(family, tmp_path):
    model, batches = fresh(family), batches_for(family)
    before = everything_about(model)
    module = cut(model, batches, stream=0.75, drop_parts=1)
    assert_untouched(model, before)
    done = module.config.extraction
    assert (module.config.stream_width, done["stream"]["width"]) == (24, 24)
    assert find_stream(module.model, module.sites).width == 24
    assert 0 < done["stream"]["lost_variance"] < 0.2
    assert done["distance"] <= done["cut_distance"]
    assert all(parameter.requires_grad for parameter in module.parameters())
    module.save_pretrained(tmp_path / "module")
    loaded = type(module).from_pretrained(tmp_path / "module")
    assert torch.equal(logits(loaded, batches), logits(module, batches))
    assert loaded.config.to_dict() == module.config.to_dict()
    if family == "gpt2":  # whose heads are as wide as the stream says
        with pytest.raises(UnsupportedArchitectureError, match="configuration has a head_dim"):
            module.save_plain(tmp_path / "plain")
        return
    assert module.save_plain(tmp_path / "plain").changes["hidden_size"] == 24
    plain = module.config.plain_class.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain, batches), logits(module, batches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("stream", [None, 0.75])
def test_the_configuration_says_the_width_that_hidden_states_have(family, stream, tmp_path):
    batches = batches_for(family)
    module = cut(fresh(family), batches, stream=stream, rejection=False)
    module.save_pretrained(tmp_path)
    for each in (module, type(module).from_pretrained(tmp_path), copy.deepcopy(module)):
        width = each(**batches[0], output_hidden_states=True).hidden_states[-1].shape[-1]
        assert width == (32 if stream is None else 24)
        names = {"hidden_size", each.config.base_config.attribute_map.get("hidden_size", "hidden_size")}
        assert {getattr(each.config, name) for name in names} == {width}
        assert each.config.base_config.hidden_size == 32
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == width


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_no_other_width_can_be_said_than_that_of_the_weights(family, tmp_path):
    module = cut(fresh(family), batches_for(family), stream=0.75, rejection=False)
    module.save_pretrained(tmp_path)
    said = module.config.to_dict()
    module.config.hidden_size = 24
    with pytest.raises(ValueError, match="hidden_size=32 for a module whose residual stream is 24 wide"):
        module.config.hidden_size = 32
    with pytest.raises(ValueError, match="hidden_size=32 for a module whose residual stream is 24 wide"):
        type(module).from_pretrained(tmp_path, hidden_size=32)
    assert module.config.to_dict() == said
    module.save_pretrained(tmp_path)
    assert type(module).from_pretrained(tmp_path).config.to_dict() == module.config.to_dict()


def test_more_neurons_stay_in_a_narrower_stream_at_the_same_weights():
    batches = batches_for("vit")
    wide, narrow = (cut(fresh("vit"), batches, stream=stream).config.extraction for stream in (None, 0.5))
    assert narrow["neurons"] > 1.5 * wide["neurons"]
    assert abs(narrow["weights"] - wide["weights"]) < 0.05
    assert narrow["bytes"] < wide["bytes"]


@pytest.mark.parametrize("family", ["vit", "llama"])
@pytest.mark.parametrize("width", [32, 20])
def test_the_basis_keeps_the_directions_that_say_most(family, width):
    source, _ = source_of(family)
    stream = find_stream(source.plain, source.sites)
    moments = stream_moments(source.plain, stream, source.batches)
    basis, lost = stream_basis(source.plain, stream, moments, width)
    is_centred = family == "vit"
    assert basis.shape == (32, width)
    if is_centred:
        torch.testing.assert_close(basis.sum(0), torch.zeros(width).double())
        torch.testing.assert_close(basis.sum(1), torch.zeros(32).double())
    seen = seen_by(source.plain, source.batches)[0]
    rows = torch.cat([seen[path] for path in stream.norms]).double()
    rows = rows - rows.mean(-1, keepdim=True) * is_centred
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rows.mT @ rows / len(rows), moments)
    kept = rows @ basis  # lengths over the width stay
    share = kept.square().mean() / rows.square().mean()
    assert share.item() == pytest.approx(1 - lost, abs=1e-9)
    values = torch.linalg.eigvalsh(moments)
    assert lost == pytest.approx((values[: 32 - width + is_centred].sum() / values.sum()).item(), abs=1e-9)


def test_layers_of_a_narrow_stream_are_fitted_to_the_whole_one_in_its_basis():
    source, _ = source_of("vit")
    model, batches = fresh("vit"), batches_for("vit")
    with torch.no_grad():
        narrowing = Narrowing.of(source, 0.75)
    keep = {site.key: {name: torch.arange(size) for name, size in site.parts.items()} for site in source.sites}
    whole = cut(model, batches, 1.0, stream=0.75, reconstruct=False)
    raw, fitted = whole.model, cut(model, batches, 1.0, stream=0.75, reconstruct=False).model
    heads = {head: torch.tensor(LABELS) for head in whole.heads}
    numbered = list(enumerate(source.batches))
    errors = Reconstruction(source.plain, fitted, source.sites, keep, heads, numbered, narrowing.basis).run(RIDGE)
    first, output = "vit.layers.0.attention.q_proj", "vit.layers.0.attention.o_proj"
    assert first in errors
    assert output in errors
    (wide, said), (narrow, made) = (seen_by(each, batches) for each in (source.plain, raw))
    features = torch.cat([narrow[first], torch.ones(len(narrow[first]), 1)], 1)
    change = ridge_change(features, said[first] - made[first], RIDGE)
    expected = raw.get_submodule(first).weight + change[:-1].mT.float()
    torch.testing.assert_close(fitted.get_submodule(first).weight, expected, atol=1e-4, rtol=1e-3)
    # The output projection reads what is fitted already; behind it both streams are before the second norm.
    (narrow, made), norm = seen_by(fitted, batches), "vit.layers.0.layernorm_after"
    missing = wide[norm].double() @ narrowing.basis - narrow[norm].double()
    reached = made[output].double() + missing
    residual = missing.square().sum() / (reached - reached.mean(0)).square().sum()
    assert residual.item() == pytest.approx(errors[output].after, rel=1e-3)


def test_heads_that_are_together_as_wide_as_the_stream_are_fitted_as_others_are():
    batches, errors = batches_for("vit"), []
    for retention, width in ((0.2, 3), (0.25, 4), (0.35, 5)):
        module = cut(fresh("vit"), batches, retention, stream=0.5, rejection=False)
        assert (module.config.sites[0]["widths"]["head_dim"], module.config.stream_width) == (width, 16)
        errors.append(module.config.extraction["layers"]["vit.layers.0.attention.q_proj"][0])
    assert errors == sorted(errors)  # more dimensions of the whole model's heads, of which the last ones matter least
    assert errors[-1] < 1


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bert", "BERT"), ("distilbert", "BERT"), ("albert", "norm"), ("swin", "streams of the widths")],
)
def test_streams_that_norms_shape_are_refused_and_the_model_stays(family, reason):
    model, batches = fresh(family), batches_for(family)
    before = everything_about(model)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        cut(model, batches, stream=0.75)
    assert_untouched(model, before)


def test_a_stream_that_is_read_before_a_norm_is_refused():
    source, _ = source_of("vit")
    norm = source.plain.vit.layers[1].layernorm_after
    norm.register_forward_hook(lambda layer, args, output: output.add_(args[0], alpha=0.1))
    with torch.no_grad(), pytest.raises(UnsupportedArchitectureError, match="answers change by"):
        Narrowing.of(source, 0.75)


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_scores_are_the_changes_of_answers_by_means_in_place_of_parts(family):
    source, _ = source_of(family)
    pairs = list(zip(source.batches, source.answers, strict=True))
    scores = part_scores(source.plain, source.means, pairs, lambda outputs: outputs.logits[:, list(LABELS)])
    assert list(scores.values()) == sorted(scores.values())
    assert len(scores) == len(source.sites) == 4
    expected = torch.cat(source.answers)
    for path, score in scores.items():
        changed = fresh(family)
        mean = seen_by(source.plain, source.batches)[1][path].mean(0)
        layer = changed.get_submodule(path)
        layer.register_forward_hook(lambda layer, args, output, mean=mean: mean.expand_as(output))
        change = logits(changed, source.batches, list(LABELS)) - expected
        variance = (expected - expected.mean(0)).square().mean()
        assert score == pytest.approx((change.square().mean() / variance).item(), rel=1e-3)


def test_dropped_parts_are_the_least_useful_ones_cost_nothing_and_others_keep_more(tmp_path, monkeypatch):
    batches, model = batches_for("vit"), fresh("vit")
    modules = [cut(model, batches, drop_parts=count) for count in (0, 2)]
    kept, done = (module.config.extraction for module in modules)
    assert "dropped" not in kept
    assert abs(done["weights"] - kept["weights"]) < 0.05
    scores = list(done["dropped"].values())
    assert len(scores) == 2
    assert scores == sorted(scores)
    by_key = [{entry["key"]: entry["kept"][-1] for entry in module.config.sites} for module in modules]
    for key, count in by_key[1].items():
        assert (count == 0) == (key in done["dropped"])
        assert count == 0 or count > by_key[0][key]
    modules[1].save_pretrained(tmp_path)
    loaded = type(modules[1]).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batches), logits(modules[1], batches))
    calls = []
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs),
    )
    logits(loaded, batches[:1])
    assert len(calls) == 2 - sum(key.endswith(":attention") for key in done["dropped"])


def test_the_number_of_dropped_parts_is_that_of_the_nearest_answers():
    batches = batches_for("vit")
    done = cut(fresh("vit"), batches, drop_parts="auto").config.extraction
    alone = {str(n): cut(fresh("vit"), batches, drop_parts=n).config.extraction["distance"] for n in range(3)}
    assert alone == done["distances"]
    best = min(done["distances"], key=done["distances"].get)
    assert done["distance"] == done["distances"][best]
    assert len(done.get("dropped", {})) == int(best)
    assert list(done["distances"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_parts": -1}, "expected a number of parts"),
        ({"drop_parts": True}, "expected a number of parts"),
        ({"drop_parts": 4}, "expected fewer"),
        ({"drop_parts": "auto", "reconstruct": False}, "expected a number of parts"),
        ({"stream": 0.0}, r"expected a share of the stream's width in \(0, 1\]"),
        ({"stream": "half"}, "expected a share"),
        ({"stream": True}, "expected a share"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        extract_module(fresh("vit"), [3, 1], batches_for("vit", 16), show_progress=False, **options)
