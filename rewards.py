"""Every reward, one shape: `make(device, dtype, arg, weights) -> reward`, `reward(frames, prompts) -> (B,)`.

    frames:  (B, N, 3, H, W) float32 in [0, 1]       prompts: list of B strings
    returns: (B,) float32, higher is better, one number per video, differentiable with respect to frames

`reward.frames` says what it wants to see: 1 for an image reward (a mean over any frames), n for a clip of n
evenly spaced frames. `arg` is what follows the colon in `--reward name:arg`. `weights` is None for the
published weights, or a folder that holds one sub-folder per reward, in the same file formats.

Your own reward: write `make_mine` by imitating `make_colorful`, and add one line to REWARDS at the end.
"""

import difflib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import CLIPVisionModelWithProjection

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BadReward(ValueError):
    """A --reward that can't be used; its message is one line that says what to do."""


# ---- 1. Shared pieces --------------------------------------------------------------------------------------


def preprocess(frames, size, mean, std):
    """Squash (..., 3, H, W) in [0, 1] to (n, 3, size, size), bicubic with antialiasing, and normalise."""
    pictures = frames.flatten(0, -4).float()
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (mean, std))
    return (pictures - mean) / std


def frozen(network, device, dtype):
    """Eval mode and no weight gradients: the gradient goes through a reward, never into it."""
    return network.to(device, dtype).eval().requires_grad_(False)


def source(weights, name, hub):
    """Where reward `name` loads from: the folder given by --reward_weights, else its hub id."""
    if weights is None:
        return hub
    folder = Path(weights) / name
    if not folder.is_dir():
        raise BadReward(f"--reward_weights {weights} has no folder {name!r}: put that reward's files there")
    return str(folder)


# ---- 2. Image rewards --------------------------------------------------------------------------------------


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: linear layers, dropouts between, no activations (layers.0/2/4/6/7)."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding):
        return self.layers(embedding)


def make_aesthetic(device, dtype, arg=None, weights=None):
    """LAION aesthetic score, about 1 to 10: a linear head on the normalised CLIP ViT-L/14 image embedding.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`.
    """
    folder = source(weights, "aesthetic", None)
    clip = CLIPVisionModelWithProjection.from_pretrained(
        folder or "openai/clip-vit-large-patch14", dtype=dtype
    )
    head_file = "aesthetic-model.pth"
    path = (
        Path(folder) / head_file if folder else hf_hub_download("trl-lib/ddpo-aesthetic-predictor", head_file)
    )
    head = AestheticHead(clip.config.projection_dim)
    head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    clip, head = frozen(clip, device, dtype), frozen(head, device, torch.float32)

    def reward(frames, prompts):
        pixels = preprocess(frames, clip.config.image_size, CLIP_MEAN, CLIP_STD)  # (B * N, 3, S, S)
        embedding = F.normalize(
            clip(pixel_values=pixels.to(dtype)).image_embeds.float(), dim=-1
        )  # (B * N, D)
        return head(embedding).view(frames.shape[:2]).mean(1)

    reward.frames = 1
    return reward


def make_colorful(device, dtype, arg=None, weights=None):
    """Colourfulness M3 of Hasler & Suesstrunk 2003 / 100: 0 is grey, 1 extremely colourful. No network."""

    def reward(frames, prompts):
        r, g, b = (255 * frames.float()).flatten(3).unbind(2)  # each (B, N, H * W)
        rg, yb = r - g, (r + g) / 2 - b
        # the small number keeps the square root's slope finite on a grey frame
        spread = (rg.var(-1, correction=0) + yb.var(-1, correction=0) + 1e-6).sqrt()
        mean = (rg.mean(-1) ** 2 + yb.mean(-1) ** 2 + 1e-6).sqrt()
        return (spread + 0.3 * mean).mean(1) / 100

    reward.frames = 1
    return reward


# ---- 3. Names and weighted sums ----------------------------------------------------------------------------

# SWAP: your reward. Name it here, and `--reward name`, `--reward "name:arg"` and sums with it work.
REWARDS = {
    "aesthetic": make_aesthetic,
    "colorful": make_colorful,
}


def parse(spec: str) -> list[tuple[float, str, str | None]]:
    """Split "hps + 0.5*remove:book" into [(1.0, "hps", None), (0.5, "remove", "book")].

    Raises BadReward, naming the nearest reward, when a name is unknown or a term can't be read.
    """
    terms = []
    for term in spec.split("+"):
        found = re.fullmatch(
            r"\s*(?:(-?\d+(?:\.\d*)?|-?\.\d+)\s*\*)?\s*([A-Za-z_]\w*)\s*(?::\s*(.*\S))?\s*", term
        )
        if not found:
            raise BadReward(
                f'can\'t read {term.strip()!r} in --reward {spec!r}: write it like "aesthetic + 0.5*colorful"'
            )
        weight, name, arg = found.groups()
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0)[0]
            raise BadReward(
                f"unknown reward {name!r}: did you mean {near!r}? There are: {', '.join(REWARDS)}"
            )
        if (name, arg) in [known[1:] for known in terms]:
            raise BadReward(f"{term.strip()!r} stands twice in --reward {spec!r}: give it one weight")
        terms.append((float(weight or 1), name, arg))
    return terms


def make_terms(spec: str, device, dtype, weights=None) -> dict:
    """Load the rewards of a weighted sum: {"name" or "name:arg": (weight, reward)}. Raises BadReward."""
    terms = {}
    for weight, name, arg in parse(spec):
        try:
            reward = REWARDS[name](device, dtype, arg, weights)
        except OSError as error:
            problem = str(error).strip().splitlines()[0][:150]
            raise BadReward(
                f"can't load reward {name!r}: check the network, or --reward_weights ({problem})"
            ) from None
        terms[name if arg is None else f"{name}:{arg}"] = (weight, reward)
    return terms
