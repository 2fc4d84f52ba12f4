"""Stable Video Diffusion (Blattmann et al. 2023), image to video: noise levels, guidance by frame."""

import diffusers
import torch

from extras.images import open_image, to_tensor
from rewards import require
from vader import (
    HERE,
    PUBLISHED,
    TINY,
    Prompt,
    VideoModel,
    generator_for,
    read_config,
    straight_through_clamp,
    tabulate,
)


class StableVideoDiffusion(VideoModel):
    svd = dict(source="stabilityai/stable-video-diffusion-img2vid", num_frames=14, height=576, width=1024)
    svd |= PUBLISHED | dict(num_inference_steps=25, guidance_scale=3.0)
    svd |= dict(steps=100, eval_every=25, grad_accum=2)  # hours on a small card, not days
    tiny = TINY | dict(source=str(HERE / "tiny" / "i2v"), num_frames=8, guidance_scale=1.0)
    presets = {"svd": svd, "tiny-i2v": tiny}

    folder = "unet"
    denoiser_class = diffusers.UNetSpatioTemporalConditionModel
    vae_class = diffusers.AutoencoderKLTemporalDecoder
    checkpointed = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel")
    checkpointed += ("BasicTransformerBlock", "TemporalBasicTransformerBlock")  # within: 2.7 GB less
    vae_checkpointed = ("SpatioTemporalResBlock",)
    images = "must"
    fps = 7
    inputs = 2  # noise and the image's latents, side by side
    grad_steps = "strongest"  # the last of 25 steps has a leverage of 0.002, the strongest 0.29
    together = 7 * 4 * 72 * 128  # numbers in the latents decoded at once: half a video of the native size
    # the model's own defaults: frames per second less one, how much moves, noise on the image
    time_ids = (6.0, 127.0, 0.02)

    def schedule(self, cfg):
        """Euler steps over noise levels sigma, v prediction (Karras et al. 2022, alg. 1 and eq. 7)."""
        own = cfg.timestep_spacing == "trailing"
        require(own, "--timestep_spacing: this model has steps of its own, leave it out")
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler)

    @torch.no_grad()
    def encode(self, prompts, cfg):
        parts = ("image_encoder", "feature_extractor", "vae")
        self.pipe = self.stock(diffusers.StableVideoDiffusionPipeline, *parts)
        self.vae = self.pipe.vae
        self.image_encoder = self.pipe.image_encoder
        conds = {}
        for prompt in prompts:
            if prompt.image:
                start = self.start(open_image(prompt.image), cfg)
                conds[prompt] = cond = {name: value.cpu() for name, value in start.items()}
        # Unconditional is an empty image.
        nothing = {name: torch.zeros_like(value) for name, value in cond.items()}
        conds[Prompt("")] = nothing | {"time_ids": cond["time_ids"]}
        if not cfg.clips:  # no more pictures will come
            self.pipe = self.image_encoder = None
        return conds

    def start(self, picture, cfg):
        """What `denoise` is told of the picture that a video starts from, without batch dimension."""
        noise = torch.randn(1, 3, cfg.height, cfg.width, generator=generator_for("image noise"))
        pixels = to_tensor(picture, cfg.height, cfg.width)[None] * 2 - 1
        pixels = (pixels + self.time_ids[2] * noise).to(self.device)
        half = self.dtype == torch.float16  # in which this encoder overflows on some images
        if half:
            self.vae.to(dtype=torch.float32)
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()[0]
        if half:
            self.vae.to(dtype=self.dtype)
        return {
            "embedding": self.pipe._encode_image(picture, self.device, 1, False)[0],  # (1, D)
            "image_latents": latents.to(self.dtype),  # (C, H / 8, W / 8), unscaled
            "time_ids": torch.tensor(self.time_ids, device=self.device, dtype=self.dtype),
        }

    def guidance(self, scale, t, frames):
        return torch.linspace(1, scale, frames, device=self.device)[:, None, None]

    def denoise(self, x, t, cond):
        image = cond["image_latents"][:, :, None].expand(-1, -1, x.shape[2], -1, -1)
        x = torch.cat([x.to(self.dtype), image], dim=1).transpose(1, 2)  # (B, F, 2 C, H, W)
        f = self.denoiser(x, t.to(self.device), cond["embedding"], cond["time_ids"], return_dict=False)[0]
        return f.transpose(1, 2).float()

    def decode(self, latents, picks):
        """As in vader.py. This VAE mixes frames: neighbours decoded together see each other, no others.

        A video is decoded in halves at its native size, in one piece where it is small, as by the stock
        pipeline with such a `decode_chunk_size`. With gradient, neighbours in `picks` are one piece.
        """
        picks = list(picks)
        scaled = latents / self.vae.config.scaling_factor
        size = 1
        if picks == list(range(picks[0], picks[-1] + 1)):  # neighbours
            size = len(picks)
            if not torch.is_grad_enabled():
                size = max(1, self.together // scaled[:, :, 0].numel())
        parts = []
        for first in range(0, len(picks), size):
            chunk = picks[first : first + size]
            piece = scaled[:, :, chunk].transpose(1, 2).flatten(0, 1).to(self.dtype)
            frames = self.vae.decode(piece, num_frames=len(chunk)).sample.float()
            parts.append(frames.unflatten(0, (-1, len(chunk))))
        return straight_through_clamp(torch.cat(parts, dim=1) / 2 + 0.5)
