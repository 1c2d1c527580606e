"""The tab Classify: the label of a picture, how probable, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewshot_diti.app import markup
from fewshot_diti.app.events import QUEUED, QUICK, Context, Report, report_to
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.images import decode
from fewshot_diti.explain import Explanation
from fewshot_diti.witnesses.features import UnetWitness

START = markup.note("The answer appears here.")
_BARS = 6  # classes with a bar of their own


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the tab shows of a picture.

    Attributes:
        label: HTML of the label and the probabilities.
        reasons: HTML of the nearest shots, the map, the curve, and what each source of evidence gives.
    """

    label: str
    reasons: str


def classify(classifier: DiTiClassifier, path: Path, report: Report) -> Answer:
    """Decides and explains a picture.

    Raises:
        ValueError: the file is no image, or the bank has fewer than two classes.
    """
    if len(classifier.classes_) < 2:
        raise ValueError("This bank has fewer than two classes to choose among; add some on the tab Classes.")
    report(0.05, "Reading the picture")
    image = decode(path)
    report(0.1, "Comparing the classes")
    probabilities = classifier.probabilities(classifier.scores([image]))[0]
    report(0.6, "Looking for similar shots")
    knows_shots = any(isinstance(x.witness, UnetWitness) for x in classifier.decider().witnesses)
    unknown = knows_shots and bool(classifier.is_unknown([image])[0])
    report(0.7, "Drawing where and when the first two classes differ")
    explanation = classifier.explain(image)
    return Answer(
        label=_label(explanation, dict(zip(classifier.classes_.tolist(), probabilities, strict=True)), unknown),
        reasons=f'<div class="sides">{_nearest(explanation)}{_sources(explanation)}</div>{_differences(explanation)}',
    )


def _label(x: Explanation, probabilities: dict[Any, float], unknown: bool) -> str:
    order = sorted(probabilities, key=lambda label: (label != x.label, -probabilities[label]))
    if unknown:
        head = (
            '<h2 class="unknown">None of these</h2><p>The picture is like none of the shots, so the probabilities '
            "below mean nothing.</p>"
        )
    else:
        head = f"<h2>{markup.name(x.label)}</h2>"
    shown = {label: float(probabilities[label]) for label in order[:_BARS]}
    rest = sum(float(probabilities[label]) for label in order[_BARS:])
    more = f'<p class="note">the other {len(order) - _BARS} classes together: {100 * rest:.1f} %</p>'
    return head + markup.bars(shown) + (more if len(order) > _BARS else "")


def _nearest(x: Explanation) -> str:
    """A row of shots for each of the first classes."""
    rows = []
    for label, found in x.neighbours.items():
        shots = "".join(
            f"<figure>{'' if n.picture is None else markup.picture(n.picture)}"
            f"<figcaption>similarity {n.similarity:.2f}</figcaption></figure>"
            for n in found
        )
        rows.append(f'<div class="shots"><div class="shots-name">{markup.name(label)}</div>{shots}</div>')
    if not rows:
        return ""
    return f"<div><h3>The most similar shots of the most probable classes</h3>{''.join(rows)}</div>"


def _differences(x: Explanation) -> str:
    """Map and curve."""
    pair = f"{markup.name(x.label)} and {markup.name(x.rival)}"
    where = markup.picture(x.map(), "where on the image the evidence of the class tokens sits")
    when = markup.picture(x.curve(), "at which timesteps the class tokens differ")
    return f'<h3>Where and when the class tokens of {pair} differ</h3><div class="pair">{where}{when}</div>'


def _sources(x: Explanation) -> str:
    """What each source of evidence gives by itself."""
    rows = [
        [markup.text(name), *(f"{100 * p:.0f} %" for p in of.values())]
        for name, of in {"together": x.probabilities, **x.sources}.items()
    ]
    head = ["", *map(markup.name, x.probabilities)]
    return f"<div><h3>What each source of evidence says by itself</h3>{markup.table(head, rows)}</div>"


def build(context: Context, examples: Sequence[str]) -> None:
    """The tab.

    Args:
        examples: paths of pictures to try.
    """
    import gradio as gr

    def run(name: str, file: Any, progress: Any = gr.Progress()) -> tuple[str, str]:  # noqa: B008, gradio's way
        if (found := context.upload(file)) is None:
            return START, ""
        answer = classify(context.banks[name].classifier, found, report_to(progress))
        return answer.label, answer.reasons

    gr.Markdown("Drop a picture. The page names its class, says how probable it is, and shows why.")
    with gr.Row():
        with gr.Column(scale=2):
            picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=230, elem_id="picture")
            if examples:
                gr.Examples([[path] for path in examples], picture, label="Test pictures to try", examples_per_page=12)
        with gr.Column(scale=3):
            label = gr.HTML(START, elem_id="answer")
    reasons = gr.HTML(elem_id="reasons")
    outputs = [label, reasons]
    asked = [context.chosen, picture]
    # as a file: gradio would decode it before the handler, and say no more than "Error" where it cannot
    picture.change(context.answering(run), asked, outputs, show_progress_on=label, preprocess=False, **QUEUED)
    context.chosen.change(lambda: (START, ""), None, outputs, **QUICK)
