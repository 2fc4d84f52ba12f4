"""Wan 2.1 and 2.2 (2025), from 1.3B to A14B: flow transformers, a causal VAE of 4 frames a latent, UMT5."""

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from extras.images import FromImage
from models.tiles import checkpoint_cached_blocks, decode_in_tiles, tiles_for
from rewards import require
from vader import HERE, PUBLISHED, TINY, VideoModel, read_config, straight_through_clamp, tabulate

FOR_16_GB = dict(quantize="nf4", offload=True)  # what 14 billion parameters need


class Wan(VideoModel):
    wan = dict(source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", num_frames=33, height=320, width=576)
    wan |= PUBLISHED | dict(num_inference_steps=20, guidance_scale=5.0, lr=1e-4, timestep_spacing="linspace")
    wan |= dict(steps=100, eval_every=25, grad_accum=2)  # hours on a small card, not days
    tiny = TINY | dict(source=str(HERE / "tiny" / "wan"), num_frames=9, guidance_scale=3.0)
    tiny["timestep_spacing"] = "linspace"
    large = wan | dict(source="Wan-AI/Wan2.1-T2V-14B-Diffusers") | FOR_16_GB
    presets = {"wan": wan, "wan-14b": large, "tiny-wan": tiny}

    text_pipeline = lora_pipeline = diffusers.WanPipeline
    denoiser_class = diffusers.WanTransformer3DModel
    vae_class = diffusers.AutoencoderKLWan
    checkpointed = ("WanTransformerBlock",)
    vae_checkpointed = ()  # its blocks keep a cache: see `recompute`
    multiple, frame_multiple = 16, 4
    scale, frames_per_latent = 8, 4
    max_tokens = 512
    fps = 16
    index_settings = ("expand_timesteps",)
    # parts of layers' names in the original checkpoint, which ComfyUI reads
    comfy_names = {"attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o"}
    comfy_names |= {"to_q": "q", "to_k": "k", "to_v": "v", "proj_out": "head.head"}
    comfy_names |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    comfy_names |= {"text_embedder": "text_embedding", "time_embedder": "time_embedding", "linear_1": "0"}
    comfy_names |= {"linear_2": "2", "time_proj": "time_projection.1", "condition_embedder.": ""}
    grad_steps = "strongest"  # the last step has a leverage of 0.009, the strongest of 30 has 0.095

    def schedule(self, cfg):
        """Euler steps of rectified flow (Liu et al. 2022): x = (1 - sigma) x0 + sigma noise, f its slope.

        linspace: as in the stock pipeline; trailing: as few-step LoRAs are trained, from 1 to 1 / T.
        """
        T, spacing = cfg.num_inference_steps, cfg.timestep_spacing
        require(spacing != "leading", "--timestep_spacing leading: this model has linspace and trailing")
        sigmas = np.linspace(1, 1 / T, T) if spacing == "trailing" else None
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=cfg.shift or self.shift())
        scheduler.set_timesteps(T, sigmas=sigmas)
        return tabulate(scheduler)

    def shift(self) -> float:
        """How much more of the steps lies where there is much noise, by the scheduler's config."""
        config = read_config(self.source, "scheduler/scheduler_config.json")
        shift = config.get("flow_shift") or config.get("shift", 1.0)
        require(0 < shift < 100, f"{self.source}: the scheduler's shift must be above 0, not {shift}")
        return shift

    @classmethod
    def variant(cls, source):
        index = read_config(source, "model_index.json")
        if index.get("expand_timesteps"):
            return Wan22
        if index.get("boundary_ratio"):
            return WanA14B
        return cls

    def encode_text(self, pipe, text):
        kwargs = dict(max_sequence_length=self.max_tokens, device=self.device)
        embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, **kwargs)
        return {"encoder_hidden_states": embeds[0]}

    def statistics(self):
        """Mean and standard deviation of the VAE's latents, (C, 1, 1, 1) each."""
        known = [self.vae.config.latents_mean, self.vae.config.latents_std]
        return torch.tensor(known, device=self.device)[..., None, None, None]

    def recompute(self):
        super().recompute()
        checkpoint_cached_blocks(self.vae)

    def decode(self, latents, picks):
        """As in vader.py: the VAE's own decoding without its clamp, one latent frame after the other.

        Frames are exact; their gradient reaches the picked latent frames, not those before them.
        """
        graph, (mean, std) = torch.is_grad_enabled(), self.statistics()
        hidden = self.vae.post_quant_conv((latents * std + mean).to(self.dtype))
        convolutions = sum(type(m).__name__ == "WanCausalConv3d" for m in self.vae.decoder.modules())
        cache, parts = [None] * convolutions, []
        alone = graph and len(picks) == 1
        tiles = tiles_for(self.scale**2 * hidden[0, 0, 0].numel()) if alone else 1
        for i in range(picks[-1] + 1):
            with torch.set_grad_enabled(graph and i in picks):
                piece, first = hidden[:, :, i : i + 1], i == 0
                if tiles > 1 and i in picks:
                    frames = decode_in_tiles(self.vae.decoder, piece, cache, first, tiles)
                else:
                    frames = self.vae.decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=first)
            if i in picks:
                parts.append(unpatchify(frames, self.vae.config.patch_size or 1))
        return straight_through_clamp(torch.cat(parts, dim=2).transpose(1, 2).float() / 2 + 0.5)


class Wan22(FromImage, Wan):
    """Wan 2.2 TI2V 5B: a VAE of 16 x 16 pixels, and a time for each token: the first may be an image's."""

    wan22 = Wan.wan | dict(source="Wan-AI/Wan2.2-TI2V-5B-Diffusers", num_frames=33, height=480, width=832)
    presets = {"wan2.2-5b": wan22}
    multiple, scale, fps = 32, 16, 24

    def flow(self, x, times, cond):
        if len(times) > 1:  # a time for each token
            times = times.expand(-1, x.shape[3] // 2, x.shape[4] // 2)
        times = times.flatten().expand(len(x), -1)
        return self.denoiser(x.to(self.dtype), timestep=times, **cond, return_dict=False)[0].float()


class WanA14B(Wan):
    """Wan 2.2 T2V A14B: `other` has the steps of much noise; what trains has the others, of most leverage."""

    a14b = Wan.large | dict(source="Wan-AI/Wan2.2-T2V-A14B-Diffusers", guidance_scale=4.0)
    presets = {"wan2.2-a14b": a14b}
    folder, other_folder = "transformer_2", "transformer"
    index_settings = ("expand_timesteps", "boundary_ratio", "transformer_2")
    lora_note = "It is for transformer_2, of little noise: `load_into_transformer_2=True` in diffusers'"
    lora_note += " `load_lora_weights`, and in ComfyUI the loader behind the low-noise model."
    other = None

    def boundary(self) -> float:
        """The first network has the steps from this t on."""
        return 1000 * read_config(self.source, "model_index.json")["boundary_ratio"]

    def trains(self, t) -> bool:
        """Is this a step of the network that trains?"""
        return t < self.boundary()

    def schedule(self, cfg):
        schedule = super().schedule(cfg)
        own = tuple(i for i, t in enumerate(schedule.t) if self.trains(t))
        K, there = cfg.backprop_steps, f"{len(own)} of the {len(schedule.t)} steps are of what trains"
        require(K <= len(own), f"--backprop_steps {K}: only {there}, {self.folder}")
        return schedule._replace(trainable=own)

    def load(self):
        if self.other is None:
            self.other = self.load_denoiser(self.other_folder).eval().requires_grad_(False)
        self.other.to("cpu")  # until its steps come
        super().load()

    def guidance(self, scale, t, frames):
        """The second network's is a third closer to 1: 3 where the first's is 4, as published."""
        return scale if t >= self.boundary() else 1 + (scale - 1) * 2 / 3

    def expert(self, t):
        return self.denoiser if self.trains(t) else self.other

    def denoise(self, x, t, cond):
        self.expert(t).to(self.device)
        return super().denoise(x, t, cond)


class WanA14BHigh(WanA14B):
    """The same, where the network for the steps of much noise trains."""

    presets = {"wan2.2-a14b-high": WanA14B.a14b}
    folder, other_folder = "transformer", "transformer_2"
    lora_note = "It is for transformer, of much noise: in ComfyUI the loader behind the high-noise model."

    def trains(self, t):
        return t >= self.boundary()
