"""The optimizer of stacked rows equals torch's AdamW on each of them alone."""

import torch

from fewshot_diti.config import TrainingConfig
from fewshot_diti.row_adamw import RowAdamW
from fewshot_diti.training import lr_scale


def test_row_adamw_equals_adamw_run_alone_on_the_rows_that_take_part() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 50, generator=g, dtype=torch.float64)
    lrs = [1e-2, 3e-3]
    parameters = [[torch.nn.Parameter(r[:30].clone()), torch.nn.Parameter(r[30:].clone())] for r in rows]
    alone = [
        torch.optim.AdamW([{"params": [p], "lr": x} for p, x in zip(ps, lrs, strict=True)], weight_decay=0.1)
        for ps in parameters
    ]
    optimizer = RowAdamW(rows, [(30, lrs[0]), (20, lrs[1])], weight_decay=0.1, max_grad_norm=1.0)
    for step in range(30):
        present = [c for c in range(3) if c != 1 or step % 3]
        grad = torch.randn(len(present), 50, generator=g, dtype=torch.float64) * torch.rand((), generator=g)
        scale = lr_scale(TrainingConfig(steps=30, lr_schedule="cosine"), step)
        optimizer.step(present, grad.clone(), scale)
        for c, of_class in zip(present, grad, strict=True):
            for p, part in zip(parameters[c], of_class.split([30, 20]), strict=True):
                p.grad = part.clone()
            torch.nn.utils.clip_grad_norm_(parameters[c], 1.0)
            for group, x in zip(alone[c].param_groups, lrs, strict=True):
                group["lr"] = x * scale
            alone[c].step()
    expected = torch.stack([torch.cat([p.detach() for p in ps]) for ps in parameters])
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


def test_a_row_that_is_absent_keeps_its_value_moments_and_step_count() -> None:
    rows = torch.ones(2, 4)
    optimizer = RowAdamW(rows, [(4, 0.1)], weight_decay=0.1, max_grad_norm=1.0)
    optimizer.step([0, 1], torch.ones(2, 4), 1.0)
    states = [optimizer.optimizer.state[p] for (p,) in optimizer.pieces]
    before = [rows[1].clone(), *(x.clone() for x in states[1].values())]
    optimizer.step([0], torch.ones(1, 4), 1.0)
    assert all(torch.equal(x, y) for x, y in zip(before, [rows[1], *states[1].values()], strict=True))
    assert [int(s["step"]) for s in states] == [2, 1]
    assert not torch.equal(rows[0], rows[1])
