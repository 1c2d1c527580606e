"""Stacked LoRA: the adapters of all classes as the rows of one matrix, applied in mixed-class batches.

Shapes: G groups of consecutive samples of a batch, one class each; B = G x m samples; T tokens; R rank; P parameters of
one class; C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from fewshot_diti.backbone import Backbone


# the middle block, and so many of the down and of the up blocks with attention, counted from the middle
BLOCK_FILTERS: dict[str, int | None] = {"narrow": 1, "medium": 2, "all": None}
_UNET_LINEARS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj")
_TEXT_LINEARS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


@dataclass(frozen=True)
class Target:
    """One adapted linear: `network` is "unet" or "text_encoder", `name` its module path inside it."""

    network: str
    name: str
    in_features: int
    out_features: int

    def fits(self, backbone: Backbone) -> bool:
        """Whether the backbone has that linear."""
        try:
            module = backbone.networks[self.network].get_submodule(self.name)
        except (KeyError, AttributeError):
            return False
        shape = self.in_features, self.out_features
        return isinstance(module, nn.Linear) and (module.in_features, module.out_features) == shape


def find_targets(
    unet: nn.Module,
    text_encoder: nn.Module,
    blocks: str = "all",
    target_modules: Sequence[str] | str | None = None,
) -> tuple[Target, ...]:
    """The linears that class tokens adapt.

    Args:
        blocks: of the U-Net, a key of `BLOCK_FILTERS`: "narrow" is the middle block and on each side of it the next
            block with attention, "medium" the next two, "all" every block. A U-Net need not have a middle block.
        target_modules: linears of both networks, as in peft: ends of their names, or one regular expression for whole
            names. By default attention and GEGLU projection in the U-Net, and attention in the text encoder. With
            `blocks="all"` these may lie anywhere in the U-Net; one of the networks may have none.

    Raises:
        ValueError: the filter is unknown, or matches no linear of these networks.
    """
    if blocks not in BLOCK_FILTERS:
        raise ValueError(f"blocks={blocks!r} is not one of {sorted(BLOCK_FILTERS)}.")
    anywhere = blocks == "all" and target_modules is not None
    starts = ("",) if anywhere else _block_names(unet, BLOCK_FILTERS[blocks])
    ends = (_UNET_LINEARS, _TEXT_LINEARS) if target_modules is None else (target_modules, target_modules)
    in_unet = _matching("unet", unet, starts, ends[0])
    in_text = _matching("text_encoder", text_encoder, ("",), ends[1])
    if target_modules is None and not (in_unet and in_text):
        raise ValueError(
            f"blocks={blocks!r} matches {len(in_unet)} linears of the U-Net and {len(in_text)} of the text encoder; "
            "the backbone must be a Stable Diffusion 1.x or 2.x with attention in these blocks."
        )
    if not in_unet and not in_text:
        linears = [n for net in (unet, text_encoder) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
        last = sorted({n.rsplit(".", 1)[-1] for n in linears if not n.endswith(".0")})
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear with blocks={blocks!r}; pass ends of names, such as "
            f"{last}, or a regular expression that matches whole names, such as {linears[0]!r}."
        )
    return in_unet + in_text


def _block_names(unet: nn.Module, count: int | None) -> tuple[str, ...]:
    """How names of modules start in the middle block and the `count` nearest blocks with attention on each side."""

    def with_attention(side: str) -> list[str]:
        blocks = unet.get_submodule(side).named_children()
        return [
            f"{side}.{number}."
            for number, block in blocks
            if any(name.endswith(_UNET_LINEARS) for name, _ in block.named_modules())
        ]

    down, up = with_attention("down_blocks"), with_attention("up_blocks")
    return (*(down if count is None else down[-count:]), "mid_block.", *up[:count])


def _matching(
    network: str, module: nn.Module, starts: tuple[str, ...], target_modules: Sequence[str] | str
) -> tuple[Target, ...]:
    def is_target(name: str) -> bool:
        if isinstance(target_modules, str):
            return re.fullmatch(target_modules, name) is not None
        return f".{name}".endswith(tuple(f".{end.removeprefix('.')}" for end in target_modules))

    return tuple(
        Target(network, name, m.in_features, m.out_features)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and name.startswith(starts) and is_target(name)
    )


@dataclass(frozen=True)
class Layout:
    """Where each adapter lies in a class's row: for every target A [rank, in], then B [out, rank].

    `alpha`: adapters are multiplied by alpha / rank where they are applied; by default alpha = rank.
    """

    targets: tuple[Target, ...]
    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"The rank of a LoRA is {self.rank!r}; it must be a whole number of at least 1.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.rank)
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:  # type: ignore[operator]
            raise ValueError(f"The alpha of a LoRA is {self.alpha!r}; it must be a finite number above 0.")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def sizes(self) -> list[int]:
        """Lengths of the pieces of a row: A and B of each target in turn."""
        return [n * self.rank for t in self.targets for n in (t.in_features, t.out_features)]

    @property
    def num_parameters(self) -> int:
        """Length of one class's row."""
        return sum(self.sizes)

    def split(self, rows_GP: Tensor) -> dict[Target, tuple[Tensor, Tensor]]:
        """A [G, R, in] and B [G, out, R] of every target: views of one split, so backward concatenates once."""
        pieces = iter(rows_GP.split(self.sizes, dim=1))
        groups = rows_GP.shape[0]
        return {
            t: (
                next(pieces).view(groups, self.rank, t.in_features),
                next(pieces).view(groups, t.out_features, self.rank),
            )
            for t in self.targets
        }

    def of_network(self, network: str, rows_CP: Tensor) -> tuple[Layout, Tensor]:
        """The layout and the rows [C, P'], copied, of one network alone."""
        kept = {t: adapters for t, adapters in self.split(rows_CP).items() if t.network == network}
        pieces = [rows_CP[:, :0], *(x.flatten(1) for pair in kept.values() for x in pair)]
        return Layout(tuple(kept), self.rank, self.alpha), torch.cat(pieces, 1)

    def initial_row(self, generator: torch.Generator) -> Tensor:
        """A ~ N(0, 1 / rank^2), B = 0 (Hu et al., LoRA, section 4.1; the spread is peft's "gaussian")."""
        pieces = []
        for t in self.targets:
            pieces.append(torch.randn(self.rank * t.in_features, generator=generator) / self.rank)
            pieces.append(torch.zeros(t.out_features * self.rank))
        return torch.cat(pieces)

    def repack(self, rows_CP: Tensor, other: Layout) -> Tensor:
        """The same adapters under another layout: absent targets become zero, a larger rank is zero-padded.

        B is multiplied by what the scales differ in.

        Raises:
            ValueError: the other layout has a smaller rank, or lacks a target of this one.
        """
        if other.rank < self.rank or not set(self.targets) <= set(other.targets):
            raise ValueError(f"A layout of rank {other.rank} cannot hold one of rank {self.rank} with its targets.")
        mine = self.split(rows_CP)
        count = len(rows_CP)
        pieces = []
        for t in other.targets:
            a = rows_CP.new_zeros(count, other.rank, t.in_features)
            b = rows_CP.new_zeros(count, t.out_features, other.rank)
            if t in mine:
                a[:, : self.rank], b[:, :, : self.rank] = mine[t]
                if self.scale != other.scale:
                    b *= self.scale / other.scale
            pieces += [a.flatten(1), b.flatten(1)]
        return torch.cat(pieces, 1)


def union_layout(layouts: Iterable[Layout]) -> Layout:
    """The smallest layout that holds all: the largest rank, the targets of the widest in their order.

    Its scale is that of all of them, or 1 where they differ.
    """
    layouts = list(layouts)
    targets: dict[Target, None] = {}
    for layout in sorted(layouts, key=lambda x: -len(x.targets)):
        targets.update(dict.fromkeys(layout.targets))
    largest = max(layouts, key=lambda x: x.rank)
    return Layout(tuple(targets), largest.rank, largest.alpha if len({x.scale for x in layouts}) == 1 else None)


def adapted_linear(linear: nn.Module, a_GRI: Tensor, b_GOR: Tensor, x: Tensor) -> Tensor:
    """linear(x) + x A^T B^T, group by group; x is [B, ..., in] with B a multiple of G.

    Two ways to the same result. Low rank: two narrow products beside the linear. Merged: W + B A for each group and one
    product, with fewer operations where a group has more tokens than in * out / (in + out), and less memory to move.
    Merging needs float32 (in bfloat16 the small update would drown in the rounding of W) and no gradient (that of
    W + B A costs as much as a full layer's). Under autocast, which gives each product its type, nothing is merged or
    added in place.
    """
    groups = a_GRI.shape[0]
    x_GTI = x.reshape(groups, -1, x.shape[-1])
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    rows, columns = weight.shape
    if torch.is_autocast_enabled(x.device.type):
        low_GTR = torch.bmm(x_GTI, a_GRI.transpose(1, 2))
        out = F.linear(x_GTI, weight, bias) + torch.bmm(low_GTR, b_GOR.transpose(1, 2))
    elif x.dtype == torch.float32 and not a_GRI.requires_grad and x_GTI.shape[1] * (rows + columns) > rows * columns:
        merged_GIO = torch.baddbmm(weight.T.expand(groups, -1, -1), a_GRI.transpose(1, 2), b_GOR.transpose(1, 2))
        out = torch.bmm(x_GTI, merged_GIO) if bias is None else torch.baddbmm(bias.view(1, 1, -1), x_GTI, merged_GIO)
    else:
        out = _LowRank.apply(x_GTI, weight, bias, a_GRI, b_GOR)
    return out.view(*x.shape[:-1], rows)


class _LowRank(torch.autograd.Function):
    """x W^T + bias + x A^T B^T, the narrow products added in place both ways; no gradient of W and bias."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_GTI: Tensor, weight: Tensor, bias: Tensor | None, a_GRI: Tensor, b_GOR: Tensor
    ) -> Tensor:
        low_GTR = torch.bmm(x_GTI, a_GRI.transpose(1, 2))
        ctx.save_for_backward(x_GTI, weight, a_GRI, b_GOR, low_GTR)
        return F.linear(x_GTI, weight, bias).baddbmm_(low_GTR, b_GOR.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:  # type: ignore[override]
        x_GTI, weight, a_GRI, b_GOR, low_GTR = ctx.saved_tensors
        grad_low_GTR = torch.bmm(grad_GTO, b_GOR)
        grad_x = (grad_GTO @ weight).baddbmm_(grad_low_GTR, a_GRI) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, torch.bmm(grad_low_GTR.transpose(1, 2), x_GTI), torch.bmm(grad_GTO.mT, low_GTR)


def _adapted_forward(linear: nn.Module, x: Tensor) -> Tensor:
    a_GRI, b_GOR = linear.__dict__["adapters"]
    return adapted_linear(linear, a_GRI, b_GOR, x)


@contextmanager
def adapted(backbone: Backbone, layout: Layout, rows_GP: Tensor) -> Iterator[None]:
    """Inside the context the backbone's networks run with the adapters of `rows_GP`, one row per group of the batch.

    Other threads wait for the networks until the context ends; the networks are left as they were found. Rows are cast
    by the caller to the networks' dtype. The adapters are attributes of the linears, so that `torch.compile` takes them
    for inputs and not for constants.
    """
    before: dict[nn.Module, dict[str, Any]] = {}
    with backbone.lock:
        networks = backbone.networks
        try:
            for target, (a_GRI, b_GOR) in layout.split(rows_GP).items():
                module = networks[target.network].get_submodule(target.name)
                adapters = a_GRI, b_GOR if layout.scale == 1 else b_GOR * layout.scale
                before[module] = {name: module.__dict__.get(name) for name in ("adapters", "forward")}
                module.__dict__.update(adapters=adapters, forward=MethodType(_adapted_forward, module))
            yield
        finally:
            for module, attributes in before.items():
                for name, value in attributes.items():
                    if value is None:
                        del module.__dict__[name]  # the class's own forward is seen again
                    else:
                        module.__dict__[name] = value


@contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients are recorded inside the context, also under `torch.no_grad` and `torch.inference_mode`.

    Tensors that were made under inference mode cannot be differentiated through even here; copies of them can.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
