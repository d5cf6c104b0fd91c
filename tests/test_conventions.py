"""Parents, modules and composed models answer as the plain model does to what transformers documents for any model."""

import copy
import functools
import json
import logging

import pytest
import torch
from conftest import LABELS, fresh, generated, hooks_of, image_samples, parent_of, text_samples
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from nemo_hf import NeMoForImageClassification, NeMoModelConfig, compose, make_parent
from nemo_hf.models.attach import attach_masks
from nemo_hf.neurons.masks import NeuronMasks
from nemo_hf.neurons.trial_inputs import random_inputs

FAMILIES = ("bert", "vit", "gpt2")
KINDS = ("parent", "module", "cut")
DROPOUT = {"bert": "hidden_dropout_prob", "vit": "hidden_dropout_prob", "gpt2": "resid_pdrop"}
ALL = list(range(len(LABELS)))
OTHER = dict(enumerate("abcde"))
OURS = {"rejection_scores"}
BACK = {name: index for index, name in OTHER.items()}


@functools.cache
def models(family):
    """The plain model, without the cache that masks have no use for, its parent, and the module of all its neurons."""
    plain = fresh(family)
    if hasattr(plain.config, "use_cache"):
        plain.config.use_cache = False
    plain.config.problem_type = "single_label_classification"
    parent = parent_of(family)
    for mask in parent.masks.site_masks():
        mask.relevance.fill_(255)
    return {"plain": plain, "parent": parent, "module": parent.extract_module(ALL)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the three models of a family, saved once."""

    @functools.cache
    def save(family):
        folder = tmp_path_factory.mktemp(family)
        for kind, model in models(family).items():
            copy.deepcopy(model).save_pretrained(folder / kind)
        return folder

    return save


def auto(family):
    return AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification


def plain_of(model):
    """The model inside a parent or module; a plain one itself."""
    return model.model if hasattr(model, "processor_files") else model


def outcome(action):
    """What an action returns, or the class of its error."""
    try:
        return action()
    except Exception as error:
        return type(error).__name__


def described(value):
    """Shapes in place of tensors, which masks change."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [described(entry) for entry in value]
    return [(name, described(entry)) for name, entry in value.items()] if hasattr(value, "items") else value


@torch.no_grad()
def run(model, given=(), **settings):
    """The outputs for inputs with padding and labels, after attributes of the configuration were set."""
    for name, value in settings.items():
        setattr(model.config, name, value)
    inputs = random_inputs(model)
    return described(model(**inputs, labels=torch.arange(len(next(iter(inputs.values())))) % 5, **dict(given)))


def written(*names):
    """Sets attributes of the configuration: what it and that of the plain model inside say then."""

    def write(model):
        for name in names:
            setattr(model.config, name, 3)
        return [(getattr(model.config, name), getattr(plain_of(model).config, name)) for name in names]

    return write


def with_gradient(model):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model.train()(**random_inputs(model)).logits.requires_grad


def checkpointing(model):
    model.gradient_checkpointing_enable()
    first = model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    return first, model.is_gradient_checkpointing


def eager(model):
    model.set_attn_implementation("eager")
    return model.config._attn_implementation, run(model, output_attentions=True)


def in_other_places(model):
    inputs = list(random_inputs(model).values())
    return model(inputs[0]).logits.shape, outcome(lambda: model(*inputs, *[None] * 40))


def copied(model):
    again = type(model.config).from_dict(model.config.to_dict())
    json.loads(model.config.to_json_string())
    changed = copy.deepcopy(model.config)
    changed.update({"hidden_size": 99})
    return again.to_dict() == model.config.to_dict(), changed == model.config, changed.hidden_size


def resized(model):
    model.resize_token_embeddings(len(model.get_input_embeddings().weight))
    found = model.resize_token_embeddings(130)
    return tuple(found.weight.shape), model.config.vocab_size, run(model)


def replaced_embeddings(model):
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    return type(model.get_input_embeddings()).__name__, model.get_output_embeddings()


# What is asked of a model; below, where the answer may differ from the plain model's, and why.
BEHAVIOURS = {
    "outputs": run,
    "tuple": lambda m: run(m, {"return_dict": False}),
    "hidden states": lambda m: run(m, {"output_hidden_states": True}),
    "tuple of all": lambda m: run(m, {"output_hidden_states": True, "output_attentions": True, "return_dict": False}),
    "hidden states by configuration": lambda m: run(m, output_hidden_states=True),
    "attentions without eager": lambda m: outcome(lambda: run(m, output_attentions=True)),
    "attentions by configuration": eager,
    "unknown argument": lambda m: outcome(lambda: run(m, {"not_an_argument": 1})),
    "arguments without names": in_other_places,
    "read": lambda m: [getattr(m.config, n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")],
    "read text": lambda m: [
        outcome(lambda n=n: getattr(m.config, n)) for n in ("vocab_size", "max_position_embeddings")
    ],
    "read image": lambda m: outcome(lambda: m.config.image_size),
    "read all": lambda m: {n: getattr(m.config, n) for n in vars(plain_of(m).config) if n[0] != "_" and n != "dtype"},
    "missing": lambda m: (hasattr(m.config, "not_there"), getattr(m.config, "not_there", 1)),
    "write": written("hidden_size", "initializer_range"),
    "labels": lambda m: (m.num_labels, m.config.num_labels, m.config.id2label, m.config.label2id),
    "text configuration": lambda m: m.config.get_text_config() is plain_of(m).config,
    "copies": copied,
    "backbone": lambda m: [type(m.base_model).__name__, *(name for name, _ in m.base_model.named_parameters())],
    "input embeddings": replaced_embeddings,
    "resized": lambda m: outcome(lambda: resized(m)),
    "position embeddings": lambda m: outcome(m.get_position_embeddings),
    "embedding parameters": lambda m: m.num_parameters() - m.num_parameters(exclude_embeddings=True),
    "footprint": lambda m: m.get_memory_footprint() - sum(t.nbytes for t in (*m.parameters(), *m.buffers())),
    "facts": lambda m: (m.device, m.dtype, m.main_input_name, m.input_modalities, m.loss_type, m.is_remote_code()),
    "dummy inputs": lambda m: described(m.dummy_inputs),
    "placement": lambda m: (m.can_generate(), sorted(m._no_split_modules), m.supports_gradient_checkpointing),
    "name": lambda m: (m.name_or_path, m.config.name_or_path),
    "precision": lambda m: [m.half().dtype, m.bfloat16().dtype, m.to(torch.float64).dtype, m.float().dtype],
    "modes": lambda m: (m.train().training, plain_of(m).training, m.eval().training, plain_of(m).training),
    "checkpointing": checkpointing,
    "gradient of the inputs": lambda m: outcome(lambda: with_gradient(m)),
    "frozen": lambda m: {p.requires_grad for p in m.requires_grad_(False).parameters()},
    "ignored in predictions": lambda m: {*getattr(m.config, "keys_to_ignore_at_inference", ["cache"])} - OURS,
    "parts by name": lambda m: [type(getattr(m, name)).__name__ for name in dict(plain_of(m).named_children())],
}
EXCEPTIONS = {
    # Mask generators have a share of the model's size: the plain model is resized before, or the module after.
    ("resized", "parent", "bert"): "ValueError",
    ("resized", "parent", "gpt2"): "ValueError",
}


@functools.cache
def answer(behaviour, family, kind):
    return outcome(lambda: BEHAVIOURS[behaviour](copy.deepcopy(models(family)[kind])))


@pytest.mark.parametrize("kind", ["parent", "module"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_model_answers_as_the_plain_one(behaviour, family, kind):
    assert answer(behaviour, family, kind) == EXCEPTIONS.get(
        (behaviour, kind, family), answer(behaviour, family, "plain")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_of_all_neurons_computes_what_the_plain_model_does(family):
    plain, module = (copy.deepcopy(models(family)[kind]) for kind in ("plain", "module"))
    inputs = random_inputs(plain)
    asked = {"output_hidden_states": True, "labels": torch.tensor([0, 1, 2, 3])}
    with torch.no_grad():
        expected, got = plain(**inputs, **asked), module(**inputs, **asked)
    assert list(got) == list(expected)
    torch.testing.assert_close(tuple(got.values()), tuple(expected.values()), atol=1e-5, rtol=1e-4)


# Arguments of from_pretrained: what the model is asked then, and the answer of a cut where it is another.
LOADING = [
    ({"output_hidden_states": True}, run),
    ({"output_attentions": True, "attn_implementation": "eager"}, run),
    (
        {"attn_implementation": "eager"},
        lambda m: (m.config._attn_implementation, plain_of(m).config._attn_implementation),
    ),
    ({"dropout": 0.3}, lambda m: sorted({p.p for p in m.modules() if isinstance(p, torch.nn.Dropout)})),
    ({"problem_type": "multi_label_classification"}, lambda m: m.config.problem_type),
    ({"id2label": OTHER, "label2id": BACK}, lambda m: (m.config.id2label, m.config.label2id)),
    ({"dtype": "bfloat16"}, lambda m: (m.dtype, m.config.dtype)),
    ({"torch_dtype": torch.float16}, lambda m: m.dtype),
    ({"device_map": "cpu"}, lambda m: m.device),
    ({"device_map": {"": "cpu"}}, lambda m: m.device),
    ({"low_cpu_mem_usage": True, "use_safetensors": True}, run),
    ({"trust_remote_code": True}, run),
    ({"output_loading_info": True}, lambda found: (described(found[1]), run(found[0]))),
    ({"variant": "none"}, run),
    ({"subfolder": "none"}, run),
    ({"not_an_option": 1}, run),
    ({"state_dict": {}}, run),
    ({"chunk_size_feed_forward": 4}, lambda m: plain_of(m).config.chunk_size_feed_forward),
]
FOR_CUTS = {"not_an_option": "ValueError"}  # names what a cut takes


@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("vit", "gpt2"))])
@pytest.mark.parametrize(("options", "behaviour"), LOADING, ids=[str([*options]) for options, _ in LOADING])
def test_options_at_loading_work_as_for_the_plain_model(saved, options, behaviour, family):
    options = {DROPOUT[family] if name == "dropout" else name: value for name, value in options.items()}

    def loaded(model_class, where, **labels):
        return outcome(lambda: behaviour(model_class.from_pretrained(saved(family) / where, **options, **labels)))

    for plain, own in ((auto(family),) * 2, (type(models(family)["plain"]), type(models(family)["parent"]))):
        expected = loaded(plain, "plain")
        assert [loaded(own, kind) for kind in ("parent", "module")] == [expected, expected]
        assert loaded(own, "parent", labels=ALL) == FOR_CUTS.get(next(iter(options)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", [{"hidden_size": 16}, {"num_hidden_layers": 1}, {"num_attention_heads": 2}], ids=str)
def test_options_that_change_the_structure_of_saved_weights_are_refused(saved, option, kind):
    where, labels = ("parent", {"labels": [0, 1]}) if kind == "cut" else (kind, {})
    with pytest.raises(ValueError, match=rf"^Got {option} for saved weights; expected .* Leave these out"):
        AutoModelForSequenceClassification.from_pretrained(saved("bert") / where, **option, **labels)
    config = AutoConfig.from_pretrained(saved("bert") / where, **option)
    with pytest.raises(ValueError, match="for saved weights"):
        AutoModelForSequenceClassification.from_pretrained(saved("bert") / where, config=config, **labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_can_be_asked_for_at_loading_and_afterwards(saved, kind):
    where, labels = ("parent", {"labels": ALL}) if kind == "cut" else (kind, {})
    for family in FAMILIES:  # where the plain model of some fails: its own parts then return tuples too
        loaded = auto(family).from_pretrained(saved(family) / where, return_dict=False, **labels)
        assert run(loaded) == [(), (4, 5)]
        loaded.config.return_dict = True
        assert [name for name, _ in run(loaded)] == ["loss", "logits"]
    loaded.config.return_dict = False
    if loaded.is_parent:  # everything of our own reads outputs by name
        loaded = loaded.extract_module(ALL)
    assert loaded.config.return_dict is False
    assert loaded.config.equivalence["status"] in ("verified", "unverified")


@pytest.mark.parametrize("kind", ["parent", "module"])
def test_a_configuration_is_taken_as_an_object_or_from_another_place(saved, tmp_path, kind):
    folder = saved("bert") / kind
    config = NeMoModelConfig.from_pretrained(folder, hidden_dropout_prob=0.3, output_hidden_states=True)
    config.save_pretrained(tmp_path)
    for given in (config, tmp_path, str(tmp_path / "config.json")):
        model = AutoModelForSequenceClassification if given is config else type(models("bert")[kind])
        loaded = model.from_pretrained(folder, config=given)
        assert loaded.config.hidden_dropout_prob == loaded.model.config.hidden_dropout_prob == 0.3
        assert [name for name, _ in run(loaded)] == ["loss", "logits", "hidden_states"]
    with pytest.raises(TypeError, match=r"^Got a BertConfig as config; expected a NeMoModelConfig"):
        type(loaded).from_pretrained(folder, config=loaded.model.config)


def test_fields_of_our_own_and_wrong_values_are_refused_by_the_configuration(saved):
    folder = saved("bert") / "parent"
    for options in ({"round_to": 8}, {"role": "module"}, {"threshold": 0.5}, {"labels": [0], "sites": []}):
        with pytest.raises(ValueError, match=r"for a saved configuration; expected no fields of NeMoModelConfig"):
            NeMoModelConfig.from_pretrained(folder, **options)
    assert NeMoModelConfig.from_pretrained(folder, labels=[0], round_to=8).round_to is None  # as a pipeline asks
    for wrong in ({"hidden_dropout_prob": "much"}, {"pad_token_id": "none"}):
        with pytest.raises(Exception, match=f"'{next(iter(wrong))}'") as raised:
            NeMoModelConfig.from_pretrained(folder, **wrong)
        assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "masks": "cpu"}], ids=str)
def test_a_cut_goes_to_one_device(saved, device_map):
    with pytest.raises(ValueError, match=r"^Got device_map=.* with labels; expected one device"):
        auto("bert").from_pretrained(saved("bert") / "parent", labels=[0], device_map=device_map)


@pytest.mark.parametrize("kind", ["parent", "module"])
def test_what_is_set_on_the_configuration_is_saved_and_comes_back(saved, tmp_path, kind):
    changed = {"pad_token_id": 3, "output_hidden_states": True, "attn_pdrop": 0.7, "own": [1]}
    model = auto("gpt2").from_pretrained(saved("gpt2") / kind)
    for name, value in changed.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "one")
    loaded = auto("gpt2").from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()
    assert {name: getattr(loaded.config, name) for name in changed} == changed
    assert loaded.config.base_config is loaded.model.config
    assert loaded.config == copy.deepcopy(loaded.config)
    untouched = auto("gpt2").from_pretrained(saved("gpt2") / kind)
    untouched.save_pretrained(tmp_path / "three")
    assert (tmp_path / "three/config.json").read_bytes() == (saved("gpt2") / kind / "config.json").read_bytes()


def test_a_padding_token_set_afterwards_counts_in_parents_modules_and_composed_models():
    plain, parent = fresh("gpt2"), parent_of("gpt2", static_evaluation=False)
    module, other = parent.extract_module([0, 1]), parent.extract_module([2])
    joint = compose([module, other])
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    for model in (plain, parent, module, joint):
        plain_config = plain_of(getattr(model, "parts", [model])[0]).config
        plain_config.pad_token_id = None
    for model in (plain, parent, module, joint):
        with pytest.raises(ValueError, match="no padding token"):
            model(tokens)
        model.config.pad_token_id = 0
        padded, alone = model(tokens).logits[0], model(tokens[:1, :3]).logits[0]
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
        if model is module:  # shared with the joint model
            model.config.pad_token_id = None


# Labels


RENAMED = {
    "id2label": {"id2label": OTHER},
    "label2id": {"label2id": BACK},
    "both": {"id2label": OTHER, "label2id": BACK},
}


@pytest.mark.parametrize("changes", RENAMED.values(), ids=RENAMED)
def test_renamed_labels_of_a_parent_go_wherever_labels_go(changes, tmp_path):
    parent = parent_of("bert")
    for name, value in changes.items():
        setattr(parent.config, name, dict(value))
    module = parent.extract_module(["b", "a"])
    parent.save_pretrained(tmp_path / "parent")
    loaded = auto("bert").from_pretrained(tmp_path / "parent")
    cut = auto("bert").from_pretrained(tmp_path / "parent", labels=["b", "a"])
    module.save_plain(tmp_path / "plain")
    exported = auto("bert").from_pretrained(tmp_path / "plain")
    for found in (module, cut, exported):
        assert (found.config.id2label, found.config.label2id) == ({0: "b", 1: "a"}, {"b": 0, "a": 1})
    assert parent.config.groups == loaded.config.groups == {name: [index] for name, index in BACK.items()}
    for plain in (parent.detach_masks(), loaded.detach_masks()):
        assert (plain.config.id2label, plain.config.label2id) == (OTHER, BACK)


def test_labels_renamed_on_modules_and_composed_models_are_saved(tmp_path):
    parent = parent_of("bert")
    module = parent.extract_module([3, 1])
    module.config.id2label = {0: "x", 1: "y"}
    module.save_pretrained(tmp_path / "module")
    assert auto("bert").from_pretrained(tmp_path / "module").config.label2id == {"x": 0, "y": 1}
    joint = compose([module, parent.extract_module([0])], labels=["y", "cat", "x"])
    joint.config.id2label = {0: "1", 1: "2", 2: "3"}
    joint.save_pretrained(tmp_path / "joint")
    loaded = auto("bert").from_pretrained(tmp_path / "joint")
    assert (loaded.config.id2label, loaded.config.label2id) == ({0: "1", 1: "2", 2: "3"}, {"1": 0, "2": 1, "3": 2})
    assert [part.config.id2label for part in loaded.parts] == [{0: "3", 1: "1"}, {0: "2"}]


WRONG_LABELS = {
    "too few": {"id2label": {0: "a", 1: "b"}},
    "other ids": {"id2label": {index + 1: name for index, name in OTHER.items()}},
    "number": {"num_labels": 3},
    "contradiction": {"id2label": OTHER, "label2id": {**BACK, "a": 1, "b": 0}},
}


@pytest.mark.parametrize("changes", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_do_not_fit_are_refused_where_they_are_used(changes, tmp_path):
    parent = parent_of("bert")
    config, hooks = copy.deepcopy(parent.config), hooks_of(parent)
    for name, value in changes.items():
        if name == "id2label" and 5 in value:
            with pytest.raises(Exception, match="from 0 on"):
                setattr(parent.config, name, value)
            return
        setattr(parent.config, name, value)
    for use in (lambda: parent.extract_module([0]), lambda: parent.save_pretrained(tmp_path), parent.detach_masks):
        with pytest.raises(ValueError, match=r"^Got (labels with the ids .*; expected 0 to 4|label2id=)"):
            use()
    assert not any(tmp_path.iterdir())
    assert hooks_of(parent) == hooks  # not half detached
    parent.config.id2label, parent.config.label2id = config.id2label, config.label2id
    assert parent.extract_module(["dog"]).config.names == {0: "dog"}


# The head alone


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_the_base_trains_the_head_alone_as_on_the_plain_model(family, tmp_path):
    data = image_samples(16) if family == "vit" else text_samples(16)
    moved = {}
    for kind in ("plain", "module"):
        model = copy.deepcopy(models(family)[kind])
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
        before = {name: parameter.detach().clone() for name, parameter in plain_of(model).named_parameters()}
        args = {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        Trainer(model, TrainingArguments(str(tmp_path), save_strategy="no", **args), train_dataset=data).train()
        after = dict(plain_of(model).named_parameters())
        moved[kind] = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved["module"] == moved["plain"] != set()
    parent = copy.deepcopy(models(family)["parent"])
    names = {f"model.{name}" for name in moved["plain"]}
    base = {id(parameter) for parameter in parent.base_model.parameters()}
    others = {name for name, parameter in parent.named_parameters() if id(parameter) not in base}
    assert others == names | {name for name, _ in parent.named_parameters() if name.startswith("masks.")}


# Masks


@pytest.mark.parametrize("method", ["__init__", "to", "attach"])
def test_a_parent_that_cannot_be_built_leaves_the_plain_model_as_it_was(monkeypatch, method):
    plain = fresh("gpt2")
    plain.config.use_cache = True
    before = plain.config.to_dict()

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(NeuronMasks, method, fail)
    with pytest.raises(MemoryError, match="no room"):
        attach_masks(plain, generated())
    assert plain.config.to_dict() == before
    assert hooks_of(plain) == 0


def test_arguments_of_masks_are_refused_where_there_are_none():
    parent = parent_of("bert")
    module, inputs = parent.extract_module([0, 1]), random_inputs(parent)
    chosen = torch.ones(4, dtype=torch.bool)
    for options in ({"static_samples": chosen}, {"output_neuron_masks": True}, {"static_masks": {}}):
        for model in (module, compose([module, parent.extract_module([2])])):
            with pytest.raises(ValueError, match=r"^Got a module; expected a parent"):
                model(**inputs, **options)
    with pytest.raises(ValueError, match=r"^Got static_samples without static_masks"):
        parent(**inputs, static_samples=chosen)


# Composed models


def test_composed_models_refuse_what_only_one_model_can_answer(caplog, tmp_path):
    parent = parent_of("bert")
    with caplog.at_level(logging.ERROR):
        joint = compose([parent.extract_module([0, 1]), parent.extract_module([2])])
    inputs = random_inputs(parent)
    labels = torch.tensor([0, 1, 2, 0])
    assert described(joint(**inputs, labels=labels, return_dict=False)) == [(), (4, 3)]
    assert described(joint(next(iter(inputs.values()))))[0][0] == "logits"
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=rf"^Got {name} for several modules; expected none"):
            joint(**inputs, **{name: True})
    joint.config.output_hidden_states = True
    with pytest.raises(ValueError, match="for several modules"):
        joint(**inputs)
    joint.config.output_hidden_states, joint.config.return_dict = False, False
    joint.save_pretrained(tmp_path)
    loaded = auto("bert").from_pretrained(tmp_path, device_map="cpu", dtype="bfloat16")
    assert (type(loaded(**inputs)), loaded.dtype) == (tuple, torch.bfloat16)


def test_exports_are_of_what_was_set(tmp_path):
    module = copy.deepcopy(models("gpt2")["module"])
    module.config.pad_token_id, module.config.output_hidden_states, module.config.return_dict = 4, True, False
    module.save_plain(tmp_path)
    plain = auto("gpt2").from_pretrained(tmp_path)
    assert (plain.config.pad_token_id, plain.config.output_hidden_states) == (4, True)
    parent = make_parent(plain, generated())
    assert (parent.config.pad_token_id, parent.config.output_hidden_states) == (4, True)


@pytest.mark.parametrize("place", ["id2label", "label2id"])
def test_labels_renamed_in_one_place_of_a_file_are_renamed_in_all(place, tmp_path):
    parent_of("vit").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    names = {int(index): name for index, name in data["id2label"].items()} | {3: "boat"}
    data[place] = names if place == "id2label" else {name: index for index, name in names.items()}
    path.write_text(json.dumps(data))
    loaded = NeMoForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == loaded.model.config.id2label == names
    assert loaded.config.label2id == {name: index for index, name in names.items()}
    loaded.save_pretrained(tmp_path)
    assert NeMoForImageClassification.from_pretrained(tmp_path, labels=["boat"]).config.id2label == {0: "boat"}
