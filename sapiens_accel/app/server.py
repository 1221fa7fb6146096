"""sapiens-accel app RUN|ORG/NAME: a page on this machine to try a network on images and videos.

Nothing leaves the machine: the page listens on loopback unless --host names another address, gradio's analytics are
off, and all files are in a temporary folder that is removed at the end.
"""

import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sapiens_accel.config.commands import app_parser
from sapiens_accel.errors import UserError
from sapiens_accel.inference.detector import DEFAULT
from sapiens_accel.inference.estimator import PoseEstimator

PORTS = range(1, 2**16)


def main(words: Sequence[str]) -> None:
    asked = app_parser().parse_args(words)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    serve(asked.weights, host=asked.host, port=asked.port, detector=asked.detector, device=asked.device, until=stopped)


def serve(
    weights: str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    detector: str = DEFAULT,
    device: str | None = None,
    until: threading.Event | None = None,
) -> None:
    """Show the page until the event is set, or until the process ends.

    Args:
        weights: a run directory, a weights folder or file, or ORG/NAME.
        host: the address to listen on; 0.0.0.0 is every one of this machine.
        detector: a folder or Hub name of a detector of transformers; loaded when it is first used.

    Raises:
        UserError: gradio is not installed; as `PoseEstimator.from_pretrained`; the address or port cannot be had.
    """
    if find_spec("gradio") is None:
        raise UserError('sapiens-accel app: gradio is not installed. Run pip install "sapiens_accel[app]"')
    if port not in PORTS:
        raise UserError(f"--port {port}: no port (expected {PORTS[0]} to {PORTS[-1]})")
    pose = PoseEstimator.from_pretrained(weights, device=device)
    folder = Path(tempfile.mkdtemp(prefix="sapiens_accel_app_"))
    # gradio reads them when it is imported: its uploads go there, and it reports nothing.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "gradio"), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        (folder / "answers").mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library of gradio's misses ffmpeg, which only sounds need
            from sapiens_accel.app import page
        logging.getLogger("httpx").setLevel(logging.WARNING)
        blocks = page.build_page(pose, _title(weights), folder / "answers", detector)
        try:
            _, url, _ = blocks.launch(**page.launch_options(host, port))
        except OSError as error:
            reason = error.strerror or "it is in use, or the address is not one of this machine"
            raise UserError(f"--host {host} --port {port}: {reason}. Give another --port") from None
        print(f"{url} shows {weights}; Ctrl-C ends it", flush=True)
        (until or threading.Event()).wait()
        blocks.close(verbose=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _title(weights: str) -> str:
    """ORG/NAME as it is; of a folder its last parts, not where it lies."""
    path = Path(weights)
    return weights if not path.exists() else "/".join(path.resolve().parts[-2:])
