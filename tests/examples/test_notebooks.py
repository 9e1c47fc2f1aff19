"""The notebooks: what holds of their files, and that they run on the tiny model."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("gradients", "llama_alpaca", "quickstart")
DATA = ROOT / "examples" / "factworld" / "data"
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|opt|content|Users|private|var)\b")


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())


def test_these_are_all() -> None:
    assert sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file(name: str) -> None:
    """nbformat 4.5, code that parses, and nothing of the machine that it ran on."""
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            # Lines for the shell and for IPython stand where a statement could.
            ast.parse(re.sub(r"(?m)^( *)[!%].*$", r"\1pass", source), cell["id"])
            for output in cell["outputs"]:
                assert output["output_type"] in ("stream", "display_data", "execute_result")
                assert output.get("name") != "stderr"
                assert "text/html" not in output.get("data", {})
                assert not MACHINE.search(json.dumps(output.get("text", "")))
    assert len(json.dumps(notebook)) < 300_000


def badge(name: str, owned: str) -> str:
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{owned}/blob/main/notebooks/{name}.ipynb)"
    )


@pytest.mark.parametrize("name", NAMES)
def test_address(name: str) -> None:
    """The first code cell clones this repository. A badge opens the notebook, if the owner of the
    repository is known. README links the file."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    repository = urls["Repository"]
    owned = repository.removeprefix("https://github.com/")
    assert re.fullmatch(r"[\w.-]+/irqlora_jax", owned)
    cells = ["".join(cell["source"]) for cell in read(name)["cells"]]
    known = not owned.startswith("OWNER/")
    assert (badge(name, owned) in cells[0]) == ("Open in Colab" in cells[0]) == known
    assert f"git clone -q {repository}\n" in cells[1]
    assert f"](notebooks/{name}.ipynb)" in (ROOT / "README.md").read_text()
    for text in cells:
        assert set(re.findall(r"github(?:\.com)?/([\w.-]+/irqlora_jax)", text)) <= {owned}


def test_a_badge_stands_behind_the_title_once_the_owner_is_known() -> None:
    pytest.importorskip("nbclient", reason="needs the extra notebook")
    badged, known = refresh().badged, f"# Title\n\n{badge('a', 'me/irqlora_jax')}\n\nText."
    assert badged("# Title\n\nText.", "a", "me/irqlora_jax") == known
    assert badged(known, "a", "me/irqlora_jax") == known
    assert badged(known, "a", "you/irqlora_jax") == known.replace("me/", "you/")
    assert badged(known, "a", "OWNER/irqlora_jax") == "# Title\n\nText."


ENVIRONMENTS = {
    "quickstart": {"STEPS": "60"},
    "gradients": {"STEPS": "40"},
    "llama_alpaca": {
        "MODEL": str(ROOT / "examples/factworld/base-small"),
        "DATA": str(DATA / "train.jsonl"),
        "DATA_FORMAT": "input_output",
        "STEPS": "6",
        "TASK": "questions",
        "QUESTIONS": str(DATA / "questions.jsonl"),
        "LIMIT": "64",
        "MESSAGE": "question what is keeper of Sirock Grolmix ? answer",
    },
}


def refresh() -> Any:
    """The script beside the notebooks, which are no package."""
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "notebooks" / "refresh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(name: str, folder: Path) -> dict[str, str]:
    """What each cell wrote, and the HTML that it showed, after a run of all cells."""
    pytest.importorskip("nbclient", reason="needs the extra notebook")
    pytest.importorskip("ipykernel", reason="needs the extra notebook")
    pytest.importorskip("matplotlib", reason="needs the extra notebook")
    values = ENVIRONMENTS[name] | {"RUN": str(folder / name), "FOLDER": str(folder / name)}
    environment = {f"IRQLORA_NOTEBOOK_{key}": value for key, value in values.items()}
    environment |= {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")}
    notebook = refresh().execute(ROOT / "notebooks" / f"{name}.ipynb", environment)
    written = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        streams = [o["text"] for o in outputs if o.get("name") == "stdout"]
        pages = [o["data"].get("text/html", "") for o in outputs if "data" in o]
        written[cell["id"]] = "".join(streams + pages)
        drawn = any("image/png" in o.get("data", {}) for o in outputs)
        assert drawn == ("plt.figure" in cell.source or "plt.subplots" in cell.source), cell.id
    refresh().cleaned(notebook, str(folder))
    assert str(folder) not in json.dumps([cell.get("outputs") for cell in notebook.cells])
    return written


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.filterwarnings("ignore")  # of other packages
def test_quickstart(tmp_path: Path) -> None:
    written = ran("quickstart", tmp_path)
    before, after = numbers(written["entropy-plot"])
    assert 2.5 < before < after < 3
    table = {line[:24].strip(): numbers(line[24:]) for line in written["train"].splitlines()}
    losses = [
        table[row][-4] for row in ("full precision", "nf3 + robust", "nf3 + robust, finetuned")
    ]
    assert losses[0] < 1.6 and losses[2] < losses[1] < table["plain nf3"][-4] < 2.8
    assert written["ask"].count("\n") == 3
    assert "<iframe" in written["report"] and "&lt;svg" in written["report"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_gradients(tmp_path: Path) -> None:
    written = ran("gradients", tmp_path)
    whole, rounded = numbers(written["loss"])
    assert whole == pytest.approx(1.494, abs=0.005) and 2.2 < rounded < 3
    before, tuned = numbers(written["tune"])
    assert before == rounded and tuned < before - 0.1
    fixed, straight = written["ste"].splitlines()
    assert "by weight 0 " in fixed and "by weight 1 " in straight
    assert abs(numbers(straight)[-1]) < 1e-5 < abs(numbers(fixed)[-1])
    correlation, added, at_once = numbers(written["sensitivity-plot"])
    assert 0 < correlation <= 1 and added > 0.5 and at_once > 0.5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_llama_alpaca(tmp_path: Path) -> None:
    written = ran("llama_alpaca", tmp_path)
    assert "computes in float32" in written["device"]
    assert "peak" in written["plan"] and "fits" in written["plan"]
    assert "bits a weight" in written["quantize"]
    assert "finetuned" in written["evaluate"]
    assert "adapter_model.safetensors" in written["export"]
    assert written["push"] == ""
