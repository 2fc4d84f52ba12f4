"""LTX-Video (HaCohen et al. 2024), text or image to video: flow on tokens, 8 frames in a latent, T5."""

import diffusers
import torch

from extras.images import FromImage
from models.tiles import compute_in_parts
from rewards import require
from vader import PUBLISHED, VideoModel, generator_for, read_config, straight_through_clamp, tabulate


class LTX(FromImage, VideoModel):
    ltx = dict(source="Lightricks/LTX-Video", num_frames=49, height=512, width=704)
    ltx |= PUBLISHED | dict(num_inference_steps=30, guidance_scale=3.0, lr=1e-4)
    presets = {"ltx": ltx}

    text_pipeline = lora_pipeline = diffusers.LTXPipeline
    denoiser_class = diffusers.LTXVideoTransformer3DModel
    vae_class = diffusers.AutoencoderKLLTXVideo
    checkpointed = ("LTXVideoTransformerBlock",)
    multiple, frame_multiple = 32, 8
    scale, frames_per_latent = 32, 8
    max_tokens = 128
    # parts of layers' names in the original checkpoint, which ComfyUI reads
    comfy_names = {"proj_in": "patchify_proj", "time_embed.": "adaln_single."}
    fps = 25  # which the denoiser is told
    decode_timestep, decode_noise_scale = 0.05, 0.025  # for a VAE that takes a timestep (0.9.1 and later)

    def schedule(self, cfg):
        """Euler steps of rectified flow; the more tokens, the more noise."""
        own = cfg.timestep_spacing == "trailing"
        require(own, "--timestep_spacing: this model has steps of its own, leave it out")
        require(cfg.num_inference_steps > 1, "--num_inference_steps must be 2 or more for this model")
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        known = scheduler.config
        _, frames, height, width = self.latent_shape(cfg)
        tokens = frames * height * width
        more_tokens = known.max_image_seq_len - known.base_image_seq_len
        slope = (known.max_shift - known.base_shift) / more_tokens
        shift = known.base_shift + slope * (tokens - known.base_image_seq_len)
        steps = cfg.num_inference_steps
        sigmas = torch.linspace(1, 1 / steps, steps).double()
        scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=shift)
        return tabulate(scheduler)

    def encode_text(self, pipe, text):
        kwargs = dict(max_sequence_length=self.max_tokens, device=self.device)
        states, mask, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False, **kwargs)
        return {"encoder_hidden_states": states[0], "encoder_attention_mask": mask[0].bool()}

    def statistics(self):
        """Mean and standard deviation of the VAE's latents, (C, 1, 1, 1) each."""
        both = torch.stack([self.vae.latents_mean, self.vae.latents_std])
        return both[..., None, None, None].to(self.device)

    def load(self):
        super().load()
        for block in self.vae.decoder.modules():  # 0.9.1's draws noise: recomputing would not repeat
            if hasattr(block, "per_channel_scale1"):
                block.per_channel_scale1 = block.per_channel_scale2 = None

    def recompute(self):
        super().recompute()
        compute_in_parts(self.vae.decoder, ("LTXVideoResnetBlock3d",))

    def flow(self, x, times, cond):
        frames, height, width = x.shape[2:]
        kwargs = dict(num_frames=frames, height=height, width=width)
        kwargs["rope_interpolation_scale"] = (self.frames_per_latent / self.fps, 32, 32)
        if len(times) > 1:  # a time for each token
            times = times.expand(frames, height, width)
        times = times.flatten().expand(len(x), -1)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens.to(self.dtype)
        kwargs |= dict(timestep=times, return_dict=False)
        f = self.denoiser(tokens, **cond, **kwargs)[0]
        f = f.transpose(1, 2).unflatten(2, (frames, height, width))
        return f.float()

    def decode(self, latents, picks):
        """As in vader.py. This VAE looks both ways in time and is cheap: it decodes all for any picks."""
        mean, std = self.statistics()
        hidden = latents * std / self.vae.config.scaling_factor + mean
        timestep = None
        if self.vae.config.timestep_conditioning:
            noise = torch.randn(hidden.shape, generator=generator_for("decode noise"))
            hidden = torch.lerp(hidden, noise.to(self.device), self.decode_noise_scale)
            timestep = torch.full((len(hidden),), self.decode_timestep).to(self.device, self.dtype)
        video = self.vae.decode(hidden.to(self.dtype), timestep).sample
        video = video.transpose(1, 2).float()
        later = latents.shape[2] - 1
        sizes = [1] + [self.frames_per_latent] * later
        by_latent = video.split(sizes, dim=1)
        picked = torch.cat([by_latent[n] for n in picks], dim=1)
        return straight_through_clamp(picked / 2 + 0.5)
