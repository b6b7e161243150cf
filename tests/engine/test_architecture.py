"""The structure: imports go one way, packages do not import the scripts, and u2mamba/fast/ can be deleted."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from tests.engine.tiny import words
from tests.forked import run_script

ROOT = Path(__file__).parents[2]


def test_imports_go_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_package_imports_a_file_of_the_root():
    root = {path.stem for path in ROOT.glob("*.py")}
    for path in (*ROOT.glob("model/**/*.py"), *ROOT.glob("u2mamba/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not root & {name.partition(".")[0] for name in names}, f"{path}: {names}"


def test_everything_trains_without_the_folder_fast(data, tmp_path):
    for name in ("u2mamba_train.py", "data_loader.py", "model", "u2mamba"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.rmtree(tmp_path / "u2mamba" / "fast")
    more = words(data, tmp_path / "saved", "--epoch_num", "1")
    done = run_script(tmp_path / "u2mamba_train.py", more, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step: plain PyTorch (u2mamba/fast not found)" in done.stdout and "done: 6 iterations" in done.stdout
