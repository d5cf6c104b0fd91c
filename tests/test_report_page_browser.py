"""The page in a real browser: sizes and commands of its picker, keyboard, themes, contrast, no network, no error."""

import json
import shlex
import shutil
from contextlib import contextmanager

import pytest
from conftest import fresh, generated, parent_of, randomize_relevance
from test_report_page import HOSTILE, data_of, named, page_of, with_labels

from nemo_hf import make_parent
from nemo_hf.cli import main
from nemo_hf.evaluation.controls import ModuleAnswers
from nemo_hf.hub.page_facts import Measured
from nemo_hf.models.base import base_parameters
from nemo_hf.neurons.sites import with_pruning_modes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CONTRAST = 4.5  # of text, as WCAG 2 asks for; of lines in charts 3
LOW_CONTRAST = """(least) => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const pixel = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => pixel(color).slice(0, 3).map((each) => each / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (pixel(color)[3] === 255) return color;
    }
    return "white";
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  let seen = 0;
  const look = (element, color, needed) => {
    const value = ratio(color, behind(element));
    seen += 1;
    if (value < needed) found.push([element.tagName, element.className, element.textContent.slice(0, 30), value]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    look(element, element.closest("svg") ? style.fill : style.color, least);
  }
  document.querySelectorAll(".line").forEach((line) => look(line, getComputedStyle(line).stroke, 3));
  return [seen, found];
}"""
FOCUSED = "(document.activeElement.id || document.activeElement.name || document.activeElement.className)"
NAMED = "input, button, select, a, pre[tabindex], [role=region]"
WITHOUT_A_NAME = """(named) => [...document.querySelectorAll(named)].filter((e) =>
  !(e.labels && [...e.labels].some((label) => label.textContent.trim())) && !e.textContent.trim()
  && !e.getAttribute("aria-label")).map((e) => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (path := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip(f"none of {BROWSERS} is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield started
        started.close()


@contextmanager
def opened(browser, directory, text, **options):
    """A page in the browser; at the end it must have loaded nothing, and nothing may have gone wrong."""
    path = directory / "report.html"
    path.write_text(text, encoding="utf-8")
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    assert problems == []
    context.close()


def choose(page, *names):
    page.locator("#clear").click()
    for name in names:
        page.get_by_label(name, exact=True).check()


def measured(count=3):
    """A parent with all sections measured but times."""
    parent = parent_of("vit")
    module = parent.extract_module(["cat", "dog", "car"][:count])
    curve = [[0.0, 1.0, 0.0], [1.0, 0.9, 0.8], [2.0, 0.1, 1.0]]
    rejection = {"auroc": 0.9, "own": 9, "other": 9, "curve": curve}
    answers = ModuleAnswers({"module": 0.9}, 9, [[3, 0, 0], [1, 2, 0], [0, 1, 2]], rejection)
    kinds = {"restricted": 0.95, "accuracy": 0.9, "raw": 0.6, "random": 0.4, "other": 0.3}
    points = [{"retention": 0.2 / (1 + place), "megabytes": 0.2 / (1 + place), **kinds} for place in range(3)]
    errors = {"layers": {"vit.layers.0.mlp.fc2": [0.3, 0.1]}, "distance": 0.1, "cut_distance": 0.5}
    numbers = dict.fromkeys(("samples", "bytes", "source_bytes", "weights", "neurons", "seconds"), 1)
    module.config.extraction = {"scores": "activity", **numbers, **errors}
    return page_of(parent, Measured(module, answers, points, 1, {"dataset": "org/data", "seed": 0}), model="parent")


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama", "swin", "bert scatter", "bert dense-heads-kept"])
def test_the_picker_tells_the_exact_size_of_a_module(browser, tmp_path, family):
    name, _, mode = family.partition(" ")
    parent = parent_of(name)
    if mode:
        fitting = [site.key for site in parent.sites if mode in {each.name for each in site.pruning_modes}]
        parent.set_sites(with_pruning_modes(parent.sites, dict.fromkeys(fitting, mode)))
    with opened(browser, tmp_path, page_of(parent)) as page:
        for labels in (["cat"], ["dog", "ship"], ["cat", "dog", "frog"]):
            module = parent.extract_module(labels)
            choose(page, *labels)
            shown = page.locator("#detail").inner_text()
            assert shown.startswith(f"{base_parameters(module):,} parameters exactly")
            assert f"with {100 * module.config.retained_neurons:.1f}% of the neurons" in shown


def test_clicks_choose_labels_groups_and_ways_and_the_command_cuts_them(browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent = with_labels(6, groups=2)
    parent.save_pretrained("parent")
    with opened(browser, tmp_path, page_of(parent, model="parent")) as page:
        command = page.locator("#command")
        assert page.locator("#count").inner_text() == "3 of 6 chosen"  # the first group, to start with
        assert "--labels 'group 0' --output-dir" in command.inner_text()
        choose(page, "label number 1", "label number 3")
        assert page.locator(".whole input").nth(1).evaluate("box => box.indeterminate")
        page.get_by_label("label number 5", exact=True).check()
        page.get_by_label("label number 2", exact=True).check()
        assert command.inner_text().count("--labels") == 1
        words = shlex.split(command.inner_text())
        assert words[4:-2] == ["group 1", "label number 2"]
        assert main(words[1:]) == 0
        saved = json.loads((tmp_path / "cut-module/config.json").read_text())
        assert sorted(saved["label_ids"]) == [1, 2, 3, 5]
        page.locator("#search").fill("number 4")
        assert page.locator("#choices input:visible").count() == 2  # the label and its group
        assert page.locator("#hits").inner_text() == "1 of 6 labels match"
        page.locator("#search").fill("")
        page.get_by_label("on samples, to a size").check()
        page.locator("#share").fill("0.35")
        page.locator("#vocabulary").check()
        assert command.inner_text().endswith(
            "--dataset DATA --retention 0.35 --vocabulary shared --output-dir cut-module"
        )
        assert "Put your own samples in place of DATA." in page.locator("#detail").inner_text()
        page.locator("#copy").click()
        assert page.locator("#copied:not(:empty)").inner_text() in ("Copied.", "Selected: copy it with Ctrl+C or ⌘C.")
        page.locator("#clear").click()
        assert page.locator("#detail").inner_text() == "Choose one label or more."
        assert not page.locator("#command").is_visible()


def test_labels_of_any_name_are_text_and_their_command_names_them(browser, tmp_path):
    parent = make_parent(named(fresh("vit"), HOSTILE), generated()).eval()
    randomize_relevance(parent)
    with opened(browser, tmp_path, page_of(parent, model="parent")) as page:
        boxes = page.locator("#choices input")
        for place, name in enumerate(HOSTILE):
            page.locator("#clear").click()
            boxes.nth(place).check()
            words = shlex.split(page.locator("#command").inner_text())
            assert words[:4] == ["nemo-hf", "cut", "parent", "--labels"]
            assert words[4:5] in ([name], [str(place)])
        assert page.locator("#choices bdi").first.inner_text() == HOSTILE[0]


def test_the_keyboard_alone_reaches_and_changes_everything(browser, tmp_path):
    with opened(browser, tmp_path, measured()) as page:
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "skip"
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "theme"
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert float(outline.removesuffix("px")) >= 2
        page.keyboard.press("Enter")
        assert page.locator("#theme").inner_text() == "Theme: light"
        page.locator("#search").focus()
        page.keyboard.type("ship")
        for _ in range(5):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.type") == "checkbox":
                break
        before = page.locator("#count").inner_text()
        page.keyboard.press("Space")
        assert page.locator("#count").inner_text() != before
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "mode"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "share"
        page.keyboard.press("ArrowRight")
        assert page.locator("#share-value").inner_text() == "21%"
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == "copy"
        page.keyboard.press("Enter")
        assert page.locator("#copied:not(:empty)").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_themes(browser, tmp_path, scheme):
    with opened(browser, tmp_path, measured(), color_scheme=scheme) as page:
        for _ in range(3):  # automatic, light, dark
            seen, low = page.evaluate(LOW_CONTRAST, CONTRAST)
            assert low == []
            assert seen > 150
            page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: automatic"
        shades = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") not in shades


def test_all_that_can_be_used_has_a_name_and_tables_have_headings(browser, tmp_path):
    with opened(browser, tmp_path, measured()) as page:
        assert page.evaluate(WITHOUT_A_NAME, NAMED) == []
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])").count() == 0
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("svg[role=img]").count() == 2
        for chart in page.locator("svg[role=img]").all():
            assert all(len(text) > 10 for text in chart.locator("> title, > desc").all_text_contents())
        assert page.locator("[aria-live=polite]").count() == 1


def test_a_narrow_screen_has_no_sideways_scroll_and_print_has_no_controls(browser, tmp_path):
    size = {"width": 360, "height": 700}
    for text in (measured(), page_of(with_labels(1000), model="parent"), page_of(fresh("vit"), model="me/vit")):
        with opened(browser, tmp_path, text, viewport=size, reduced_motion="reduce") as page:
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
            page.emulate_media(media="print")
            assert not page.locator("#theme").is_visible()
            assert not page.locator("#chooser").is_visible()


def test_a_thousand_labels_are_found_by_name(browser, tmp_path):
    text = page_of(with_labels(1000), model="parent")
    with opened(browser, tmp_path, text) as page:
        assert len(data_of(text)["names"]) == page.locator("#choices input").count() == 1000
        page.locator("#search").fill("number 777")
        assert page.locator("#choices li:visible").count() == 1
        page.get_by_label("label number 777", exact=True).check()
        assert "'label number 777'" in page.locator("#command").inner_text()
