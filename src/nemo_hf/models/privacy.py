"""Takes paths of this machine, tokens, and names of code or weights elsewhere out of all that is written."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._validators import validate_repo_id

SECRET, PLACE = "TOKEN", "PATH"  # what stands in place of one
# Keys of configurations and processors' files by which transformers runs code, or loads from elsewhere.
LOADERS = ("audio_tokenizer", "auto_map", "custom_pipelines", "gguf_file")
ORIGINS = ("_commit_hash", "_name_or_path", "name_or_path", "repository")  # where this machine loaded a model from
LABELS = ("groups", "id2label", "label2id", "label_groups", "labels")  # the user's words, whatever they look like
TOKENIZED = re.compile(r".+_tokens?|content|chat_template")  # in a tokenizer's files: a token may look like a path
# Texts of a tokenizer, which would read or write others if they were changed: "/b/" may be a token.
TOKENIZED = re.compile(r".+_tokens?|content|chat_template")
# `tokens_per_second` and `tokenizer` are no secrets; the entry `key` of a site and the text `pad_token` neither.
SECRET_OPTION = re.compile(
    r"token(?![a-z])|secret|passw|passphrase|credential|api_?key|authorization|signature|(^|_)(key|pwd|auth|bearer|cookie)$"
)
SECRET_ENTRY = re.compile(r"(hub|hf|auth|access|api|private)_?(token|key)|secret|passw|credential")
NUMBERS = re.compile("token|key")  # in names whose numbers are counts, such as `max_token`
TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{10,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,1000}\.[\w-]+\.)[\w-]*"
)
IN_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+@")  # a user and a password, or a token
IN_HEADER = re.compile(r"(?i)\b(authorization\W{1,4}|bearer\s+)((?:basic|bearer|token)\s+)?[^\s'\",;]+")
ASSIGNED = re.compile(r"(?<![\w-])(-{0,2}[\w.-]{1,80})(['\"]?\s*[=:]\s*['\"]?)(?!//)([^\s'\",;&}\]]+)")
PASSED = re.compile(r"(?<!\S)(--[\w-]+)(\s+)([^\s-]\S*)")  # --token abc
# "/b/" is rather a word: at least two folders make a path.
WHOLE_PATH = re.compile(
    r"(?:~[\w.-]*/|(?i:file):|/+(?=[^/\n]*[^/\s])[^/\n]+/+|[A-Za-z]:[\\/]|\\\\[\w.$-]+\\)[^\s/][\s\S]*|file:/[\s\S]*"
)
ROOT_PATH = re.compile(r"~|/[^\s/]+/?")
QUOTED = re.compile(r"(?<=(['\"]))[^'\"\n]+(?=\1)")
END = r"[^\s'\"|<>,;:()\[\]{}]*"
HOMES = rf"(?i:file):/+{END}|/(?:home|Users|root)/{END}|(?<![A-Za-z0-9])[A-Za-z]:[\\/]Users[\\/]{END}"
IN_HOME = re.compile(HOMES)
PATH = re.compile(
    rf"{HOMES}|(?<![A-Za-z0-9])[A-Za-z]:[\\/]{END}|(?<![\\\w])\\\\[\w.$-]+\\{END}|(?<![\w./:])//(?=[\w.-]+/){END}"
    rf"|(?:(?<![\w.~%*\\/<&+-])|(?<=(?<![\w-])-[A-Z]))(?:~[\w.-]*/|/(?=[\w.@+~-]+/[^\s/])|/(?=(?:tmp|mnt|data)\b)){END}"
)
KEPT_NAME = re.compile(
    r"(?i)[^\\/\s]+\.(json|jsonl|ya?ml|toml|py|txt|md|csv|tsv|parquet|arrow|zip|safetensors|onnx|bin|pt|model)"
)


def is_repository(name: str) -> bool:
    """Tells whether a text can be the name of a Hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_name(source: str | Path | None) -> str | None:
    """Returns the name of a Hub repository as it is, and `None` for anything that may be a local path.

    Whether a relative path is one shows at the time of loading, before the directory is left or removed.
    """
    if not source or not isinstance(source, str) or Path(source).exists():
        return None
    return source if is_repository(source) else None


def downloaded_name(source: str | None) -> str | None:
    """Returns the name of a Hub repository if the Hub's cache knows it: another may be a path that is gone."""
    name = hub_name(source)
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")) if name else None
    return name if folder and folder.is_dir() else None


def clean_text(text: str) -> str:
    """Replaces tokens, passwords and absolute paths in a text; of a file's path its name stays."""
    if whole := WHOLE_PATH.fullmatch(text):
        return _file_name(whole)
    text = QUOTED.sub(lambda found: _file_name(found) if WHOLE_PATH.fullmatch(found[0]) else found[0], text)
    text = IN_HEADER.sub(lambda found: f"{found[1]}{found[2] or ''}{SECRET}", text)
    for option in (ASSIGNED, PASSED):
        text = option.sub(lambda f: f"{f[1]}{f[2]}{SECRET}" if _fits(SECRET_OPTION, f[1]) else f[0], text)
    text = PATH.sub(_file_name, _without_tokens(text))
    home = str(Path.home())
    return text.replace(home, PLACE) if len(home) > 1 else text


def _without_tokens(text: str) -> str:
    return TOKENS.sub(SECRET, IN_ADDRESS.sub(f"{SECRET}@", text))


def _file_name(path: re.Match[str]) -> str:
    name = re.split(r"[\\/]", path[0].rstrip("\\/"))[-1]
    return TOKENS.sub(SECRET, name) if KEPT_NAME.fullmatch(name) else PLACE


def _fits(secret: re.Pattern[str], name: str) -> bool:
    """Whether a name in snake_case, camelCase or with dashes is that of a secret."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return bool(secret.search(re.sub(r"[-.]", "_", words).strip("_")))


def clean(value: Any, name: str = "", is_config: bool = False) -> Any:
    """A copy of nested JSON without tokens and absolute paths; the user's labels stay as they are.

    A configuration, apart from its record `training`, also loses `LOADERS` and `ORIGINS`; in it only texts that are
    paths as a whole, paths in a home directory, and plain tokens are replaced: models are built from its other texts.
    """
    if name in LABELS or value is None or isinstance(value, (bool, float)):
        return value
    if _fits(SECRET_ENTRY if is_config else SECRET_OPTION, name):
        is_count = isinstance(value, int) and NUMBERS.search(name.lower())
        return value if is_count or not value else SECRET
    if isinstance(value, Mapping):
        kept = {key: each for key, each in value.items() if not (is_config and key in LOADERS + ORIGINS)}
        inner = {key: clean(each, str(key), is_config and key != "training") for key, each in kept.items()}
        return _with_clean_keys(inner, is_config)
    if isinstance(value, (list, tuple)):
        are_words = not is_config and all(isinstance(each, str) for each in value)
        return list(_clean_words(value)) if are_words else [clean(each, name, is_config) for each in value]
    if not isinstance(value, str) or (is_config and TOKENIZED.fullmatch(name)):
        return value
    return _clean_value(value, is_config)


def _with_clean_keys(data: Mapping[Any, Any], is_config: bool) -> dict[Any, Any]:
    """Cleans the keys of a mapping, and numbers those that would be equal then."""
    cleaned: dict[Any, Any] = {}
    counts: Counter[str] = Counter()
    for key, value in data.items():
        name = key if not isinstance(key, str) else _clean_part(key) if is_config else clean_text(key)
        unique = name
        while unique in cleaned:
            counts[name] += 1
            unique = f"{name} #{counts[name] + 1}"
        cleaned[unique] = value
    return cleaned


def _clean_value(text: str, is_config: bool) -> str:
    """Cleans a text, which may itself be JSON."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            data = json.loads(text)
            cleaned = clean(data, "", is_config)
        except (ValueError, RecursionError):  # no JSON
            pass
        else:
            return text if cleaned == data else json.dumps(cleaned, ensure_ascii=False)
    if not is_config and ROOT_PATH.fullmatch(text):
        return PLACE
    return _clean_part(text) if is_config and not WHOLE_PATH.fullmatch(text) else clean_text(text)


def _clean_part(text: str) -> str:
    """Cleans a text of which a model may be built: only plain tokens, and paths in a home directory."""
    return IN_HOME.sub(_file_name, _without_tokens(text))


def clean_command(words: Sequence[str]) -> str:
    """Joins the words of a command line for a shell, without tokens and absolute paths."""
    return shlex.join(_clean_words(words))


def _clean_words(words: Sequence[str]) -> Iterator[str]:
    before = ""
    for word in words:  # the one after --token is a secret
        is_value = before.startswith("-") and "=" not in before and not word.startswith("--")
        yield SECRET if is_value and _fits(SECRET_OPTION, before) else _clean_word(word)
        before = word


def _clean_word(word: str) -> str:
    """Cleans a word of a command line, such as `--option=value` or `NAME=value`."""
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"-{0,2}[\w.-]+", name):
        return f"{name}={SECRET if _fits(SECRET_OPTION, name) else _clean_word(value)}"
    return _clean_value(word, is_config=False)
