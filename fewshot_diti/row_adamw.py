"""AdamW on rows of a matrix, each with moments, steps, weight decay and clipping of its own.

Shapes: C classes, G classes in one batch, P parameters of one class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


class RowAdamW:
    """torch's AdamW on chosen rows of a matrix: absent rows keep moments, steps and values.

    Clipping is by the norm of each row's gradient.

    Args:
        rows_CP: changed in place.
        lr: (width, learning rate) of the consecutive pieces of a row.
    """

    def __init__(
        self, rows_CP: Tensor, lr: Sequence[tuple[int, float]], *, weight_decay: float, max_grad_norm: float
    ) -> None:
        self.widths, self.lr = [w for w, _ in lr], [x for _, x in lr]
        self.max_grad_norm = max_grad_norm
        self.pieces = [[nn.Parameter(piece) for piece in row.split(self.widths)] for row in rows_CP]
        groups = [{"params": list(ps), "lr": x} for ps, x in zip(zip(*self.pieces, strict=True), self.lr, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, classes: Sequence[int], grad_GP: Tensor, lr_scale: float) -> None:
        """One step of the rows `classes` with learning rate `lr * lr_scale`; clips `grad_GP` in place."""
        norm = grad_GP.norm(dim=1, keepdim=True)
        clipped = grad_GP.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for c, row in zip(classes, clipped, strict=True):
            for p, piece in zip(self.pieces[c], row.split(self.widths), strict=True):
                p.grad = piece
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Both moments [C, P], on the CPU, and the number of steps [C] of every row; 0 where it has had none."""
        rows = [[self.optimizer.state.get(piece) for piece in row] for row in self.pieces]
        moments = {
            name: torch.stack([self._joined(row, states, name) for row, states in zip(self.pieces, rows, strict=True)])
            for name in _MOMENTS
        }
        return moments | {"steps": torch.tensor([int(states[0]["step"]) if states[0] else 0 for states in rows])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        for c, row in enumerate(self.pieces):
            parts = {name: state[name][c].split(self.widths) for name in _MOMENTS}
            for k, piece in enumerate(row):
                moments = {name: parts[name][k].to(piece, copy=True) for name in _MOMENTS}
                steps = torch.tensor(float(state["steps"][c]), device=piece.device)  # as the fused AdamW counts
                self.optimizer.state[piece] = {"step": steps, **moments}

    @staticmethod
    def _joined(row: Sequence[Tensor], states: Sequence[Mapping[str, Tensor] | None], name: str) -> Tensor:
        parts = [state[name] if state else torch.zeros_like(p) for p, state in zip(row, states, strict=True)]
        return torch.cat([part.cpu() for part in parts])
