"""The training loop of all that is trained for long: schedule, one checkpoint file, one log."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fewshot_diti.distributed import main_alone_in
from fewshot_diti.files import append, write_atomically
from fewshot_diti.progress import say


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of every such run.

    Attributes:
        output_dir: gets the checkpoint, the log and the trained model.
        batch_size: images per step and process.
        lr: peak of the learning rate, after a linear warm-up of `warmup` steps; then a cosine to zero.
        ema_decay: of the averaged weights, which are what is validated and saved.
        mixed_precision: "bf16" or "no".
        log_every, validate_every: in steps.
        save_seconds: a checkpoint is written with the first line of the log after so much time.
    """

    output_dir: Path
    steps: int
    batch_size: int
    lr: float
    warmup: int
    ema_decay: float
    seed: int = 0
    mixed_precision: Literal["bf16", "no"] = "bf16"
    log_every: int = 50
    validate_every: int = 500
    save_seconds: float = 240.0

    @property
    def decisive(self) -> str:
        """A hash of all settings that decide the result, 16 hex characters; paths do not, their content does."""
        idle = ("output_dir", "log_every", "validate_every", "save_seconds")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        kept = {name: value for name, value in values.items() if not isinstance(value, Path)}
        return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The random stream of one step of one process: a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4099 + rank)


def half_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with its weights in float16, as it is saved to ship."""
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in module.state_dict().items()}


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a module, such as running statistics of batch normalisation."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def _drop_later_lines(log: Path, step: int) -> None:
    """Removes from a log what a killed run wrote after its last checkpoint, and a line that was cut off."""
    kept = []
    for line in log.read_bytes().splitlines(keepends=True) if log.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    if kept or log.is_file():
        write_atomically(log, b"".join(kept))


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, step: int, made_from: str
) -> None:
    """Writes weights, buffers, optimizer moments and average in one safetensors file, replaced atomically."""
    tensors: dict[str, Tensor] = {}
    for (name, p), average in zip(module.named_parameters(), ema.shadow_params, strict=True):
        tensors[f"model.{name}"] = p.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{key}.{name}"] = optimizer.state[p][key]
        tensors[f"ema.{name}"] = average
    tensors |= {f"buffer.{name}": b for name, b in saved_buffers(module).items()}
    metadata = {"step": str(step), "made_from": made_from}
    write_atomically(path, save({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata))


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, made_from: str
) -> int:
    """Restores what `save_checkpoint` wrote; returns the step to continue from, 0 without a file.

    Raises:
        ValueError: the checkpoint was made from other data or settings, or of another model.
    """
    if not path.exists():
        return 0
    try:
        return _load_checkpoint(path, module, optimizer, ema, made_from)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to begin anew, or bring a copy back.") from error


def _load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, made_from: str
) -> int:
    fused = optimizer.defaults.get("fused", False)
    with safe_open(path, "pt") as f, torch.no_grad():
        if f.metadata().get("made_from") != made_from:
            raise ValueError(
                f"{path} was made from other data or settings, or of another model "
                f"({f.metadata().get('made_from')}; now {made_from}); pass another --output_dir, or remove that file."
            )
        step = int(f.metadata()["step"])
        for name, b in saved_buffers(module).items():
            b.copy_(f.get_tensor(f"buffer.{name}"))
        ema.optimization_step = step
        for (name, p), average in zip(module.named_parameters(), ema.shadow_params, strict=True):
            p.copy_(f.get_tensor(f"model.{name}"))
            average.copy_(f.get_tensor(f"ema.{name}"))
            optimizer.state[p] = {
                # in the parameter's own memory format: the fused AdamW walks both side by side
                key: torch.empty_like(p).copy_(f.get_tensor(f"{key}.{name}"))
                for key in ("exp_avg", "exp_avg_sq")
            } | {"step": torch.tensor(float(step), device=p.device if fused else "cpu")}
    return step


def run_loop(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    *,
    made_from: str,
    loss_fn: Callable[[nn.Module, int], dict[str, Tensor]],
    validate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Trains `module`, continuing from `output_dir/checkpoint.safetensors` where it exists.

    Args:
        made_from: identifies the data; a checkpoint of other data, of other settings, or of a model of other shapes is
            refused.
        loss_fn: (module, step) to named losses; "loss" is minimised, the rest is logged.
        validate: figures of the averaged weights, logged as they are.

    The module is left with its averaged weights.
    """
    bare = accelerator.unwrap_model(module, keep_torch_compile=False)
    shapes = repr([(name, tuple(p.shape)) for name, p in bare.named_parameters()])
    made_from = (
        f"{made_from}, settings {config.decisive}, parameters {hashlib.sha256(shapes.encode()).hexdigest()[:16]}"
    )
    ema = EMAModel(bare.parameters(), config.ema_decay, foreach=True)
    with main_alone_in(config.output_dir, config.output_dir):
        _run_loop(accelerator, module, bare, optimizer, ema, config, made_from, loss_fn, validate)
    ema.copy_to(bare.parameters())


def _run_loop(
    accelerator: Accelerator,
    module: nn.Module,
    bare: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    config: LoopConfig,
    made_from: str,
    loss_fn: Callable[[nn.Module, int], dict[str, Tensor]],
    validate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """The steps that are left after the last checkpoint."""
    checkpoint = config.output_dir / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, bare, optimizer, ema, made_from)
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr  # needed by a schedule that continues
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=config.warmup,
        num_training_steps=config.steps,
        last_epoch=start - 1,
    )
    log_file = config.output_dir / "log.jsonl"
    if accelerator.is_main_process:
        _drop_later_lines(log_file, start)
    sums: dict[str, float] = {}
    summed = 0
    began = saved = time.monotonic()

    def log(record: dict[str, float]) -> None:
        if accelerator.is_main_process:
            append(log_file, f"{json.dumps(record)}\n".encode())
        say(" ".join(f"{k} {v:.5g}" for k, v in record.items()))

    for step in range(start, config.steps):
        losses = loss_fn(module, step)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(bare.parameters())
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        summed += 1
        done = step + 1
        if done % config.log_every == 0:
            rate = (done - start) / (time.monotonic() - began)
            log({"step": done, **{k: v / summed for k, v in sums.items()}, "steps_per_second": rate})
            sums, summed = {}, 0
        if done % config.validate_every == 0 or done == config.steps:
            ema.store(bare.parameters())
            ema.copy_to(bare.parameters())
            log({"step": done, **validate(bare)})
            ema.restore(bare.parameters())
        # right after a line of the log: started again, the run writes the same means into the next one
        due = done % config.log_every == 0 and time.monotonic() - saved > config.save_seconds
        if accelerator.is_main_process and (due or done == config.steps):
            save_checkpoint(checkpoint, bare, optimizer, ema, done, made_from)
            saved = time.monotonic()
