"""The pocket Stable Diffusion: U-Net and text encoder on the latents of the pocket's autoencoder.

    accelerate launch --cpu -m recipes.pocket.sd first --data DIR
    accelerate launch --cpu -m recipes.pocket.sd second --data DIR
    accelerate launch --cpu -m recipes.pocket.sd third --data DIR

Each goes on where the one before ends. In `second` and `third` images in false colours are enlarged and moved, more
captions name the variant, and a linear head learns the variants from the U-Net's features: with their labels, as
`siblings.py` does, which few-shot methods on other models do not have.

With `accelerate launch --dynamo_backend inductor` the networks are compiled, which takes some minutes and then saves a
quarter of each step; on a processor with AMX the losses of `second` were not finite that way (torch 2.14.1). A
processor without bfloat16 needs --mixed_precision no. `--start_from FOLDER` continues from a Stable Diffusion on the
same autoencoder.

Hardware: two CPU cores with bfloat16; on GPUs leave out --cpu.
Time: the 18,700 steps of `first` took 3 hours (1.1 steps/s, later 2.0 compiled on a faster machine), the 5,000 of
`second` an hour and the 6,000 of `third` 80 minutes (1.3 steps/s).
Expected: the curves in docs/pocket.md. `first` was trained in three runs, each continuing the one before: 5,000 steps
(a fifth of the samples in false colours, kinds never named), 7,200 and 6,500 as below, peak learning rates 1e-3, 8e-4
and 7e-4. All steps in one run: not measured. held_out_error_50 was 0.238, 0.241 and 0.235 in the end, and
held_out_accuracy 0.829 after `second` (of every other image) and 0.865 after `third`.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewshot_diti.files import write_atomically
from fewshot_diti.hashes import hash_weights
from fewshot_diti.loop import run_loop, step_generator
from recipes.pocket.captions import GENERIC_CAPTION, P_GENERIC, P_VARIANT, Captioner, train_tokenizer
from recipes.pocket.latents import cached_latents, encode_latents, image_size
from recipes.pocket.networks import (
    FEATURES,
    TextToNoise,
    build_scheduler,
    build_text_encoder,
    build_unet,
    features_kept,
)
from recipes.pocket.renders import (
    HELD_OUT,
    KINDS,
    FalseColourConfig,
    Renders,
    few_shot_accuracy,
    load_renders,
    split_held_out,
)


@dataclass(frozen=True, kw_only=True)
class UnetConfig(FalseColourConfig):
    """Everything that decides a U-Net run.

    Attributes:
        vae: folder of the autoencoder (`train_vae` writes it); it decides image and latent sizes.
        start_from: folder of a Stable Diffusion on the same autoencoder, whose U-Net, text encoder and tokenizer the
            run begins with, whatever the sizes below; None begins from scratch.
        kinds: JSON object that names kinds of aircraft for a variant, which some captions use; None: none do.
        generic_captions, variant_captions: share of the captions that name nothing, and of the others those that name
            the variant.
        text_width, text_layers, vocab_size, max_length: of the CLIP text encoder and its tokenizer.
        false_colours: captions of these samples say so.
        prediction_type: "v_prediction" learns large t sooner than "epsilon", which must first pass the noise through
            the network unharmed.
        small_t: share of samples drawn from the lower 40 % of the timesteps, where fine attributes are lost.
        zoom, shift: of the copies in false colours, as of `random_crops`.
        class_weight: of a second loss, the cross-entropy of a linear head that tells the variant from the mean of the
            block whose output the classifier takes as features. Only samples count whose caption says nothing of the
            shape, at timesteps below `class_until` (a share of the schedule). The pipeline has no head.
    """

    vae: Path
    start_from: Path | None = None
    kinds: Path | None = None
    generic_captions: float = P_GENERIC
    variant_captions: float = P_VARIANT
    block_out_channels: tuple[int, ...] = (128, 192, 256, 128)
    layers_per_block: int = 1
    norm_num_groups: int = 16
    head_size: int = 32
    text_width: int = 192
    text_layers: int = 3
    vocab_size: int = 1024
    max_length: int = 32
    prediction_type: str = "v_prediction"
    small_t: float = 0.2
    zoom: float = 0.0
    shift: float = 0.0
    class_weight: float = 0.0
    class_until: float = 0.6
    steps: int = 5_000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 200
    ema_decay: float = 0.998


def load_start(
    config: UnetConfig, vae: AutoencoderKL
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer, DDIMScheduler]:
    """What `config.start_from` holds, in fp32.

    Raises:
        ValueError: it stands on another autoencoder, or predicts something else than `config.prediction_type`.
    """
    pipe = StableDiffusionPipeline.from_pretrained(
        config.start_from, safety_checker=None, dtype=torch.float32, use_safetensors=True
    )
    if hash_weights(pipe.vae) != hash_weights(vae):
        raise ValueError(f"{config.start_from} stands on another autoencoder than {config.vae}; pass its own --vae.")
    if pipe.scheduler.config.prediction_type != config.prediction_type:
        raise ValueError(
            f"{config.start_from} predicts {pipe.scheduler.config.prediction_type}, not {config.prediction_type}; "
            "pass its --prediction_type."
        )
    return (
        pipe.unet,
        pipe.text_encoder,
        pipe.tokenizer,
        DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False),
    )


class _CaptionedLatents:
    """The training set: latents of every image, as rendered and in false colours, and a fresh caption each time."""

    def __init__(self, renders: Renders, vae: AutoencoderKL, config: UnetConfig, accelerator: Accelerator) -> None:
        self.renders, self.config = renders, config
        shares = {"p_generic": config.generic_captions, "p_variant": config.variant_captions}
        self.caption = Captioner(renders, config.kinds, **shares)
        cache = config.output_dir / "latents.safetensors"
        crops = config.zoom, config.shift
        self.mean, self.std = cached_latents(vae, renders, config.false_copies, accelerator, cache, crops)
        names = sorted(set(renders.variants))
        self.labels = torch.tensor([names.index(variant) for variant in renders.variants])

    def batch(self, size: int, g: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """Latents, captions, and the positions of their variants, -1 where the caption says something of the shape."""
        rows = torch.randint(len(self.renders), (size,), generator=g)
        shuffled = torch.rand(size, generator=g) < self.config.false_colours
        version = torch.where(shuffled, torch.randint(1, len(self.mean), (size,), generator=g), 0)
        rng = random.Random(int(torch.randint(2**62, (), generator=g)))
        pairs = zip(rows.tolist(), shuffled.tolist(), strict=True)
        captions = [self.caption(row, rng, false_colours=f) for row, f in pairs]
        named = torch.tensor([self.caption.names_shape(*x) for x in zip(rows.tolist(), captions, strict=True)])
        labels = torch.where(named, -1, self.labels[rows])
        mean, std = (x[version, rows].float() for x in (self.mean, self.std))
        return mean + std * torch.randn(mean.shape, generator=g), captions, labels


def draw_timesteps(size: int, num_train_timesteps: int, small_t: float, g: torch.Generator) -> Tensor:
    """Timesteps [size], a share `small_t` of them from the lower 40 %."""
    u = torch.rand(size, generator=g)
    u = torch.where(torch.rand(size, generator=g) < small_t, 0.4 * u, u)
    return (u * num_train_timesteps).long()


def train_unet(config: UnetConfig) -> StableDiffusionPipeline:
    """Trains and saves `output_dir/pipeline` at every validation; a killed run continues at its last checkpoint."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    vae = AutoencoderKL.from_pretrained(config.vae, use_safetensors=True).eval().requires_grad_(False)
    seen, unseen = split_held_out(load_renders(config.data, image_size(vae)), config.held_out)
    data = _CaptionedLatents(seen, vae, config, accelerator)
    torch.manual_seed(config.seed)
    if config.start_from is None:
        rng = random.Random(config.seed)
        corpus = [data.caption(row, rng, false_colours=f) for row in range(len(seen)) for f in (False, False, True)]
        tokenizer = train_tokenizer([*corpus, GENERIC_CAPTION], config.vocab_size, config.max_length)
        unet = build_unet(
            vae,
            config.text_width,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            head_size=config.head_size,
        )
        text_encoder = build_text_encoder(tokenizer, config.text_width, config.text_layers)
        scheduler = build_scheduler(config.prediction_type)
    else:
        unet, text_encoder, tokenizer, scheduler = load_start(config, vae)
    num_t = scheduler.config.num_train_timesteps
    module: nn.Module = TextToNoise(unet, text_encoder, len(set(seen.variants)) if config.class_weight else 0).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    accelerator.print(f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    module = accelerator.prepare_model(module)

    def tokenize(captions: list[str]) -> Tensor:
        encoded = tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return encoded.input_ids.to(accelerator.device)

    def errors(
        module: nn.Module, latents: Tensor, noise: Tensor, timesteps: Tensor, captions: list[str]
    ) -> tuple[Tensor, Tensor | None]:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise if config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        predicted, logits = module(
            noisy.to(accelerator.device, memory_format=torch.channels_last),
            timesteps.to(accelerator.device),
            tokenize(captions),
        )
        target = target.to(accelerator.device)
        return F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3)), logits

    def loss_fn(module: nn.Module, step: int) -> dict[str, Tensor]:
        g = step_generator(config.seed, step, accelerator.process_index)
        latents, captions, labels = data.batch(config.batch_size, g)
        timesteps = draw_timesteps(config.batch_size, num_t, config.small_t, g)
        e, logits = errors(module, latents, torch.randn(latents.shape, generator=g), timesteps, captions)
        if logits is None:
            return {"loss": e.mean()}
        labels = torch.where(timesteps < config.class_until * num_t, labels, -1).to(logits.device)
        each = F.cross_entropy(logits.float(), labels, ignore_index=-1, label_smoothing=0.1, reduction="none")
        variant = each.sum() / (labels >= 0).sum().clamp(min=1)
        return {"loss": e.mean() + config.class_weight * variant, "restoration": e.mean(), "variant": variant}

    unseen_latents = encode_latents(vae, unseen.pixels_NCHW, accelerator)[0].float()
    held_out_latents = unseen_latents[::26]
    held_out_noise = torch.randn(held_out_latents.shape, generator=torch.Generator().manual_seed(config.seed))

    @torch.no_grad()
    def held_out_accuracy() -> float:
        """Of the features of variants that are left out; liveries of the shots occur among the other images."""
        text = text_encoder(tokenize([GENERIC_CAPTION])).last_hidden_state
        time = torch.tensor(round(FEATURES.timestep * num_t))
        with features_kept(unet) as kept:
            for latents in unseen_latents.split(64):
                noiseless = scheduler.add_noise(latents, torch.zeros_like(latents), time.expand(len(latents)))
                noiseless = noiseless.to(accelerator.device, memory_format=torch.channels_last)
                unet(noiseless, time.to(accelerator.device), text.expand(len(latents), -1, -1))
        pooled = [F.adaptive_avg_pool2d(maps.float(), FEATURES.positions).flatten(1).cpu() for maps in kept]
        return few_shot_accuracy(torch.cat(pooled).numpy(), unseen.variants)

    def validate(module: nn.Module) -> dict[str, float]:
        figures = {}
        for t in range(num_t // 20, num_t, num_t // 10):
            timesteps = torch.full((len(held_out_latents),), t)
            captions = [GENERIC_CAPTION] * len(held_out_latents)
            with torch.no_grad(), accelerator.autocast():
                e, _ = errors(module, held_out_latents, held_out_noise, timesteps, captions)
            # in eps whatever the network predicts (Salimans and Ho, appendix D), so that runs compare
            factor = 1.0 if config.prediction_type == "epsilon" else float(scheduler.alphas_cumprod[t])
            figures[f"held_out_error_{t}"] = factor * float(e.mean())
        if len(set(unseen.variants)) > 1:
            with accelerator.autocast():
                figures["held_out_accuracy"] = held_out_accuracy()
        if accelerator.is_main_process:
            _save(pipeline(), config.output_dir / "pipeline")
        return figures

    def pipeline() -> StableDiffusionPipeline:
        copies = []
        for model in (unet, text_encoder, vae):
            if model is text_encoder:
                copy = type(model)(model.config)
            else:  # the start folder is not kept in the config
                copy = type(model).from_config({k: v for k, v in model.config.items() if k != "_name_or_path"})
            copy.load_state_dict(model.state_dict())
            copies.append(copy.half())
        return StableDiffusionPipeline(
            unet=copies[0],
            text_encoder=copies[1],
            vae=copies[2],
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    words = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    made_from = (
        f"images {seen.fingerprint}, tokenizer {words}, autoencoder {hash_weights(vae)}, {config.prediction_type}, "
        f"start {hash_weights(unet, text_encoder) if config.start_from else 'from scratch'}"
    )
    run_loop(accelerator, module, optimizer, config, made_from=made_from, loss_fn=loss_fn, validate=validate)
    trained = pipeline()
    if accelerator.is_main_process:
        _save(trained, config.output_dir / "pipeline")
    return trained


def _save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Saves fp16 weights that a plain `from_pretrained` loads in float32.

    diffusers does so whatever the file holds; transformers takes the dtype that the text encoder's config names.
    """
    pipe.save_pretrained(folder)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    write_atomically(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def first() -> UnetConfig:
    """The configuration of the first run, from scratch."""
    return UnetConfig(
        data=Path("pocket-train"),
        held_out=HELD_OUT,
        kinds=KINDS,
        vae=Path("runs/pocket-vae/vae"),
        output_dir=Path("runs/pocket-sd"),
        false_copies=5,
        steps=18_700,
        ema_decay=0.999,
    )


def second() -> UnetConfig:
    """That of the run after it, which begins with its result."""
    return replace(
        first(),
        start_from=Path("runs/pocket-sd/pipeline"),
        output_dir=Path("runs/pocket-sd-second"),
        generic_captions=0.35,
        variant_captions=0.5,
        steps=5_000,
        lr=5e-4,
        zoom=0.15,
        shift=0.06,
        class_weight=0.2,
    )


def third() -> UnetConfig:
    """That of the last one, whose result ships."""
    return replace(
        second(),
        start_from=second().output_dir / "pipeline",
        output_dir=Path("runs/pocket-sd-third"),
        steps=6_000,
        lr=4e-4,
        class_weight=0.05,
    )


if __name__ == "__main__":
    editions = {
        "first": ("From scratch.", first()),
        "second": ("Goes on with the result of first.", second()),
        "third": ("Goes on with the result of second.", third()),
    }
    try:
        train_unet(tyro.extras.overridable_config_cli(editions))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
