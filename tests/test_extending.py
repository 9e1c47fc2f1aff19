"""docs/extending.md, run: its three files, and what they make of the product, in a copy of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.models import NARROW, ROOT, word_tokenizer, write_model

PAGE = ROOT / "docs" / "extending.md"
SCRIPT = """
import json, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
import irqlora_jax as irq
from irqlora_jax import cli
from irqlora_jax.runs.load import load_run

def call(*words):
    assert cli.main(list(words)) == 0, words

quant = ["--quant.format=even2", "--quant.calibration=middle"]
call("quantize", "--model=model", "--output_dir=base", "--progress=false", *quant)
train = ["train", "--model=base", "--output_dir=run", "--adapter.method=gate", "--adapter.rank=4",
         "--data.train=rows.jsonl", "--data.format=input_output", "--train.batch_size=2",
         "--train.learning_rate=0.05", "--log.progress=false", "--train.save_every=2", *quant]
call(*train, "--train.steps=2")
call(*train, "--train.steps=4")  # resumes
call("export", "--run=run", "--output_dir=adapter", "--kind=adapter", "--progress=false")
call("export", "--run=run", "--output_dir=merged", "--kind=merged", "--progress=false")
call("report", "--run=run")
opened, tokens = load_run("run"), jnp.arange(3, 11)[None]
assert opened.step == 4 and opened.model.adapter.method == "gate"
gate = opened.variables["params"]["layers"]["mlp"]["up_proj"]["gate"]
assert gate.shape == (2, 4) and (gate != 1).any()  # it was trained, saved and read
def logits(params, base):
    return np.asarray(opened.model.apply({"params": params, "base": base}, tokens))
expected = logits(opened.variables["params"], opened.variables["base"])
again = irq.hf.load_adapter("adapter", opened.model)
np.testing.assert_allclose(logits(again, opened.variables["base"]), expected, atol=1e-4)
whole = load_run("merged")
merged = np.asarray(whole.model.apply(whole.variables, tokens))
np.testing.assert_allclose(merged, expected, atol=1e-4)
card, page = Path("adapter/README.md").read_text(), Path("run/report.html").read_text()
assert "even2 with shifts in the middle of the range" in card and "a gated LoRA adapter" in card
assert "even2" in page and "middle" in page and "gated LoRA" in page
print("done")
"""


def test_one_file_and_one_line_each_reach_the_whole_product(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("irqlora_jax", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    added = 0
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found = re.match(r"# (append to )?(irqlora_jax/\S+)\n", code)
        if found is not None:
            file = tmp_path / found[2]
            assert file.exists() == bool(found[1]), file
            file.write_text((file.read_text() if found[1] else "") + code)
            added += 1
    assert added == 6
    write_model(tmp_path / "model", NARROW, tokenizer=word_tokenizer(NARROW.vocab_size))
    row = '{"input": "word4 word5", "output": "word6 word7"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 6)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("done")
