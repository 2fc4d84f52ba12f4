"""CogVideoX 2B and 5B (Yang et al. 2024): v-prediction, a causal VAE of 4 frames a latent, T5."""

import functools

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch.utils.checkpoint import checkpoint

from rewards import require
from vader import PUBLISHED, TextToVideoUNet, read_config, straight_through_clamp, tabulate


class CogVideoX(TextToVideoUNet):
    cogvideox = dict(source="zai-org/CogVideoX-2b", num_frames=17, height=480, width=720)
    cogvideox |= PUBLISHED | dict(num_inference_steps=20, guidance_scale=6.0, lr=1e-4)
    cogvideox |= dict(steps=100, eval_every=25, grad_accum=2)  # hours on a small card, not days
    presets = {"cogvideox": cogvideox, "cogvideox-5b": cogvideox | dict(source="zai-org/CogVideoX-5b")}

    text_pipeline = lora_pipeline = diffusers.CogVideoXPipeline
    denoiser_class, folder = diffusers.CogVideoXTransformer3DModel, "transformer"
    vae_class = diffusers.AutoencoderKLCogVideoX
    checkpointed = ("CogVideoXBlock",)
    vae_checkpointed = ("CogVideoXResnetBlock3D", "CogVideoXUpsample3D", "CogVideoXSpatialNorm3D")
    multiple, frame_multiple = 16, 8
    scale, frames_per_latent = 8, 4
    stochastic = False

    @classmethod
    def build_on_meta(cls, source):
        newer = read_config(source, "transformer/config.json").get("patch_size_t")
        require(not newer, f"{source} is a CogVideoX 1.5, for which there is no code: take CogVideoX-5b")
        return super().build_on_meta(source)

    def schedule(self, cfg):
        config = read_config(self.source, "scheduler/scheduler_config.json")
        config |= dict(timestep_spacing=cfg.timestep_spacing)
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(config)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler)

    @property
    def max_tokens(self):
        return read_config(self.source, "transformer/config.json")["max_text_seq_length"]

    def encode_text(self, pipe, text):
        how = dict(do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device)
        return {"encoder_hidden_states": pipe.encode_prompt(text, **how)[0][0]}

    def denoise(self, x, t, cond):
        known, height, width = self.denoiser.config, x.shape[3], x.shape[4]
        if known.use_rotary_positional_embeddings:  # 5B's
            p = known.patch_size
            grid = height // p, width // p
            region = get_resize_crop_region_for_grid(grid, known.sample_width // p, known.sample_height // p)
            size = dict(crops_coords=region, grid_size=grid, temporal_size=x.shape[2], device=self.device)
            cond = cond | {"image_rotary_emb": get_3d_rotary_pos_embed(known.attention_head_dim, **size)}
        return super().denoise(x.transpose(1, 2), t, cond).transpose(1, 2)

    def decode(self, latents, picks):
        """As in vader.py; large frames in overlapping tiles, as after `pipe.vae.enable_tiling()`.

        Frames are exact; their gradient reaches the chunks of picked latent frames, not those before them.
        """
        vae, hidden = self.vae, (latents / self.vae.config.scaling_factor).to(self.dtype)
        height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
        if hidden.shape[3] <= height and hidden.shape[4] <= width:
            video = self.decode_tile(hidden, picks)
        else:
            # neighbours share this much of a tile, and are blended there
            y_share, x_share = vae.tile_overlap_factor_height, vae.tile_overlap_factor_width
            tops = range(0, hidden.shape[3], int(height * (1 - y_share)))
            lefts = range(0, hidden.shape[4], int(width * (1 - x_share)))
            tiles = [[hidden[..., y : y + height, x : x + width] for x in lefts] for y in tops]
            # checkpointed as a whole: only one tile's graph is alive
            run = functools.partial(checkpoint, self.decode_tile, picks=picks, use_reentrant=False)
            rows = [[run(tile) for tile in row] for row in tiles]
            high, wide = vae.tile_sample_min_height, vae.tile_sample_min_width
            y_blend, x_blend = int(high * y_share), int(wide * x_share)
            for i, row in enumerate(rows):
                for j in range(len(row)):
                    row[j] = vae.blend_v(rows[i - 1][j], row[j], y_blend) if i else row[j]
                    row[j] = vae.blend_h(row[j - 1], row[j], x_blend) if j else row[j]
            kept = [[tile[..., : high - y_blend, : wide - x_blend] for tile in row] for row in rows]
            video = torch.cat([torch.cat(row, dim=4) for row in kept], dim=3)
        return straight_through_clamp(video.transpose(1, 2).float() / 2 + 0.5)

    def decode_tile(self, hidden, picks):
        """The VAE's own decoding: latent frames 0 to 2, then two by two, handing on a cache."""
        chunks = [range(3), *(range(first, first + 2) for first in range(3, hidden.shape[2], 2))]
        picked = [n for n, chunk in enumerate(chunks) if set(chunk) & set(picks)]
        parts, cache, graph = [], None, torch.is_grad_enabled()
        for n, chunk in enumerate(chunks[: picked[-1] + 1]):
            with torch.set_grad_enabled(graph and n in picked):
                piece = hidden[:, :, chunk.start : chunk.stop]
                video, cache = self.vae.decoder(piece, conv_cache=cache)
            split = video.split([self.frames_per_latent if i else 1 for i in chunk], dim=2)
            parts += [part for i, part in zip(chunk, split, strict=True) if i in picks]
        return torch.cat(parts, dim=2)
