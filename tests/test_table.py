"""Tables of accuracy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fewshot_diti import plots
from fewshot_diti.evaluation.table import Row, comma_separated, highlighted, latex, markdown, plot, published_rows


def test_tables_mark_the_best_of_what_competes_and_say_what_sets_the_others_apart() -> None:
    rows = [
        *published_rows((1, 16))[-1:],
        Row(name="diti", accuracy={1: (40.0, 44.0), 16: (80.0, 82.0)}, seeds=2),
        Row(name="tip_adapter", accuracy={1: (45.0, 45.0)}, seeds=2),
        Row(name="siblings", accuracy={1: (85.0, 85.0), 16: (97.0, 97.0)}, seeds=2, supervision="with more labels"),
        Row(name="finetune", accuracy={1: (60.0,)}, seeds=2),
    ]
    assert markdown(rows, (1, 16)).splitlines() == [
        "| method | 1 shot | 16 shots | average |",
        "| --- | ---: | ---: | ---: |",
        "| DiTi, SD 2.0 (published, Yue et al., CVPR 2024) | 48.5 | 79.9 | 64.2 |",
        "| diti | 42.0 ± 2.8 | **81.0 ± 1.4** | **61.5** |",
        "| tip_adapter | **45.0 ± 0.0** |  |  |",
        "| siblings (with more labels) | 85.0 ± 0.0 | 97.0 ± 0.0 | 91.0 |",
        "| finetune | 60.0 (1 of 2 seeds) |  |  |",
    ]
    assert r"tip\_adapter & \textbf{45.0 $\pm$ 0.0} &  &  \\" in latex(rows, (1, 16))
    lines = comma_separated(rows, (1, 16)).splitlines()
    assert "diti,1,42.000,2.828,2,," in lines and "siblings,1,85.000,0.000,2,,with more labels" in lines


def test_a_plot_highlights_the_classifier_class_tokens_and_the_best_baselines_in_colours_of_their_own() -> None:
    accuracy = {
        "diti": 60.0,
        "fewshot-diti": 70.0,
        "diti+clip": 90.0,
        "finetune": 80.0,
        "linear": 75.0,
        "neighbour": 20.0,
    }
    rows = [Row(name=name, accuracy={1: (value,), 2: (value,)}) for name, value in accuracy.items()]
    rows += [
        Row(name="siblings", accuracy={1: (99.0,), 2: (99.0,)}, supervision="with more labels"),
        *published_rows((1, 2)),
    ]
    colours = highlighted(rows, (1, 2))
    assert list(colours) == ["fewshot-diti", "diti", "finetune", "linear"]
    assert len(set(colours.values())) == 4 and plots.PALE not in colours.values()
    assert plot(rows, (1, 2), colours).startswith(b"\x89PNG")


def test_labels_at_the_ends_of_lines_do_not_overlap_and_keep_the_order_of_the_lines() -> None:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    values = [1.0, 1.001, 1.002, 5.0, 1.003]
    for value in values:
        axes.plot([0, 1], [0, value])
    plots.label_ends(axes, [plots.End(1, value, f"{value}", plots.BLUE) for value in values])
    FigureCanvasAgg(figure).draw()
    # the text alone: an annotation's own extent holds its line too
    boxes = sorted(((Text.get_window_extent(t), float(t.get_text())) for t in axes.texts), key=lambda pair: pair[0].y0)
    assert [value for _, value in boxes] == sorted(values)
    assert all(above.y0 >= below.y1 for (below, _), (above, _) in pairwise(boxes))
    alone = axes.transData.transform((1, 5.0))[1]
    assert np.isclose((boxes[-1][0].y0 + boxes[-1][0].y1) / 2, alone, atol=4)  # pixels
