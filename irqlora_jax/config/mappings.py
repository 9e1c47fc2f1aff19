"""Mappings and values from YAML and JSON text."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from irqlora_jax.text import read_text, shorten


def read_mapping(path: str) -> dict[Any, Any]:
    """Reads a file of YAML or JSON.

    Raises:
        ValueError: the file cannot be read, is not valid, or a key appears twice.
    """
    import yaml

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(_repeated([name for name, _ in pairs]))
        return dict(pairs)

    repeated: list[str] = []
    try:
        text = read_text(Path(path))
        # JSON and YAML write non-finite numbers differently.
        if path.endswith(".json"):
            values = json.loads(text, object_pairs_hook=unique)
        else:
            values = yaml.load(text, _yaml_loader())
            repeated.extend(_repeated_keys(yaml.compose(text, _yaml_loader())))
    except OSError as error:
        raise ValueError(f"config = {shorten(path)}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise ValueError(f"{where}: not valid YAML ({problem or 'bad character'})") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deep; expected fields and sections") from None
    if repeated:
        raise ValueError(f"{path}: {repeated[0]} appears twice: expected every key once")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no fields; expected lines such as 'model: FOLDER'")
    return values


@functools.cache
def _yaml_loader() -> Any:
    """Loads "1e-4" as a number and dates as text, unlike YAML 1.1."""
    import yaml

    fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(fastest):
        yaml_implicit_resolvers: ClassVar = {
            first: [pair for pair in pairs if not pair[0].endswith((":float", ":timestamp"))]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    number = r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)"
    special = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    pattern = re.compile(f"^(?:{number}|{special})$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))
    return Loader


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for place, name in enumerate(names) if name in names[:place]]


def _repeated_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of keys that appear twice in a mapping of a YAML node."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "sequence":
        for child in node.value:
            yield from _repeated_keys(child, prefix)
        return
    names = [f"{prefix}{key.value}" for key, _ in node.value]
    yield from _repeated(names)
    for name, (_, child) in zip(names, node.value, strict=True):
        yield from _repeated_keys(child, f"{name}.")


def read_value(text: str) -> Any:
    """Reads a value from text, or returns the text if it is no YAML."""
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except (yaml.YAMLError, ValueError, RecursionError):  # int() refuses more than 4300 digits
        return text
