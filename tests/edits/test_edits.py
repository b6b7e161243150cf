"""Each diff of docs/editing.md, applied to a copy of the project does as it says."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.tiny import draw_pairs
from tests.forked import run_script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/editing.md").read_text("utf-8")
DIFFS = dict(re.findall(r"^### ([^\n]*)\n[^#]*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
TRAIN = (
    "finetune --model_name run --arch one --epoch_num 1 --batch_size_train 4 --rescale 64 --crop 64 --device cpu "
    "--precision fp32 --warmup_iters 0 --lr_schedule constant --log_frq 1 --tra_image_dir images --tra_label_dir masks "
    "--val_image_dir val/images --val_label_dir val/masks --pretrained="
).split()
BEST = "saved_models/run/best.pth"
U2NETP, U2MAMBAP = (("--arch", arch, "--pretrained", "small") for arch in ("u2netp", "u2mambap"))
ONE = """

class One(nn.Module):  # for edits that have nothing to do with the network
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)

    def forward(self, x, logits=False):
        return self.conv(x).split(1, 1) if logits else self.conv(x).sigmoid().split(1, 1)


ARCHS["one"] = One
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")


def apply(folder: Path, diff: str) -> None:
    """Hunks after `@@` or `--- file`; unchanged and removed lines occur once, up to their comments."""

    def code(line: str) -> str:
        return line.split("  # ")[0].rstrip()

    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        path = folder / name
        for hunk in hunks.split("\n@@\n"):
            lines, source = hunk.splitlines(), path.read_text("utf-8").splitlines()
            old = [code(line[1:]) for line in lines if line[:1] != "+"]
            places = [i for i in range(len(source)) if [code(s) for s in source[i : i + len(old)]] == old]
            assert len(places) == 1, f"{name}: {len(places)} places for\n{hunk}"
            kept, new = iter(source[places[0] :]), []
            for line in lines:
                before = line[1:] if line[:1] == "+" else next(kept)
                new += [] if line[:1] == "-" else [before]
            source[places[0] : places[0] + len(old)] = new
            path.write_text("\n".join(source) + "\n", "utf-8")


def make_data(folder: Path, *options) -> Path:
    """Eight pairs to train and two to validate."""
    draw_pairs(folder / "val", ("p8", "p9"), *options, seed=1)
    return draw_pairs(folder, [f"p{i}" for i in range(8)], *options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def project(data, tmp_path):
    """A copy of the project: `edit` applies diffs of the page, `run` a script -> its lines, `train` the trainer."""
    folder = tmp_path / "project"
    for package in ("model", "u2mamba", "saved_models"):
        shutil.copytree(ROOT / package, folder / package)
    for script in ROOT.glob("*.py"):
        shutil.copy2(script, folder)
    with (folder / "model/__init__.py").open("a") as file:
        file.write(ONE)

    def edit(*titles, old="", new=""):
        for title in titles:
            apply(folder, DIFFS[title].replace(old, new))

    def undo(name):
        shutil.copy2(ROOT / name, folder / name)

    def run(script, *words, code=0):
        done = run_script(folder / script, words, folder, folder)
        assert done.returncode == code and (code != 2 or done.stderr.count("\n") == 1), done.stdout + done.stderr
        return done.stdout + done.stderr

    def train(*words, code=0, data=data):
        return run("u2mamba_train.py", *TRAIN, "--data_dir", data, *words, code=code)

    def load(name="best.pth"):
        return torch.load(folder / "saved_models/run" / name, weights_only=True)

    saved = folder / "saved_models/run"
    return SimpleNamespace(folder=folder, edit=edit, undo=undo, run=run, train=train, load=load, saved=saved)


def predict(project, data, mode="map"):
    words = "--checkpoint", BEST, "--mode", mode, "--device", "cpu"
    project.run("u2mamba_predict.py", data / "val/images", *words)
    return np.asarray(Image.open(project.folder / "maps" / mode / "p8.png"))


def evaluate(project, data):
    files = "--image", data / "val/images", "--gt", data / "val/masks", "--json", "scores.json"
    project.run("u2mamba_eval.py", "--checkpoint", BEST, *files, "--device", "cpu")
    return json.loads((project.folder / "scores.json").read_text())[0]


def export(project):
    assert "maximum difference to PyTorch" in project.run("u2mamba_export.py", "--checkpoint", BEST)


def printed_rates(lines):
    return [float(rate) for rate in re.findall(r"lr (\S+),", lines)]


def iou(lines):
    return float(re.findall(r"validation IoU: (\S+),", lines)[-1])


def test_group_norm_attention_folds_plateau(project, data):
    project.edit("Group norm", "Attention in each RSU", "A number", "K-fold cross-validation", "ReduceLROnPlateau")
    lines = project.train(*U2NETP, "--epoch_num", "3", "--lr", "1e-3")
    assert "data: 8 pairs for training, 2 for validation" in lines and "22 new" in lines
    rates = printed_rates(lines)
    assert rates[0] == 1e-3 and set(rates) <= {1e-3, 5e-4, 2.5e-4}
    assert not any("running_mean" in key for key in project.load())
    assert predict(project, data).shape == (48, 72)
    export(project)


def test_instance_norm_head_one_cycle(project, data):
    project.edit("Instance norm", "A different head", "An unused module", "d0 alone", "One cycle")
    assert '--pretrained "" trains from scratch' in project.train(*U2NETP, code=2)
    lines = project.train("--arch", "u2netp", "--epoch_num", "2", "--lr", "1e-3")
    assert printed_rates(lines) == pytest.approx([9.36e-4, 8.12e-4, 2.83e-4, 4e-9], rel=0.01)
    assert "d1" not in (project.saved / "log.csv").read_text().splitlines()[0].split(",")
    assert predict(project, data).std() > 0
    export(project)


def test_gelu_rsu8_tar_and_loss_poly_score_logging(project, data):
    (project.folder / "wandb.py").write_text("def log(values, step):\n    print('wandb', values, step)\n")
    project.edit("GELU", "RSU-8", "tar and loss, as in U-2-Net", "Poly schedule", "Another score")
    project.edit("Logging to another tool", "Crops and augmentation", "Weights of each epoch")
    lines = project.train("--arch", "u2netp")
    assert "wandb {'val/val_meanF'" in lines and "wandb {'train/lr'" in lines
    assert "val_meanF" in (project.saved / "log.csv").read_text().splitlines()[0]
    loss, tar = map(float, re.findall(r"train loss: (\S+), tar: (\S+),", lines)[-1])
    assert 4 < loss / tar < 10 and len(list(project.saved.glob("run_bce_*.pth"))) == 1
    assert printed_rates(lines) == pytest.approx([1e-4 * 0.5**0.9, 0], rel=0.01)
    export(project)


def test_a_frozen_encoder_stays_until_it_is_unfrozen(project):
    project.edit("Frozen encoder")
    more = *U2MAMBAP, "--ema_decay", "0.9", "--lr", "1e-3", "--weight_decay", "0.1"
    project.train(*more)
    before = torch.load(ROOT / "saved_models/u2mambap.pth", weights_only=True)
    encoder, trained = [key for key in before if re.match(r"stage\d\.", key)], "stage1d.rebnconvin.conv_s1.weight"
    for weights in (project.load(), project.load("last.pth")["model"]):
        assert all(torch.equal(weights[key], before[key]) for key in encoder)
        assert not torch.equal(weights[trained], before[trained])
    project.edit("Unfreezing")
    lines = project.train(*more, "--epoch_num", "2")
    assert "the code has changed since this run was saved: u2mamba_train.py" in lines
    weights = project.load()
    moved = [key for key in encoder if not key.endswith(("num_batches_tracked", "conv_s1.bias"))]
    assert not any(torch.equal(weights[key], before[key]) for key in moved)


def test_a_smaller_rate_for_the_encoder_in_a_run_that_resumes(project):
    project.train(*U2NETP)
    before = project.load("last.pth")["model"]
    project.edit("A smaller learning rate for the encoder")
    lines = project.train(*U2NETP, "--epoch_num", "2", "--lr", "1e-3", "--resume", "force")
    assert "the optimizer or its parameter groups changed: its moments start from zero" in lines
    after = project.load("last.pth")["model"]
    moved = {key: (after[key] - before[key]).abs().max() for key in after if key.endswith("conv_s1.weight")}
    encoder = [moved.pop(key) for key in list(moved) if re.match(r"stage\d\.", key)]
    assert max(encoder) < 2.1e-4 < 1e-3 < max(moved.values())  # Adam's first steps are of the size of the rate


def test_a_network_of_ones_own_is_known_to_every_command(project, data):
    project.edit("Other widths", "State size of Mamba")
    project.train("--arch", "quarter")
    weights = project.load()
    assert weights["stage1.mamba7.mamba.A_log"].shape[1] == 8 and len(weights["side1.bias"]) == 1
    assert predict(project, data).shape == (48, 72)
    assert evaluate(project, data)["iou_mean"] >= 0
    (project.folder / "hub.py").write_text(f"import hubconf\nprint(hubconf.u2net_file({BEST!r}).settings)\n")
    assert "'arch': 'quarter', 'mamba_at': 'bottleneck', 'd_state': 8" in project.run("hub.py").replace('"', "'")
    lines = project.train("--arch", "quarter", "--pretrained", BEST, "--model_name", "second")
    assert f"pretrained: {len(weights)} tensors matched, 0 new" in lines
    project.undo("model/__init__.py")
    lines = project.run("u2mamba_predict.py", data / "val", "--checkpoint", BEST, "--out", "other", code=2)
    assert "arch = 'quarter': must be one of u2net, u2netp, u2mamba, u2mambap" in lines


def test_a_compiled_network_other_losses_and_a_new_setting_resume_a_run_and_best_starts_anew(project):
    project.train(*(average := ("--ema_decay", "0.9")))
    project.edit("torch.compile", old="compile(net)", new='compile(net, backend="eager")')
    project.edit("Weights of the outputs", "Weight of the object", "SSIM, with its own setting")
    project.edit("Best by another score")
    assert "the code has changed since: u2mamba_train.py; use --resume never" in project.train(*average, code=2)
    lines = project.train(*average, "--epoch_num", "2")
    assert "the code has changed since this run was saved: u2mamba_train.py" in lines and "ssim" not in lines
    state = project.load("last.pth")["state"]
    assert state["best_name"] == "IoU" and project.load()._metadata["u2mamba"]["state"]["epoch"] == 1
    for weights in (project.load(), project.load("last.pth")["model"], project.load("last.pth")["step"]["ema"]):
        assert not any("_orig_mod" in key for key in weights)
    more = *average, "--epoch_num", "3", "--ssim_weight", "0.5"
    assert "ssim_weight: 0.0 -> 0.5" in project.train(*more, code=2)
    project.train(*more, "--resume", "force")


def test_early_stopping_ends_as_a_run_does_and_the_later_of_equals_is_best(project, tmp_path):
    data = make_data(tmp_path / "data")
    for mask in (data / "val/masks").iterdir():
        Image.fromarray(np.zeros((48, 72), np.uint8)).save(mask)
    project.edit("Early stopping")
    lines = project.train(*(more := ("--epoch_num", "50", "--batch_size_train", "8")), data=data)
    assert "epoch: 4/50] validation" in lines and "epoch: 5/50" not in lines and "done: 4 iterations" in lines
    assert list(project.saved.glob("run_bce_itr_4_*.pth")) and (project.saved / "preview.png").exists()
    assert project.load()._metadata["u2mamba"]["state"]["epoch"] == 3  # while the fourth was validated
    assert "holds a finished run of 4 epochs" in project.train(*more, data=data)


def test_other_masks_and_another_reading_are_another_run(project, data, tmp_path):
    first = project.train()
    assert "data: 8 pairs for training, 2 for validation" in first
    other = shutil.copytree(data, tmp_path / "other")
    lines = project.train(data=other)
    assert "the same pairs in another folder: data_dir" in lines and "holds a finished run" in lines
    disc = np.asarray(Image.open(other / "masks/p0.png"))
    Image.fromarray(255 - disc).save(other / "masks/p0.png")
    refused = project.train(data=other, code=2)
    assert all(said in refused for said in ("different training or validation pairs", "--resume never", "--model_name"))
    project.edit("Inverted masks")
    refused = project.train(code=2)
    assert "code has changed since: u2mamba/dataset/decode.py" in refused and "cache: filled" in refused
    project.train("--resume", "never")
    caches = [np.fromfile(path, np.uint8) for path in data.glob(".cache_64_*.npy")]
    assert len(caches) == 1 and caches[0][-10 * 64 * 64 :].mean() > 128
    project.undo("u2mamba/dataset/decode.py")
    assert "cache: filled" in project.train("--resume", "never")


def test_padding_is_undone_by_every_command(project, data):
    project.edit("Padding instead of stretching")
    trained = iou(project.train(*U2MAMBAP, "--epoch_num", "4", "--lr", "1e-3", "--val_frq", "4"))
    scores = evaluate(project, data)
    assert scores["iou_mean"] == pytest.approx(trained, abs=0.1) and trained > 0.6, scores
    mask = predict(project, data, "mask") > 0
    truth = np.asarray(Image.open(data / "val/masks/p8.png")) > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.6


def test_suffixes_links_batches_of_one_and_published_classes(project, data, tmp_path):
    both = tmp_path / "both"
    for folder in ("images", "masks", "val/images", "val/masks"):
        (both / folder).mkdir(parents=True)
        for file in sorted((data / folder).iterdir())[:2]:
            name = f"{file.stem}_mask.png" if "masks" in folder else file.name
            (both / folder / name).symlink_to(file)
    project.edit("Masks with a suffix")
    for name, old, new in (
        ("data_loader.py", "torch.rand(()) >= 0.5", "torch.rand(()) >= 0.9"),
        ("u2mamba_train.py", "    step_class =", "    net.more = torch.nn.Linear(1, 1)\n    step_class ="),
    ):
        source = project.folder / name
        source.write_text(source.read_text().replace(old, new))
    sizes = "--rescale", "128", "--scale_max", "1"
    lines = project.train("--batch_size_train", "1", *sizes, data=both)
    assert "ite: 2]" in lines and "data: 2 pairs for training, 2 for validation" in lines
    assert "data_loader.py was edited, but no run uses its classes: edit u2mamba/dataset/augment.py" in lines
    assert "warning: crop 64 of rescale 128: trained at 64 pixels, used at 128" in lines
    assert "first more.weight; it belongs to another or a changed network; no other command can load" in lines


def test_four_channels(project, tmp_path):
    data = make_data(tmp_path / "data", "RGBA")
    project.edit("Four channels")
    project.train(*U2NETP, "--color_jitter", "0.2", data=data)
    assert project.load()["stage1.rebnconvin.conv_s1.weight"].shape[1] == 4
    assert predict(project, data, "cutout").shape == (48, 72, 4)
    export(project)


def test_three_classes(project, tmp_path):
    data = make_data(tmp_path / "data", "RGB", True)
    project.edit("Three classes")
    lines = project.train(*U2NETP, "--epoch_num", "4", "--lr", "3e-3", "--val_frq", "4", data=data)
    assert project.load()["outconv.bias"].shape == (3,) and iou(lines) > 0, lines
    alpha = predict(project, data, "cutout")[..., 3] / 255
    truth = np.asarray(Image.open(data / "val/masks/p8.png")) > 0
    assert alpha[truth].mean() > alpha[~truth].mean() + 0.2
    export(project)


CANNOT_WORK = {  # what the line says: file, what stands there, and in its place
    "total_loss returned a tensor (7, 2, 1, 64, 64)": ("u2mamba_train.py", "weights) for", 'reduction="none") for'),
    "u2mamba_train.py, line": ("u2mamba_train.py", "d.float(), masks", "d[0, 0], masks"),
    "score maxF of SODMetric.compute": ("u2mamba/engine/validation.py", "f.max()}", "f.max() * float('nan')}"),
    "to have 4 channels, but got 3": ("model/__init__.py", "nn.Conv2d(3, 7", "nn.Conv2d(4, 7"),
    "BEST_BY = 'Sm'": ("u2mamba_train.py", 'BEST_BY = "maxF"', 'BEST_BY = "Sm"'),
    "TypeError: SGD": ("u2mamba_train.py", "torch.optim.AdamW if", "torch.optim.SGD if"),
    "first output is of (32, 32) pixels": (
        "model/__init__.py",
        "return self.conv(x)",
        "return self.conv(x[..., ::2, ::2])",
    ),
    "1 channels, but MEAN": ("u2mamba/dataset/decode.py", 'asarray(file.convert("RGB"))', "asarray(file)[..., :1]"),
    "arch = 'one': must be one of u2net, ": ("model/__init__.py", 'ARCHS["one"]', 'ARCHS["two"]'),
}


@pytest.mark.parametrize("said", CANNOT_WORK)
def test_an_edit_that_cannot_work_is_refused_with_nothing_written_over(project, said):
    file, old, new = CANNOT_WORK[said]
    project.saved.mkdir()
    for name in ("last.pth", "best.pth", "log.csv", "run.lock", "run_bce_itr_2_train_1.000000_tar_0.100000.pth"):
        (project.saved / name).write_text("" if name == "run.lock" else name)  # of an earlier run
    source = project.folder / file
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    before = {path: path.read_bytes() for path in project.saved.iterdir()}
    assert said in project.train("--resume", "never", code=2)
    assert before == {path: path.read_bytes() for path in project.saved.iterdir()}


def test_every_diff_of_the_page_is_applied():
    source = Path(__file__).read_text("utf-8")
    assert [title for title in DIFFS if f'"{title}"' not in source] == [] and len(DIFFS) == PAGE.count("```diff")
