"""Tables of accuracy."""

from __future__ import annotations

from fewshot_diti.evaluation.table import Row, comma_separated, latex, markdown, published_rows


def test_tables_mark_the_best_of_what_competes_and_say_what_sets_the_others_apart() -> None:
    rows = [
        *published_rows((1, 16))[-1:],
        Row(name="diti", accuracy={1: (40.0, 44.0), 16: (80.0, 82.0)}, seeds=2),
        Row(name="tip_adapter", accuracy={1: (45.0, 45.0)}, seeds=2),
        Row(name="siblings", accuracy={1: (85.0, 85.0), 16: (97.0, 97.0)}, seeds=2, told="told more"),
        Row(name="finetune", accuracy={1: (60.0,)}, seeds=2),
    ]
    assert markdown(rows, (1, 16)).splitlines() == [
        "| method | 1 shot | 16 shots | average |",
        "| --- | ---: | ---: | ---: |",
        "| DiTi, SD 2.0 (published, Yue et al., CVPR 2024) | 48.5 | 79.9 | 64.2 |",
        "| diti | 42.0 ± 2.8 | **81.0 ± 1.4** | **61.5** |",
        "| tip_adapter | **45.0 ± 0.0** |  |  |",
        "| siblings (told more) | 85.0 ± 0.0 | 97.0 ± 0.0 | 91.0 |",
        "| finetune | 60.0 (1 of 2 seeds) |  |  |",
    ]
    assert r"tip\_adapter & \textbf{45.0 $\pm$ 0.0} &  &  \\" in latex(rows, (1, 16))
    lines = comma_separated(rows, (1, 16)).splitlines()
    assert "diti,1,42.000,2.828,2,," in lines and "siblings,1,85.000,0.000,2,,told more" in lines
