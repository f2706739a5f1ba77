"""From YAML text to plain values: limits, duplicate keys, line numbers, one `extends:`, dotted overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipkit.config.problems import Origin, Path_, Problem, dotted, raise_problems, shown

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000  # after aliases are expanded, so that a few hundred bytes cannot become gigabytes
MAX_DEPTH = 32
_DEFAULTS: dict[str, Any] = {"objectives": [{"name": "clip"}]}

# Alternatives: a later layer that sets one of them replaces the others of earlier layers.
_ALTERNATIVES: dict[Path_, tuple[frozenset[str], ...]] = {
    ("run",): (frozenset({"samples"}), frozenset({"epochs"}), frozenset({"steps"})),
    ("model",): (
        frozenset({"name"}),
        frozenset({"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}),
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 3e-4 is a number, and neither `no`, `12:30` nor a date is anything but text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the base class declares it this way)


class _Dumper(yaml.SafeDumper):
    """Writes exactly what _Loader reads back as the same value."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the base class declares it this way)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
    "null": r"~|null|Null|NULL|",
}
for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), None)


def dump_yaml(values: dict[str, Any]) -> str:
    """Returns `values` as YAML text that reads back as the same values."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def flow_yaml(value: Any) -> str:
    """Returns one value as YAML on one line, to stand after `key: `; it reads back as the same value."""
    text: str = yaml.dump(
        {"": value},
        Dumper=_Dumper,
        default_flow_style=True,
        allow_unicode=True,
        width=1_000_000,
        sort_keys=False,
    )
    return text.strip().removeprefix("{").removesuffix("}").partition(": ")[2]


@dataclass
class Values:
    """Plain nested values, and for each path where it was written."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path_, Origin] = field(default_factory=dict)

    def mark(self, path: Path_, origin: Origin, value: Any) -> None:
        """Records where `value` at `path` comes from and forgets what stood below it before."""
        if isinstance(value, dict):
            for key, entry in value.items():
                self.mark((*path, key), origin, entry)
        else:
            for old in [old for old in self.origins if old[: len(path)] == path]:
                del self.origins[old]
        self.origins[path] = origin


class _Tree:
    """Turns a node tree into values while recording lines and collecting every problem of the file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = Values()
        self.problems: list[Problem] = []
        self.count = 0

    def _refuse(self, node: yaml.Node, cause: str, cure: str) -> None:
        self.problems.append(Problem(Origin(self.name, node.start_mark.line + 1), cause, cure))

    def convert(self, node: yaml.Node, path: Path_) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise_problems([Problem(Origin(self.name), *_TOO_MANY)])
        if len(path) > MAX_DEPTH:  # an alias may stand inside its own anchor
            raise_problems([Problem(Origin(self.name, node.start_mark.line + 1), *_TOO_DEEP)])
        self.values.origins.setdefault(path, Origin(self.name, node.start_mark.line + 1))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.convert(child, (*path, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return self._refuse_tag(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or not key:
                self._refuse(
                    key_node, f"a key under {dotted(path)} is not a plain word", "write it as `key: value`"
                )
                continue
            if key in result:
                self._refuse(
                    key_node, f"{dotted((*path, key))} is written twice", "keep one of the two lines"
                )
            self.values.origins[(*path, key)] = Origin(self.name, key_node.start_mark.line + 1)
            result[key] = self.convert(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.ScalarNode, path: Path_) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = node.value.replace("_", "")
        try:
            if kind == "str":
                return node.value
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(text.replace(".inf", "inf").replace(".nan", "nan"))
            if kind in ("bool", "null"):
                return node.value.lower() == "true" if kind == "bool" else None
        except ValueError:
            self._refuse(node, f"{dotted(path)}: {shown(node.value)} is no {kind}", "write a plain number")
            return None
        return self._refuse_tag(node, path)

    def _refuse_tag(self, node: yaml.Node, path: Path_) -> None:
        cure = "write a plain value: tags that build objects are never executed"
        self._refuse(node, f"{dotted(path)}: the YAML tag {shown(node.tag)} is not allowed", cure)


_TOO_MANY = (
    f"more than {MAX_VALUES:,} values once anchors are expanded",
    "write it out without nested anchors; a configuration has a few dozen values",
)

_TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep", "flatten them"


def _compose(text: str, name: str) -> yaml.Node | None:
    """Returns the node tree after the limits that protect the parser itself (depth before recursion)."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            opens = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
            closes = isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
            depth += opens - closes
            if depth > MAX_DEPTH:
                raise_problems([Problem(Origin(name), *_TOO_DEEP)])
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        cause = " ".join(f"not valid YAML: {error.problem or error.context}".split())
        cure = (
            "correct this line; text that contains `: `, `#`, `{`, `[`, `*` or `%` at its start needs quotes"
        )
        raise_problems([Problem(Origin(name, mark.line + 1 if mark else None), cause, cure)])
    except (yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise_problems([Problem(Origin(name), f"not valid YAML: {first}", "save it as plain UTF-8 text")])


def parse_text(text: str, name: str) -> Values:
    """Returns the values of YAML `text`; `name` stands in messages. Raises ConfigError with every problem."""
    node = _compose(text, name)
    if node is None:
        return Values()
    if not isinstance(node, yaml.MappingNode):
        cause = "a configuration is a mapping of sections"
        raise_problems(
            [Problem(Origin(name, node.start_mark.line + 1), cause, "begin with `model:`, `data:`, `run:`")]
        )
    tree = _Tree(name)
    tree.values.tree = tree.convert(node, ())
    raise_problems(tree.problems)
    return tree.values


def _read_file(path: Path) -> Values:
    try:
        if path.stat().st_size > MAX_BYTES:
            cause = f"larger than {MAX_BYTES:,} bytes"
            raise_problems(
                [Problem(Origin(str(path)), cause, "a configuration is a short text file; check the path")]
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise_problems([Problem(Origin(str(path)), "not UTF-8 text", "check that this is a YAML file")])
    except OSError as error:
        cure = "check the path; `clipkit configs ls` lists the configurations that come with clipkit"
        raise_problems([Problem(Origin(str(path)), f"cannot be read ({error.strerror or error})", cure)])
    return parse_text(text, str(path))


def _normalise(tree: dict[str, Any]) -> dict[str, Any]:
    """Short spellings become their long form, so that layers merge whichever one they use."""
    tree = {key: value for key, value in tree.items() if value is not None}
    if isinstance(tree.get("model"), str):
        tree["model"] = {"name": tree["model"]}
    if isinstance(tree.get("objectives"), str):
        tree["objectives"] = [tree["objectives"]]
    if isinstance(tree.get("objectives"), list):
        tree["objectives"] = [{"name": e} if isinstance(e, str) else e for e in tree["objectives"]]
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        tree["data"] = {**data, "train": [{"shards": data["train"]}]}
    return tree


def _without_alternatives(base: dict[str, Any], over: dict[str, Any], path: Path_) -> dict[str, Any]:
    groups = _ALTERNATIVES.get(path, ())
    chosen = {key for key, value in over.items() if value is not None}
    dropped = {
        key for group in groups if any(other & chosen for other in groups if other != group) for key in group
    }
    return {key: value for key, value in base.items() if key not in dropped}


def _merge(base: Any, over: Any, path: Path_) -> Any:
    """Returns `base` overlaid by `over`: mappings merge key by key, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = _without_alternatives(base, over, path)
    for key, value in over.items():
        merged[key] = _merge(merged.get(key), value, (*path, key))
    return merged


def _leaves(tree: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _overlay(base: Values, over: Values) -> Values:
    """Returns `base` overlaid by `over`, with the origin of everything that `over` replaced."""
    merged = Values(_merge(base.tree, over.tree, ()), dict(base.origins))
    for path, value in _leaves(over.tree):
        merged.mark(path, over.origins.get(path, Origin("")), value)
    merged.origins.update(over.origins)
    return merged


def _assign(tree: Any, path: Path_, value: Any, whole: Path_, origin: Origin) -> Any:
    """Returns `tree` with `value` merged in at `path` (a list index may be one past the end)."""
    here = whole[: len(whole) - len(path)]
    if not path:
        return _merge(tree, value, whole)
    key = path[0]
    if isinstance(tree, list):
        if not (isinstance(key, str) and key.isdigit() and int(key) <= len(tree)):
            cause = f"{dotted(here)} is a list of {len(tree)}; {shown(key)} is no position in it"
            raise_problems([Problem(origin, cause, f"use {dotted(here)}.0 to {dotted(here)}.{len(tree)}")])
        entries = [*tree, {}] if int(key) == len(tree) else list(tree)
        entries[int(key)] = _assign(entries[int(key)], path[1:], value, whole, origin)
        return entries
    if tree is not None and not isinstance(tree, dict):
        cause = f"{dotted(here)} is {shown(tree)}, so it has no {shown(key)} below it"
        raise_problems([Problem(origin, cause, f"set {dotted(here)} itself")])
    section = _without_alternatives(tree or {}, {str(key): value}, here)
    return {**section, str(key): _assign(section.get(str(key)), path[1:], value, whole, origin)}


_BARE = re.compile(
    r"""[{\[]|[}\]]|(?<![^\s{\[,:])(?:"(?:\\.|[^"\\])*"|'(?:''|[^'])*')|(?:^|\s)\#|:(?=\s|$)"""
)


def _reads_as_path(text: str) -> bool:
    """Whether YAML would take a comment or a mapping out of text such as /data/my #1 or /data/a: b."""
    depth = 0
    for found in _BARE.findall(text):
        if found in "{[}]":
            depth += 1 if found in "{[" else -1
        elif found[0] not in "\"'" and depth <= 0:
            return True
    return False


def _override_value(text: str) -> Any:
    """The value as YAML; text that is no YAML, such as *.tar or {00..12}.tar, is itself."""
    if _reads_as_path(text):
        return text
    try:
        return parse_text(f"value:\n  {text}", "override").tree.get("value")
    except Exception as error:
        from clipkit.types import ConfigError

        if not isinstance(error, ConfigError):
            raise
        return text


def _override(values: Values, text: str) -> Values:
    key, found, written = text.partition("=")
    origin = Origin(f"override {shown(text)}")
    parts = tuple(key.strip().split("."))
    if not found or not all(parts):
        raise_problems([Problem(origin, "an override is written key=value", "for example optim.lr=3e-4")])
    value = _override_value(written.strip())
    tree = _normalise(_assign(values.tree, parts, value, parts, origin))
    changed = Values(tree, dict(values.origins))
    path: Path_ = tuple(int(part) if part.isdigit() else part for part in parts)
    changed.mark(path, origin, value)
    return changed


def read_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns `key=value` words as nested values. Raises ConfigError for a word that is not one."""
    values = Values()
    for text in overrides:
        values = _override(values, text)
    return values.tree


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> Values:
    """Returns the merged values of a file, of the file it extends, and of the overrides, in rising priority.

    Raises ConfigError (exit 2) naming file, line, key and value of every problem found.
    """
    path = Path(path)
    values = _read_file(path)
    base = Values()
    if "extends" in values.tree:
        name = values.tree.pop("extends")
        origin = values.origins[("extends",)]
        if not isinstance(name, str) or not name:
            raise_problems([Problem(origin, f"extends is {shown(name)}", "write the path of one YAML file")])
        base = _read_file(path.parent / name)
        if "extends" in base.tree:
            cause = f"extends {shown(name)}, which extends another file itself"
            raise_problems([Problem(origin, cause, "extend one file; copy what the second one adds")])
    return layer([base, values], overrides)


def layer(layers: Sequence[Values], overrides: Sequence[str] = ()) -> Values:
    """Returns the layers over the defaults, later ones winning, then the `key=value` overrides."""
    values = Values(dict(_DEFAULTS))
    for entry in layers:
        values = _overlay(values, Values(_normalise(entry.tree), entry.origins))
    problems: list[Problem] = []
    for text in overrides:
        try:
            values = _override(values, text)
        except Exception as error:
            found = getattr(error, "problems", None)
            if found is None:
                raise
            problems.extend(found)
    raise_problems(problems)
    return values
