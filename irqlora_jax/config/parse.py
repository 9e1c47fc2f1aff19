"""Makes dataclasses from command lines and configuration files.

jsonargparse prints the help. It does not parse, because its messages are those of a programmer, and
it does not say which fields were set.
"""

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, cast

from irqlora_jax.adapters import config as adapter
from irqlora_jax.config.mappings import read_mapping, read_value
from irqlora_jax.quant import config as quant
from irqlora_jax.text import refusal, require, shorten

Parsed = TypeVar("Parsed")
Convert = Callable[[str, Any], Any]
_RENAMED = {
    f"{section}.{old}": ".".join((section, *new))
    for section, names in (("quant", quant.RENAMED), ("adapter", adapter.RENAMED))
    for old, new in names.items()
}
"""Current names of fields by their other names."""


def parse_flags(kind: type[Parsed], argv: Sequence[str], script: str) -> Parsed:
    """Makes a dataclass from flags and, with `--config`, YAML files. Later values override earlier.

    The value of a boolean flag is optional: `--baseline` means `--baseline=true`.

    Raises:
        ValueError: no such file, unknown key, wrong type or invalid value. For a configuration of a
            run: also as `Config.load`.
        SystemExit: help or the configuration was asked for, and printed.
    """
    names = [flag.partition("=")[0] for flag in argv]
    if "-h" in names or any(re.fullmatch(r"--([\w.]+\.)?help", name) for name in names):
        _print_help(kind, argv, script)
    flags = [flag for flag in argv if flag != "--print_config"]
    parsed = parse(kind, list(_split_flags(dict(named_fields(kind)), flags, script)), script)
    if len(flags) < len(argv):
        import yaml

        # JSON makes tuples lists.
        values = json.loads(json.dumps(dataclasses.asdict(cast(Any, parsed))))
        print(yaml.safe_dump(values, sort_keys=False), end="")
        raise SystemExit(0)
    return parsed


def parse(
    kind: type[Parsed], values: Iterable[tuple[str, Any]], script: str, *, fill: bool = True
) -> Parsed:
    """Makes a dataclass from dotted names and values; "config" names a file with more of them.

    Args:
        kind: the dataclass. It may have a static method `fill(given, convert)`, which returns the
            values by dotted name with more of them.
        values: later ones override earlier ones.
        script: for the error message about an unknown field.
        fill: whether to call `kind.fill`.

    Raises:
        ValueError: no such file, unknown key, wrong type or invalid value.
    """
    known = dict(named_fields(kind))
    given: dict[str, Any] = {}
    for name, value in values:
        if name == "config":
            given |= _flatten(known, read_mapping(value), f"{value}: ", "", script)
        else:
            given |= _flatten(known, {name: value}, "--", "", script)
    filled = getattr(kind, "fill", None)
    if fill and filled is not None:
        given = filled(given, lambda name, value: _convert(name, known[name], value, script))
    return _build(kind, given, script)


def _print_help(kind: type, argv: Sequence[str], script: str) -> NoReturn:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=script,
        usage=f"{script} [--config FILE] [--field VALUE | --section.field VALUE ...]",
        description=kind.__doc__,
        print_config=None,
    )
    parser.add_argument(
        "--config", action="config", help="YAML or JSON file. Flags that follow override it."
    )
    parser.add_argument("--print_config", action="store_true", help="Print the configuration.")
    parser.add_class_arguments(kind, as_group=False)
    lists = [f"--{name}.help" for name, one in named_fields(kind) if _has_entries(one)]
    for flag in argv:
        if flag in lists:
            parser.parse_args([flag])
    parser.print_help()
    raise SystemExit(0)


def named_fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and the types of all sections and fields."""
    for field in dataclasses.fields(kind):
        yield prefix + field.name, field.type
        if dataclasses.is_dataclass(field.type):
            yield from named_fields(field.type, f"{prefix}{field.name}.")


def _split_flags(
    known: Mapping[str, Any], argv: Sequence[str], script: str
) -> Iterator[tuple[str, str]]:
    """Splits a command line into names and values."""
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(
                f"{shorten(flag)}: not a flag; expected --FIELD VALUE "
                f"({script} --help lists every field)"
            )
        name, equals, value = flag[2:].partition("=")
        name = _RENAMED.get(name, name)
        if name != "config":
            _check_known(name, known, "--", script)
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and known.get(name) in (bool, bool | str):
            value = "true"
        elif not equals:
            raise ValueError(f"--{name}: no value follows; expected --{name} VALUE")
        yield name, value


_SOURCES = {"model", "run"}  # what a command reads; each command has one of these flags


def _check_known(name: str, known: Mapping[str, Any], written: str, script: str) -> None:
    if name in known:
        return
    last = name.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for other in known:
        by_last.setdefault(other.rpartition(".")[2], []).append(other)
    # A misspelled name, or the same or a similar one in another section.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8) or by_last.get(last, [])
    near = near or [other for other in known if {name, other} == _SOURCES]
    if not near:
        similar = difflib.get_close_matches(last, by_last, n=1)
        near = [other for one in similar for other in by_last[one]]
    start = "--" if written == "--" else ""
    hint = f"; did you mean {' or '.join(start + other for other in near[:3])}?" if near else ""
    raise ValueError(
        f"{written}{shorten(name, quoted=False)}: unknown field{hint} "
        f"({script} --help lists every field)"
    )


def _flatten(
    known: Mapping[str, Any], values: Mapping[Any, Any], written: str, prefix: str, script: str
) -> dict[str, Any]:
    """Returns the values of fields by dotted name. Sections without a value are left out.

    Args:
        known: names and types of all sections and fields.
        values: nested values of sections and fields. Names may be dotted.
        written: stands in front of a name in error messages.
        prefix: of the names.
        script: for the error message about an unknown field.

    Raises:
        ValueError: an unknown field, one that appears twice, or a section without fields.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = _RENAMED.get(f"{prefix}{key}", f"{prefix}{key}")
        _check_known(name, known, written, script)
        if not dataclasses.is_dataclass(known[name]):
            found = {name: value}
        else:
            if isinstance(value, str):
                loaded = read_value(value)
                value = read_mapping(value) if os.path.isfile(value) else loaded
            accepted = "a section with fields"
            require(value is None or isinstance(value, dict), written + name, value, accepted)
            found = _flatten(known, value or {}, written, f"{name}.", script)
        for name in flat.keys() & found.keys():
            raise ValueError(f"{written}{name} appears twice: expected every key once")
        flat |= found
    return flat


def _build(kind: type[Parsed], given: Mapping[str, Any], script: str, prefix: str = "") -> Parsed:
    """Makes a dataclass from the values of its fields by dotted name.

    Raises:
        ValueError: a required field has no value, or a value has the wrong type or is invalid.
    """
    values: dict[str, Any] = {}
    missing: list[str] = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name, inner = prefix + field.name, cast(Any, field.type)
        if dataclasses.is_dataclass(inner):
            if any(other.startswith(f"{name}.") for other in given):
                values[field.name] = _build(cast(Any, inner), given, script, f"{name}.")
        elif name in given:
            values[field.name] = _convert(name, inner, given[name], script)
        elif field.default is dataclasses.MISSING:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: no value, but one is required "
            f"({script} --help lists every field)"
        )
    return kind(**values)


def _convert(name: str, kind: Any, value: Any, script: str) -> Any:
    """Converts a value from a file or a flag to the type of its field.

    Where the field is not text, text is read as YAML.

    Raises:
        ValueError: another type.
    """
    if typing.get_origin(kind) is tuple:
        return _convert_list(name, kind, value, script)
    kinds = _alternatives(kind)
    if types.NoneType in kinds and (value is None or value in ("null", "~")):
        return None
    for one in kinds:
        if typing.get_origin(one) is tuple and _is_list(name, one, value):
            return _convert_list(name, one, value, script)
    for one in kinds:
        if typing.get_origin(one) is tuple:
            continue
        if typing.get_origin(one) is Literal:
            for choice in typing.get_args(one):
                if value == choice and type(value) is type(choice):
                    return choice
                if isinstance(choice, int) and value == str(choice):  # a flag
                    return choice
            continue
        found: Any = read_value(value) if isinstance(value, str) and one is not str else value
        if one is float and type(found) is int and abs(found) < _LIMIT:
            return float(found)
        # A bool is an int for isinstance.
        if type(found) is one and (one is not int or abs(found) < _LIMIT):
            return found
    words = _in_words(kind)
    if str in kinds and isinstance(value, int | float):
        words = words.replace("text", "text in quotes", 1)
    raise refusal(name, value, words)


_LIMIT = 2**63
"""Larger numbers do not fit into an integer of 64 bits."""


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _has_entries(kind: Any) -> bool:
    """Whether a field may be a list of entries with fields of their own."""
    return any(
        typing.get_origin(one) is tuple and dataclasses.is_dataclass(typing.get_args(one)[0])
        for one in _alternatives(kind)
    )


def _is_list(name: str, kind: Any, value: Any) -> bool:
    """Whether a value is meant as a list where the field may also be text."""
    found = read_value(value) if isinstance(value, str) else value
    ok = not (isinstance(found, str) and found.startswith("[{"))
    require(ok, name, value, _in_words(kind))
    return isinstance(found, list | tuple | dict)


def _convert_list(name: str, kind: Any, value: Any, script: str) -> tuple[Any, ...]:
    """Converts a list. A single value, also as text, stands for a list of one."""
    inner: Any = typing.get_args(kind)[0]
    found = read_value(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        ok = found is not None and not (isinstance(value, str) and value.startswith("["))
        require(ok, name, value, _in_words(kind))
        found = [value if inner is str else found]
    if not dataclasses.is_dataclass(inner):
        require(all(isinstance(one, inner) for one in found), name, value, _in_words(kind))
        return tuple(found)
    made: list[Any] = []
    alone: str | None = getattr(inner, "text_field", None)
    one: Any
    for place, one in enumerate(found):
        prefix = f"{name}[{place}]."
        if not isinstance(one, inner):
            # Text stands for an entry with this field alone.
            values: Any = {alone: one} if isinstance(one, str) and alone is not None else one
            require(isinstance(values, dict), prefix[:-1], one, _in_words(inner))
            fields = _flatten(dict(named_fields(inner, prefix)), values, "", prefix, script)
            one = _build(inner, fields, script, prefix)
        made.append(one)
    return tuple(made)


def _in_words(kind: Any) -> str:
    """Says which values a field accepts."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        many = {str: "[a, b]", int: "[1, 2]"}.get(inner) or inner.example
        return f"a list such as {many}, or a single value"
    if dataclasses.is_dataclass(kind):
        return f"a section with {' or '.join(field.name for field in dataclasses.fields(kind))}"
    words: dict[Any, str] = {bool: "true or false", int: "a whole number"}
    words |= {float: "a number", str: "text", types.NoneType: "null"}
    accepted: list[str] = []
    for one in _alternatives(kind):
        if typing.get_origin(one) is tuple:
            accepted.append(_in_words(one).removesuffix(", or a single value"))
        elif typing.get_origin(one) is Literal:
            accepted += map(str, typing.get_args(one))
        else:
            accepted.append(words[one])
    *most, last = accepted
    return f"{', '.join(most)} or {last}" if most else last
