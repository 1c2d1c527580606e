"""A setting that is out of its range is named."""

from __future__ import annotations

import pytest

from fewshot_diti.config import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("rank", 0),
        ("shots_per_step", 0),
        ("lr_unet", -1.0),
        ("weight_decay", float("nan")),
        ("max_grad_norm", 0.0),
        ("lr_schedule", "linear"),
        ("blocks", "wide"),
        ("hue", 0.6),
        ("timesteps", (5, 5)),
    ],
)
def test_a_config_names_the_value_that_is_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        TrainingConfig(**{"steps": 10, field: value})  # type: ignore[arg-type]
