"""README.md, docs/, the notebook: commands parse, Python code runs, links lead somewhere, options are current."""

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

import u2mamba_export
from u2mamba.runtime.config import OLD_NAMES, read_settings
from u2mamba.runtime.environment import VERSION
from u2mamba_train import PRESETS, Config

ROOT = Path(__file__).parents[1]
PAGES = {p: p.read_text("utf-8") for p in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")) if p.name != "LOG.md"}
TEXT, README = "\n".join(PAGES.values()), PAGES[ROOT / "README.md"]
SCRIPT = r"(?:python|torchrun[^`\n]*?) (?:-m )?(u2mamba_\w+\.py|benchmarks\.\w+|train_data/\w+\.py)([^`\n#&>]*)"
COLUMN = rf"`((?:{'|'.join(PRESETS)}) --[^`]*)`"  # of tables: a preset and options
COMMANDS = {*re.findall(SCRIPT, TEXT), *(("u2mamba_train.py", words) for words in re.findall(COLUMN, TEXT))}


@pytest.mark.parametrize(("script", "words"), sorted(COMMANDS))
def test_a_command_parses(script, words):
    module, argv = importlib.import_module(script.removesuffix(".py").replace("/", ".")), shlex.split(words)
    if script == "u2mamba_train.py":
        read_settings(Config(), PRESETS, argv)
    elif script.startswith("train_data"):
        assert all(word in inspect.getsource(module) for word in argv if word.startswith("--"))
    else:
        tyro.cli(module.Config, use_underscores=True, args=argv)


def test_the_table_of_options_is_current():
    source, rows = inspect.getsource(Config).splitlines(), []
    for node in ast.parse("\n".join(source)).body[0].body:
        lines = (*source[node.lineno - 1 : node.end_lineno], source[node.lineno - 2])
        comment = next(line.partition("# ")[2] for line in lines if "# " in line)
        rows.append(f"| `{node.target.id}` | `{getattr(Config(), node.target.id)!r}` | {comment} |\n")
    assert "".join(rows) in PAGES[ROOT / "docs/training.md"], "".join(rows)


def test_the_frame_is_current():
    change, citation = PAGES[ROOT / "CHANGELOG.md"], (ROOT / "CITATION.cff").read_text("utf-8")
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"\nversion: {VERSION}\n" in citation and re.search(r"^## (.*)", change, re.MULTILINE)[1] == VERSION
    missing = [name for name in OLD_NAMES if not re.search(rf"`{name}\b", change)]
    assert not missing, f"CHANGELOG.md lacks {missing}"


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!http|\.\./\.\./)([^)#]*)#?([^)]*)\)", text):
            file = (page.parent / target).resolve() if target else page
            titles = re.findall(r"^#+ (.*)$", PAGES.get(file, ""), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert file.exists() and (not anchor or anchor in slugs), f"{page.name}: {target}#{anchor}"


def test_python_blocks_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "examples/coffee.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    u2mamba_export.main(u2mamba_export.Config(out="small.onnx"))
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(code.replace("saved_models/", f"{ROOT}/saved_models/"), {})  # noqa: S102 - our own pages


def test_the_notebook_runs_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))["cells"]
    namespace, outputs = {}, []
    for _ in range(2):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), namespace)  # noqa: S102 - our own notebook
        outputs.append(capsys.readouterr().out)
    first, second = outputs
    before, after = first.split("MAE before: ")[1].split(", after: ")
    assert float(after) < float(before) and second.endswith(f"MAE before: {before}, after: {after}")
    assert "done: 1 images" in first and "are already done" in second and "holds a finished run" in second


def test_the_readme_is_short():
    assert README.count("\n") <= 220 and len(README.encode()) <= 13_000
    assert len(re.findall(r"[0-9][0-9.,]*", README)) <= 260
