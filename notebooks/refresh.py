"""Runs the notebooks again and stores their outputs: `python notebooks/refresh.py [FILE ...]`.

Needs the extra `notebook`. Removes output that differs between machines: paths, times, warnings,
progress bars. Writes the repository's address from pyproject.toml into the notebooks and README.md.
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
SHOWN = ("quickstart", "gradients")  # only with a GPU are the third notebook's outputs useful


def repository() -> str:
    """OWNER/NAME on GitHub."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def addressed(text: str) -> str:
    """Replaces the repository's address in a text by the current one."""
    name = repository()
    return re.sub(rf"(github(?:\.com)?)/[\w.-]+/{name.split('/')[1]}\b", rf"\1/{name}", text)


def execute(path: Path, environment: Mapping[str, str]) -> nbformat.NotebookNode:
    """Executes a notebook and returns it with its outputs.

    Args:
        path: the notebook.
        environment: variables for it; IRQLORA_NOTEBOOK_NAME sets a parameter.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": path.parent}})
    return client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def cleaned(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
    """Cleans outputs for the repository. The notebook wrote its runs into `folder`."""
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
    """Reduces a plot to 256 colors, which takes a third of the bytes."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image = image.convert("RGB").quantize(
        256, Image.Quantize.MAXCOVERAGE
    )  # keeps thin lines distinct
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
    files = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.ipynb"))
    for file in [ROOT / "README.md", *files]:
        file.write_text(addressed(file.read_text()))
    for file in files:
        if file.stem in SHOWN:
            with tempfile.TemporaryDirectory() as folder:
                environment = {"IRQLORA_NOTEBOOK_RUN": f"{folder}/{file.stem}"}
                notebook = cleaned(execute(file.resolve(), environment), folder)
            file.write_text(nbformat.writes(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
