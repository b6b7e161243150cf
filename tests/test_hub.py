"""torch.hub loads the networks, also for a caller whose own module is called `model`."""

from pathlib import Path

import pytest
import torch

from tests.forked import run_script
from u2mamba.inference import load_model

ROOT = Path(__file__).parents[1]


def test_a_caller_with_a_module_called_model(tmp_path):
    (tmp_path / "model.py").write_text("OWN = True\n", encoding="utf-8")
    (tmp_path / "use.py").write_text(
        "import torch, model\n"
        f"root = {str(ROOT)!r}\n"
        "net = torch.hub.load(root, 'u2mambap', source='local')\n"
        "same = torch.hub.load(root, 'u2net_file', root + '/saved_models/u2mambap.pth', source='local')\n"
        "import model as again\n"
        "assert again.OWN and not net.training and net.settings == same.settings\n"
        "torch.save([n(torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64))[0] for n in (net, same)], 'd0.pt')\n",
        encoding="utf-8",
    )
    assert run_script(tmp_path / "use.py", [], tmp_path, tmp_path).returncode == 0
    with torch.no_grad():
        expected = load_model("small")(torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64))[0]
    for d0 in torch.load(tmp_path / "d0.pt"):
        torch.testing.assert_close(d0.detach(), expected, rtol=0, atol=1e-6)


def test_weights_that_are_missing_are_named_and_random_ones_need_no_file(tmp_path):
    large = torch.hub.load(str(ROOT), "u2mamba", pretrained=False, mamba_norm="gate", source="local")
    assert sum(p.numel() for p in large.parameters()) > 45_000_000 and not large.training
    with pytest.raises(ValueError, match=r"absent\.pth: there is no such checkpoint"):
        torch.hub.load(str(ROOT), "u2net_file", str(tmp_path / "absent.pth"), source="local")
