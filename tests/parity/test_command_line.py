"""The whole path with the installed command alone, and transformers at its end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data"
COMMAND = Path(sys.executable).with_name("irqlora")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")


def irqlora(*flags: object) -> str:
    done = subprocess.run([COMMAND, *map(str, flags)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quantize_train_mmlu_export_load_generate(tmp_path: Path) -> None:
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    mmlu = tmp_path / "mmlu"
    for part in ("dev", "test"):
        (mmlu / part).mkdir(parents=True)
        for subject in ("anatomy", "astronomy"):
            shutil.copy(DATA / "mmlu" / part / f"{subject}_{part}.csv", mmlu / part)

    irqlora("quantize", "--model", DATA / "stories260K", "--output_dir", base, "--progress=false")
    irqlora(
        *("train", "--model", base, "--output_dir", run, "--adapter.rank=4"),
        *("--data.train", DATA / "alpaca" / "alpaca_tiny.json", "--data.eval_fraction=0.1"),
        # Rows of one length, because every length is compiled.
        *("--data.source_length=96", "--data.target_length=32"),
        *("--train.steps=6", "--train.batch_size=4", "--train.compute_dtype=float32"),
        *("--train.learning_rate=1e-2", "--log.progress=false"),
    )
    out = irqlora("eval", "--run", run, "--task=mmlu", "--mmlu", mmlu, "--progress=false")
    assert "anatomy" in out and "STEM" in out
    scores = json.loads((run / "eval-mmlu.json").read_text())
    assert 0 < scores["accuracy"] < 0.6
    irqlora(
        *("export", "--run", run, "--output_dir", merged, "--kind=merged", "--dtype=float32"),
        "--progress=false",
    )
    assert "mmlu" in (merged / "README.md").read_text().lower()  # the scores travel along

    prompt = "Once upon a time"
    flags = ("--prompt", prompt, "--max_new_tokens=24")
    irqlora("eval", "--run", merged, "--task=generate", *flags, "--output", tmp_path / "text.json")
    ours = json.loads((tmp_path / "text.json").read_text())["text"]
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    tokens = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), tokens], dim=1)
    theirs = model.generate(tokens, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True).endswith(ours)
    assert len(ours) > 20
