"""What a trained network loses without its Mamba layers: all of them removed, or one at a time, without training again.

    python -m benchmarks.remove_mamba --checkpoint saved_models/u2mambap.pth
    python -m benchmarks.remove_mamba --checkpoint saved_models/fast/best.pth --each --every 14

IoU and MAE on the validation pairs of DUTS-TR, with the mean difference per image and its standard error.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.hardware import cli, print_hardware
from data_loader import open_data, pair_folders, train_val_split, validation_batches
from model.mamba import MambaLayer
from u2mamba.engine.validation import iou_per_image
from u2mamba.inference.predictor import load_model
from u2mamba.runtime.environment import choose_device, choose_precision


@dataclass
class Config:
    checkpoint: str = "saved_models/u2mambap.pth"
    data: str = "train_data/DUTS-TR/DUTS-TR"
    each: bool = False  # remove each layer by itself too
    every: int = 1  # use every n-th validation pair
    size: int = 320  # pixels
    batch: int = 32
    device: str = "auto"


@torch.inference_mode()
def scores(net: nn.Module, cfg: Config, source, removed: dict[str, nn.Module]) -> tuple[Tensor, dict[str, float]]:
    """(IoU and MAE of each image (N, 2), norm of what each removed layer adds over the norm of its input)."""
    sizes = {}

    def remove(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        sizes[name] = (out.float().norm() / inputs[0].float().norm()).item()
        return torch.zeros_like(out)

    hooks = [layer.register_forward_hook(partial(remove, name)) for name, layer in removed.items()]
    rows = []
    for batch in validation_batches(source, range(0, len(source), cfg.every), cfg.batch):
        d0 = net(batch.x)[0].float()
        rows.append(torch.stack((iou_per_image(d0, batch.y), (d0 - batch.y).abs().mean((1, 2, 3))), 1))
    for hook in hooks:
        hook.remove()
    return torch.cat(rows).double().cpu(), sizes


def main(cfg: Config) -> None:
    device, _ = choose_device(cfg.device)
    print_hardware(device)
    folders = [Path(cfg.data, name) for name in ("im_aug", "gt_aug")]
    source = open_data(*train_val_split(pair_folders(*folders)), cfg.size).val.to(device)
    net = load_model(cfg.checkpoint).to(device)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, MambaLayer)}
    variants = {"all": layers} | ({name: {name: layer} for name, layer in layers.items()} if cfg.each else {})
    with torch.autocast(device.type, torch.bfloat16, enabled=choose_precision("bf16", device)[0] == "bf16"):
        whole, _ = scores(net, cfg, source, {})
        iou, mae = whole.mean(0).tolist()
        print(f"{cfg.checkpoint}, {len(whole)} validation pairs: IoU {iou:.4f}, MAE {mae:.4f}")
        for name, removed in variants.items():
            without, sizes = scores(net, cfg, source, removed)
            difference = without - whole
            (d_iou, d_mae), errors = difference.mean(0).tolist(), (difference.std(0) / len(whole) ** 0.5).tolist()
            size = f", relative size {sizes[name]:.2f}" if name in sizes else ""
            words = f"IoU {d_iou:+.4f} ± {errors[0]:.4f}, MAE {d_mae:+.4f} ± {errors[1]:.4f}{size}"
            print(f"without {name}: {words}", flush=True)


if __name__ == "__main__":
    cli(main, Config, __doc__)
