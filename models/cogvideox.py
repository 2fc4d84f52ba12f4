"""CogVideoX 2B and 5B (Yang et al. 2024): v-prediction, a causal VAE of 4 frames a latent, T5."""

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch.utils.checkpoint import checkpoint

from rewards import require
from vader import PUBLISHED, VideoModel, read_config, straight_through_clamp, tabulate


class CogVideoX(VideoModel):
    cogvideox = dict(source="zai-org/CogVideoX-2b", num_frames=17, height=480, width=720)
    cogvideox |= PUBLISHED | dict(num_inference_steps=20, guidance_scale=6.0, lr=1e-4)
    cogvideox |= dict(steps=100, eval_every=25, grad_accum=2)  # hours on a small card, not days
    presets = {"cogvideox": cogvideox, "cogvideox-5b": cogvideox | dict(source="zai-org/CogVideoX-5b")}

    text_pipeline = lora_pipeline = diffusers.CogVideoXPipeline
    denoiser_class = diffusers.CogVideoXTransformer3DModel
    vae_class = diffusers.AutoencoderKLCogVideoX
    checkpointed = ("CogVideoXBlock",)
    vae_checkpointed = ("CogVideoXResnetBlock3D", "CogVideoXUpsample3D", "CogVideoXSpatialNorm3D")
    multiple, frame_multiple = 16, 8
    scale, frames_per_latent = 8, 4

    @classmethod
    def variant(cls, source):
        newer = read_config(source, "transformer/config.json").get("patch_size_t")
        require(not newer, f"{source} is a CogVideoX 1.5, for which there is no code: take CogVideoX-5b")
        return cls

    def schedule(self, cfg):
        config = read_config(self.source, "scheduler/scheduler_config.json")
        config["timestep_spacing"] = cfg.timestep_spacing
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(config)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler)

    @property
    def max_tokens(self):
        return read_config(self.source, "transformer/config.json")["max_text_seq_length"]

    def encode_text(self, pipe, text):
        kwargs = dict(do_classifier_free_guidance=False, max_sequence_length=self.max_tokens)
        prompt_embeds, _ = pipe.encode_prompt(text, device=self.device, **kwargs)
        return {"encoder_hidden_states": prompt_embeds[0]}

    def denoise(self, x, t, cond):
        if self.denoiser.config.use_rotary_positional_embeddings:  # 5B's
            cond = cond | {"image_rotary_emb": self.rotary_embedding(*x.shape[2:])}
        return super().denoise(x.transpose(1, 2), t, cond).transpose(1, 2)

    def rotary_embedding(self, frames, height, width):
        """Where each patch of latents of this size is, as cosines and sines; as in the stock pipeline."""
        config = self.denoiser.config
        grid = (height // config.patch_size, width // config.patch_size)
        native_width = config.sample_width // config.patch_size
        native_height = config.sample_height // config.patch_size
        return get_3d_rotary_pos_embed(
            config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, native_width, native_height),
            grid_size=grid,
            temporal_size=frames,
            device=self.device,
        )

    def decode(self, latents, picks):
        """As in vader.py; large frames in overlapping tiles, as after `pipe.vae.enable_tiling()`.

        Frames are exact; their gradient reaches the chunks of picked latent frames, not those before them.
        """
        hidden = (latents / self.vae.config.scaling_factor).to(self.dtype)
        too_high = hidden.shape[3] > self.vae.tile_latent_min_height
        too_wide = hidden.shape[4] > self.vae.tile_latent_min_width
        if too_high or too_wide:
            video = self.decode_tiles(hidden, picks)
        else:
            video = self.decode_tile(hidden, picks)
        return straight_through_clamp(video.transpose(1, 2).float() / 2 + 0.5)

    def decode_tile(self, hidden, picks):
        """The VAE's own decoding: latent frames 0 to 2, then two by two, handing on a cache.

        hidden: (B, C, F, H, W) -> the picked frames, (B, 3, N, 8 H, 8 W).
        """
        chunks = [range(min(3, hidden.shape[2]))]
        for first in range(3, hidden.shape[2], 2):
            chunks.append(range(first, first + 2))
        parts, cache = [], None
        graph = torch.is_grad_enabled()
        for chunk in chunks:
            if chunk.start > picks[-1]:
                break
            with torch.set_grad_enabled(graph and any(n in picks for n in chunk)):
                piece = hidden[:, :, chunk.start : chunk.stop]
                frames, cache = self.vae.decoder(piece, conv_cache=cache)
            sizes = [self.frames_per_latent] * len(chunk)
            if chunk.start == 0:
                sizes[0] = 1
            for n, part in zip(chunk, frames.split(sizes, dim=2), strict=True):
                if n in picks:
                    parts.append(part)
        return torch.cat(parts, dim=2)

    def decode_tiles(self, hidden, picks):
        """As `decode_tile`, tile by tile, of which only one's graph is alive; neighbours are blended."""
        vae = self.vae
        height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
        # the part of a tile that it shares with the next one, in which one fades into the other
        y_shared, x_shared = vae.tile_overlap_factor_height, vae.tile_overlap_factor_width
        y_blend = int(vae.tile_sample_min_height * y_shared)
        x_blend = int(vae.tile_sample_min_width * x_shared)
        y_kept = vae.tile_sample_min_height - y_blend
        x_kept = vae.tile_sample_min_width - x_blend
        bands, row_above = [], []
        for y in range(0, hidden.shape[3], int(height * (1 - y_shared))):
            row = []
            for x in range(0, hidden.shape[4], int(width * (1 - x_shared))):
                piece = hidden[..., y : y + height, x : x + width]
                tile = checkpoint(self.decode_tile, piece, picks, use_reentrant=False)
                if row_above:
                    tile = vae.blend_v(row_above[len(row)], tile, y_blend)
                if row:
                    tile = vae.blend_h(row[-1], tile, x_blend)
                row.append(tile)
            kept = [tile[..., :y_kept, :x_kept] for tile in row]
            bands.append(torch.cat(kept, dim=4))
            row_above = row
        return torch.cat(bands, dim=3)
