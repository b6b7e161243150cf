"""What a trained network gains or loses without training: mirrored, without Mamba layers, other statistics or sizes.

    python -m benchmarks.after_training --data_dir train_data --checkpoint saved_models/u2mambap.pth

Held-out figures of one checkpoint, each line another way to use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from benchmarks.hardware import lines
from data_loader import Changes, DataSource, batches, epoch_plan, open_data, validation_batches
from model.mamba import MambaLayer
from u2mamba.engine.metrics import ValidationMetrics
from u2mamba.inference.predictor import trained_network
from u2mamba.runtime.environment import choose_device, choose_precision
from u2mamba.runtime.errors import one_line_errors
from u2mamba_train import FAST


@dataclass
class Options:
    checkpoint: str = "saved_models/u2mambap.pth"
    data_dir: str = "train_data"
    batch: int = 32
    batches: int = 50  # from which batch norm's statistics are taken
    sizes: tuple[int, ...] = (288, 352)  # pixels, beside the 320 of the pairs


@torch.no_grad()
def measured(call: Callable[[Tensor], Tensor], pairs: DataSource, batch: int) -> dict[str, float]:
    """Held-out figures of `call`: images (B, 3, 320, 320) -> maps (B, 1, 320, 320)."""
    metrics = ValidationMetrics(pairs.device)
    for b in validation_batches(pairs, batch_size=batch, channels_last=True):
        metrics.update(call(b.x), b.y)
    return metrics.result()


@torch.no_grad()
def take_statistics(net: nn.Module, pairs: DataSource, options: Options, size: int, changes: Changes | None) -> None:
    """Running means and variances of batch norm become the mean over `options.batches` batches of training pairs."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean of all batches
    net.train()
    plan = epoch_plan(len(pairs), 0, 0, pairs.size, size, 0.0, 0.5, numbers=True)[: options.batches * options.batch]
    for b in batches(pairs, plan, options.batch, size, channels_last=True, changes=changes):
        net(b.x)
    net.eval()


def main(options: Options) -> None:
    device, _ = choose_device()
    print("\n".join(lines(device)))
    root = Path(options.data_dir, "DUTS-TR", "DUTS-TR")
    data = open_data(root / "im_aug", root / "gt_aug")
    train, held_out = data.train.to(device), data.val.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=choose_precision("bf16", device)[0] == "bf16")

    def opened() -> nn.Module:
        return trained_network(options.checkpoint)[0].to(device, memory_format=torch.channels_last)

    def line(words: str, call: Callable[[Tensor], Tensor]) -> None:
        with autocast:
            got = measured(call, held_out, options.batch)
        print(f"{words:40}" + "".join(f"{got[k]:9.4f}" for k in ("maxF", "MAE", "IoU")), flush=True)

    def at(size: int) -> Callable[[Tensor], Tensor]:
        def resized(x: Tensor, to: int) -> Tensor:
            return nn.functional.interpolate(x, (to, to), mode="bilinear", align_corners=False, antialias=True)

        return lambda x: resized(net(resized(x, size))[0].float(), x.shape[2])

    print(f"{'':40}     maxF      MAE      IoU")
    net = opened()
    line("as it is", lambda x: net(x)[0])
    mamba = [m.register_forward_hook(lambda *about: 0 * about[2]) for m in net.modules() if isinstance(m, MambaLayer)]
    if mamba:
        line("its Mamba layers add nothing", lambda x: net(x)[0])
    for hook in mamba:
        hook.remove()
    line("mean with the mirrored picture", lambda x: (net(x)[0] + net(x.flip(3))[0].flip(3)) / 2)
    for size in options.sizes:
        line(f"at {size} pixels", at(size))
    recipe = Changes.of(FAST)
    for words, size, changes in (("whole pictures", train.size, None), ("changed ones", FAST.crop, recipe)):
        net = opened()
        with autocast:
            take_statistics(net, train, options, size, changes)
        line(f"statistics of {words}", lambda x, net=net: net(x)[0])


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__, use_underscores=True))
