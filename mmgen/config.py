"""Strict configuration: YAML files and command lines -> frozen dataclasses.

Only machinery. Each room defines a small frozen dataclass of its own and reads it as any other; nothing here knows a
field of any of them. Nothing is ignored or repaired: an unknown key or a value of the wrong type is a `ValueError` of
one line that names the key by its dotted path (`optim.betas`), and says what would be right.

What an annotation may be: bool, int, float, str, Path, None, Literal, a frozen dataclass, `tuple[X, ...]`,
`tuple[X, Y]`, `dict[str, X]`, unions of these, and Any (read later by a part's own dataclass). A union of dataclasses
is resolved by the field that is called `name` or `kind` and annotated with a Literal. YAML reads `1e-3` as text, so
numbers are read by their annotation.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mmgen.files import write_text

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.?inf", re.IGNORECASE)
_NONE = ("none", "null", "~")


class _Typed(str):
    """A word of the command line: text whose type the annotation decides."""


class _Override(dict[str, Any]):
    """A mapping that changes entries of a default instead of replacing it (the command line's)."""


class _UnknownKey(ValueError):
    def __init__(self, where: str, siblings: Sequence[str]):
        super().__init__(where)
        self.where, self.siblings = where, siblings


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error (plain YAML keeps the last and says nothing)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice in one mapping"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path | str, cls: type[T]) -> T:
    """Reads the YAML file at `path` as a `cls`.

    Raises ValueError, beginning with the file's name, where the file is missing, is no YAML, or does not fit `cls`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    try:
        content = yaml.load(text, _StrictLoader)
        return from_mapping({} if content is None else content, cls)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_mapping(mapping: Mapping[str, Any], cls: type[T], default: T | None = None) -> T:
    """Returns the `cls` that `mapping` describes; keys it does not name keep the value of `default`, or of `cls`.

    A nested mapping changes the field's default key by key; tuples and dicts are replaced whole. Raises ValueError.
    """
    return _read_root(mapping, cls, default)


def parse_overrides(cls: type[T], default: T, argv: Sequence[str], prog: str = "mmgen train CONFIG") -> T:
    """Returns `default` changed by `--a.b value` words; `--help` prints every key and its default, then exits with 0.

    Words are read exactly as the file is (same types, same errors, `1e6` for a count, another member of a union by its
    name), so what can be written in YAML can be typed. Several values follow one flag as `--optim.betas 0.9 0.95`;
    entries of dicts and tuples are reached by key and index (`--data.sources.emoji.weight 2`). Raises ValueError.
    """
    if any(word in ("-h", "--help") for word in argv):
        import tyro

        markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        tyro.cli(cls, default=default, args=["--help"], prog=prog, use_underscores=True, config=markers)
    overrides = _Override()
    for path, value in _flags(argv):
        *parents, last = path.split(".")
        node = overrides
        for depth, key in enumerate(parents):
            child = node.setdefault(key, _Override())
            if not isinstance(child, _Override):
                raise ValueError(
                    f"--{path}: --{'.'.join(parents[: depth + 1])} is already given a value of its own"
                )
            node = child
        if last in node:
            raise ValueError(f"--{path}: given twice, or beside keys below it")
        node[last] = value
    return _read_root(overrides, cls, default, prefix="--")


def to_mapping(config: Any) -> dict[str, Any]:
    """Returns `config` (a dataclass) as plain mappings, lists and scalars, which `from_mapping` reads back equal."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def save_yaml(config: Any, path: Path | str) -> None:
    """Writes `config` (a dataclass) whole, defaults included; the file appears complete or not at all."""
    write_text(path, yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=120))


def fingerprint(config: Any) -> str:
    """Returns 16 hexadecimal digits that depend on every value of `config` and on nothing else."""
    canonical = json.dumps(to_mapping(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read_root(mapping: Mapping[str, Any], cls: type[T], default: T | None, prefix: str = "") -> T:
    """Reads the outermost dataclass; `prefix` stands before the keys in messages."""
    try:
        return _read_dataclass(mapping, cls, "", default)
    except _UnknownKey as error:
        raise ValueError(_unknown_message(error, cls, default, prefix)) from None
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _read_dataclass(value: Any, cls: type[T], where: str, default: Any = None) -> T:
    assert isinstance(cls, type) and dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where or 'the file'}: expected a mapping of {cls.__name__}'s keys, got {_shown(value)}"
        )
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key not in fields:
            raise _UnknownKey(_join(where, key), tuple(fields))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if type(default) is cls:
            base = getattr(default, name)
        elif field.default_factory is not dataclasses.MISSING:
            base = field.default_factory()
        else:
            base = field.default
        if name in value:
            values[name] = _read(value[name], hints[name], _join(where, name), base)
        elif base is dataclasses.MISSING:
            raise ValueError(
                f"{_join(where, name)}: missing; it has no default and takes {_type_name(hints[name])}"
            )
        else:
            values[name] = base
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _read(value: Any, hint: Any, where: str, default: Any) -> Any:
    """Returns `value` as a `hint`; `default` is what a mapping changes key by key."""
    if hint is Any:
        return _read_any(value, where, default)
    origin, typed = get_origin(hint), isinstance(value, _Typed)
    if origin in (Union, types.UnionType):
        return _read_union(value, get_args(hint), where, default)
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(value, hint, where, default)  # pyright: ignore[reportArgumentType]
    if origin is tuple:
        return _read_tuple(value, get_args(hint), where, default)
    if origin in (dict, Mapping):
        return _read_dict(value, get_args(hint)[1], where, default)
    if origin is Literal:
        for choice in get_args(hint):
            if (value == choice and type(value) is type(choice)) or (typed and value == str(choice)):
                return choice
        near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(hint)], 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: expected {_type_name(hint)}, got {_shown(value)}{hint_text}")
    return _read_scalar(value, hint, where)


def _read_any(value: Any, where: str, default: Any) -> Any:
    """What another part will read by its own dataclass: mappings are merged, words of a command line read as YAML."""
    if isinstance(value, Mapping):
        return _read_dict(value, Any, where, default)
    if isinstance(value, _Typed):
        try:
            return yaml.load(value, _StrictLoader)
        except yaml.YAMLError:
            raise ValueError(f"{where}: {_shown(value)} is not valid YAML") from None
    return [_read_any(item, where, None) for item in value] if isinstance(value, list) else value


def _read_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint in (str, Path) and isinstance(value, str):
        return hint(value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, _Typed) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    if hint in (int, float) and not isinstance(value, bool):
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = (
                int(value)
                if re.fullmatch(r"[-+]?\d[\d_]*", value)
                else float(re.sub(r"\.inf", "inf", value.lower()))
            )
        if hint is float and isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, int) or isinstance(value, float) and value.is_integer():
            return int(value)
    assert hint in (str, Path, bool, int, float), f"{where}: {hint} cannot be configured"
    quote = "; put it in quotes" if hint is str and isinstance(value, (bool, int, float)) else ""
    raise ValueError(f"{where}: expected {_type_name(hint)}, got {_shown(value)}{quote}")


def _read_union(value: Any, hints: Sequence[Any], where: str, default: Any) -> Any:
    members: list[Any] = [hint for hint in hints if dataclasses.is_dataclass(hint)]
    if isinstance(value, Mapping) and members:
        return _read_dataclass(value, _choose(value, members, where, default), where, default)
    if type(None) in hints and (value is None or isinstance(value, _Typed) and value.lower() in _NONE):
        return None
    others = [hint for hint in hints if hint is not type(None)]
    if isinstance(value, _Typed) and str in others and not value.startswith("["):
        others = [hint for hint in others if get_origin(hint) is not tuple]  # a text may have commas
    if len(others) == 1:  # the one reading's own message is the better one
        return _read(value, others[0], where, default)
    # An exact type wins, so that 1 stays an int under `float | int`; text is the last resort of a typed word.
    for hint in sorted(others, key=lambda hint: (hint is not type(value), hint in (str, Path))):
        try:
            return _read(value, hint, where, default)
        except ValueError:
            continue
    raise ValueError(f"{where}: expected {_type_name(Union[*hints])}, got {_shown(value)}")


def _choose(value: Mapping[str, Any], members: Sequence[type], where: str, default: Any) -> type:
    """Returns the dataclass among `members` whose `name` or `kind` is the mapping's, or the default's own."""
    if len(members) == 1:
        return members[0]
    tags: dict[str, type] = {}
    keys: set[str] = set()
    for member in members:
        hints = get_type_hints(member)
        key = next((k for k in ("name", "kind") if get_origin(hints.get(k)) is Literal), None)
        assert key is not None, (
            f"{member.__name__} needs a Literal field `name` or `kind` to stand in a union"
        )
        keys.add(key)
        tags |= dict.fromkeys(get_args(hints[key]), member)
    assert len(keys) == 1, f"{where}: members of one union are told apart by one field, not {keys}"
    key = keys.pop()
    if key not in value:
        if type(default) in members:
            return type(default)
        raise ValueError(f"{_join(where, key)}: missing; it takes one of {', '.join(tags)}")
    tag = value[key]
    if tag not in tags:
        near = difflib.get_close_matches(str(tag), list(tags), 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{_join(where, key)}: expected one of {', '.join(tags)}, got {_shown(tag)}{hint_text}"
        )
    return tags[tag]


def _read_tuple(value: Any, hints: Sequence[Any], where: str, default: Any) -> tuple[Any, ...]:
    if isinstance(value, _Override):
        return _read_entries(value, hints, where, default)
    if isinstance(value, _Typed):
        listed = value.strip("[]()")
        value = [_Typed(word.strip()) for word in listed.split(",") if word.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected {_type_name(tuple[*hints])}, got {_shown(value)}")
    if hints[-1] is not Ellipsis and len(value) != len(hints):
        raise ValueError(f"{where}: expected {len(hints)} values, got {len(value)}")
    return tuple(_read(item, _item(hints, i), f"{where}.{i}", None) for i, item in enumerate(value))


def _read_entries(value: _Override, hints: Sequence[Any], where: str, default: Any) -> tuple[Any, ...]:
    entries = list(default) if isinstance(default, tuple) else []
    for key, item in value.items():
        if not (key.isdigit() and int(key) < len(entries)):
            raise ValueError(f"{where}.{key}: no such entry; the list has {len(entries)}, counted from 0")
        entries[int(key)] = _read(item, _item(hints, int(key)), f"{where}.{key}", entries[int(key)])
    return tuple(entries)


def _item(hints: Sequence[Any], index: int) -> Any:
    return hints[0] if hints[-1] is Ellipsis else hints[index]


def _read_dict(value: Any, hint: Any, where: str, default: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping of names to {_type_name(hint)}, got {_shown(value)}")
    old: dict[str, Any] = dict(default) if isinstance(default, Mapping) else {}
    entries = old if isinstance(value, _Override) else {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: the key {key!r} is not text; put it in quotes")
        entries[key] = _read(item, hint, _join(where, key), old.get(key))
    return entries


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of `--a.b value ...` and `--a.b=value`."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if not (word.startswith("--") and len(word) > 2):
            raise ValueError(f"{word}: unexpected word; settings are given as --a.b value")
        flag, equals, inline = word[2:].partition("=")
        position += 1
        values = [_Typed(inline)] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(_Typed(argv[position]))
            position += 1
        if not values:
            raise ValueError(f"--{flag}: expected a value after it (booleans too: --{flag} True)")
        yield flag, values[0] if len(values) == 1 else values


def _unknown_message(error: _UnknownKey, cls: type, default: Any, prefix: str) -> str:
    """One line: the key, the nearest known one (its siblings first, then anywhere), and its siblings."""
    parent, _, last = error.where.rpartition(".")
    here = f"known here: {', '.join(error.siblings)}"
    near = [_join(parent, name) for name in difflib.get_close_matches(last, error.siblings, 1)]
    if not near:
        known = _known_paths(cls, default)
        if error.where in known:
            return f"{prefix}{error.where}: unknown key; another choice of {parent} has it; {here}"
        same_name = [path for path in known if path.rpartition(".")[2] == last]
        near = same_name[:1] or difflib.get_close_matches(error.where, known, 1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{prefix}{error.where}: unknown key; {hint}{here}"


def _known_paths(hint: Any, default: Any, where: str = "") -> list[str]:
    """Every dotted path that a file or a command line may name."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        names = [f.name for f in dataclasses.fields(hint) if f.init]
        paths = [_known_paths(hints[n], getattr(default, n, None), _join(where, n)) for n in names]
        return ([where] if where else []) + [path for group in paths for path in group]
    if get_origin(hint) in (Union, types.UnionType):
        groups = [_known_paths(member, default, where) for member in get_args(hint)]
        return list(dict.fromkeys(path for group in groups for path in group))
    if get_origin(hint) is dict and isinstance(default, Mapping):
        return [
            p
            for key, item in default.items()
            for p in _known_paths(get_args(hint)[1], item, _join(where, key))
        ]
    return [where]


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        members = get_args(hint)
        if members[-1] is Ellipsis:
            return f"a list of {_type_name(members[0])}"
        return f"a list of {len(members)} ({', '.join(_type_name(member) for member in members)})"
    if get_origin(hint) is dict:
        return f"a mapping of names to {_type_name(get_args(hint)[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return names.get(hint) or ("null" if hint is type(None) else f"a mapping ({hint.__name__})")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
