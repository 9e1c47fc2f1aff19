"""Renders chat templates, as a program of its own that can be stopped (see `template.py`).

It imports nothing of the package, so it starts in a tenth of a second. It reads requests from
standard input and answers on standard output, one JSON object a line.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils


class Generation(jinja2.ext.Extension):
    """{% generation %}, which only marks the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Returns the block, with a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_inside")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace without the names that lead to the internals of Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a field may be called "self"
        self, *rest = args
        fields = dict(*rest, **kwargs)
        for name in fields:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the field {name!r}")


class Dict:
    """The function `dict` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Makes a dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Makes a dictionary from its keys."""
        return dict.fromkeys(*args)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(8)
def compile_template(text: str) -> jinja2.Template:
    """Compiles a template with what transformers offers to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(text)


def answer(asked: dict[str, Any], characters: int) -> dict[str, Any]:
    """Renders a template for some conversations: {"texts": ...}, or the reason of a failure."""
    texts = []
    try:
        for seen in asked["seen"]:
            # Without a handler this signal ends the process, whatever it computes.
            signal.alarm(asked["seconds"])
            template = compile_template(asked["template"])
            texts.append(template.render(json.loads(seen) | asked["tokens"]))
            if len(texts[-1]) > characters:
                return {"stopped": f"it writes more than {characters:,} characters"}
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": f"{error.message} in line {error.lineno}"}
    except MemoryError:
        return {"stopped": "it needs too much memory"}
    except Exception as error:  # a template can raise anything
        return {"failed": " ".join(str(error).split()) or type(error).__name__}
    finally:
        signal.alarm(0)
    return {"texts": texts}


def main(memory: int, characters: int) -> None:
    """Answers requests until the end of the input. A slow one ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    with contextlib.suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), characters)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
