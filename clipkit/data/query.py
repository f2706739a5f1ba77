"""Conditions over the fields of a sample: `json.similarity >= 0.3 and "dog" in lower(txt)`.

The text is parsed, never run: comparisons, `and`, `or`, `not`, `in`, `is`, arithmetic, lists, `len` and
`lower` over the fields `key`, `txt`, `cls` and `json.NAME`; anything else is refused. A field that is not
there, or a value of a type that does not fit, makes what depends on it unknown, as in SQL: `not` of unknown
is unknown, and a sample is kept only where the whole is true.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from clipkit.data.sample import MAX_CAPTION_BYTES, MAX_JSON_BYTES
from clipkit.types import ConfigError

Path = tuple[str | int, ...]
Look = Callable[[Path], Any]
_Part = Callable[[Look], Any]

UNKNOWN: Any = object()
"""What a look-up returns for a field that is not there."""

ROOTS = ("key", "txt", "cls", "json")
_CURE = "write for example: json.similarity >= 0.3 and json.width >= 200 (fields: key, txt, cls, json.NAME)"
_MAX_TEXT = 10_000
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
# No power and no product of text: a short condition must not be able to fill the memory.
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"len": len, "lower": lambda text: text.lower()}
_UNFIT = (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError)


@dataclass
class Seen:
    """What became of the parts of a condition, over all samples that it was asked about.

    fields       name of a field that was looked up -> whether a sample had it
    comparisons  text of a comparison, or of another operation -> whether its values ever fitted it: numbers
                 with numbers, text with text
    """

    fields: dict[str, bool] = field(default_factory=dict)
    comparisons: dict[str, bool] = field(default_factory=dict)

    def add(self, other: Seen) -> None:
        """Adds what other samples showed."""
        for mine, theirs in ((self.fields, other.fields), (self.comparisons, other.comparisons)):
            for name, known in theirs.items():
                mine[name] = mine.get(name, False) or known


class Query:
    """A condition. Raises ConfigError, naming the place, for a text that is not one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.seen = Seen()
        try:
            if len(text) > _MAX_TEXT:
                raise ValueError(f"longer than {_MAX_TEXT} characters")
            self._value = _compiled(ast.parse(text.strip(), mode="eval").body, self.seen)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
            raise ConfigError(f"the condition {text!r} cannot be read: {reason}", _CURE) from None

    def matches(self, look: Look) -> bool | None:
        """Returns whether the condition holds; None when it depends on what is not there or does not fit."""
        found = _truth(self._value(look))
        return None if found is UNKNOWN else bool(found)


class Fields:
    """Look-up of fields in the members of one sample; columns of a table go before what its JSON holds.

    member: returns the bytes of a member by extension, None when there is none.
    """

    def __init__(
        self, key: str, member: Callable[[str], bytes | None], joined: Mapping[str, Any] | None = None
    ) -> None:
        self._key = key
        self._member = member
        self._joined = joined or {}
        self._document: Any = None

    def __call__(self, path: Path) -> Any:
        """Returns the value at `path`, UNKNOWN when there is none."""
        if path == ("key",):
            return self._key
        if path[0] != "json":
            return self._text(str(path[0])) if len(path) == 1 else UNKNOWN
        value: Any = self._joined if len(path) > 1 and path[1] in self._joined else self.document()
        try:
            for name in path[1:]:
                if isinstance(value, str):
                    return UNKNOWN
                value = value[name]
        except (LookupError, TypeError):
            return UNKNOWN
        return value

    def document(self) -> Any:
        """Returns the value of the JSON member, UNKNOWN when there is none that can be read."""
        if self._document is None:
            data = self._member("json")
            self._document = UNKNOWN
            if data is not None and len(data) <= MAX_JSON_BYTES:
                try:
                    self._document = json.loads(data.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    self._document = UNKNOWN  # the caller counts samples whose fields are unknown
        return self._document

    def _text(self, extension: str) -> Any:
        data = self._member(extension)
        if data is None or len(data) > MAX_CAPTION_BYTES:
            return UNKNOWN
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return UNKNOWN


def field_path(field: str) -> Path:
    """Returns the path of a field as options write it: `key`, `txt`, `json.uid`, `json.captions.0`.

    Raises ConfigError for anything else.
    """
    root, *names = field.split(".")
    if root not in ROOTS or not all(names) or (root == "json") != bool(names):
        raise ConfigError(f"{field!r} is no field of a sample", "write key, txt, cls or json.NAME")
    return (root, *(int(name) if name.isdecimal() else name for name in names))


def value_text(value: Any) -> str:
    """Returns a value as the text it is compared by: text as it is, 7 and "7" alike."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _truth(value: Any) -> Any:
    return UNKNOWN if value is UNKNOWN else bool(value)


def _compiled(node: ast.expr, seen: Seen) -> _Part:
    if isinstance(node, ast.Constant):
        return _constant(node)
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
        return _field(_path(node), seen)
    if isinstance(node, ast.BoolOp):
        parts = [_compiled(value, seen) for value in node.values]
        return _joined(parts, decides=isinstance(node.op, ast.Or))
    if isinstance(node, ast.UnaryOp):
        return _unary(node, seen)
    if isinstance(node, ast.Compare):
        return _compared(node, seen)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _applied(_numbers(_ARITHMETIC[type(node.op)]), [node.left, node.right], node, seen)
    if isinstance(node, ast.List | ast.Tuple):
        return _applied(lambda *values: list(values), node.elts, node, seen)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if len(node.args) != 1 or node.keywords:
            raise ValueError(f"{node.func.id} takes one value")
        return _applied(_FUNCTIONS[node.func.id], node.args, node, seen)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed")


def _field(path: Path, seen: Seen) -> _Part:
    name = ".".join(map(str, path))

    def run(look: Look) -> Any:
        value = look(path)
        seen.fields[name] = seen.fields.get(name, False) or value is not UNKNOWN
        return value

    return run


def _constant(node: ast.Constant) -> _Part:
    value = node.value
    if not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{ast.unparse(node)!r} is not allowed")
    return lambda look: value


def _path(node: ast.expr) -> Path:
    if isinstance(node, ast.Name):
        if node.id not in ROOTS:
            raise ValueError(f"there is no field {node.id!r}; did you mean json.{node.id}?")
        return (node.id,)
    path: Path
    if isinstance(node, ast.Attribute):
        path = (*_path(node.value), node.attr)
    elif isinstance(node, ast.Subscript):
        step = ast.literal_eval(node.slice)
        if isinstance(step, bool) or not isinstance(step, str | int):
            raise ValueError(f"{ast.unparse(node)!r} is not allowed")
        path = (*_path(node.value), step)
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not allowed")
    if path[0] != "json":
        raise ValueError(f"{path[0]!r} has no parts; only json has")
    return path


def _unary(node: ast.UnaryOp, seen: Seen) -> _Part:
    if isinstance(node.op, ast.Not):
        return _applied(operator.not_, [node.operand], node, seen)
    if isinstance(node.op, ast.USub):
        return _applied(_numbers(operator.neg), [node.operand], node, seen)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed")


def _compared(node: ast.Compare, seen: Seen) -> _Part:
    values = [node.left, *node.comparators]
    pairs = []
    for (left, right), how in zip(pairwise(values), node.ops, strict=True):
        single = ast.Compare(left, [how], [right])
        pairs.append(_applied(_COMPARISONS[type(how)], [left, right], single, seen))
    return pairs[0] if len(pairs) == 1 else _joined(pairs, decides=False)


def _alike(how: ast.cmpop, left: Any, right: Any) -> bool:
    """Whether a comparison that raises nothing compares values of one type; `is` always does."""
    if isinstance(how, ast.In | ast.NotIn) and isinstance(right, list):
        return not right or any(_alike(ast.Eq(), left, each) for each in right)
    if not isinstance(how, ast.Eq | ast.NotEq) or left is None or right is None:
        return True
    numbers = isinstance(left, int | float), isinstance(right, int | float)
    return all(numbers) if any(numbers) else type(left) is type(right)


def _joined(parts: list[_Part], decides: bool) -> _Part:
    """`or` (decides = True) and `and` (False) of three-valued parts."""

    def run(look: Look) -> Any:
        found: Any = not decides
        for part in parts:
            value = _truth(part(look))
            if value is decides:
                return decides
            if value is UNKNOWN:
                found = UNKNOWN
        return found

    return run


def _applied(function: Callable[..., Any], nodes: Sequence[ast.expr], whole: ast.expr, seen: Seen) -> _Part:
    parts = [_compiled(node, seen) for node in nodes]
    name = ast.unparse(whole)

    def run(look: Look) -> Any:
        values = [part(look) for part in parts]
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        seen.comparisons.setdefault(name, False)
        try:
            found = function(*values)
        except _UNFIT:
            return UNKNOWN
        if not seen.comparisons[name]:
            how = whole.ops[0] if isinstance(whole, ast.Compare) else None
            seen.comparisons[name] = how is None or _alike(how, *values)
        return found

    return run


def _numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Any) -> Any:
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError("not a number")
        return function(*values)

    return run
