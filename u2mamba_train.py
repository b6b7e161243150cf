"""Train U²-Net with Mamba layers for salient object detection (SOD) on DUTS-TR.

    python u2mamba_train.py            the baseline: the settings below
    python u2mamba_train.py fast       the same network with a recipe for speed and accuracy; small: the small network
    python u2mamba_train.py demo       a small synthetic dataset and the small network: minutes on a laptop's CPU
    python u2mamba_train.py finetune --data_dir FOLDER --tra_image_dir images --tra_label_dir masks    your own pairs
    python u2mamba_train.py --lr 5e-4          any setting by its name; --help lists them
    torchrun --nproc_per_node=4 u2mamba_train.py fast_4gpu      four GPUs; torchrun runs the other presets too

Edit the settings, run, read loss and IoU; checkpoints: saved_models/<model_name>/. The same command resumes a run.
"""

import os.path  # isort: skip
import sys  # isort: skip

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
import u2mamba.runtime.start  # noqa: F401  # isort: skip
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_loader import DataError, find_pairs, open_data, train_val_split, validation_batches
from model import build_model
from model.u2net import as_list
from u2mamba.dataset.demo import make_demo
from u2mamba.engine.checkpoint import Checkpointer, warm_start
from u2mamba.engine.distributed import DistContext, init_distributed
from u2mamba.engine.logger import NonFiniteError, TrainLogger
from u2mamba.engine.overfit import overfit, try_batch
from u2mamba.engine.parameters import param_groups_weight_decay
from u2mamba.engine.run_folder import acquire_run_dir, release_run_locks
from u2mamba.engine.schedule import Schedule, train_batches, validate_config
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import VAL_BATCH, preview, preview_batch, validate
from u2mamba.inference.predictor import weights_path
from u2mamba.runtime.config import Count, CountOrZero, Fraction, Range, Size, Weight, read_settings, to_dict
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import EXIT_OK, Stopped, StopSignal, one_line_errors

try:
    from u2mamba import fast
except ImportError:  # the folder was deleted
    fast = None

BEST_BY = "maxF"  # validation score that selects best.pth: higher is better, except for MAE

# ------- 1. settings --------


@dataclass
class Config:
    # the run
    model_name: str = "u2net"  # folder of the checkpoints under saved_models/
    saved_models: str = "saved_models"  # parent folder of all runs
    seed: CountOrZero = 0  # seed of initial weights, shuffling and augmentation
    deterministic: bool = False  # bitwise reproducible runs on a GPU, slower; CPU runs always are
    # auto: resume from last.pth if the settings agree; force: even if they differ; never: start over
    resume: Literal["auto", "force", "never"] = "auto"
    # the network
    arch: str = "u2mamba"  # u2net, u2netp, u2mamba, u2mambap (p: the small one), or your own in model.ARCHS
    mamba_at: Literal["none", "bottleneck", "encoder"] = "bottleneck"  # where the Mamba layers are in each RSU
    mamba_norm: Literal["none", "gate"] = "none"  # gate: RMSNorm before the output projection of Mamba, as in Mamba-2
    pretrained: str = ""  # weights to start from: small, large, or a file: u2net.pth, u2netp.pth or ours
    # the data
    data_dir: str = "train_data"  # parent folder of the image and mask folders
    tra_image_dir: str = "DUTS-TR/DUTS-TR/im_aug"  # under data_dir: the images
    tra_label_dir: str = "DUTS-TR/DUTS-TR/gt_aug"  # under data_dir: their masks, with the same names
    val_image_dir: str = ""  # under data_dir: validation images; empty: 5 % of the training pairs, by hash of the name
    val_label_dir: str = ""  # under data_dir: their masks
    rescale: Size = 320  # pixels: every pair is resized to this square
    crop: Size = 288  # pixels: size of the random square crop that follows
    early_crop: Annotated[int, Range(0, 4096)] = 0  # progressive resizing: crop of the first epochs, in pixels; 0: off
    early_fraction: Fraction = 0.6  # fraction of the epochs with early_crop
    vflip_prob: Fraction = 0.5  # probability of a vertical flip
    hflip_prob: Fraction = 0.0  # probability of a horizontal flip; 0 because im_aug may already contain flipped copies
    scale_min: Fraction = 0.0  # random resized crop: min. side, relative to the image's; both 0: the crop above
    scale_max: Annotated[float, Range(0, 2)] = 0.0  # max. side; above 1: reflection padding; both 1: whole images
    rotation_degrees: Annotated[float, Range(0, 180)] = 0.0  # random rotation by up to ± this many degrees
    color_jitter: Fraction = 0.0  # brightness, contrast and saturation by up to ± this fraction
    sharpness: Annotated[float, Range(0, 3)] = 0.0  # sharpness factor from exp(-sharpness), blurred, to exp(sharpness)
    noise: Fraction = 0.0  # Gaussian noise: maximum standard deviation, for images in [0, 1]
    whole_fraction: Fraction = 0.0  # fraction of the epochs, at the end, on whole images instead of random crops
    # training
    overfit: CountOrZero = 0  # sanity check: number of pairs to overfit; 0: train
    epoch_num: Count = 720  # 720 epochs of DUTS-TR in batches of 12 are the paper's 600,000 iterations
    batch_size_train: Count = 12  # pairs per GPU per step
    grad_accum_steps: Count = 1  # gradient accumulation: micro-batches per batch, to save memory
    drop_last: bool = False  # drop the last, smaller batch of each epoch
    lr: Annotated[float, Range(0, 10)] = 1e-4  # learning rate
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: decays to 1 % of lr at the last iteration
    warmup_iters: CountOrZero = 0  # iterations of linear warmup
    weight_decay: Annotated[float, Range(0, 10)] = 0.0  # for convolutions and matrices; above 0: AdamW, else Adam
    grad_clip: Annotated[float, Range(0, 1e9)] = 0.0  # maximum gradient norm; 0: no clipping
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0  # EMA of the weights: decay per iteration; 0: off
    iou_weight: Weight = 0.0  # weight of 1 - soft IoU of each output, added to its BCE
    edge_weight: Weight = 0.0  # extra weight of the BCE near the mask's edges
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, channels_last, Triton kernels; weights stay fp32
    plain: bool = False  # plain PyTorch: without u2mamba/fast (Triton kernels, CUDA graph)
    # output
    log_frq: Count = 10  # iterations between printed lines
    val_frq: Count = 1  # epochs between validations
    save_frq: Count = 2000  # iterations between checkpoints
    keep_checkpoints: CountOrZero = 0  # number of weights files to keep, the newest; 0: all
    # the machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the best available
    gpu: Annotated[int, Range(0, 1024)] = 0  # GPU index; with several processes, that of the first


FAST = Config(
    model_name="fast", epoch_num=104, precision="bf16", batch_size_train=32, lr=1e-3, lr_schedule="cosine",
    warmup_iters=500, weight_decay=0.02, grad_clip=1.0, ema_decay=0.9995, iou_weight=3.0, edge_weight=1.0,
    crop=320, early_crop=192, scale_min=0.5, scale_max=1.3, whole_fraction=0.4, rotation_degrees=10.0,
    color_jitter=0.4, sharpness=0.8, noise=0.03, vflip_prob=0.0, hflip_prob=0.5, val_frq=5, drop_last=True,
)  # fmt: skip
PRESETS = {
    "reference": Config(),
    "fast": replace(FAST, mamba_norm="gate"),  # else activations explode; not in small, and fast_4gpu was run without
    "small": replace(FAST, model_name="small", arch="u2mambap", early_fraction=0.5, epoch_num=156),
    "fast_4gpu": replace(
        FAST, model_name="fast_4gpu", batch_size_train=16, early_fraction=0.5, epoch_num=298, val_frq=10, save_frq=10000
    ),
    "finetune": Config(
        model_name="finetune", arch="u2mambap", pretrained="small", precision="bf16", batch_size_train=8, epoch_num=40,
        lr=1e-4, lr_schedule="cosine", warmup_iters=20, weight_decay=0.02, grad_clip=1.0,
        crop=320, vflip_prob=0.0, hflip_prob=0.5,
    ),
    "demo": Config(
        model_name="demo", data_dir="train_data/demo", arch="u2mambap", rescale=96, crop=96, precision="bf16",
        epoch_num=4, batch_size_train=8, lr=1e-3, lr_schedule="cosine", warmup_iters=20, vflip_prob=0.0, hflip_prob=0.5,
        save_frq=100,
    ),
}  # fmt: skip

# ------- 2. loss: binary cross-entropy of the final output d0 and the six side outputs; soft IoU, edges --------


def stack(logits: tuple[Tensor, ...] | Tensor) -> Tensor:
    """d0, ..., d6, each (B, 1, H, W), as one fp32 tensor (7, B, 1, H, W); one already stacked is returned."""
    return logits if getattr(logits, "ndim", 0) == 5 else torch.stack(as_list(logits)).float()


def multi_bce_loss_fusion(logits: tuple[Tensor, ...], masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean BCE of d0, ..., d6, each (B, 1, H, W) before the sigmoid, against masks in [0, 1] -> (7,).

    Their sum is U²-Net's loss (arXiv 2005.09007, equation 1, all weights 1). From logits and in fp32, because
    sigmoid + BCELoss loses log(1 - p) under mixed precision. weights: per pixel, shape of the masks.
    """
    return torch.stack([F.binary_cross_entropy_with_logits(d.float(), masks, weights) for d in logits])


def soft_iou_loss(logits: tuple[Tensor, ...], masks: Tensor) -> Tensor:
    """1 - soft IoU of d0, ..., d6, averaged over the images -> (7,): small objects count as much as large ones."""
    p = torch.sigmoid(stack(logits))
    both = (p * masks).sum((2, 3, 4))
    return 1 - ((both + 1) / (p.sum((2, 3, 4)) + masks.sum((1, 2, 3)) - both + 1)).mean(1)


def edge_weights(masks: Tensor) -> Tensor:
    """5 |31x31 local mean of the mask - mask|: high at edges and thin parts (after F3Net, arXiv 1911.11445)."""
    around = F.avg_pool2d(masks, (31, 1), stride=1, padding=(15, 0), count_include_pad=False)
    around = F.avg_pool2d(around, (1, 31), stride=1, padding=(0, 15), count_include_pad=False)
    return 5 * (around - masks).abs()


def total_loss(logits: tuple[Tensor, ...], masks: Tensor, cfg: Config) -> Tensor:
    """The loss of each output -> (7,); training minimizes their sum."""
    logits = stack(logits)  # once for all terms
    weights = 1 + cfg.edge_weight * edge_weights(masks) if cfg.edge_weight else None
    losses = multi_bce_loss_fusion(logits, masks, weights)
    return losses + cfg.iou_weight * soft_iou_loss(logits, masks) if cfg.iou_weight else losses


def learning_rate(cfg: Config, iteration: int, progress: float) -> float:
    """The learning rate of an iteration, counted from 1; progress: completed fraction of the run."""
    rate = cfg.lr * min(1.0, iteration / max(cfg.warmup_iters, 1))
    if cfg.lr_schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    return rate


def choose_step(net: torch.nn.Module, plain: bool) -> type[TrainStep]:
    """The class of the training step; installs the fast operations in `net` where they help. Prints the choice."""
    if plain or fast is None:
        print(f"step: plain PyTorch ({'--plain' if plain else 'u2mamba/fast not found'})")
        return TrainStep
    for line in fast.install(net):
        print(line)
    return fast.TrainStep


@release_run_locks()
def run(cfg: Config, dist: DistContext) -> int:
    """The whole run, in every process of `dist`; returns the exit code."""
    cfg, pretrained = validate_config(cfg, weights_path)
    env = Environment.choose(cfg, dist)
    folder = Path(cfg.saved_models, cfg.model_name + ("_overfit" if cfg.overfit else ""))
    if dist.is_main:
        acquire_run_dir(folder)

    # ------- 3. data --------

    pairs = find_pairs(cfg)
    train, val = train_val_split(pairs)  # for a split of your own, change this line
    data = open_data(train, val, cfg.rescale, dist).to(env.device)
    shown = preview_batch(data, env.channels_last)

    # ------- 4. model --------

    net = build_model(to_dict(cfg)).to(env.device, memory_format=env.memory_format).train()
    print(f"network: {cfg.arch}, {sum(p.numel() for p in net.parameters()):,} parameters")
    step_class = choose_step(net, cfg.plain)

    # ------- 5. optimizer --------

    groups, algorithm = param_groups_weight_decay(net), torch.optim.AdamW if cfg.weight_decay else torch.optim.Adam
    optimizer = algorithm(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay, fused=True)
    step = step_class(
        net, optimizer, partial(total_loss, cfg=cfg), env, dist,
        grad_clip=cfg.grad_clip, ema_decay=cfg.ema_decay, grad_accum_steps=cfg.grad_accum_steps,
    )  # fmt: skip
    if cfg.overfit:
        return overfit(step, data.train, cfg.overfit, cfg.batch_size_train, folder)

    # ------- 6. training --------

    checkpoints = Checkpointer(folder, cfg, step, data.fingerprint)
    schedule = Schedule(cfg, len(data.train), dist.size)
    state = checkpoints.restore()
    if state.finished:
        return EXIT_OK
    if pretrained and not state.iteration:
        print(warm_start(net, pretrained, cfg.rescale))
    try_batch(step, shown, BEST_BY)
    checkpoints.begin(state)  # all processes have the main one's weights from here on
    schedule.start_from(state)
    logger = TrainLogger(folder, [pair.image.name for pair in data.train.pairs], schedule, state, dist.is_main)

    def save_weights() -> None:
        means, averaged = step.read(), step.ema_model()
        checkpoints.save_weights(averaged, state, means.loss, means.tar)
        logger.log_image(preview(averaged, shown.x, shown.y))
        step.reset()

    def end_epoch() -> None:
        if (state.epoch + 1) % cfg.val_frq == 0 or state.epoch + 1 == cfg.epoch_num:
            started, averaged = time.monotonic(), step.ema_model()
            own = range(dist.rank, len(data.val), dist.size)
            scores = validate(averaged, validation_batches(data.val, own, VAL_BATCH, env.channels_last), stop, dist)
            best = state.is_best(BEST_BY, scores)
            logger.log_validation(scores, best, time.monotonic() - started, averaged)
            if best and checkpoints.save_best(averaged, state):
                state.best, state.best_name = scores[BEST_BY], BEST_BY
        state.end_epoch()

    with StopSignal() as stop, logger:
        try:
            if schedule.epoch_is_over(state):  # a signal cut its validation short
                end_epoch()
            for batch in train_batches(data.train, schedule, state, env.channels_last, dist):
                state.advance(len(batch.rows))
                step.set_learning_rate(learning_rate(cfg, state.iteration, schedule.progress(state)))
                step(batch.x, batch.y)
                logger.update(batch)
                if state.iteration % cfg.log_frq == 0 or state.iteration in (1, schedule.total_iterations):
                    logger.log_train(step.read(), float(optimizer.param_groups[0]["lr"]))
                if state.iteration % cfg.save_frq == 0:
                    save_weights()
                if state.iteration % cfg.save_frq == 0 or checkpoints.is_due():
                    checkpoints.save_last(state)
                dist.raise_if_stopped(stop)  # in all processes at the same iteration
                if schedule.epoch_is_over(state):
                    end_epoch()
                    if checkpoints.is_cheap():
                        checkpoints.save_last(state)
        except (Stopped, DataError, NonFiniteError) as reason:
            checkpoints.save_last(state)
            if not isinstance(reason, Stopped):
                raise
            print(f"stopped at iteration {state.iteration}; {checkpoints.resume_hint()}")
            return reason.exit_code
        if step.read().steps:  # else it was just done
            save_weights()  # before last.pth says that the run is finished
        checkpoints.save_last(state, finished=True)
    return checkpoints.report_end(state, skipped=pairs.skipped + len(data.report.unusable))


if __name__ == "__main__":
    with one_line_errors(), init_distributed() as dist:
        cfg = read_settings(Config(), PRESETS)
        if "demo" in sys.argv[1:2]:
            with dist.main_process_first():
                make_demo(cfg.data_dir)
        sys.exit(run(cfg, dist))
