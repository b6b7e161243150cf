"""examples/quickstart.ipynb runs: its code cells in order, twice, in one namespace."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code, namespace = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"], {}
    outputs = []
    for _ in range(2):
        for cell in code:
            exec(compile(cell, NOTEBOOK.name, "exec"), namespace)  # noqa: S102 - our own notebook
        outputs.append(capsys.readouterr().out)
    first, second = outputs
    before, after = first.split("MAE before: ")[1].split(", after: ")
    assert float(after) < float(before) and second.endswith(f"MAE before: {before}, after: {after}")
    assert "done: 1 images" in first and "are already done" in second and "holds a finished run" in second
