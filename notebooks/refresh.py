"""Runs the notebooks again and keeps their outputs: `python notebooks/refresh.py [FILE ...]`.

Needs the extra `notebook`. Things that differ between machines are left out: paths, times,
warnings, progress bars. The address of the repository comes from pyproject.toml. Once its owner is
known, the first cell of every notebook gets a badge that opens it in Colab.
"""

import base64
import io
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
SHOWN = ("quickstart", "gradients")  # the outputs of the other one need a GPU
UNKNOWN = "OWNER"
"""The owner in pyproject.toml as long as nobody knows it."""
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"


def repository() -> str:
    """OWNER/NAME on GitHub."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def addressed(text: str, owned: str) -> str:
    """A text with the current address of the repository, `owned` (OWNER/NAME)."""
    return re.sub(rf"(github(?:\.com)?)/[\w.-]+/{owned.split('/')[1]}\b", rf"\1/{owned}", text)


def badged(text: str, name: str, owned: str) -> str:
    """The first cell of the notebook `name`, with its badge if the owner in `owned` is known."""
    title, *rest = (part for part in text.split("\n\n") if not part.startswith(BADGE))
    if not owned.startswith(f"{UNKNOWN}/"):
        rest.insert(0, f"{BADGE}({COLAB}/github/{owned}/blob/main/notebooks/{name}.ipynb)")
    return "\n\n".join([title, *rest])


def execute(path: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Args:
        path: which.
        environment: variables for it, IRQLORA_NOTEBOOK_NAME for its parameters.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": path.parent}})
    return client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def cleaned(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
    """Outputs as they are committed; runs lay in `folder`."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            kept = []
            for output in cell.outputs:
                if _is_noise(output):
                    continue
                if "text" in output:
                    output.text = output.text.replace(folder, "runs").replace(f"{ROOT}/", "")
                    if kept and kept[-1].get("name") == output.name:
                        kept[-1].text += output.text
                        continue
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _small(output.data["image/png"])
                kept.append(output)
            cell.outputs = kept
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _is_noise(output: nbformat.NotebookNode) -> bool:
    framed = "<iframe" in output.get("data", {}).get("text/html", "")  # a whole page
    return output.get("name") == "stderr" or framed


def _small(png: str) -> str:
    """A plot with 256 colors, which takes a third of the bytes."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # keeps thin lines apart
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    files = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.ipynb"))
    owned = repository()
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        notebook.cells[0].source = badged(notebook.cells[0].source, file.stem, owned)
        file.write_text(addressed(nbformat.writes(notebook, indent=1) + "\n", owned))
        if file.stem in SHOWN:
            with tempfile.TemporaryDirectory() as folder:
                environment = {"IRQLORA_NOTEBOOK_RUN": f"{folder}/{file.stem}"}
                notebook = cleaned(execute(file.resolve(), environment), folder)
            file.write_text(nbformat.writes(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
