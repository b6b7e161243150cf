"""Do reading and writing cost u2mamba_predict.py anything? Images a second of network and whole, in turn.

    python -m benchmarks.predict                              200 made photographs, maps and cut-outs
    python -m benchmarks.predict --images FOLDER --checkpoint saved_models/u2net/best.pth
    python -m benchmarks.predict --large                      the peak memory of one image of 8,000x6,000 pixels

The network alone computes the same batches from bytes that lie ready. The whole reads files and writes maps; its time
does not count the start (imports, weights, and the first batch, which warms up).
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

import u2mamba_predict
from benchmarks.hardware import lines, median_and_spread, wait
from model import ARCHS
from u2mamba.dataset.demo import PHOTOGRAPHS
from u2mamba.dataset.pairs import IMAGE_TYPES
from u2mamba.inference.pipeline import THREADS, compute_maps, read
from u2mamba.inference.predictor import Predictor, trained_network
from u2mamba.runtime.environment import choose_device, choose_precision, choose_scan, memory_in_use
from u2mamba.runtime.workers import in_order


@dataclass
class Options:
    checkpoint: str = ""  # default: the network `arch` with weights as initialised, which take as long
    arch: str = "u2mamba"
    images: str = ""  # folder
    count: int = 200  # images that are made where no folder is given: 400x300 JPEGs, as those of DUTS
    mode: tuple[str, ...] = ("soft", "rgba")
    batch: int = 0  # 0: as u2mamba_predict.py chooses
    size: int = 320
    runs: int = 3
    device: str = "auto"
    large: bool = False  # one large image instead


def make_images(folder: Path, count: int) -> None:
    photographs = [Image.open(PHOTOGRAPHS / name).convert("RGB") for name in ("astronaut.png", "coffee.png")]
    for i in range(count):
        photograph = photographs[i % 2]
        box = (i % 50, i % 40, photograph.width - i % 30, photograph.height - i % 20)
        photograph.resize((400, 300), box=box).save(folder / f"{i:04}.jpg", quality=90)


def large(options: Options, predict: Predictor, folder: Path) -> None:
    """Prints the memory that the process holds after a small image, and its peak with a large one."""
    status = Path("/proc/self/status")
    if not status.exists():
        sys.exit("--large reads /proc, which Linux alone has")

    def gib(key: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) / 2**20

    image = Image.open(PHOTOGRAPHS / "coffee.png").convert("RGB")
    for name, size in (("small", (400, 300)), ("large", (8000, 6000))):
        image.resize(size).save(folder / f"{name}.jpg")
        if name == "large":
            del image
        work(options, predict, [u2mamba_predict.Source(folder / f"{name}.jpg", Path(name))], folder, 1)
        print(f"{name}, {size[0]}x{size[1]}: {gib('VmRSS'):.2f} GiB now, peak {gib('VmHWM'):.2f} GiB")


def work(options: Options, predict: Predictor, sources: list, out: Path, batch: int) -> None:
    """What u2mamba_predict.run does between its start and its last line."""
    targets = {s: {m: out / m / f"{s.name}{u2mamba_predict.MODES[m]}" for m in options.mode} for s in sources}
    with ThreadPoolExecutor(THREADS) as pool:
        maps = compute_maps(predict, targets, pool, options.size, batch)
        how = {mode: {} for mode in options.mode}
        written = in_order(
            pool, lambda found: u2mamba_predict.write(found, targets, 0.5, how), maps, 2 * batch + THREADS
        )
        for _, failure in written:
            if failure:
                sys.exit(f"error: {failure}")


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    torch.backends.cudnn.benchmark = True
    precision = choose_precision("bf16", device)[0]
    backend = choose_scan(device, "auto")[0]
    torch.manual_seed(0)
    net = trained_network(options.checkpoint, backend)[0] if options.checkpoint else ARCHS[options.arch]().eval()
    predict = Predictor(net, device, precision)
    batch = options.batch or (4 if device.type == "cpu" else 32)
    print("\n".join(lines(device)))
    with tempfile.TemporaryDirectory() as made:
        if options.large:
            large(options, predict, Path(made))
            return
        folder = Path(options.images or made)
        if not options.images:
            make_images(folder, options.count)
        paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_TYPES]
        paths = paths[: len(paths) // batch * batch]
        sources = [u2mamba_predict.Source(p, p.relative_to(folder).with_suffix("")) for p in paths]
        if not sources:
            sys.exit(f"error: {folder}: fewer images than a batch of {batch}")
        ready = torch.from_numpy(np.stack([read(source, options.size)[1] for source in sources])).to(device)

        def network_alone() -> None:
            for images in ready.split(batch):
                predict(images)
            wait(device)

        ways = {
            "network alone": network_alone,
            "files to files": lambda: work(options, predict, sources, Path(made), batch),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        predict(ready[:batch])
        for _ in range(options.runs):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                rates[name].append(len(sources) / (time.perf_counter() - begun))
        print(
            f"{type(net).__name__}, {precision}, {len(sources)} images in batches of {batch}, {THREADS} threads, "
            f"{' and '.join(options.mode)}, {options.runs} runs in turn, {memory_in_use(device):.1f} GiB"
        )
        for name, found in rates.items():
            median, spread = median_and_spread(found)
            print(f"{name}: {median:.1f} images/s +- {spread:.1f}")
        alone, whole = (median_and_spread(found)[0] for found in rates.values())
        print(f"ratio: {whole / alone:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
