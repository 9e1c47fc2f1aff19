"""The rooms of the package, and the one direction in which they import each other."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "irqlora_jax"
# From low to high. Rooms on one floor may not import each other.
FLOORS = (
    ("text", "messages", "machine", "kernels"),
    ("processes", "data"),
    ("sharding",),
    ("quant",),
    ("adapters",),
    ("model",),
    ("files",),
    ("base",),
    ("config",),
    ("runs",),
    ("generate", "export"),
    ("evaluate", "serve"),
    ("report",),
    ("train",),
    ("plan", "hf"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(source: str) -> set[str]:
    """The rooms that a file imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "irqlora_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("irqlora_jax."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "irqlora_jax" and len(name) > 1}
    return found


def upward(files: dict[str, str]) -> list[str]:
    """The imports that do not lead to a lower floor, of sources by their path in the package."""
    found = []
    for path, source in sorted(files.items()):
        room = path.removesuffix(".py").split("/")[0]
        for other in sorted(rooms_imported(source) - {room}):
            if FLOOR[other] >= FLOOR[room]:
                found.append(f"{path} imports {other}, which is not below {room}")
    return found


def sources() -> dict[str, str]:
    """All files but the two that only name what there is."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    named = ("__init__.py", "__main__.py")
    return {name: path.read_text() for name, path in paths.items() if name not in named}


def test_no_import_leads_upwards_so_there_is_no_circle():
    assert upward(sources()) == []


def test_the_check_sees_an_import_that_leads_upwards():
    inside = {"quant/icq.py": "def f():\n    from irqlora_jax.runs import load\n"}
    assert upward(inside) == ["quant/icq.py imports runs, which is not below quant"]
    assert len(upward({"data/rows.py": "from irqlora_jax import sharding"})) == 1
    assert upward({"runs/load.py": "import irqlora_jax.quant.icq"}) == []


def test_every_room_has_a_floor_and_few_modules_stand_outside_of_them():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == set(FLOOR)
    assert len(modules) <= 8
