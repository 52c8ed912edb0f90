# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The application: a tab for each page, whichever can be had."""

from collections.abc import Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI

from .comparison import Comparison, compare_page
from .diagnosis import diagnose_page
from .looking import Detector
from .queue import Queue
from .server import create_server


# Fonts of the reader's system: a page on this machine asks nobody else for anything.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container { max-width: none !important; padding: 8px 16px !important; }
#painting { padding: 0; }
#painting iframe { display: block; width: 100%; height: calc(100vh - 110px); min-height: 560px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
#map-before img, #map-after img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""
KEPT_SECONDS = 24 * 60 * 60  # what was dropped onto a page


def create_application(
    queue: Queue | None = None,
    detector: Detector | None = None,
    comparison: Comparison | None = None,
    *,
    host: str = "127.0.0.1",
    max_upload_megabytes: int = 20,
) -> FastAPI:
    """The pages as an application that any server of ASGI can run.

    Args:
        queue: of images to paint on; without it there is no such page.
        detector: for the page that diagnoses; without it there is none.
        comparison: of two folders; without it there is no such page.
        host: that the server listens to: on the loopback address only requests to this machine's own names are answered.
        max_upload_megabytes: size of the largest file that can be dropped.

    Raises:
        ValueError: there is nothing to show, or an argument is out of range.
    """
    if max_upload_megabytes < 1:
        raise ValueError(f"`max_upload_megabytes` must be at least 1, found {max_upload_megabytes}.")
    pages: list[tuple[str, Callable[[], None]]] = []
    if queue is not None:
        pages.append(("Annotate", lambda: annotate_page(queue)))
    if detector is not None:
        pages.append(("Diagnose", lambda: diagnose_page(detector, max_upload_megabytes)))
    if comparison is not None:
        pages.append(("Compare", lambda: compare_page(comparison)))
    if not pages:
        raise ValueError("There is nothing to show: give a `queue`, a `detector` or a `comparison`.")
    with gr.Blocks(title="DiffDoctor", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as blocks:
        with gr.Tabs():
            for name, build in pages:
                with gr.Tab(name, id=name):
                    build()
    return gr.mount_gradio_app(
        create_server(queue, host),
        blocks,
        path="/",
        max_file_size=max_upload_megabytes * 2**20,
        theme=THEME,
        css=CSS,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
    )


def serve(app: FastAPI, host: str, port: int, *, behind_proxy: bool = False) -> None:
    """Serve the pages until the process is interrupted.

    Args:
        app: of [`create_application`].
        host, port: to listen to.
        behind_proxy: believe what a proxy says about the address that visitors see, as on the Hub.
    """
    trusted = "*" if behind_proxy else "127.0.0.1"
    uvicorn.run(
        app, host=host, port=port, log_level="warning", proxy_headers=behind_proxy, forwarded_allow_ips=trusted
    )


def annotate_page(queue: Queue) -> None:
    """The page for painting, and how far everybody is."""
    gr.HTML('<iframe src="annotate/annotate.html" title="Annotate"></iframe>', elem_id="painting")
    with gr.Accordion("Progress and agreement", open=False):
        summary = gr.Markdown()
        with gr.Row():
            people = gr.Dataframe(
                headers=["annotator", "finished", "skipped", "begun"], label="Annotators", interactive=False
            )
            pairs = gr.Dataframe(
                headers=["annotator", "annotator", "images", "mean IoU"], label="Agreement", interactive=False
            )
        refresh = gr.Button("Refresh", size="sm")

    def report():
        found = queue.progress()
        wanted = found["images"] * found["copies"]
        text = f"{found['finished']} of {found['images']} images are finished; {found['missing']} of {wanted} masks are missing."
        if queue.quarantined:
            text += f" {len(queue.quarantined)} images cannot be read."
        rows = [[name, n["done"], n["skipped"], n["draft"]] for name, n in found["annotators"].items()]
        agreed = [[one, other, images, round(iou, 3)] for (one, other), (images, iou) in queue.agreement().items()]
        return text, rows, agreed

    refresh.click(report, outputs=[summary, people, pairs], api_visibility="private")
    gr.on(triggers=None, fn=report, outputs=[summary, people, pairs], api_visibility="private")
