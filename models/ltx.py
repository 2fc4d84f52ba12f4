"""LTX-Video (HaCohen et al. 2024), text or image to video: flow on tokens, 8 frames in a latent, T5."""

import math

import diffusers
import torch

from extras.images import FromImage
from rewards import require
from vader import PUBLISHED, TextToVideoUNet, generator_for, read_config, straight_through_clamp, tabulate


class LTX(FromImage, TextToVideoUNet):
    ltx = dict(source="Lightricks/LTX-Video", num_frames=49, height=512, width=704)
    ltx |= PUBLISHED | dict(num_inference_steps=30, guidance_scale=3.0, lr=1e-4)
    presets = {"ltx": ltx}

    text_pipeline = lora_pipeline = diffusers.LTXPipeline
    denoiser_class, folder = diffusers.LTXVideoTransformer3DModel, "transformer"
    vae_class = diffusers.AutoencoderKLLTXVideo
    checkpointed = ("LTXVideoTransformerBlock",)
    vae_checkpointed = ("LTXVideoResnetBlock3d",)
    multiple, frame_multiple = 32, 8
    scale, frames_per_latent = 32, 8
    stochastic = False
    max_tokens = 128
    # parts of layers' names in the original checkpoint, which ComfyUI reads
    comfy_names = {"proj_in": "patchify_proj", "time_embed.": "adaln_single."}
    frame_rate = 25  # frames per second, told to the denoiser
    decode_timestep, decode_noise_scale = 0.05, 0.025  # for a VAE that takes a timestep (0.9.1 and later)

    def schedule(self, cfg):
        """Euler steps of rectified flow; the more tokens, the more noise."""
        require(cfg.num_inference_steps > 1, "--num_inference_steps must be 2 or more for this model")
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        known = scheduler.config
        _, *size = self.latent_shape(cfg)
        slope = (known.max_shift - known.base_shift) / (known.max_image_seq_len - known.base_image_seq_len)
        shift = known.base_shift + slope * (math.prod(size) - known.base_image_seq_len)
        steps = cfg.num_inference_steps
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).double().tolist(), mu=shift)
        return tabulate(scheduler)

    def encode_text(self, pipe, text):
        how = dict(do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device)
        states, mask, *_ = pipe.encode_prompt(text, **how)
        return {"encoder_hidden_states": states[0], "encoder_attention_mask": mask[0].bool()}

    def statistics(self):
        """Mean and standard deviation of the VAE's latents, (C, 1, 1, 1) each."""
        return (v.view(-1, 1, 1, 1).to(self.device) for v in (self.vae.latents_mean, self.vae.latents_std))

    def load(self):
        super().load()
        for block in self.vae.decoder.modules():  # 0.9.1's draws noise: recomputing would not repeat
            if hasattr(block, "per_channel_scale1"):
                block.per_channel_scale1 = block.per_channel_scale2 = None

    def flow(self, x, times, cond):
        size = dict(zip(("num_frames", "height", "width"), x.shape[2:], strict=True))
        size["rope_interpolation_scale"] = (self.frames_per_latent / self.frame_rate, 32, 32)
        if len(times) > 1:  # a time for each token
            times = times.expand(x.shape[2:])
        tokens, times = x.flatten(2).transpose(1, 2).to(self.dtype), times.flatten().expand(len(x), -1)
        f = self.denoiser(tokens, timestep=times, **cond, **size, return_dict=False)[0]
        return f.transpose(1, 2).unflatten(2, x.shape[2:]).float()

    def decode(self, latents, picks):
        """As in vader.py. This VAE looks both ways in time and is cheap: it decodes all for any picks."""
        vae, timestep, (mean, std) = self.vae, None, self.statistics()
        hidden = latents * std / vae.config.scaling_factor + mean
        if vae.config.timestep_conditioning:
            noise = torch.randn(hidden.shape, generator=generator_for("decode noise")).to(self.device)
            hidden = torch.lerp(hidden, noise, self.decode_noise_scale)
            timestep = torch.full((len(hidden),), self.decode_timestep).to(self.device, self.dtype)
        video = vae.decode(hidden.to(self.dtype), timestep, return_dict=False)[0].transpose(1, 2).float()
        split = video.split([1] + [self.frames_per_latent] * (latents.shape[2] - 1), dim=1)
        return straight_through_clamp(torch.cat([split[n] for n in picks], dim=1) / 2 + 0.5)
