"""The page, in gradio: an image or a video in, boxes by a detector or by hand, keypoints and files out.

Each visitor has a session of gradio's own: what a handler keeps between two clicks is in it (`gr.State`), nothing in
this module.
"""

# pyright: reportMissingImports=false
import html
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapiens_accel.app import results
from sapiens_accel.app.results import Answer, Request
from sapiens_accel.errors import UserError
from sapiens_accel.inference import media
from sapiens_accel.inference.estimator import PoseEstimator

FORGET_SECONDS = 3600  # after which a visitor's files are removed
MAX_FILE_SIZE = "1gb"
# A page of gradio works without the internet, and with this no browser asks for anything elsewhere.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob: ws: wss:"
# In the page's head: the `css` of gradio rewrites selectors, and drops these of narrow screens.
CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: auto}
#status {min-height: 1.6em} #status .error {color: #c00000; font-weight: 600}
@media (max-width: 760px) {
  .gradio-container .column {flex: 1 1 100% !important}
  .gradio-container, .gradio-container :is(.main, .wrap, main, .row, .column, .block) {min-width: 0 !important}
}
#view img {cursor: crosshair}
#table div {max-height: 320px; overflow: auto} #table table {width: 100%; border: 0; border-collapse: collapse}
#table th {text-align: left; position: sticky; top: 0; background: var(--background-fill-primary)}
#table :is(td, th) {padding: 2px 8px; border: 0; border-bottom: 1px solid var(--border-color-primary); font-size: 14px}
"""
CHOICES = [
    ("Each person, by a detector", results.DETECTOR),
    ("The whole image is one person", results.WHOLE),
    ("Boxes of mine", results.BY_HAND),
]
FONTS = ["system-ui", "sans-serif"]


def build_page(pose: PoseEstimator, name: str, folder: Path, detector: str) -> gr.Blocks:
    """The page of a network.

    Args:
        name: of the weights, for the title.
        folder: for the files of answers, until gradio has copied them.
        detector: a folder or Hub name; loaded when it is first used.
    """
    page = gr.Blocks(title=name, analytics_enabled=False, delete_cache=(FORGET_SECONDS // 4, FORGET_SECONDS))
    with page:
        gr.Markdown(f"## {html.escape(name)}\n{_about(pose)}")
        with gr.Row():
            with gr.Column(min_width=320):
                file = gr.File(label="Image or video", type="filepath", height=120, elem_id="file")
                boxes = gr.Radio(CHOICES, value=_usual_boxes(pose), label="People", elem_id="boxes")
                text = gr.Textbox(
                    label="Boxes: x y width height in px, a line each; or click two corners in the image",
                    lines=3, visible=False, elem_id="box_text",
                )  # fmt: skip
                clear = gr.Button("Remove boxes", size="sm", visible=False)
                smooth = gr.Checkbox(label="Smooth over time", visible=False, elem_id="smooth")
                view = gr.Image(label="Input", interactive=False, buttons=[], visible=False, elem_id="view")
                button = gr.Button("Find keypoints", variant="primary", elem_id="find")
            with gr.Column(min_width=320):
                status = gr.HTML(elem_id="status")
                image = gr.Image(label="Keypoints", interactive=False, buttons=["download", "fullscreen"],
                                 format="png", visible=False, elem_id="result")  # fmt: skip
                film = gr.Video(label="Keypoints", interactive=False, visible=False, elem_id="film")
                with gr.Row():
                    json = gr.DownloadButton("COCO JSON", visible=False, elem_id="json")
                    csv = gr.DownloadButton("CSV", visible=False, elem_id="csv")
                table = gr.HTML(visible=False, elem_id="table")
        corner = gr.State(None)  # the first corner of a box whose second one is to be clicked
        hidden: dict[str, Any] = {"api_visibility": "private"}
        shown = [status, image, film, json, csv, table]
        file.change(_open, [file], [view, smooth, text, corner, *shown], **hidden)
        boxes.change(_choose, [boxes], [text, clear], **hidden)
        text.change(_redraw, [file, text], [view, status], show_progress="hidden", **hidden)
        clear.click(lambda: ("", None), None, [text, corner], **hidden)
        view.select(_click, [file, boxes, text, corner], [view, text, corner], show_progress="hidden", **hidden)

        def find(path: str | None, boxes: str, text: str, smooth: bool) -> Iterator[list[Any]]:
            asked = None
            if path:
                asked = Request(path=Path(path), boxes=boxes, detector=detector, box_text=text, smooth=smooth)
            yield from _find(pose, folder, asked)

        button.click(find, [file, boxes, text, smooth], shown, concurrency_limit=1, **hidden)
    return page


def launch_options(host: str, port: int) -> dict[str, Any]:
    """What `gr.Blocks.launch` is to be called with: only what was asked for is reachable, and nothing is sent."""
    return {
        "server_name": host, "server_port": port, "share": False, "quiet": True, "prevent_thread_lock": True,
        "footer_links": [], "run_history": False, "ssr_mode": False, "pwa": False, "mcp_server": False,
        "enable_monitoring": False, "max_file_size": MAX_FILE_SIZE, "head": f"<style>{CSS}</style>",
        "theme": Default(font=FONTS, font_mono=["monospace"]),
        "app_kwargs": {"middleware": [Middleware(_StayHere)]},
    }  # fmt: skip


class _StayHere:
    """Adds POLICY to each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("Content-Security-Policy", POLICY)
            await send(message)

        await self.app(scope, receive, send_with_policy)


# ---- What is shown


def _about(pose: PoseEstimator) -> str:
    kinds = " or ".join(pose.finder.skeleton.categories) or "person"
    height, width = pose.finder.networks[0].codec.input_hw
    return f"{len(pose.names)} keypoints of a {html.escape(kinds)}; input of the network {width}x{height} px"


def _usual_boxes(pose: PoseEstimator) -> str:
    """People are detected; animals of a laboratory, which the usual detector may not know, fill their images."""
    return results.DETECTOR if set(pose.finder.skeleton.categories) <= {"person"} else results.WHOLE


def _open(path: str | None) -> list[Any]:
    """What is shown of a new file; the files and keypoints of the one before are gone."""
    view, is_video, line = gr.update(value=None, visible=False), False, ""
    if path:
        try:
            view = gr.update(value=results.read_preview(Path(path)), visible=True)
            is_video = media.is_video(Path(path))
        except UserError as error:
            line = _error(error, path)
    return [view, gr.update(visible=is_video), "", None, line, *_nothing()]


def _choose(boxes: str) -> list[Any]:
    by_hand = boxes == results.BY_HAND
    return [gr.update(visible=by_hand), gr.update(visible=by_hand)]


def _redraw(path: str | None, text: str) -> list[Any]:
    if not path:
        return [gr.skip(), gr.skip()]
    try:
        return [results.draw_boxes(results.read_preview(Path(path)), text), ""]
    except UserError as error:
        return [gr.skip(), _error(error, path)]


def _click(path: str | None, boxes: str, text: str, corner: list[int] | None, click: gr.SelectData) -> list[Any]:
    """The first corner of a box, or the second, which completes it."""
    if not path or boxes != results.BY_HAND:
        return [gr.skip(), gr.skip(), None]
    if corner is None:
        return [results.draw_boxes(results.read_preview(Path(path)), text, click.index), gr.skip(), list(click.index)]
    lines = [*filter(None, [text.strip()]), results.box_line(corner, click.index)]
    return [gr.skip(), "\n".join(lines), None]  # the view follows the text


def _find(pose: PoseEstimator, folder: Path, request: Request | None) -> Iterator[list[Any]]:
    if request is None:
        yield [_error(UserError("no file (expected an image or a video)"), ""), *_nothing()]
        return
    yield [_line("..."), *_nothing()]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            for part in results.predict(pose, request, Path(scratch)):
                yield [_line(part), *_nothing()] if isinstance(part, str) else _show(part)
        except UserError as error:
            yield [_error(error, str(request.path)), *_nothing()]


def _show(answer: Answer) -> list[Any]:
    is_film = isinstance(answer.drawn, Path)
    return [
        _line(answer.line),
        gr.update(value=None if is_film else answer.drawn, visible=not is_film),
        gr.update(value=str(answer.drawn) if is_film else None, visible=is_film),
        gr.update(value=str(answer.json), visible=True),
        gr.update(value=str(answer.csv), visible=True),
        gr.update(value=_table(answer.rows), visible=bool(answer.rows)),
    ]


def _table(rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in results.COLUMNS)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<div><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _nothing() -> list[Any]:
    return [gr.update(value=None, visible=False) for _ in range(5)]


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _error(error: UserError, path: str) -> str:
    """The line of an error; a visitor's file goes by its own name."""
    text = str(error).replace(path, Path(path).name) if path else str(error)
    return f'<p class="error">{html.escape(text)}</p>'
