"""What README.md and docs/results.md tell users to type."""

import re
import subprocess
import sys
from pathlib import Path

from u2mamba.runtime.config import read_settings
from u2mamba_train import PRESETS, Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def test_the_python_in_it_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "\nassert d0.shape == (1, 1, 320, 320) and len(sides) == 6 and 0.9 < d0.max() <= 1, d0"
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_trainer_takes_its_commands():
    commands = re.findall(r"u2mamba_train\.py((?: [\w./-]+)*)", README + RESULTS)
    given = {words for words in commands if words.startswith((" --", *(f" {preset}" for preset in PRESETS)))}
    assert len(given) >= 10, given
    for words in given:
        read_settings(Config(), PRESETS, words.split())
