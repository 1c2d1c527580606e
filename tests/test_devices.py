"""Device and dtype of the networks, where nothing or a name is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewshot_diti import devices
from fewshot_diti.backbone import Backbone, load_backbone
from fewshot_diti.devices import as_dtype, default_device


@pytest.mark.parametrize(("kind", "expected"), [("mps", "mps"), ("xpu", "xpu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_the_accelerator_of_the_process_is_used(monkeypatch: pytest.MonkeyPatch, kind: str, expected: str) -> None:
    monkeypatch.setattr(devices, "process_state", lambda: type("State", (), {"device": torch.device(kind)}))
    assert default_device() == torch.device(expected)


def test_another_accelerator_is_not_used_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "process_state", lambda: type("State", (), {"device": torch.device("hpu")}))
    with pytest.warns(UserWarning, match="'hpu' is not supported; the networks run on the CPU"):
        assert default_device() == torch.device("cpu")


def test_a_dtype_may_be_given_by_name(backbone_folder: Path) -> None:
    cpu = torch.device("cpu")
    assert as_dtype("float16", cpu) == as_dtype(torch.float16, cpu) == torch.float16
    assert as_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    assert as_dtype("auto", torch.device("mps")) == torch.float32
    assert Backbone.from_pretrained(backbone_folder, dtype="bfloat16", device="cpu").unet.dtype == torch.bfloat16
    assert load_backbone(str(backbone_folder), "float32").dtype == torch.float32
    for wrong in ("int8", "half", torch.int8, None):
        with pytest.raises(ValueError, match="; pass 'auto', one of"):
            as_dtype(wrong, cpu)  # type: ignore[arg-type]
