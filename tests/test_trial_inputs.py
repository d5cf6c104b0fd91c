"""Random inputs are of the kind and shape that a model takes, always the same, and touch nothing else."""

import pytest
import torch
from conftest import LABELS, fresh, tiny

from nemo_hf.models.attach import attach_masks
from nemo_hf.neurons.trial_inputs import random_inputs

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SHORT = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = {"d_model": 32, **SHORT, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
FEATURES = {"vocab_size": 120, "num_mel_bins": 16, "max_source_positions": 20}
POSITIONS_OF_TEXT = {"vocab_size": 120, "max_position_embeddings": 12, "pad_token_id": 0}
PERCEIVER = {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 1}
PERCEIVER |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 1}
MODELS = {
    "BartForSequenceClassification": {"vocab_size": 12, **BART, "max_position_embeddings": 40, **SPECIAL},
    "WhisperForAudioClassification": {**BART, **SPECIAL, **FEATURES},
    "ASTForAudioClassification": {**SIZES, "num_mel_bins": 16, "max_length": 40},
    "Wav2Vec2ForSequenceClassification": {**SIZES, **CONVOLUTIONS, **POSITIONS},
    "Wav2Vec2BertForSequenceClassification": {**SIZES, "feature_projection_input_dim": 24},
    "Siglip2ForImageClassification": {"vision_config": {**SIZES, "patch_size": 4, "num_patches": 16}},
    "PerceiverForImageClassificationLearned": {**PERCEIVER, "image_size": 16},
    "PerceiverForSequenceClassification": {**PERCEIVER, **POSITIONS_OF_TEXT},
}
PARENTS = ("vit", "bert", "Wav2Vec2ForSequenceClassification")
TOKENS = {"input_ids": (16,), "attention_mask": (16,)}
SHAPES = {
    "vit": {"pixel_values": (3, 16, 16)},
    "bert": TOKENS,
    "gpt2": TOKENS,
    "BartForSequenceClassification": TOKENS,
    "WhisperForAudioClassification": {"input_features": (16, 40)},
    "ASTForAudioClassification": {"input_values": (40, 16)},
    "Wav2Vec2ForSequenceClassification": {"input_values": (4000,)},
    "Wav2Vec2BertForSequenceClassification": {"input_features": (30, 24)},
    "Siglip2ForImageClassification": {"pixel_values": (16, 48), "pixel_attention_mask": (16,), "spatial_shapes": (2,)},
    "PerceiverForImageClassificationLearned": {"pixel_values": (3, 16, 16)},
    "PerceiverForSequenceClassification": {"input_ids": (8,), "attention_mask": (8,)},
}


def built(name: str):
    return tiny(name, **MODELS[name]) if name in MODELS else fresh(name)


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_model_runs_on_inputs_of_its_kind(name):
    model = built(name)
    state = torch.get_rng_state()
    inputs = random_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == {k: (4, *v) for k, v in SHAPES[name].items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (4, len(LABELS))
    assert logits.isfinite().all()
    again = random_inputs(attach_masks(model) if name in PARENTS else model)
    torch.testing.assert_close(again, inputs, rtol=0, atol=0)
    assert all(len(value) == 2 for value in random_inputs(model, samples=2).values())
    first, *others = next(iter(inputs.values())).unbind()
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["bert", "BartForSequenceClassification"])
def test_half_of_the_texts_have_padding_at_the_end(name):
    model = built(name)
    inputs = random_inputs(model)
    ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    assert attention_mask.sum(1).tolist() == [16, 16, 8, 8]
    assert torch.equal(ids == model.config.pad_token_id, attention_mask == 0)
    assert (attention_mask.diff(dim=1) <= 0).all()
    assert ids.max() < model.config.vocab_size
    if name != "bert":  # encoder-decoders classify at the end of the text
        assert torch.equal((ids == 2).nonzero()[:, 1], attention_mask.sum(1) - 1)


def test_texts_use_the_whole_vocabulary_but_no_special_token(bert):
    for name, token in (("sep_token_id", 5), ("image_token_id", 7), ("boi_token_index", 9)):
        setattr(bert.config, name, token)
    bert.config.vocab_size = 12
    assert set(random_inputs(bert, 64)["input_ids"].unique().tolist()) == {0, 4, 6, 8, 10, 11}


@pytest.mark.parametrize(("longest", "tokens"), [(-1, 16), (20, 16), (12, 8), (6, 2)])
def test_texts_are_as_long_as_the_model_has_positions_for(bert, longest, tokens):
    # Some models number positions from the padding token's id on, so that a few are never used.
    bert.config.max_position_embeddings = longest
    assert random_inputs(bert)["input_ids"].shape == (4, tokens)
    bert.config.pad_token_id = None  # then it takes one text at a time
    assert {name: tuple(value.shape) for name, value in random_inputs(bert).items()} == {"input_ids": (1, tokens)}


def test_images_may_be_wide_and_a_model_of_other_inputs_is_refused(vit):
    vit.config.image_size, vit.config.num_channels = [8, 16], 1
    assert random_inputs(vit)["pixel_values"].shape == (4, 1, 8, 16)
    vit.main_input_name = "point_cloud"
    with pytest.raises(ValueError, match=r"^Got a model whose main input is 'point_cloud'; expected .*\. Pass a few"):
        random_inputs(vit)
