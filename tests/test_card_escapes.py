"""A card shows what it is handed as text, whatever it is: no accepted report or record breaks it or adds markup."""

import functools
import operator
import re
import types
import typing

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nemo_hf.hub.markdown import ENVIRONMENT, Markdown, escaped, one_line
from nemo_hf.hub.model_card import KEPT_BELOW, CardFacts, own_text, render_model_card
from nemo_hf.models.config_checks import (
    EQUIVALENCE,
    FORMATS,
    MODULE_REPORT,
    PARENT_REPORT,
    REJECTION,
    TRAINING,
    check_report,
    check_training,
    holds,
)  # fmt: skip

# Each would be markup at the start of a line, within one, in a table, in code or in the header.
PIECES = [
    "<img src=x>", "[x](https://evil.example)", "https://evil.example", "www.evil.example", "me@evil.example",
    "`", "```", "~~~", "|", "# h", "---", "===", "- x", "1. x", "> x", "**b**", "$x$", "&lt;", "{{ 7*7 }}", "{% if %}",
    "<!-- x", KEPT_BELOW, "\\", "'", '"', ":", "\t", "é", "license: evil", "!", "_x_", "\u202e", "", "a",
]  # fmt: skip
LINES = st.lists(st.sampled_from(PIECES), max_size=3).map(" ".join)
WORDS = st.one_of(LINES, st.lists(LINES, max_size=3).map("\n".join))
NUMBERS = st.one_of(st.integers(-5, 10**12), st.floats())
OTHER = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
)
NAMES = st.sampled_from(["org/x", "data", "me/A.b-c"])
SOME_NAMES = {"base_model": NAMES, "datasets": st.lists(NAMES, max_size=2)}
TIMED = st.dictionaries(st.one_of(st.sampled_from(["1", "8"]), LINES), NUMBERS, max_size=3)


def values(kind, name=""):
    """Values of a type of the tables that `check_record` takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if name in SOME_NAMES:
        return SOME_NAMES[name] | st.none()
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, (values(each) for each in arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        keys = st.sampled_from(["auroc", "accepted", "rejected", "random", "seed", "1"]) | LINES
        return st.dictionaries(keys, values(arguments[1]), max_size=3)
    plain = {str: WORDS, int: st.integers(0, 10**12), float: st.floats(), type(None): st.none(), typing.Any: OTHER}
    return plain[kind]


def records(table, **others):
    return st.fixed_dictionaries({**{name: values(kind, name) for name, kind in table.items()}, **others})


SIZES = {"latency_ms": TIMED, "parent_latency_ms": TIMED}
FORMAT_TIMES = {"latency_ms": st.dictionaries(st.sampled_from(["module", "plain", "x"]), TIMED, max_size=2)}
REPORTS = records(MODULE_REPORT, **SIZES, formats=st.none() | records(FORMATS, **FORMAT_TIMES)) | records(PARENT_REPORT)
ARGUMENTS = st.dictionaries(st.sampled_from(["seed", "bf16", "lr_scheduler_kwargs"]), OTHER, max_size=3)
RECORDS = records(TRAINING, arguments=ARGUMENTS)


def accepted(check, data) -> bool:
    try:
        check(data)
    except (TypeError, ValueError):
        return False
    return True


def outside_code(card: str) -> list[str]:
    """Lines of the body without code: blocks between fences, and spans."""
    body = card.split("\n---\n", 1)[1]
    fence = re.search("^`{3,}", body, re.MULTILINE)[0]
    text = re.sub(rf"^{fence}\w+\n.*?\n{fence}$", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", text).splitlines()


MARKUP = re.compile(r"(?<!\\)(?:\\\\)*([<>*_#\[\]{}~$@&]|(?<=\w):(?=//)|(?<=www)\.)|^\s*(?:[-+=]+|\d+[.)])(?:\s|$)")


@functools.cache
def own_lines() -> set[str]:
    """Markup that is the template's: what cards of plain words have on their lines."""
    return set(render_model_card(facts("a", "b", None, None)).splitlines())


def facts(label, text, report, training, role="module", **changes) -> CardFacts:
    part = {"labels": [label], "parent": "me/x", "base_class": text, "parameters": 1, "retained_neurons": 0.5}
    part |= {"is_tuned": False, "equivalence": None, "scale": 1.0, "bias": 0.0}
    given = {"parts": [part]} if role == "composed" else {}
    given |= {"groups": [{"name": label, "labels": [label, "b"]}]} if role == "parent" else {}
    return CardFacts(
        "me/x", "image-classification", role, text, [label, "b"], 10, 0.1, label_ids=[0, 1], report=report,
        training=training, parent="me/parent", measured_on="org/data", split=text, datasets=["org/data"],
        nemo_config={"label_groups": {label: [text]}}, versions={text: text}, tags=[text], license=text,
        **{**given, **changes},
    )  # fmt: skip


FUZZING = {"deadline": None, "derandomize": True, "database": None}
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=80, suppress_health_check=SLOW, **FUZZING)
@given(
    *(WORDS, WORDS, REPORTS | st.none(), RECORDS | st.none()),
    st.sampled_from(["module", "parent", "composed"]),
    records(EQUIVALENCE) | st.none(),
    records(REJECTION) | st.none(),
)
def test_whatever_the_checks_accept_is_shown_as_text(label, text, report, training, role, equivalence, rejection):
    assume(report is None or accepted(check_report, report))
    assume(training is None or accepted(check_training, training))
    assume(accepted(holds(EQUIVALENCE), equivalence) and accepted(holds(REJECTION), rejection))
    card = render_model_card(facts(label, text, report, training, role, equivalence=equivalence, rejection=rejection))
    header = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert header["library_name"] == "nemo-hf"
    assert header["tags"][:2] == ["nemo-hf", role]
    assert set(header["tags"]) == {"nemo-hf", role, one_line(text)}
    assert header.get("license", "") == one_line(text)
    assert header["datasets"] == ["org/data"]
    assert card.splitlines().count(KEPT_BELOW) == 1
    assert own_text(card) == ""
    title = next(line for line in card.splitlines() if line.startswith("# me"))
    assert title == "# me/x"
    ours = own_lines()
    for line in outside_code(card):
        bare = re.sub(r"^(\#\# |- |\| *|\|(---\|)+)|\((allowed|parent): [^()]*\)", "", line)
        found = MARKUP.search(bare)
        is_ours = line in ours or line.startswith(("inputs of shape [", "([arXiv", "Made with", "Neuron-Level"))
        assert is_ours or found is None, (line, found)


@pytest.mark.parametrize("text", [*PIECES, "a\n\n# b", "\x00\u2028x"])
def test_a_template_escapes_all_that_it_prints(text):
    """So that a field that is added to it can't be forgotten."""
    for source in ("{{ x }}", "{{ x ~ '' }}", "{{ [x] | join }}", "{{ x | lower }}", "{% set y = x %}{{ y }}"):
        shown = ENVIRONMENT.from_string(source).render(x=text)
        assert "\n" not in shown
        assert not MARKUP.search(shown), (source, shown)
    assert escaped(escaped(text)) == escaped(text)
    assert ENVIRONMENT.from_string("{{ x }}").render(x=Markdown(text)) == text
