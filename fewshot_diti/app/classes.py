"""The tab Classes: further classes for a bank, and new banks, from pictures that were dropped on the page."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from fewshot_diti.app import markup
from fewshot_diti.app.banks import Banks, ServedBank
from fewshot_diti.app.events import QUEUED, QUICK, Context, Report, report_to
from fewshot_diti.app.guard import KEPT_SECONDS
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.checking import find_copies, judged_by_others
from fewshot_diti.checkpoints import checkpoints_for
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.config import FROM_PRESET, Label, ScoringConfig
from fewshot_diti.data import open_image
from fewshot_diti.data.image_set import image_files_set, normalize_class_name
from fewshot_diti.evaluation.run import fit_and_save
from fewshot_diti.files import check_writable, is_empty
from fewshot_diti.lora_files import file_names
from fewshot_diti.progress import counted, reported_to
from fewshot_diti.witnesses.features import UnetWitness

Listed = list[tuple[str, list[str]]]  # names of classes and paths of their pictures

FOLDS = 3  # of cross-validation, as of `fewshot-diti train`
MAX_PICTURES, MAX_CLASSES = 64, 40  # of a class, of a list
_THUMBNAIL = (72, 48)
_SHOWN = 8  # thumbnails of a class
_NAMED = 5  # pairs of copies


def put_on_list(listed: Listed, name: str, paths: Sequence[str]) -> Listed:
    """The list with a further class, or with further pictures of one that is on it.

    Raises:
        ValueError: no name or one that the library refuses, no pictures, a file that is no image, or too many.
    """
    name = normalize_class_name(name.strip())
    if not name:
        raise ValueError("The class has no name yet; write one, then put it on the list.")
    if not paths:
        raise ValueError(f"There are no pictures of {name!r} yet; drop some, then put the class on the list.")
    classes = dict(listed)
    classes[name] = list(dict.fromkeys([*classes.get(name, []), *paths]))
    if len(classes[name]) > MAX_PICTURES:
        raise ValueError(f"{name!r} has {len(classes[name])} pictures; a class takes up to {MAX_PICTURES}.")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"The list takes up to {MAX_CLASSES} classes; train these first.")
    for path in paths:
        open_image(path)
    return list(classes.items())


def show_list(listed: Listed) -> str:
    """HTML of the list, and of what is wrong with it: pictures that are on it twice."""
    rows = []
    for name, paths in listed:
        pictures = ""
        for path in paths[:_SHOWN]:
            picture = open_image(path)
            picture.thumbnail(_THUMBNAIL)
            pictures += markup.picture(picture)
        rows.append([markup.name(name), str(len(paths)), f'<div class="thumbs">{pictures}</div>'])
    if not rows:
        return markup.note("The list is empty.")
    return markup.table(["class", "pictures", ""], rows) + _show_copies(listed)


def _show_copies(listed: Listed) -> str:
    """HTML that names pictures which are one picture, in the same pixels or in others; "" where there are none."""
    paths, names = _flat(listed)
    found = find_copies(image_files_set([Path(path) for path in paths], names))
    pairs = [f"{Path(paths[a]).name} of {names[a]} and {Path(paths[b]).name} of {names[b]}" for a, b in found]
    if not pairs:
        return ""
    more = f"; and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    return markup.note(
        f"One picture twice: {'; '.join(pairs[:_NAMED])}{more}. Keep one of each: held-out accuracy is too high where "
        "a copy was learned, and of two classes one is wrong."
    )


def add_to_bank(bank: ServedBank, listed: Listed, report: Report) -> str:
    """Adds the classes of the list and saves the bank; returns what to tell the user.

    The class tokens that are there stay as they are. The folder holds the old bank until the new one is whole.

    Raises:
        ValueError: an empty list, a class that the bank has already, or the folder was changed or cannot be written to.
        OSError: the larger bank could not be saved.
        TrainingError: a class's loss was not finite; the other classes are added.
    """
    paths, names = _flat(listed)
    if not paths:
        raise ValueError("The list is empty; put a class with its pictures on it first.")
    bank.check_unchanged()
    check_writable(bank.folder)
    before = bank.classifier
    assert before.bank_ is not None
    labels = [before.bank_.as_label(name) for name in names]
    classifier = copy(before)  # others go on with the bank as it is
    with checkpoints_for(bank.folder) as checkpoints:
        try:
            with reported_to(lambda desc, done, total: report(done / total, f"Learning: {desc}")):
                classifier.add_classes(paths, labels, checkpoints=checkpoints)
        finally:
            if len(classifier.classes_) > len(before.classes_):
                bank.check_unchanged()  # what another program saved meanwhile stays
                _replace(bank, classifier)
    counts = ", ".join(f"{name} ({counted(len(of), 'picture')})" for name, of in listed)
    return (
        f"Learned: {counts}. The bank in {bank.folder} has {len(classifier.classes_)} classes now; the other class "
        f"tokens are as they were. {_held_out(classifier, list(dict.fromkeys(labels)))}"
    )


def _held_out(classifier: DiTiClassifier, added: Sequence[Label]) -> str:
    """What to tell of pictures of added classes that are held out, by the features alone: they are fitted in a moment,
    where class tokens would have to be trained again."""
    shots = next((x.shots for x in classifier.decider().witnesses if isinstance(x.witness, UnetWitness)), {})
    order = sorted(shots)
    judged = [x for label in added if label in shots for x in judged_by_others(shots, [label], FOLDS)]
    right = sum(order[int(log_p_C.argmax())] == label for label, _, log_p_C in judged)
    if not judged:
        return "There is no held-out accuracy of what was added: try it on pictures that it has not learned from."
    return (
        f"Of the {counted(len(judged), 'added picture')}, held out in turn, {right} are right by the features alone; "
        "what is trained is usually more accurate."
    )


def make_bank(
    banks: Banks, like: ServedBank, folder: Path, concept: str, listed: Listed, cross_validate: bool, report: Report
) -> tuple[str, str]:
    """Trains a bank of the list's classes on the backbone of another bank, and saves it; its name, and what to tell.

    Args:
        folder: that gets it; must not be there yet.
        concept: what all classes are.
        cross_validate: costs a training for each fold.

    Raises:
        ValueError: fewer than two classes, no concept, or the folder is there or cannot be written to.
        TrainingError: a class's loss was not finite; what there is lies in FOLDER_incomplete.
    """
    paths, names = _flat(listed)
    if len(listed) < 2:
        raise ValueError(f"A new bank needs two classes or more; the list has {len(listed)}.")
    if not concept.strip():
        raise ValueError("Say what all classes are, in the singular, such as bird.")
    if folder.exists() and not is_empty(folder):
        raise ValueError(f"{folder} is there already; choose another name for the new bank.")
    check_writable(folder.parent)
    fewest = min(len(of) for _, of in listed)
    folds = min(FOLDS, fewest) if cross_validate and fewest > 1 else 0
    old = like.classifier
    classifier = DiTiClassifier(
        old.backbone_,
        concept=concept.strip(),
        scoring=ScoringConfig(folds=folds, temperature="fit" if folds else FROM_PRESET),
        geometry=old.geometry_,
    )
    shots = image_files_set([Path(path) for path in paths], names)
    with reported_to(lambda desc, done, total: report(done / total, f"Learning: {desc}")):
        fit_and_save(classifier, shots, names, folder)
    name = banks.add(ServedBank(folder, classifier, bank_fingerprint(folder)))
    return name, f"The bank of {len(listed)} classes is in {folder}. {_accuracy(classifier, len(paths))}"


def folder_of(parent: Path, name: str) -> Path:
    """The folder for a bank of that name; raises ValueError where there is none."""
    if not (name := normalize_class_name(name.strip())):
        raise ValueError("The new bank has no name yet; write one.")
    return parent / file_names([name])[name]


def _flat(listed: Listed) -> tuple[list[str], list[str]]:
    """Paths, and the class of each."""
    return [path for _, paths in listed for path in paths], [name for name, paths in listed for _ in paths]


def _replace(bank: ServedBank, classifier: DiTiClassifier) -> None:
    try:
        bank.replace(classifier)
    except OSError as error:
        raise OSError(
            f"The classes are learned and in use until the page ends, but could not be saved in {bank.folder} "
            f"({error}); make room there, then add a class to save all."
        ) from error


def _accuracy(classifier: DiTiClassifier, shots: int) -> str:
    accuracy = classifier.calibration_.accuracy
    if accuracy is None:
        return "It was not cross-validated: try it on pictures that it has not learned from."
    return (
        f"Cross-validated accuracy: {100 * accuracy:.1f} % of {shots} pictures, each judged by class tokens that were "
        "trained without it."
    )


def build(context: Context, concept: str) -> Any:
    """The tab; returns the event after which the bank in use has further classes.

    Args:
        concept: what all classes of the first bank are, "" where it is not known.
    """
    import gradio as gr

    Chosen = tuple[Listed, str, str, None]  # the list and what shows it; name and pictures, empty

    def put(listed: Listed, name: str, paths: list[str] | None) -> Chosen:
        for path in paths or ():
            context.upload(path)
        listed = put_on_list(listed, name, paths or [])
        return listed, show_list(listed), "", None

    def add(name: str, listed: Listed, progress: Any = gr.Progress()) -> tuple[Listed, str, str]:  # noqa: B008
        told = add_to_bank(context.banks[name], listed, report_to(progress))
        return [], show_list([]), markup.note(told)

    def make(
        like: str,
        listed: Listed,
        name: str,
        concept: str,
        cross_validate: bool,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Listed, str, str, Any]:
        folder = folder_of(context.made, name)
        report = report_to(progress)
        made, told = make_bank(context.banks, context.banks[like], folder, concept, listed, cross_validate, report)
        return [], show_list([]), markup.note(told), gr.Dropdown(context.banks.names, value=made)

    gr.Markdown(
        "Teach the bank further classes from a few pictures each, or make a new one. The bank in use is saved in its "
        "folder when its new classes are learned; until then, and where something fails, it stays as it is."
    )
    listed = gr.State([], time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column():
            gr.Markdown("### 1. Pictures of each class")
            name = gr.Textbox(label="Name of the class", max_lines=1, elem_id="class-name")
            pictures = gr.File(
                label=f"Its pictures, up to {MAX_PICTURES}",
                file_count="multiple",
                file_types=["image"],
                height=120,
                elem_id="class-pictures",
            )
            put_button = gr.Button("Put the class on the list")
        with gr.Column():
            gr.Markdown("### 2. The list")
            shown = gr.HTML(show_list([]), elem_id="class-list")
            empty_button = gr.Button("Empty the list", size="sm")
    with gr.Row():
        with gr.Column():
            gr.Markdown("### 3. Add its classes to the bank in use\nWhat the bank has learned before stays as it is.")
            add_button = gr.Button("Add the classes", variant="primary")
        with gr.Column():
            gr.Markdown(f"### or make a new bank of them\nIt is saved in a folder under `{context.made}`.")
            with gr.Row():
                new_name = gr.Textbox(label="Name of the new bank", max_lines=1, elem_id="bank-name")
                kind = gr.Textbox(concept, label="What all classes are, such as bird", max_lines=1)
            checked = gr.Checkbox(
                value=True,
                label=f"Measure its accuracy on held-out pictures ({FOLDS} more trainings)",
                elem_id="cross-validate",
            )
            make_button = gr.Button("Make the new bank", variant="primary")
    told = gr.HTML(elem_id="told", min_height=60)
    in_form, learned = [listed, shown, name, pictures], [listed, shown, told]
    put_button.click(context.answering(put), [listed, name, pictures], in_form, **QUICK)
    empty_button.click(lambda: ([], show_list([])), None, [listed, shown], **QUICK)
    adding = {**QUEUED, "show_progress_on": told}
    added = add_button.click(context.answering(add), [context.chosen, listed], learned, **adding)
    asked = [context.chosen, listed, new_name, kind, checked]
    make_button.click(context.answering(make), asked, [*learned, context.chosen], **adding)
    return added
