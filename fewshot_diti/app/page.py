"""The page: its tabs, put together and served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewshot_diti.app import classes, classify, markup, results, timesteps
from fewshot_diti.app.banks import Banks, ServedBank
from fewshot_diti.app.events import QUICK, Context
from fewshot_diti.app.guard import AT_ONCE, HOSTS, KEPT_SECONDS, SESSIONS, Guard, Limits, own_folder
from fewshot_diti.presets import PRESETS

TITLE = "Few-shot classification of things that look almost alike"
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def build_page(banks: Banks, results_folder: Path | None, uploads: Path, made: Path) -> Any:
    """The page as `gr.Blocks`.

    Args:
        results_folder: what `fewshot-diti eval` left, where there is something.
        uploads: folder of what users drop.
        made: folder that gets new banks.

    Raises:
        ValueError: the folder holds no results.
    """
    import gradio as gr

    first = banks[banks.names[0]]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {TITLE}\nfrom a few pictures per class, by the denoising errors of Stable Diffusion")
            with gr.Column(min_width=360, scale=0):
                chosen = gr.Dropdown(banks.names, value=banks.names[0], elem_id="bank", container=False)
                about = gr.HTML(_about(first), elem_id="about")
        context = Context(banks=banks, chosen=chosen, uploads=uploads, made=made)
        with gr.Tab("Classify"):
            classify.build(context, _examples(first))
        with gr.Tab("Classes"):
            classifier = first.classifier
            added = classes.build(context, classifier.concept or PRESETS[classifier.backbone_.kind].concept or "")
        with gr.Tab("Results"):
            results.build(context, results_folder)
        with gr.Tab("Timesteps") as tab:
            timesteps.build(context, tab)
        for event in (chosen.change, added.success):
            event(context.answering(lambda name: _about(banks[name])), chosen, about, **QUICK)
        # a page that is loaded again knows the banks that were made since
        page.load(lambda: gr.Dropdown(banks.names), None, chosen, **QUICK)
    return page


@contextmanager
def served(
    first: ServedBank, results_folder: Path | None, port: int, made: Path, limits: Limits | None = None
) -> Iterator[str]:
    """Serves the page on 127.0.0.1 while the context lasts, and gives its address.

    Raises:
        ValueError: the port is taken, or the folder holds no results.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    with own_folder() as uploads:
        import gradio as gr

        page = build_page(Banks(first), results_folder, uploads, made)
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS)),
            Middleware(Guard, folder=uploads, limits=limits or Limits()),
        ]
        page.queue(max_size=AT_ONCE - 1)  # one more is being served
        try:
            _, address, _ = page.launch(
                server_name=HOSTS[0],
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": middleware, "openapi_url": None},
                theme=gr.themes.Base(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                css=CSS,
            )
        except OSError as error:
            raise ValueError(f"The page cannot be served on port={port} ({error}); pass another --port.") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _about(bank: ServedBank) -> str:
    folder = bank.folder.resolve()
    shown = Path("~") / folder.relative_to(Path.home()) if folder.is_relative_to(Path.home()) else folder
    return f"Bank in use: {len(bank.classifier.classes_)} classes, saved in {markup.text(shown)}"


def _examples(bank: ServedBank) -> list[str]:
    """Paths of bundled test pictures, one of each class that the bank has."""
    try:
        images = timesteps.test_images(bank.classifier)
    except ValueError:
        return []
    return list(images.first_of_each_class(1).names)
