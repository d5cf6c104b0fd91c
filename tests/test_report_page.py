"""The page about a model: what it holds, that it is text whatever the words are, and the sizes that its picker says."""

import base64
import copy
import functools
import hashlib
import itertools
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
import torch
from conftest import LABELS, fresh, generated, parent_of, randomize_relevance
from hypothesis import given, settings
from stage import stage as stage
from stage import template as template
from test_card_escapes import FUZZING, SLOW, WORDS

from nemo_hf import NeMoConfig, compose, extract_module, make_parent, write_report_page
from nemo_hf.cli import main
from nemo_hf.evaluation.controls import CUTS, ModuleAnswers, measure_answers, rejection_curve
from nemo_hf.hub.page_charts import ticks
from nemo_hf.hub.page_facts import MOST_SHOWN, Measured, chosen_labels, label_words, page_facts, shown_source
from nemo_hf.hub.publish import CardOptions, write_companions
from nemo_hf.hub.report_page import page_words, render_page
from nemo_hf.models.base import base_parameters
from nemo_hf.models.extraction import make_plan
from nemo_hf.neurons.sites import AttentionSite, with_pruning_modes
from nemo_hf.pruning.layer_cuts import site_cut
from nemo_hf.pruning.size_table import full_widths, parameters_at, size_table

LARGEST_PAGE = 1_000_000  # bytes
HOSTILE = ["</script><script>alert(1)</script>", '\'; rm -rf "$HOME"', "\u202egnp.exe", "<!--", "cat+dog"]


def page_of(model, measured=None, origin=None, /, **words):
    is_module = getattr(model.config, "role", None) == "module"
    source = origin if is_module else model
    return render_page(page_facts(model, source, measured or Measured(), page_words(model, source, words)))


class Elements(HTMLParser):
    """Elements and texts of a page as a browser finds them."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self.open = [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def with_labels(count, groups=None):
    """A parent of many labels, with a random relevance."""
    plain = fresh("bert")
    plain.classifier = torch.nn.Linear(32, count)
    plain.config.num_labels = count
    names = [f"label number {index}" for index in range(count)]
    members = {f"group {i}": [n for j, n in enumerate(names) if j % groups == i] for i in range(groups or 0)}
    options = NeMoConfig(masks="assigned", plain_ratio=0.5, label_groups=members or None)
    parent = make_parent(named(plain, names), options).eval()
    generator = torch.Generator().manual_seed(0)
    for mask in parent.masks.site_masks():
        mask.relevance.copy_(torch.randint(0, 256, mask.relevance.shape, generator=generator, dtype=torch.uint8))
    parent.config.relevance_source = "exact"
    return parent


def widths_of(parent, labels):
    """The widths of a module by the plan of its cut."""
    keep, widths, first = make_plan(parent, labels).keep, {0: len(labels)}, 1
    for site in parent.sites:
        cut = site_cut(site, keep[site.key]).widths
        if site.cut_by.is_scattered:
            values = [len(keep[site.key][part]) for part in site.parts]
        elif isinstance(site, AttentionSite):
            values = [cut["key_value_heads"] * cut["head_dim"], cut["key_value_heads"]]
        else:
            values = list(cut.values())
        widths |= {first + place: value for place, value in enumerate(values)}
        first += max(2, len(values))
    return widths


def test_the_size_table_gives_the_parameters_of_the_module_and_of_the_whole(family):
    parent = parent_of(family)
    table = size_table(parent.model, parent.sites, parent.heads, len(LABELS))
    assert parameters_at(table, full_widths(parent.sites, len(LABELS))) == base_parameters(parent)
    for labels in (["cat"], ["dog", "ship", "frog"]):
        module = parent.extract_module(labels)
        assert parameters_at(table, widths_of(parent, labels)) == base_parameters(module) < base_parameters(parent)


@pytest.mark.parametrize("mode", ["scatter", "scatter-gated", "dense-heads-kept"])
def test_the_size_table_holds_in_every_pruning_mode(mode):
    parent = parent_of("bert")
    possible = [site.key for site in parent.sites if mode in {each.name for each in site.pruning_modes}]
    parent.set_sites(with_pruning_modes(parent.sites, dict.fromkeys(possible, mode)))
    table = size_table(parent.model, parent.sites, parent.heads, len(LABELS))
    module = parent.extract_module(["cat", "car"])
    assert parameters_at(table, widths_of(parent, ["cat", "car"])) == base_parameters(module)


@pytest.mark.parametrize(("family", "retention"), [("bert", 0.5), ("vit", 0.2)])
def test_the_size_for_a_retention_is_that_of_the_cut_or_a_little_more(family, retention):
    plain = fresh(family)
    about = data_of(page_of(plain))["samples"]
    told = about["rest"] + 2 * about["per_label"] + retention * about["weights"]
    inputs = (
        {"input_ids": torch.randint(3, 100, (24, 9))}
        if family == "bert"
        else {"pixel_values": torch.rand(24, 3, 16, 16)}
    )
    module = extract_module(plain, [0, 1], [inputs], retention, reconstruct=False, show_progress=False)
    assert 0.85 * told <= base_parameters(module) <= told


def test_every_kind_of_model_has_a_page_that_says_what_it_lacks():
    parent = parent_of("vit")
    module = parent.extract_module(["cat", "dog"])
    texts = {"parent": page_of(parent), "plain": page_of(fresh("vit")), "module": page_of(module)}
    for kind, page in texts.items():
        elements = Elements(page)
        assert "Not measured" in elements.texts["h2"], kind
        assert any("--dataset" in text for text in elements.texts["code"]), kind
        assert "NaN" not in page
        ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
        assert len(ids) == len(set(ids))
        levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert 'id="picker"' not in texts["module"]
    assert 'id="picker"' in page_of(module, None, parent)
    assert 'id="overlap"' in texts["parent"]
    assert 'id="overlap"' not in texts["plain"]


def test_nothing_is_loaded_and_only_the_page_s_own_script_may_run():
    page = page_of(parent_of("vit"))
    elements = Elements(page)
    sources = [a for _, attributes in elements.found for a in attributes if a in ("src", "srcset", "data", "action")]
    links = [attributes["href"] for _, attributes in elements.found if "href" in attributes]
    assert sources == []
    assert all(link.startswith("#") for link in links)
    assert not [a for _, attributes in elements.found for a in attributes if a.startswith("on") or a == "style"]
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert not re.search("unsafe|http", policy)
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|url\(|@import|//cdn", page)


def tags_of(page):
    return [(tag, sorted(attributes)) for tag, attributes in Elements(page).found if tag != "wbr"]  # one a point


@functools.cache
def some_facts():
    """Facts of a module with answers."""
    parent = make_parent(fresh("vit"), NeMoConfig(masks="static"))
    module = parent.extract_module([0, 1])
    answers = ModuleAnswers({}, 2, [[1, 0], [1, 0]])
    return page_facts(module, parent, Measured(module, answers), page_words(module, parent, {}))


def words_page(label, text):
    """A page that shows a label and a text wherever it shows any."""
    facts = copy.deepcopy(some_facts())
    facts["module"]["labels"] = facts["confusion"]["labels"] = facts["labels"] = [label, "b"]
    facts["module"]["layers"] = [[text, 0.2, 0.1]]
    facts["module"]["extraction"] = {"distance": 0.1, "cut_distance": 0.2, "refused": text}
    report = {"accuracy": 0.5, "parent_restricted_accuracy": 0.6, "samples": 2, "device": text, "latency_note": text}
    facts["report"] = {**report, "latency_ms": {"1": 1.0}, "parent_latency_ms": {"1": 2.0}}
    facts["about"] |= {"dataset": text, "split": text, "seed": 0, "cut_samples": [3, 1000], "is_example": True}
    facts["title"] = facts["base_class"] = text
    facts["neurons"] = {"columns": [0, text], "groups": [label], "sites": [[text, text, 4]], "rows": [[0.5, 1.0]]}
    facts["overlap"] = {"groups": [label, text], "indices": [[1.0, 0.5], [0.5, 1.0]]}
    facts["picker"] |= {"names": [label, text], "source": text, "note": text}
    return render_page(facts)


@settings(max_examples=25, suppress_health_check=SLOW, **FUZZING)
@given(WORDS, WORDS)
def test_whatever_the_words_are_they_are_text(label, text):
    page, plain = words_page(label, f"x{text}"), words_page("a", "b")
    assert tags_of(page) == tags_of(plain)
    assert data_of(page)["names"] == [label, f"x{text}"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)


@pytest.mark.parametrize("names", [HOSTILE, ["3", "1", "", "\n", "-x"], ["a", "a", "b", "c", "d"]])
def test_labels_of_any_name_stay_data_and_their_words_cut_what_they_name(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent = make_parent(named(fresh("vit"), names), generated()).eval()
    randomize_relevance(parent)
    parent.save_pretrained("parent")
    page = page_of(parent, model="parent")
    assert page.count("<script") == 2
    data = data_of(page)
    assert data["names"] == names
    tried = [(index, word) for index, word in enumerate(data["words"]) if word is not None]
    assert len(tried) >= 3
    for index, word in tried:
        line = f"{data['samples']['command']} {word} --output-dir {data['output']}"
        program, *words = shlex.split(line)
        assert program == "nemo-hf"
        assert main(words) == 0
        assert json.loads((tmp_path / "cut-module/config.json").read_text())["label_ids"] == [index]


def test_a_label_that_no_word_means_alone_has_none():
    assert label_words({0: "1", 1: "\n", 2: "b", 3: "b"}, {}) == ["1", None, "2", "3"]
    assert label_words({0: "a", 1: "b"}, {"a": [0, 1]}) == ["0", "b"]


@pytest.mark.parametrize(("word", "shown"), [
    ("me/cat-dog", ("me/cat-dog", False)), ("out/parent", ("out/parent", False)),
    ("/srv/secret/parent", ("parent", True)), ("~/x/parent", ("parent", True)), (r"C:\Users\me\p", ("p", True)),
])  # fmt: skip
def test_folders_of_this_machine_are_left_out(word, shown):
    assert shown_source(word) == shown


def test_a_page_holds_no_path_and_no_token(tmp_path):
    parent = parent_of("vit")
    data = ["--dataset", str(tmp_path / "data"), "--label-column", "hf_abcdefghijklmnopqrst"]
    page = page_of(parent, model=str(tmp_path / "parent"), cut=data, dataset=str(tmp_path / "data"))
    assert str(tmp_path) not in page
    assert "hf_abc" not in page
    assert data_of(page)["samples"]["options"] == "--dataset data --label-column TOKEN"
    assert "Folders above are left out" in page


@pytest.mark.parametrize(("count", "groups"), [(150, 10), (150, None), (1000, None)])
def test_many_labels_stay_below_a_megabyte_and_are_summed_up(count, groups):
    parent = with_labels(count, groups)
    module = parent.extract_module(list(range(40)))
    generator = torch.Generator().manual_seed(0)
    confusion = torch.randint(0, 9, (40, 40), generator=generator).tolist()
    page = page_of(parent, Measured(module, ModuleAnswers({"module": 0.5}, 9, confusion)))
    assert len(page.encode()) < LARGEST_PAGE
    assert len(data_of(page)["names"]) == count
    assert "The most frequent mistakes" in page
    assert ("The pairs with most in common" in page) == ((groups or count) > MOST_SHOWN)
    widest = max(row.count("<t") for row in page.split("<tr"))
    assert widest <= MOST_SHOWN + 8


def test_the_rejection_curve_is_the_shares_of_samples_on_each_side():
    energies, is_own = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([True, True, False, True])
    found = rejection_curve(energies, is_own)
    assert found["auroc"] == pytest.approx(2 / 3)
    for threshold, own, other in found["curve"]:
        assert own == pytest.approx(sum(e >= threshold for e in (3.0, 2.0, 0.5)) / 3)
        assert other == float(threshold > 1.0)
    assert rejection_curve(energies, torch.ones(4, dtype=torch.bool)) == {}


@pytest.mark.parametrize(("count", "groups", "expected"), [
    (5, None, [0, 1]), (12, None, [0, 1, 2, 3, 4]), (150, None, range(15)), (400, None, range(16)),
    (150, 10, range(0, 150, 10)),
])  # fmt: skip
def test_a_page_for_no_labels_in_particular_is_about_some(count, groups, expected):
    parent = with_labels(count, groups)
    assert chosen_labels(parent) == list(expected)
    if groups is None:
        assert chosen_labels(parent.detach_masks()) == list(expected)


def test_answers_are_counted_as_a_naive_loop_counts_them():
    parent = parent_of("vit")
    module = parent.extract_module(["ship", "cat"])
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(30, 3, 16, 16, generator=generator), torch.randint(0, 5, (30,), generator=generator)
    batches = [
        {"pixel_values": pixels[:20], "labels": labels[:20]},
        {"pixel_values": pixels[20:], "labels": labels[20:]},
    ]
    found = measure_answers(module, {"same": module.model}, batches)
    counts = [[0, 0], [0, 0]]
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        if label in (3, 0):
            counts[[3, 0].index(label)][int(module.own_logits(pixel_values=pixel[None]).argmax())] += 1
    assert found.confusion == counts
    right = (counts[0][0] + counts[1][1]) / found.samples
    assert found.accuracies == pytest.approx({"module": right, "same": right})


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.3, 0.9, [0.4, 0.6, 0.8])])
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


@pytest.mark.slow
def test_the_command_measures_a_plain_model_and_a_module_of_it(stage, capsys):
    vit, data = "google/vit-base-patch16-224-in21k", "--dataset org/animals --batch-size 8 --samples 10"
    there = data.replace("org", f"{stage}/org")
    assert main(f"report {vit} --output out/plain.html {there} --labels cat+dog car --retention 0.5 0.2".split()) == 0
    page = (stage / "out/plain.html").read_text()
    assert {"accuracy", "picker", "mistakes", "rejection", "errors", "latency"} <= set(
        re.findall(r'<section id="(\w+)"', page)
    )
    assert "A module of 3 of 5 labels takes" in page
    assert re.search(r"Modules and controls are cut on \d+( to \d+)? other samples each", page)
    assert "They are an example" not in page
    assert "labels of animals (" in page
    err = capsys.readouterr().err
    assert [f"Cutting {kind}" in err for kind in CUTS.values()] == [True] * 4
    assert "Answers" in err
    cut = "--dataset org/animals --retention 0.5 --output-dir m"
    assert main(f"cut {vit} --labels cat dog {cut}".split()) == 0
    assert main(f"report m --parent {vit} --output m.html {data} --retention 0.3".split()) == 0
    assert 'class="mark"' in (stage / "m.html").read_text()
    assert main(f"report m --output alone.html {data}".split()) == 0
    sections = re.findall(r'<section id="(\w+)"', (stage / "alone.html").read_text())
    assert sections == ["accuracy", "neurons", "mistakes", "rejection", "errors", "unknown"]
    assert "are cut on" not in (stage / "alone.html").read_text()
    data = data_of((stage / "m.html").read_text())
    line = (
        f"{data['samples']['command']} {data['words'][0]} {data['samples']['options']} --retention 0.3 --output-dir x"
    )
    assert main(shlex.split(line)[1:]) == 0
    assert "kB" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    ("report parent --output parent", "which is a directory; expected a file"),
    ("report parent --output x.html --labels cat", "Got --labels without --dataset"),
    ("report parent --output x.html --parent parent", "Got an origin of a model that is no module"),
    ("report cat-dog --output x.html --dataset org/animals --labels cat", "Got --labels for a module; expected none"),
    ("report cat-dog --output x.html --parent parent --dataset org/animals --labels cat", "Got --labels for a module"),
    ("report cat-dog --output x.html --dataset org/animals --retention 0.5", "Got --retention for a module alone"),
    ("report cat-dog --output x.html --parent google-bert/bert-base-uncased", "Got an origin of another class"),
    ("report parent --output x.html --dataset org/animals --labels cta", "Did you mean 'cat'?"),
    ("report ./nothing --output x.html", "no directory and no name"),
    ("push --parent parent --namespace me --modules cat --report-page x.html", "Got one --report-page for several"),
])  # fmt: skip
def test_wrong_input_ends_in_one_line_and_leaves_nothing(words, message, stage, capsys):
    assert main(words.split()) == 2
    assert [message in line for line in capsys.readouterr().err.splitlines()] == [True]
    assert not (stage / "x.html").exists()


def test_models_without_a_page_are_refused(tmp_path):
    parent = parent_of("vit")
    modules = [parent.extract_module(["cat"]), parent.extract_module(["dog"])]
    with pytest.raises(TypeError, match="Write a page for each of its modules"):
        write_report_page(compose(modules), tmp_path / "x.html")
    for alone, message in (({"batches": []}, "no module"), ({"calibration": []}, "without labelled batches")):
        with pytest.raises(ValueError, match=message):
            write_report_page(parent, tmp_path / "x.html", **alone)
    with pytest.raises(ValueError, match="Pass origin="):
        write_report_page(modules[0], tmp_path / "x.html", calibration=[])
    assert list(tmp_path.iterdir()) == []


def test_the_card_links_a_page_that_is_there_or_asked_for(tmp_path):
    parent = parent_of("vit")
    module = parent.extract_module(["cat", "dog"])
    module.save_pretrained(tmp_path)
    facts = write_companions(module, tmp_path, "me/x", CardOptions(), None)
    assert facts.page is None
    assert list(tmp_path.glob("*.html")) == []
    for options in (CardOptions(report_page=True), CardOptions()):  # the second finds that of the first
        assert write_companions(module, tmp_path, "me/x", options, None).page == "report.html"
        assert (tmp_path / "README.md").read_text().count("(report.html)") == 1
        assert "me/x" in (tmp_path / "report.html").read_text()
    (tmp_path / "mine.html").write_text("<p>mine")
    write_companions(module, tmp_path, "me/x", CardOptions(report_page=tmp_path / "mine.html"), None)
    assert (tmp_path / "report.html").read_text() == "<p>mine"
