"""A page on which to cut objects out of photos: drop one, see its map and cut-out, download the PNG.

    pip install -r requirements-app.txt
    python -m examples.app                  then open http://127.0.0.1:7860
    python -m examples.app --host 0.0.0.0   for other machines of the network too

Nothing is fetched from the internet or sent there. Photos and results lie in a temporary folder for an hour, or until
the server stops. The downloaded PNG is the one that `u2mamba_predict.py --mode cutout` writes.
"""

import functools
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image, ImageColor

import u2mamba_predict
from u2mamba.inference.predictor import PRETRAINED, PRETRAINED_DIR, input_size, load_model
from u2mamba.inference.render import predict_file
from u2mamba.runtime.config import Range, read_settings
from u2mamba.runtime.errors import EXIT_OK, UserError, one_line_errors

PREVIEW = 900  # pixels: longest side of the images on the page
MAX_FILE_SIZE = "100mb"
MAX_WAITING = 50  # photos; they are processed one at a time
KEEP_SECONDS = 3600


@dataclass
class Config:
    __doc__ = __doc__  # for --help
    host: str = "127.0.0.1"
    port: Annotated[int, Range(1, 65535)] = 7860
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device supports it


def build_page(cfg: Config, folder: str):
    """The page (gradio.Blocks); results are written to `folder`."""
    import gradio as gr

    options = u2mamba_predict.Config(mode=("map", "cutout"), device=cfg.device, precision=cfg.precision)

    @functools.lru_cache(maxsize=len(PRETRAINED))
    def prepared(checkpoint: str):
        net = load_model(checkpoint)
        size = input_size(net)
        return u2mamba_predict.prepare(net, size, replace(options, checkpoint=checkpoint)), size

    def cut_out(photo: str | None, checkpoint: str, color: str):
        if photo is None:
            return None, None, None
        try:
            files = predict_file(Path(photo), *prepared(checkpoint), options)
        except UserError as error:
            raise gr.Error(str(error).replace(f"{Path(photo).parent}/", ""), print_exception=False) from None
        result = Path(tempfile.mkdtemp(dir=folder))
        for mode, content in files.items():
            Path(result, f"{mode}.png").write_bytes(content)
        png = Path(result, "cutout.png").rename(result / f"{Path(photo).stem}.png")
        return preview(result / "map.png"), on_background(str(png), color), str(png)

    def on_background(png: str | None, color: str) -> Image.Image | None:
        if png is None:
            return None
        cutout = preview(Path(png))
        background = Image.new("RGBA", cutout.size, ImageColor.getrgb(color))
        return Image.alpha_composite(background, cutout).convert("RGB")

    with gr.Blocks(title="U²-Mamba cut-outs", delete_cache=(600, KEEP_SECONDS), analytics_enabled=False) as page:
        gr.Markdown("# Cut out an object\nDrop a photo. It stays on this machine.")
        with gr.Row():
            photo = gr.File(label="Photo (JPEG, PNG, WebP, BMP, TIFF or GIF)", type="filepath", height=170)
            with gr.Column():
                names = [name for name, file in PRETRAINED.items() if (PRETRAINED_DIR / file).is_file()]
                checkpoint = gr.Radio(names, value=names[0], label="Weights")
                color = gr.ColorPicker("#ff00ff", label="Background")
        with gr.Row():
            shown = {"format": "png", "height": 360, "interactive": False, "buttons": []}
            saliency, cutout = gr.Image(label="Saliency map", **shown), gr.Image(label="Cut-out", **shown)
        png = gr.File(label="Download (PNG with transparency)", interactive=False, height=110, elem_id="download")
        gr.on(
            [photo.change, checkpoint.change],
            cut_out,
            [photo, checkpoint, color],
            [saliency, cutout, png],
            concurrency_limit=1,
            show_progress_on=[saliency, cutout],
        )
        color.change(on_background, [png, color], cutout, show_progress="hidden")
    return page.queue(max_size=MAX_WAITING)


def preview(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.thumbnail((PREVIEW, PREVIEW))
        return image.copy()


def main(cfg: Config) -> int:
    """Serves the page until Ctrl-C (exit code 130) or SIGTERM (143)."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="cutouts-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads too
        try:
            import gradio as gr
        except ImportError as error:
            raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-app.txt") from None
        fonts = {"font": gr.themes.Font("sans-serif"), "font_mono": gr.themes.Font("monospace")}  # the machine's own
        page = build_page(cfg, folder)
        stopped = threading.Event()
        try:
            page.launch(
                server_name=cfg.host,
                server_port=cfg.port,
                theme=gr.themes.Default(**fonts),
                max_file_size=MAX_FILE_SIZE,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
            )
            print(f"page: {page.local_url} (Ctrl-C stops it)", flush=True)
            stopped.wait()
        except OSError as error:
            raise UserError(f"{error}: choose another --port") from None
        finally:
            page.close(verbose=False)
    return EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(read_settings(Config())))
