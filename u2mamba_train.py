"""Trains U²-Net with Mamba layers for salient object detection (SOD) on DUTS-TR.

    python u2mamba_train.py            the reference run: the constants below
    python u2mamba_train.py fast       the same network by a recipe for speed and quality, and small: the small network
    python u2mamba_train.py demo       a small made data set and the small network: minutes on a laptop's CPU
    python u2mamba_train.py finetune --data_dir FOLDER --tra_image_dir images --tra_label_dir masks    on your own pairs
    python u2mamba_train.py demo --overfit 1                  learns one pair by heart: the check to make first
    python u2mamba_train.py --lr 5e-4  any constant by its name; --help lists them
    torchrun --nproc_per_node=4 u2mamba_train.py best   the recipe of fast on four GPUs; torchrun runs the others too

Edit the constants, run, read loss and IoU; checkpoints: saved_models/<model_name>/. The same command resumes a run.
"""

import u2mamba.runtime.start  # noqa: F401  # isort: skip
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_loader import (
    Augmentation,
    batches,
    epoch_plan,
    find_pairs,
    open_data,
    train_val_split,
    validation_batches,
)
from model import ARCHS
from u2mamba.dataset.demo import make_demo
from u2mamba.engine import checkpoint, resume
from u2mamba.engine.distributed import DistContext, init_distributed
from u2mamba.engine.logger import TrainLogger
from u2mamba.engine.overfit import overfit
from u2mamba.engine.parameters import decayed_and_not
from u2mamba.engine.resume import Progress
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import preview, validate
from u2mamba.fast import multi_loss
from u2mamba.runtime.config import LIMITS, MAY_DIFFER, as_plain_dict, check_together, read_settings, tell_odd_sizes
from u2mamba.runtime.environment import (
    choose_device,
    choose_kernels,
    choose_layout,
    choose_precision,
    choose_scan,
    seed_everything,
)
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, StopSignal, UserError, one_line_errors

# ------- 1. constants --------


@dataclass
class Config:
    # the run
    model_name: str = "u2net"  # folder of the checkpoints under saved_models/
    saved_models: str = "saved_models"  # where the runs' folders are
    seed: int = 0  # of the weights at the start, the order of the pairs and the crops
    deterministic: bool = False  # the same seed, the same bits on a GPU too, at some speed; on a CPU it is so anyway
    # auto: goes on from last.pth when the constants agree; anyway: also when they do not; never: starts anew
    resume: Literal["auto", "anyway", "never"] = "auto"

    # the network
    arch: Literal["u2net", "u2netp", "u2mamba", "u2mambap"] = "u2mamba"  # without or with Mamba; p: the small one
    mamba_at: Literal["none", "bottleneck", "encoder"] = "bottleneck"  # where the Mamba layers stand in each block
    mamba_norm: Literal["none", "gate"] = "none"  # gate: RMSNorm of the gated result before out_proj, as in Mamba-2
    scan_backend: Literal["auto", "reference", "torch", "triton", "mamba_ssm"] = "auto"  # of Mamba; auto: the fastest
    pretrained: str = ""  # file of weights to start from: public u2net.pth or u2netp.pth, or ours
    # the data
    data_dir: str = "train_data"  # folder in which the next two are
    tra_image_dir: str = "DUTS-TR/DUTS-TR/im_aug"  # under data_dir: the images
    tra_label_dir: str = "DUTS-TR/DUTS-TR/gt_aug"  # under data_dir: their masks, of the same names
    rescale: int = 320  # pixels: every pair is squashed to this square
    crop: int = 288  # pixels: then cut to this square at random
    flip_upside_down: float = 0.5  # probability that a pair is turned upside down
    crop_early: int = 0  # pixels in the first part of the run, where small pictures teach as much in less time; 0: crop
    early: float = 0.6  # share of the epochs that crop_early is for
    window: float = 0.0  # smallest share of a picture's sides that is cut out and brought to crop; 0: crop as it is
    beyond: float = 0.0  # by how much the largest window is larger than the picture, which is mirrored at its edges
    rotate: float = 0.0  # degrees either way; with this or colour, and no window, whole pictures are taken
    colour: float = 0.0  # share by which brightness, contrast and saturation change
    mirror: float = 0.0  # probability that a pair is mirrored; 0 because im_aug may already hold mirrored copies
    val_image_dir: str = ""  # under data_dir: images for validation; then no training pair is used for it
    val_label_dir: str = ""  # under data_dir: their masks
    # the training
    overfit: int = 0  # pairs to learn by heart, to see that it can learn; 0: train
    epoch_num: int = 720  # passes over the pairs; 720 of DUTS-TR in batches of 12 are the paper's 600,000 iterations
    batch_size_train: int = 12  # pairs a step and GPU
    accumulate: int = 1  # parts that a batch goes through the network in, one by one, where memory is short
    whole_batches: bool = False  # leave out the pairs at an epoch's end that do not fill one
    batch_size_val: int = 12  # held-out pairs at a time
    optimizer: Literal["adam", "adamw"] = "adam"  # adamw: weight decay apart from the gradient
    iou_loss: float = 0.0  # weight of 1 - soft IoU of each output beside its BCE
    edge_loss: float = 0.0  # weight of each output's BCE once more, counted near the mask's edges only
    lr: float = 1e-4  # learning rate
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: down to 1 % at the last iteration
    warmup: int = 0  # iterations of rising learning rate
    weight_decay: float = 0.0  # of convolutions and matrices
    sync_batch_norm: bool = False  # several GPUs: normalise by the batches of all instead of each by its own
    clip: float = 0.0  # largest norm of the gradient; 0: not clipped
    ema_decay: float = 0.0  # of the averaged weights, per iteration; 0: no average
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay fp32
    channels_last: bool = False  # memory format of the convolutions
    cuda_graph: bool = True  # replay the whole step as one CUDA graph: the same arithmetic without the launches
    fused_kernels: bool = False  # Triton kernels between the convolutions; wants CUDA, bf16 and channels_last
    max_bad_steps: int = 20  # steps in a row that are not finite before the run stops
    # what is printed and kept
    log_frq: int = 10  # iterations between printed lines
    val_frq: int = 1  # epochs between validations
    save_frq: int = 2000  # iterations between checkpoints
    keep_checkpoints: int = 0  # weight files that stay, the newest; 0: all
    save_minutes: float = 5.0  # most minutes between two writings of last.pth
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best there is
    gpu: int = 0  # number of the GPU, where there are several; of several processes, the first one's


FAST = Config(
    model_name="fast", epoch_num=110, precision="bf16", channels_last=True, fused_kernels=True, batch_size_train=32,
    batch_size_val=32, optimizer="adamw", lr=1e-3, lr_schedule="cosine", warmup=500, weight_decay=0.02, clip=1.0,
    ema_decay=0.9995, iou_loss=1.0, edge_loss=1.0, crop=320, crop_early=192, window=0.5, beyond=0.3, rotate=20.0,
    colour=0.4, flip_upside_down=0.0, mirror=0.5, val_frq=5, whole_batches=True,
)  # fmt: skip
PRESETS = {
    "reference": Config(),
    "fast": replace(FAST, mamba_norm="gate"),  # else layers grow; small's do not, best was measured without
    "small": replace(FAST, model_name="small", arch="u2mambap", early=0.5, epoch_num=156),
    "best": replace(FAST, model_name="best", batch_size_train=16, early=0.5, epoch_num=298, val_frq=10, save_frq=10000),
    "finetune": Config(
        model_name="finetune", precision="bf16", channels_last=True, fused_kernels=True, batch_size_train=8,
        epoch_num=40, optimizer="adamw", lr=1e-4, lr_schedule="cosine", warmup=20, weight_decay=0.02, clip=1.0,
        flip_upside_down=0.0, mirror=0.5, arch="u2mambap", pretrained="saved_models/u2mambap.pth",
    ),
    "demo": Config(
        model_name="demo", data_dir="train_data/demo", arch="u2mambap", rescale=96, crop=96, precision="bf16",
        channels_last=True, epoch_num=4, batch_size_train=8, lr=1e-3, lr_schedule="cosine", warmup=20,
        flip_upside_down=0.0, mirror=0.5, save_frq=100,
    ),
}  # fmt: skip
# ------- 2. loss: binary cross-entropy on the fused map and the six side outputs; soft IoU, edges --------


def multi_bce_loss_fusion(logits: tuple[Tensor, ...], masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean BCE of d0, ..., d6, each (B, 1, H, W) before the sigmoid, against masks in [0, 1] -> (7,).

    Their sum is U²-Net's loss (arXiv 2005.09007, equation 1, all weights 1). From logits and in fp32, because
    sigmoid + BCELoss loses log(1 - p) under mixed precision. weights: of the pixels, as masks.
    """
    return torch.stack([F.binary_cross_entropy_with_logits(d.float(), masks, weights) for d in logits])


def soft_iou_loss(logits: tuple[Tensor, ...], masks: Tensor) -> Tensor:
    """1 - soft IoU of d0, ..., d6, averaged over the images -> (7,): a small object counts as much as a large one."""
    p = torch.sigmoid(torch.stack([d.float() for d in logits]))  # (7, B, 1, H, W)
    both = (p * masks).sum((2, 3, 4))
    return 1 - ((both + 1) / (p.sum((2, 3, 4)) + masks.sum((1, 2, 3)) - both + 1)).mean(1)


def edge_weights(masks: Tensor) -> Tensor:
    """5 |mean of the mask in 31x31 pixels around - the mask|: edges, thin parts (after F3Net's, arXiv 1911.11445)."""
    around = F.avg_pool2d(masks, (31, 1), stride=1, padding=(15, 0), count_include_pad=False)
    around = F.avg_pool2d(around, (1, 31), stride=1, padding=(0, 15), count_include_pad=False)
    return 5 * (around - masks).abs()


def total_loss(logits: tuple[Tensor, ...], masks: Tensor, iou: float, edge: float, fused: bool) -> Tensor:
    """Of each output -> (7,), by the constants iou_loss and edge_loss. fused: the same by kernels of our own."""
    weights = 1 + edge * edge_weights(masks) if edge else None
    if fused:  # another loss has to be written there too, or this branch taken out
        return multi_loss(logits, masks, weights, iou)
    return multi_bce_loss_fusion(logits, masks, weights) + (iou * soft_iou_loss(logits, masks) if iou else 0)


def learning_rate(cfg: Config, iteration: int, done: float) -> float:
    """The rate of iteration 1, 2, ..., after which the share `done` of the run is over."""
    rate = cfg.lr * min(1.0, iteration / max(cfg.warmup, 1))
    if cfg.lr_schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
    return rate


@checkpoint.folders_released()
def run(cfg: Config, world: DistContext) -> int:
    """The whole run, from the constants to the last checkpoint, in every process of `world`; returns the exit code."""
    check_together(cfg, files=world.is_main)
    seed_everything(cfg.seed, cfg.deterministic)
    device, device_line = choose_device(cfg.device, cfg.gpu + world.local_rank)
    precision, precision_line = choose_precision(cfg.precision, device)
    synchronised = cfg.sync_batch_norm and world.size > 1
    channels_last, layout_line = choose_layout(cfg.channels_last, device, precision)
    fused, fused_line = choose_kernels(cfg.fused_kernels, device, precision, cfg.channels_last, synchronised)
    backend, backend_line = choose_scan(device, cfg.scan_backend)
    print(f"device: {device_line}\nprocesses: {world.line(cfg.batch_size_train)}", flush=True)
    print(f"precision: {precision_line}, {layout_line}, {fused_line}\nselective scan: {backend_line}", flush=True)
    torch.set_float32_matmul_precision("high" if fused else "highest")  # TF32 in what stays fp32
    folder = Path(cfg.saved_models, cfg.model_name + ("_overfit" if cfg.overfit else ""))

    # ------- 3. data --------

    with world.main_process_first():
        if cfg.data_dir == PRESETS["demo"].data_dir:
            make_demo(cfg.data_dir)
        if world.is_main:
            checkpoint.open_folder(folder)
    pairs = find_pairs(cfg)
    train, val = train_val_split(pairs)  # for a split of your own, change this line: two lists of pairs
    data = open_data(train, val, cfg.rescale, world).to(device)
    source, held_out = data.train, data.val
    constants = as_plain_dict(cfg) | resume.what_is_there(source, held_out, world.size)
    world.check_same(constants, MAY_DIFFER)
    first = range(min(6, len(held_out or source)))
    shown = next(validation_batches(held_out or source, first, channels_last=channels_last))

    # ------- 4. model --------

    mamba = {"mamba_at": cfg.mamba_at, "backend": backend, "mamba_norm": cfg.mamba_norm}
    net = ARCHS[cfg.arch](**mamba if cfg.arch.startswith("u2mamba") else {})
    net.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    world.prepare(net, cfg.sync_batch_norm)
    print(f"network: {cfg.arch}, {sum(p.numel() for p in net.parameters()):,} parameters")

    # ------- 5. optimizer --------

    algorithm = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    optimizer = algorithm(
        decayed_and_not(net), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay, fused=True
    )
    step = TrainStep(
        net, optimizer, lambda d, y: total_loss(d, y, cfg.iou_loss, cfg.edge_loss, fused), device, precision, cfg.clip,
        cfg.ema_decay, cfg.cuda_graph, fused, world, cfg.accumulate,
    )  # fmt: skip
    stop = StopSignal()  # until here a signal ends the process at once: there is nothing to save

    # ------- 6. training --------

    if cfg.overfit:
        return overfit(step, source, cfg.overfit, cfg.batch_size_train, channels_last, folder, stop)
    progress = Progress()
    saved, found = world.broadcast_object(lambda: resume.find_last(folder, cfg.resume, constants))
    if saved:
        progress = resume.go_on(saved, found, net, step, constants)
        if progress.epoch >= cfg.epoch_num:
            more = "" if resume.knows_no_end(cfg.lr_schedule, cfg.crop_early) else ", with --resume anyway,"
            print(f"{found} holds a finished run of {progress.epoch} epochs; a larger epoch_num{more} goes on from it")
            return EXIT_OK
        print(f"going on from {found}: epoch {progress.epoch + 1}, iteration {progress.iteration}")
    elif cfg.pretrained:
        print(checkpoint.start_from(net, Path(cfg.pretrained), cfg.rescale))
    if world.is_main:
        resume.keep_constants(folder, constants, anew=not saved)
    used = len(source) - cfg.whole_batches * (len(source) % (cfg.batch_size_train * world.size)) or len(source)
    total = progress.iteration + world.steps(used - progress.position, cfg.batch_size_train)
    total += (cfg.epoch_num - progress.epoch - 1) * world.steps(used, cfg.batch_size_train)
    tell_odd_sizes(cfg, len(source), world.size, total)
    report = TrainLogger(
        folder, cfg.epoch_num, [pair.image.name for pair in source.pairs], total, progress.iteration, progress.seconds,
        world.is_main, progress.epoch,
    )  # fmt: skip
    last = checkpoint.LastFile(folder, cfg.save_minutes, report.say, found.name == "last.pth")

    def save_last() -> None:
        if world.is_main:
            progress.seconds = report.seconds
            last.write({
                "config": constants, "progress": asdict(progress), "model": checkpoint.plain_state(net),
                "step": step.state_dict(), "random": torch.get_rng_state(),
            })  # fmt: skip

    def save_weights() -> None:
        if world.is_main:
            means, kept = step.read(), step.averaged()
            name = checkpoint.weight_file(cfg.model_name, progress.iteration, means.loss, means.losses[0])
            if checkpoint.save_or_warn(checkpoint.plain_state(kept), folder / name, report.say):
                checkpoint.prune(folder, cfg.keep_checkpoints, progress.iteration)
            report.picture(preview(kept, shown.x, shown.y), progress.iteration)
        step.reset()

    resized = bool(cfg.window or cfg.beyond)
    augmentation = Augmentation(resized * (cfg.window or 1.0), resized * (1 + cfg.beyond), cfg.rotate, cfg.colour)
    chances, stopped = (cfg.flip_upside_down, cfg.mirror), 0  # a signal's exit code
    for epoch in range(progress.epoch, cfg.epoch_num):
        crop = cfg.crop_early if cfg.crop_early and epoch < cfg.early * cfg.epoch_num else cfg.crop
        plan = epoch_plan(len(source), epoch, cfg.seed, cfg.rescale, crop, *chances, random=any(augmentation))[:used]
        own = world.shard(plan[progress.position :])
        for batch in resume.saving(
            save_last, batches(source, own, cfg.batch_size_train, crop, channels_last, augmentation)
        ):
            rows = plan[progress.position :][: len(batch.rows) * world.size]  # of all processes
            progress.iteration += 1
            progress.position += len(rows)
            done = (epoch + progress.position / used) / cfg.epoch_num  # not by iterations: GPUs may come and go
            rate = learning_rate(cfg, progress.iteration, done)
            step.set_learning_rate(rate)
            step(batch.x, batch.y)
            stopped = world.all_reduce_max(stop.exit_code)  # a signal to one process ends all at the same iteration
            report.count(rows, batch.wait)

            if progress.iteration % cfg.log_frq == 0 or progress.iteration in (1, total):
                means = step.read()
                report.training_line(epoch + 1, progress.position, progress.iteration, means, rate)
                if means.bad_in_a_row >= cfg.max_bad_steps:
                    save_last()
                    raise UserError(
                        f"{means.bad_in_a_row} steps in a row were not finite (the last: {means.not_finite[0]}); go on "
                        f'from {last.path} with a lower lr, clip = 1.0 or precision = "fp32" (and --resume anyway)'
                    )
            if progress.iteration % cfg.save_frq == 0:
                save_weights()
                save_last()
            elif last.is_due():
                save_last()
            if stopped:
                break

        if not stopped and ((epoch + 1) % cfg.val_frq == 0 or epoch + 1 == cfg.epoch_num):
            started, kept = time.monotonic(), step.averaged()
            own = range(world.rank, len(held_out), world.size)
            own = validation_batches(held_out, own, cfg.batch_size_val, channels_last)
            figures = validate(kept, own, stop, world)
            stopped = world.all_reduce_max(stop.exit_code)
            if figures:
                best = math.isfinite(figures["MAE"]) and figures["maxF"] > progress.best
                report.validation_line(epoch + 1, progress.iteration, figures, best, time.monotonic() - started)
                report.name_grown_layers(kept)
                if best and (
                    not world.is_main
                    or checkpoint.save_or_warn(checkpoint.plain_state(kept), folder / "best.pth", report.say)
                ):
                    progress.best = figures["maxF"]
        if not stopped:
            progress.epoch, progress.position = epoch + 1, 0
            if progress.epoch == cfg.epoch_num and progress.iteration % cfg.save_frq:  # else it was just done
                save_weights()  # before last.pth says that the run is over
        if stopped or last.is_due() or last.is_cheap() or epoch + 1 == cfg.epoch_num:
            save_last()
        if stopped:
            report.say(f"stopped at iteration {progress.iteration}; {last.promise(cfg.resume)}")
            report.close()
            return stopped
    report.close()
    if not last.is_safe:
        raise UserError(f"the run is over, but {last.path} could not be written; what was saved is in {folder}")
    took = timedelta(seconds=round(report.seconds))
    skipped = pairs.skipped + data.report.skipped
    aside = f", {skipped} files skipped (exit code 1)" if skipped else ""
    print(f"done: {progress.iteration} iterations in {took}, checkpoints in {folder}{aside}")
    return EXIT_SKIPPED if aside else EXIT_OK


if __name__ == "__main__":
    with one_line_errors(), init_distributed() as world:
        sys.exit(run(read_settings(Config(), PRESETS, LIMITS), world))
