"""--clips: videos of several clips, each made from the last frame of the clip before it.

Between clips passes a picture, without gradient: the reward's gradient in a clip trains that clip's steps. So
a whole video is sampled and walked back clip by clip, by vader.py's own functions.
"""

from dataclasses import replace

import torch
from PIL import Image

import vader
from rewards import require


def chain(family, cfg):
    """A family's class whose videos are cfg.clips clips side by side along the frames, cfg.num_frames in all.

    Settings without clips are to it those of one clip. Raises BadInput unless the family makes videos from
    images (has a method `start`), and clips of that length.
    """
    has_start = hasattr(family, "start")
    require(has_start, "--clips: this model starts from no image: svd, tiny-i2v, ltx, wan2.2-5b do")
    frames, left = divmod(cfg.num_frames, cfg.clips)
    require(left == 0, f"--num_frames {cfg.num_frames}: must be a multiple of --clips {cfg.clips}")
    group = family.frame_multiple
    fits = (frames - 1) % group == 0
    problem = f"a clip has {frames}, must be 1 more than a multiple of {group}"
    require(fits, f"--num_frames {cfg.num_frames}: {problem}")

    class Chain(family):
        frame_multiple = 1  # checked above
        rollout, walk_back = staticmethod(rollout), staticmethod(walk_back)
        length = 1 + (frames - 1) // family.frames_per_latent  # latent frames of a clip

        def latent_shape(self, cfg):
            if not cfg.clips:
                return super().latent_shape(cfg)
            channels, frames, height, width = super().latent_shape(settings_of_a_clip(cfg))
            return channels, cfg.clips * frames, height, width

        def schedule(self, cfg):
            return super().schedule(settings_of_a_clip(cfg))

        def latent_frame(self, frame):
            clip, inside = divmod(frame, frames)
            return clip * self.length + super().latent_frame(inside)

        def decode(self, latents, picks):
            parts = []
            for k, clip in enumerate(latents.split(self.length, dim=2)):
                inside = picks_in_clip(picks, k, self.length)
                if inside:
                    parts.append(super().decode(clip, inside))
            return torch.cat(parts, dim=1)

    return Chain


def settings_of_a_clip(cfg):
    if not cfg.clips:
        return cfg
    return replace(cfg, clips=None, num_frames=cfg.num_frames // cfg.clips)


def picks_in_clip(picks, k: int, length: int) -> list[int]:
    """Those of the whole video's latent frames that are in clip k, counted from its first one."""
    return [n - k * length for n in picks if n // length == k]


@torch.no_grad()
def rollout(run, batch):
    """As `vader.rollout`, clip by clip -> T + 1 latents of the whole video, (B, C, F, H, W) float32.

    Fills batch.clips with a Batch for each clip: its noise, its picks, and what `denoise` is given for it.
    """
    one = replace(run, cfg=settings_of_a_clip(run.cfg))
    length = run.model.length
    empty_prompt = run.conds[vader.Prompt(run.cfg.negative_prompt)]
    cond = batch.cond
    by_clip = []
    batch.clips.clear()
    for k, noise in enumerate(batch.noise.split(length, dim=2)):
        if k > 0:
            cond = cond | start_from_last_frame(run, by_clip[-1][-1])
        # an image, which the empty prompt may not have, is given to both guidance branches
        uncond = dict(cond)
        for name in empty_prompt:
            uncond[name] = batch.uncond[name]
        picks = picks_in_clip(batch.picks, k, length)
        clip = batch._replace(noise=noise, cond=cond, uncond=uncond, picks=picks, clips=[])
        batch.clips.append(clip)
        by_clip.append(vader.rollout(one, clip))
    whole = []
    for parts in zip(*by_clip, strict=True):  # of the same step
        whole.append(torch.cat(parts, dim=2))
    return whole


def start_from_last_frame(run, latents) -> dict:
    """What `denoise` is given for the clip after the one with these clean latents, {name: (B, ...)}."""
    cfg, model = run.cfg, run.model
    frames = model.decode(latents, range(model.length))[:, -1]  # (B, 3, H, W)
    # in 8 bits, as it would be read from a file
    pixels = (frames * 255).round().byte().permute(0, 2, 3, 1).cpu()
    starts = []
    for picture in pixels:
        starts.append(model.start(Image.fromarray(picture.numpy()), cfg))
    cond = {}
    for name in starts[0]:
        cond[name] = torch.stack([start[name] for start in starts])
    return cond


def walk_back(run, batch, latents, g):
    """Backward of `rollout`: `vader.walk_back` for each clip alone, but for those that were not scored.

    latents: T + 1, (B, C, F, H, W) of the whole video; g: d loss / d latents[-1], 0 in clips without picks.
    """
    one = replace(run, cfg=settings_of_a_clip(run.cfg))
    length = run.model.length
    for k, clip in enumerate(batch.clips):
        if clip.picks:
            latents_of_clip = []
            for x in latents:
                latents_of_clip.append(x.narrow(2, k * length, length))
            vader.walk_back(one, clip, latents_of_clip, g.narrow(2, k * length, length))
