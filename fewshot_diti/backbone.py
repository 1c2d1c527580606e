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
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import is_xformers_available
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewshot_diti.backbone_files import (
    POCKET,
    check_parts,
    load_parts,
    parts_of_pipeline,
    portable_name,
    public_name,
)
from fewshot_diti.backbone_files import (
    resolve as resolve,
)
from fewshot_diti.devices import DtypeName, as_dtype, default_device
from fewshot_diti.devices import default_dtype as default_dtype
from fewshot_diti.hashes import hash_backbone
from fewshot_diti.memory import keep_freed_pages
from fewshot_diti.presets import Kind, kind_of

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile


class Backbone:
    """A frozen Stable Diffusion. It may be used from several threads and pickled; a deep copy is the same object.

    Attributes:
        name: what `from_pretrained` was given; of a folder the absolute path.
        lock: held by each forward of a network, and by `lora.adapted` as long as the networks have adapters.
        hash: identifies all that decides an error: weights, settings of the networks, tokenizer, schedule and
            prediction type. Files in fp32 and in fp16 agree.
        alphas_cumprod: [T] float64, of the backbone's own schedule.
        prediction_type: "epsilon" or "v_prediction".
        image_size: (height, width) in pixels that the backbone was trained at.
        compiled_unet: the U-Net as torch compiles it, for batches of one shape; None where that is not asked for.
    """

    compiled_unet: Callable[..., Any] | None = None
    _compile_mode: CompileMode | None = None

    @torch.inference_mode(False)  # weights that are cast under inference mode could not be trained through
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
        check_parts(name, vae, tokenizer, text_encoder, unet, scheduler)
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
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        name_or_path: str | Path = POCKET,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        cache_dir: str | Path | None = None,
        xformers: bool = False,
        compile: CompileMode | None = None,
    ) -> Backbone:
        """Loads "pocket", a folder in diffusers' layout, or a hub id; SD 1.x and 2.x. Images are made by DDIM.

        Args:
            dtype: of U-Net and text encoder; "auto" is bfloat16 where the hardware has it, else float32.
            device: by default the accelerator (CUDA, XPU or MPS) where there is one, else the CPU.
            variant: of the weights files, such as "fp16"; by default none, or that of the files where all have one.
            revision: of the repository on the hub, as in diffusers.
            token: for the hub, as in diffusers.
            local_files_only: downloads nothing.
            cache_dir: where downloads lie.
            xformers: its attention instead of torch's, on CUDA; the extra `xformers` installs it.
            compile: mode of `torch.compile` for scoring in full batches, which are of one shape: two trials each of as
                many pairs of image and class as fit. The rest, odd numbers of trials and training go without. It needs
                a C++ compiler, and takes a minute or more before the first full batch.

        Raises:
            OSError: no such folder or hub id, or a part of it is missing or damaged.
            ValueError: the model is no text-to-image Stable Diffusion 1.x or 2.x, its tokenizer is incomplete, or a
                weight is not finite; or xformers cannot be used here; or another dtype or mode of `torch.compile`.
        """
        device = torch.device(device) if device is not None else default_device()
        dtype = as_dtype(dtype, device)
        if compile is not None and compile not in get_args(CompileMode):
            raise ValueError(f"compile={compile!r}; pass one of {get_args(CompileMode)}, or None.")
        if xformers and not (device.type == "cuda" and is_xformers_available()):
            raise ValueError(
                f"xformers=True on {device.type}; it needs CUDA and `pip install 'fewshot-diti[xformers]'`. Without it "
                "torch's own attention is used."
            )
        hub = {"revision": revision, "token": token, "local_files_only": local_files_only, "cache_dir": cache_dir}
        parts = load_parts(name_or_path, variant, **{k: v for k, v in hub.items() if v is not None})
        backbone = cls(name=portable_name(name_or_path), dtype=dtype, device=device, **parts)
        if xformers:
            backbone.unet.enable_xformers_memory_efficient_attention()
        backbone._compile(compile)
        return backbone

    @classmethod
    @torch.inference_mode(False)
    def from_pipe(
        cls,
        pipe: DiffusionPipeline,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Backbone:
        """The backbone in a loaded StableDiffusionPipeline of Stable Diffusion 1.x or 2.x.

        The pipeline stays as it is. Weights that keep their dtype, device and memory layout share its memory; so do not
        train the pipeline or fuse a LoRA into it while the backbone is in use. The hash of a pipeline in bfloat16 is
        not that of its files, which hold more digits.

        Args:
            dtype: as of `from_pretrained`; by default that of the pipeline's U-Net.
            device: likewise.

        Raises:
            ValueError: another kind of pipeline, such as SDXL, or one that is offloaded, quantized, or has LoRA layers.
        """
        parts = parts_of_pipeline(pipe)
        device = torch.device(device) if device is not None else pipe.unet.device
        dtype = pipe.unet.dtype if dtype is None else as_dtype(dtype, device)
        name = portable_name(pipe.config.get("_name_or_path") or type(pipe).__name__)
        return cls(name=name, dtype=dtype, device=device, **parts)

    def _compile(self, mode: CompileMode | None) -> None:
        self._compile_mode = mode
        self.compiled_unet = None if mode is None else torch.compile(self.unet, dynamic=False, mode=mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("lock", "compiled_unet")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = RLock()
        self._compile(self._compile_mode)

    def __copy__(self) -> Backbone:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)  # the lock too: the networks are shared
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return self

    @property
    def public_name(self) -> str:
        """The part of the name that may be shared: a hub id, "pocket", or the last part of a folder's path."""
        return public_name(self.name)

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
    def kind(self) -> Kind:
        """The name of the presets for it: "pocket" for small U-Nets, "stable-diffusion" for larger ones."""
        return kind_of(self._num_parameters)

    @cached_property
    def _num_parameters(self) -> int:
        return int(self.unet.num_parameters())

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
            with self.lock:
                posterior = self.vae.encode(batch.to(self.device, torch.float32)).latent_dist
            means.append((posterior.mean * self.vae.config.scaling_factor).cpu())
            stds.append((posterior.std * self.vae.config.scaling_factor).cpu())
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode_latents(self, latents_Bchw: Tensor) -> list[Image.Image]:
        """The images that scaled latents stand for."""
        batches = latents_Bchw.to(self.device, torch.float32).split(16)
        with self.lock:
            pixels = torch.cat([self.vae.decode(b / self.vae.config.scaling_factor).sample.cpu() for b in batches])
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).numpy()]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, L], padded to the model's length.

        Raises:
            ValueError: a prompt is longer than the text encoder reads; truncation would cut the class name off.
        """
        length = self.tokenizer.model_max_length
        with self.lock:  # a tokenizer cannot be called while another thread sets its padding
            for prompt in prompts:
                if (count := len(self.tokenizer(prompt).input_ids)) > length:
                    raise ValueError(
                        f"Prompt {prompt!r} has {count} tokens, backbone {self.name!r} reads {length}; shorten it, or "
                        "the name of the class in it."
                    )
            encoded = self.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        return encoded.input_ids.to(self.device)

    def encode_text(self, input_ids_BL: Tensor) -> Tensor:
        """Text embeddings [B, L, D] in the backbone's dtype."""
        with self.lock:
            return self.text_encoder(input_ids_BL).last_hidden_state

    def add_noise(self, latents_Bchw: Tensor, noise_Bchw: Tensor, timesteps_B: Tensor) -> Tensor:
        """x_t in the latents' dtype, fp32 or finer (Ho et al., DDPM, eq. 4).

        Not the scheduler's own: it rounds the schedule to the latents' dtype before it takes the roots.
        """
        a_T = self.alphas_cumprod
        signal_B111, noise_B111 = (
            # float64 stays on the CPU: MPS has none
            x_T.to(latents_Bchw.dtype).to(latents_Bchw.device)[timesteps_B][:, None, None, None]
            for x_T in (a_T.sqrt(), (1 - a_T).sqrt())
        )
        return signal_B111 * latents_Bchw + noise_B111 * noise_Bchw

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
        squares_Bchw, factors_B = self._squares(latents_Bchw, noise_Bchw, timesteps_B, text_BLD, unet)
        return factors_B * squares_Bchw.mean((1, 2, 3))

    def error_maps(self, latents_Bchw: Tensor, noise_Bchw: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """`errors` by latent position, [B, h, w]: averaged over the channels alone."""
        squares_Bchw, factors_B = self._squares(latents_Bchw, noise_Bchw, timesteps_B, text_BLD, None)
        return factors_B[:, None, None] * squares_Bchw.mean(1)

    def _squares(
        self,
        latents_Bchw: Tensor,
        noise_Bchw: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        unet: Callable[..., Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """Squared differences from what the model should predict [B, c, h, w], and the factors [B] that make them
        squared differences in eps."""
        noisy = self.add_noise(latents_Bchw, noise_Bchw, timesteps_B)
        network = self.unet if unet is None else unet
        with self.lock:
            predicted = network(noisy.to(self.dtype), timesteps_B, text_BLD).sample.to(latents_Bchw)
        if self.prediction_type == "epsilon":
            return (noise_Bchw - predicted).square(), latents_Bchw.new_ones(len(latents_Bchw))
        a = self.alphas_cumprod.to(latents_Bchw.dtype).to(latents_Bchw.device)[timesteps_B]
        a_B111 = a[:, None, None, None]
        v = a_B111.sqrt() * noise_Bchw - (1 - a_B111).sqrt() * latents_Bchw
        return (v - predicted).square(), a

    @torch.no_grad()
    def generate_latents(
        self,
        prompt: str,
        seeds: Sequence[int],
        *,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
    ) -> Tensor:
        """Scaled latents [len(seeds), c, h, w] of images that the backbone makes of a prompt, fp32 on the CPU.

        One image per seed, all in one batch. `negative_prompt` as in diffusers: by default the empty text.
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
        with self.lock:
            latents = pipe(
                prompt=[prompt] * len(seeds),
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(seeds),
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                output_type="latent",
            ).images
        return latents.float().cpu()


def load_backbone(name: str, dtype: torch.dtype | DtypeName = "auto", compile: CompileMode | None = None) -> Backbone:
    """`Backbone.from_pretrained` on the default device."""
    return Backbone.from_pretrained(name, dtype=dtype, compile=compile)
