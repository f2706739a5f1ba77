"""Text before it is shown or written: `redact` hides secrets, `visible` shows control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# Up to the last @ before the path: a password may hold one itself.
_USERINFO = re.compile(r"(?<=://)[^/?#\s'\"]+@")
# Up to white space or a quote: half of a token that holds a comma would still be half of a token.
_QUERY = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s?'\"<>]*\?)([^\s'\"<>]+)")
_SECRET_VALUE = re.compile(
    r"(?i)(?<![a-z])((?:[\w-]*[_-])?(?:token|secret|password|passwd|signature|sig|credential|api[_-]?key|"
    r"access[_-]?key|secret[_-]?key|accesskeyid|awsaccesskeyid)(?:[_-]id)?\s*[=]\s*)[^&\s'\",;]+"
)
_SECRET_NAME = re.compile(r"(?i)token|key|secret|password")
# C0 and C1 controls, line and paragraph separators, marks that turn the direction of text, half surrogates.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SHORTEST_SECRET = 8  # TOKENIZERS_PARALLELISM=false is none, and would hide every "false"


def redact(text: str) -> str:
    """Returns `text` with secrets replaced by ***.

    Secrets are user:password@ and every query value of a URL, values after token=, key=, signature= and the
    like, and the values of environment variables whose names hold TOKEN, KEY, SECRET or PASSWORD.
    """
    for value in _environment_secrets():
        text = text.replace(value, "***")
    text = _USERINFO.sub("***@", text)
    text = _QUERY.sub(lambda found: found[1] + "&".join(map(_without_value, found[2].split("&"))), text)
    return _SECRET_VALUE.sub(r"\1***", text)


def redact_all(value: Any) -> Any:
    """Returns a JSON-able value with every text in it redacted; keys stay as they are."""
    if isinstance(value, Mapping):
        return {key: redact_all(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(entry) for entry in value]
    return redact(value) if isinstance(value, str) else value


def visible(text: str, lines: bool = False) -> str:
    """Returns `text` on one line, with JSON's escapes in place of characters that a terminal would obey.

    Captions, keys and names come from strangers: an escape sequence clears the screen, a new line forges a
    message, a bidirectional override reverses one. JSON texts stay JSON of the same values. lines: line ends
    and tabs stay, for texts whose lines are our own.
    """
    return _OBEYED.sub(lambda found: found[0] if lines and found[0] in "\n\t" else _escape(found[0]), text)


def _escape(character: str) -> str:
    return _NAMED.get(character) or f"\\u{ord(character):04x}"


def _without_value(part: str) -> str:
    name, equals, _ = part.partition("=")
    return f"{name}=***" if equals else "***"


def _environment_secrets() -> list[str]:
    """Longest first, so that a secret within another one leaves no rest of it."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and not _is_path(value)
    }
    return sorted(found, key=len, reverse=True)


def _is_path(value: str) -> bool:
    # Names such as SSH_KEY_FILE say where a secret lies; that is what a message about it must name.
    return os.path.isabs(value) and os.path.exists(value)
