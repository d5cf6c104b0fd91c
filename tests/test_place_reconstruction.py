"""Reconstruction of modules that answer at many places of a sample, or with several labels for it."""

import pytest
import torch
from conftest import fresh, generated, randomize
from cutting_helpers import batches_for
from place_helpers import CHOSEN, IDS, close, inputs_of, plain_model, restricted, run
from test_place_heads import AUTO
from transformers import AutoModelForImageClassification

from nemo_hf import extract_module

DETECTORS = ("detr", "yolos", "rt-detr")
PIXELS = ("segformer", "beit")
TOKENS = ("bert", "distilbert", "deberta-v2")
ALL_QUERIES = {"rt-detr": {"num_queries": 84}}  # all places of an image, so that a module only orders them anew
FARTHEST = {"rt-detr": 0.1}  # as pairs of other queries have less than half of the distance by chance
SAMPLES = {"rt-detr": 16, "detr": 32, "beit": 32}
SLOW = ("detr", "beit")  # of many layers


def batches_of(name, count=128, seed=0, size=16):
    """Images, or texts of 3 to 12 tokens with padding."""
    generator, like = torch.Generator().manual_seed(seed), inputs_of(name)
    found = []
    for _ in range(0, count, size):
        if "input_ids" in like:
            mask = (torch.arange(12) < torch.randint(3, 13, (size, 1), generator=generator)).long()
            ids = torch.randint(5, 118, (size, 12), generator=generator)
            found.append({"input_ids": ids * mask, "attention_mask": mask})
        else:
            shape = like["pixel_values"].shape[1:]
            found.append({"pixel_values": torch.randn(size, *shape, generator=generator)})
    return found


def cut(name, source, samples, retention=0.4, **options):
    config = generated(targets=("attention", "ffn") if name in SLOW else ("attention", "ffn", "conv"))
    return extract_module(source, CHOSEN, samples, retention, nemo_config=config, show_progress=False, **options)


def distance(module, source, batches):
    """Mean square of what a module's answers lack to those of its source; detected objects in any order."""
    squares = []
    for batch in batches:
        got, expected = run(module, **batch), run(source, **batch)
        missing = got.logits - restricted(expected)
        if "pred_boxes" in expected:
            found = torch.cat([got.logits, got.pred_boxes], -1)
            wanted = torch.cat([restricted(expected), expected.pred_boxes], -1)
            missing = torch.cdist(found, wanted).amin(1)
        squares.append(missing[batch["attention_mask"].bool()] if "attention_mask" in batch else missing.flatten())
    return torch.cat(squares).square().mean().item()


@pytest.mark.parametrize("name", [*TOKENS, *PIXELS, *DETECTORS])
def test_a_reconstructed_module_is_nearer_to_its_source_on_other_inputs(name, tmp_path):
    source = plain_model(name, **ALL_QUERIES.get(name, {})).eval()
    samples, others = batches_of(name, SAMPLES.get(name, 128)), batches_of(name, 32, seed=1)
    raw, module = (cut(name, source, samples, reconstruct=done) for done in (False, True))
    assert "refused" not in module.config.extraction
    assert distance(module, source, others) < FARTHEST.get(name, 0.5) * distance(raw, source, others)
    module.save_pretrained(tmp_path)
    loaded = AUTO[module.task].from_pretrained(tmp_path)
    assert loaded.config.id2label == dict(enumerate(CHOSEN))
    assert loaded.config.extraction == module.config.extraction
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    got, expected = run(loaded, **others[0]), run(module, **others[0])
    assert got.logits.shape == restricted(run(source, **others[0])).shape
    assert close(got.logits, expected.logits, 1e-6)


def test_padding_and_ignored_labels_change_no_module_of_tokens():
    source = plain_model("bert").eval()
    bare = batches_of("bert", 32)
    labels = [torch.where(batch["attention_mask"] > 0, IDS[0], -100) for batch in bare]
    labelled = [{**batch, "labels": own} for batch, own in zip(bare, labels, strict=True)]
    noise = torch.randint(5, 118, (16, 12), generator=torch.Generator().manual_seed(2))
    wordy = [
        {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], noise)} for batch in bare
    ]
    expected = cut("bert", source, bare)
    for samples in (labelled, wordy):
        module = cut("bert", source, samples)
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_samples_of_ignored_labels_alone_are_not_used():
    samples = batches_of("bert", 32)
    own = torch.full((16, 12), IDS[1])
    own[::2] = -100
    labelled = [{**batch, "labels": own} for batch in samples]
    assert cut("bert", plain_model("bert").eval(), labelled).config.extraction["samples"] == 16


def test_a_loss_of_tokens_is_measured_where_they_have_labels():
    source = plain_model("bert").eval()
    batches = []
    for batch in batches_of("bert", 64):
        answered = torch.tensor(IDS)[restricted(run(source, **batch)).argmax(-1)]
        answered[:, ::3] = -100
        batches.append({**batch, "labels": answered})
    whole = cut("bert", source, batches, None, max_loss=0, validation=batches)
    for batch in batches:
        used = batch["labels"] != -100
        assert torch.equal(torch.tensor(IDS)[run(whole, **{k: batch[k] for k in ("input_ids", "attention_mask")})
                                             .logits.argmax(-1)][used], batch["labels"][used])  # fmt: skip


def test_a_reconstructed_module_of_several_labels_says_yes_or_no_as_its_source(tmp_path):
    source = randomize(fresh("vit"), 0.3)
    source.config.problem_type = "multi_label_classification"
    samples, others = batches_for("vit", 96), batches_for("vit", 64, seed=1)
    raw, module = (cut("vit", source, samples, reconstruct=done) for done in (False, True))
    assert distance(module, source, others) < 0.5 * distance(raw, source, others)
    assert module.config.problem_type == "multi_label_classification"
    module.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(run(loaded, **batch).logits, run(module, **batch).logits) for batch in others)
