"""Puts plain data into Markdown: a template escapes each value that it prints, unless its type says it is markup."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined
from markupsafe import Markup

# Where a value is the start of a line, its first characters could start a list, a heading or code.
SYNTAX = re.compile(r"^[-+=]+(?=\s|$)|^\d+(?=[.)](?:\s|$))|(?<=www)\.|[\\`*_{}\[\]<>()#!|~&:@$]")


class Markdown(Markup):
    """Text that is Markdown already."""


def one_line(text: Any) -> str:
    """A text of any characters on one line, without those that don't print."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def escaped(value: Any) -> Markdown:
    """Keeps a value of any characters on one line and out of Markdown's syntax; what is `Markdown` stays as it is."""
    if isinstance(value, Markdown):
        return value
    text = "" if value is None or isinstance(value, Undefined) else one_line(value)
    return Markdown(SYNTAX.sub(lambda found: f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}", text))


def names(values: Iterable[Any]) -> Markdown:
    """Escaped names with commas between."""
    return Markdown(", ".join(escaped(value) or "(empty name)" for value in values))


def number(value: Any) -> Markdown:
    """An integer with separators, or 4 digits after the point."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escaped(value)
    return Markdown(f"{value:,}" if isinstance(value, int) else f"{value:.4f}")


def percent(share: Any) -> Markdown:
    """A share as a percentage."""
    return Markdown(f"{100 * share:.1f}%") if isinstance(share, (int, float)) else escaped(share)


def digits(value: Any, form: str) -> Markdown:
    """A number in a format such as `.1e`."""
    return Markdown(format(value, form)) if isinstance(value, (int, float)) else escaped(value)


def code(text: Any) -> Markdown:
    """Code within a line, also in a table."""
    line = one_line(text).replace("|", r"\|") or " "
    ticks = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in (line[0], line[-1]) else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def code_blocks(blocks: Iterable[tuple[str, str]]) -> list[Markdown]:
    """Blocks of code, of pairs of a language and lines, with the same fence: more backticks than there are in any."""
    given = list(blocks)
    fence = "`" * max([3, *(len(run) + 1 for _, text in given for run in re.findall("`+", text))])
    return [Markdown(f"{fence}{language}\n{text}\n{fence}") for language, text in given]


def call_arguments(options: Mapping[str, Any]) -> str:
    """Keyword arguments as Python code."""
    return ", ".join(f"{name}={_literal(value)}" for name, value in options.items())


def _literal(value: Any) -> str:
    is_special = isinstance(value, float) and not math.isfinite(value)
    return f"float({str(value)!r})" if is_special else repr(value)


ENVIRONMENT = Environment(
    loader=PackageLoader("nemo_hf.hub"),
    undefined=StrictUndefined,
    autoescape=True,
    finalize=escaped,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"names": names, "number": number, "percent": percent, "digits": digits, "code": code}
