"""Every reward, one shape: `make(device, dtype, weights) -> reward`, `reward(frames, prompts) -> (B,)`.

    frames:  (B, N, 3, H, W) float32 in [0, 1]       prompts: list of B strings
    returns: (B,) float32, higher is better, one number per video, differentiable with respect to frames

`reward.frames` says what it wants to see: 1 for an image reward (a mean over any frames), n for a clip of n
evenly spaced frames, "all" for every frame. `weights` is None for the published weights, or the folder that
holds the same files, DIR/name of `--reward_weights DIR`. A `make` with a parameter `arg` gets what follows
the colon in `--reward name:arg`; when that has no default, it must be given.
Optional: `reward.report`, {name: (B,)} figures of the last call, to log; `reward.check(prompts)`, called once
before training, raises BadInput; `reward.networks`, modules that `--offload` moves to host memory.

Your own reward: write `make_mine` by imitating `make_colorful`; `require` refuses what it can't work with.
"""

import contextlib
import difflib
import functools
import inspect
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- 1. Shared pieces --------------------------------------------------------------------------------------
def evenly_spaced(n: int, size: int) -> list[int]:
    """n indices of `size` things, the first and the last among them; some twice where n is larger."""
    return np.linspace(0, size - 1, n).round().astype(int).tolist()


def exact(x):
    """float32, or float64 if it is that already: half precision is for the inside of networks only."""
    return x if x.dtype == torch.float64 else x.float()


def preprocess(frames, size, mean, std, short_side=False, crop=None, mode="bicubic"):
    """Frames as a network wants them: resized with antialiasing, cropped, normalised; differentiable.

    frames: (..., 3, H, W) in [0, 1] -> (n, 3, h, w). size: (h, w) to squash to, or an int for a square; with
    short_side it is the shorter side's, and the shape is kept. crop: side of a square cut from the middle.
    """
    pictures = exact(frames).flatten(0, -4)
    height, width = pictures.shape[-2:]
    size = (size, size) if isinstance(size, int) else size
    if short_side:
        size = [int(size[0] * side / min(height, width)) for side in (height, width)]
    if (height, width) != tuple(size):
        pictures = F.interpolate(pictures, tuple(size), mode=mode, antialias=True).clamp(0, 1)
    if crop:
        top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
        pictures = pictures[..., top : top + crop, left : left + crop]
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (mean, std))
    return (pictures - mean) / std


def checkpoint_blocks(network: nn.Module, classes):
    """Recompute the activations of every block of these classes in the backward pass (Chen et al. 2016).

    diffusers' own switches are missing, or leave out the attention; transformers' are for training mode only.
    """

    def recomputed(forward, *args, **kwargs):
        # as separate tensors, or an outer checkpoint could not free them (CogVideoX's caches: 6 GB)
        leaves, shape = tree_flatten((args, kwargs))

        def run(*leaves):
            args, kwargs = tree_unflatten(leaves, shape)
            return forward(*args, **kwargs)

        return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)

    for module in network.modules():
        if type(module).__name__ in classes:
            module.forward = functools.partial(recomputed, module.forward)


def frozen(network, device, dtype):
    """Eval mode; no weight gradients, they go through a reward, never into it; checkpointed on a GPU."""
    kinds = (GradientCheckpointingLayer, open_clip.transformer.ResidualAttentionBlock)
    if str(device).startswith("cuda"):
        checkpoint_blocks(network, {type(m).__name__ for m in network.modules() if isinstance(m, kinds)})
    return network.to(device, dtype).eval().requires_grad_(False)


def plain(text: str) -> str:
    """Lower case, without articles: people write "playing the piano" where the label is "playing piano"."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower()).split())


def pick_label(names, wanted: str, what: str) -> int:
    """Index of a label by its name, in whatever case. names: {index: name}. Raises BadInput."""
    numbers = {plain(name): int(number) for number, name in names.items()}
    if plain(wanted) not in numbers:
        near = ", ".join(difflib.get_close_matches(plain(wanted), numbers, n=4, cutoff=0))
        raise BadInput(f"no {what} {wanted!r} among the model's {len(numbers)}; the nearest are: {near}")
    return numbers[plain(wanted)]


# ---- 2. Image rewards --------------------------------------------------------------------------------------
def aesthetic_head(width: int) -> nn.Module:
    """LAION's aesthetic predictor: linear layers, dropouts between, no activations (layers.0/2/4/6/7)."""
    first = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
    last = [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*first, *last)})


def make_aesthetic(device, dtype, weights=None):
    """LAION aesthetic score, about 1 to 10: a linear head on the normalised CLIP ViT-L/14 image embedding.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`.
    """
    path = fetch(weights or "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "aesthetic")
    kind, model = transformers.CLIPVisionModelWithProjection, weights or "openai/clip-vit-large-patch14"
    text = r"text_|logit_scale"  # of a whole CLIP
    clip = load(kind, model, "aesthetic", dtype=dtype, device=device, more=text)
    head = load_state(aesthetic_head(clip.config.projection_dim), path)
    head = frozen(head, device, torch.promote_types(dtype, torch.float32))

    def reward(frames, prompts):
        pixels = preprocess(frames, clip.config.image_size, CLIP_MEAN, CLIP_STD)  # (B * N, 3, S, S)
        embedding = exact(clip(pixel_values=pixels.to(dtype)).image_embeds)  # (B * N, D)
        return head.layers(F.normalize(embedding, dim=-1)).view(frames.shape[:2]).mean(1)

    reward.frames, reward.networks = 1, [clip, head]
    return reward


def image_text_reward(network, embed_image, embed_text, scale=1.0):
    """scale x cosine of each frame's embedding and its own prompt's, averaged over frames.

    embed_image: (B, N, 3, H, W) -> (B * N, D); embed_text: a prompt -> (1, D).
    """
    known = {}

    def reward(frames, prompts):
        with torch.no_grad():
            known.update({p: F.normalize(exact(embed_text(p)), dim=-1) for p in {*prompts} - known.keys()})
        texts = torch.stack([known[p] for p in prompts])  # (B, 1, D)
        images = F.normalize(exact(embed_image(frames)), dim=-1).unflatten(0, frames.shape[:2])  # (B, N, D)
        return scale * (images * texts).sum(-1).mean(1)

    reward.frames, reward.networks = 1, [network]
    return reward


def load_clip(model, text_model, flag, device, dtype, cropped=False):
    """A transformers CLIP: the model, frames (B, N, 3, H, W) -> (B * N, D), and a prompt -> (1, D)."""
    tokenizer = load(transformers.CLIPTokenizer, text_model, flag)
    clip = load(transformers.CLIPModel, model, flag, dtype=dtype, device=device)
    size, length = clip.config.vision_config.image_size, clip.config.text_config.max_position_embeddings
    how = dict(short_side=True, crop=size) if cropped else {}
    fill = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}

    def embed_image(frames):
        pixels = preprocess(frames, size, CLIP_MEAN, CLIP_STD, **how).to(dtype)
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

    def embed_text(prompt):
        return clip.text_projection(clip.text_model(**tokenizer(prompt, **fill).to(device)).pooler_output)

    return clip, embed_image, embed_text


def make_clip(device, dtype, weights=None, arg=None):
    """Cosine of frame and prompt by CLIP (Radford et al. 2021), -1 to 1. arg: a hub id, else ViT-L/14."""
    model = arg or weights or "openai/clip-vit-large-patch14"
    return image_text_reward(*load_clip(model, model, "clip", device, dtype))


def make_pickscore(device, dtype, weights=None):
    """PickScore (Kirstain et al. 2023): exp(logit scale) x cosine / 100, about 0.2."""
    model = weights or "yuvalkirstain/PickScore_v1"
    text_model = weights or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    clip, *embed = load_clip(model, text_model, "pickscore", device, dtype, cropped=True)
    return image_text_reward(clip, *embed, scale=exact(clip.logit_scale).exp() / 100)


def make_hps(device, dtype, weights=None):
    """HPSv2.1 (Wu et al. 2023): cosine of frame and prompt, about 0.2 to 0.35.

    Source: github.com/tgxs002/HPSv2. A folder may bring an open_clip_config.json, else it is a ViT-H-14.
    """
    folder = weights or "xswu/HPSv2"
    path, own = fetch(folder, "HPS_v2.1_compressed.pt", "hps"), Path(folder) / "open_clip_config.json"
    name, config = "ViT-H-14", open_clip.get_model_config("ViT-H-14")
    if own.exists():
        name, config = f"local-dir:{folder}", read_json(own).get("model_cfg")
        load(transformers.CLIPTokenizer, folder, "hps")
    with as_bad_input(f"{own} is damaged"):
        clip, tokenizer = open_clip.CLIP(**config), open_clip.get_tokenizer(name)
    clip = frozen(load_state(clip, path, inside="state_dict"), device, dtype)

    def embed_image(frames):
        return clip.encode_image(preprocess(frames, clip.visual.image_size, CLIP_MEAN, CLIP_STD).to(dtype))

    def embed_text(prompt):
        return clip.encode_text(tokenizer([prompt]).to(device))

    return image_text_reward(clip, embed_image, embed_text)


def make_remove(device, dtype, weights=None, *, arg):
    """Minus how much of an object YOLOS (Fang et al. 2021) sees in a frame, from 0 down. arg: a COCO name.

    Sum over queries of p sigmoid((p - 0.2) / 0.05), p being the object's softmax probability: a faint
    detection counts for little and still has a gradient. Reports the detections above 0.2 as `count`.
    """
    source = weights or "hustvl/yolos-base"
    yolos = load(transformers.YolosForObjectDetection, source, "remove", dtype=dtype, device=device)
    number, side = pick_label(yolos.config.id2label, arg, "object"), min(512, yolos.config.image_size[0])

    def reward(frames, prompts):
        height, width = frames.shape[-2:]
        short = min(side, 1333 * min(height, width) / max(height, width))  # the longer side is at most 1333
        size = [int(short * s / min(height, width)) // 16 * 16 for s in (height, width)]
        pixels = preprocess(frames, tuple(size), IMAGENET_MEAN, IMAGENET_STD, mode="bilinear")
        p = exact(yolos(pixel_values=pixels.to(dtype)).logits).softmax(-1)[..., number]  # (B * N, queries)
        seen = (p * torch.sigmoid((p - 0.2) / 0.05)).sum(-1)
        reward.report = {"count": (p > 0.2).sum(-1).view(frames.shape[:2]).float().mean(1)}
        return -seen.view(frames.shape[:2]).mean(1)

    reward.frames, reward.networks = 1, [yolos]
    return reward


def make_colorful(device, dtype, weights=None):
    """Colourfulness M3 of Hasler & Suesstrunk 2003 / 100: 0 is grey, 1 extremely colourful. No network."""

    def reward(frames, prompts):
        r, g, b = (255 * exact(frames)).flatten(3).unbind(2)  # each (B, N, H * W)
        rg, yb = r - g, (r + g) / 2 - b
        # the small number keeps the square root's slope finite on a grey frame
        spread = (rg.var(-1, correction=0) + yb.var(-1, correction=0) + 1e-6).sqrt()
        mean = (rg.mean(-1) ** 2 + yb.mean(-1) ** 2 + 1e-6).sqrt()
        return (spread + 0.3 * mean).mean(1) / 100

    reward.frames = 1
    return reward


def make_compressible(device, dtype, weights=None):
    """Minus the estimated size of a frame as JPEG, in kB: bits of its quantised 8 x 8 DCT, no network.

    A coefficient c in steps of q counts log2(1 + |c / q|), rounding left out; luminance, and both chroma
    planes at half resolution. 2.2 bits each and 0.6 kB of headers fit photographs at quality 50.
    """
    # the luminance quantisation table of the JPEG standard (ITU-T T.81, table K.1), at quality 50
    table = """
    16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 18 22
    37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
    n = torch.arange(8.0)
    dct = torch.cos((2 * n + 1) * n[:, None] * torch.pi / 16) / 2
    dct[0] /= 2**0.5
    table = torch.tensor([float(q) for q in table.split()])
    waves = torch.einsum("ux,vy->uvxy", dct, dct).view(64, 1, 8, 8) / table.view(64, 1, 1, 1)
    # RGB to luminance, blue and red difference (ITU-T T.871)
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]

    def reward(frames, prompts):
        pictures = 255 * exact(frames).flatten(0, 1)
        planes = torch.einsum("yc,nchw->nyhw", torch.tensor(matrix).to(pictures), pictures)
        planes = planes[:, :1] - 128, *F.avg_pool2d(planes[:, 1:], 2).split(1, dim=1)
        coefficients = [F.conv2d(plane, waves.to(plane), stride=8) for plane in planes]
        bits = sum(torch.log2(1 + c.abs()).flatten(1).sum(1) for c in coefficients)
        return -(0.6 + 2.2 * bits / 8000).view(frames.shape[:2]).mean(1)

    reward.frames = 1
    return reward


# ---- 3. Clip rewards ---------------------------------------------------------------------------------------
def make_action(device, dtype, weights=None, arg=None):
    """Log probability of an action by VideoMAE (Tong et al. 2022), from 0 down. arg: a Kinetics-400 name.

    Without arg each prompt must hold the name of an action; the longest counts. Reports `probability`.
    """
    source = weights or "MCG-NJU/videomae-base-finetuned-kinetics"
    network = load(transformers.VideoMAEForVideoClassification, source, "action", dtype=dtype, device=device)
    config = network.config
    fixed = None if arg is None else pick_label(config.id2label, arg, "action")

    def label_of(prompt):
        names = config.id2label.values()
        held = [name for name in names if re.search(rf"\b{re.escape(plain(name))}\b", plain(prompt))]
        near = ", ".join(difflib.get_close_matches(prompt, names, n=3, cutoff=0))
        require(held, f"prompt {prompt!r} names no action; give one, as in action:{near} (the nearest)")
        return pick_label(config.id2label, max(held, key=len), "action")

    def check(prompts):
        if fixed is None:
            for prompt in dict.fromkeys(prompts):
                print(f"action: {config.id2label[label_of(prompt)]!r} in {prompt!r}")

    def reward(frames, prompts):
        labels = [label_of(p) if fixed is None else fixed for p in prompts]
        how = dict(short_side=True, crop=config.image_size, mode="bilinear")
        pixels = preprocess(frames, config.image_size, IMAGENET_MEAN, IMAGENET_STD, **how).to(dtype)
        logits = exact(network(pixel_values=pixels.unflatten(0, frames.shape[:2])).logits)  # (B, labels)
        value = logits.log_softmax(-1)[torch.arange(len(prompts)), labels]
        reward.report = {"probability": value.detach().exp()}
        return value

    reward.frames, reward.networks, reward.check = config.num_frames, [network], check
    return reward


def jepa_masks(time: int, height: int, width: int, blocks: int, area: float, generator):
    """V-JEPA's mask: `blocks` rectangles, each `area` of a frame, aspect 0.75 to 1.5, through all of time.

    Returns token indices (context,), (target,) of a clip of time x height x width tokens; neither is empty.
    """
    inside = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(blocks):
        aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
        sides = [(height, aspect), (width, 1 / aspect)]
        h, w = (min(max(round((area * height * width * share) ** 0.5), 1), most) for most, share in sides)
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        inside[top : top + h, left : left + w] = True
    inside[0, 0] &= not inside.all()
    everywhere = inside.expand(time, -1, -1).flatten()
    return (~everywhere).nonzero()[:, 0], everywhere.nonzero()[:, 0]


def jepa_loss(model, pixels, true, context, target):
    """V-JEPA's loss (Bardes et al. 2024, eq. 1) of each clip, (B,): L1 of predicted and true features.

    `VJEPA2Model.forward` drops the masked tokens after the encoder, when the context has seen them: here they
    are dropped before any layer. pixels: (B, N, 3, S, S) normalised; true: (B, T, D) the encoder's features
    of the full clip, layer-normed here; context (C,), target (M,): token indices.
    """
    batch, seen = len(pixels), model.encoder.embeddings(pixels)[:, context]
    for layer in model.encoder.layer:
        seen = layer(seen, context.expand(batch, -1))[0]
    # the predictor picks the context out of a whole clip of features
    features = torch.zeros_like(true).index_copy(1, context, model.encoder.layernorm(seen))
    rows = ([context.expand(batch, -1)], [target.expand(batch, -1)])
    predicted, true = exact(model.predictor(features, *rows).last_hidden_state), exact(true[:, target])
    return (predicted - F.layer_norm(true, true.shape[-1:])).abs().mean((1, 2))


def jepa_score(model, pixels):
    """Minus the loss of each clip, (B,), averaged over four fixed masks: 8 blocks of 15 %, 2 of 70 %, again.

    pixels: (B, N, 3, S, S) normalised; N a multiple of the model's tubelet_size.
    """
    true = model.encoder(pixels).last_hidden_state  # with gradient: the loss as a function of the pixels
    config = model.config
    side, time = config.crop_size // config.patch_size, pixels.shape[1] // config.tubelet_size
    generator, losses = torch.Generator().manual_seed(0), []
    for blocks, area in [(8, 0.15), (2, 0.7)] * 2:
        masks = jepa_masks(time, side, side, blocks, area, generator)
        losses.append(jepa_loss(model, pixels, true, *(mask.to(pixels.device) for mask in masks)))
    return -torch.stack(losses).mean(0)


def make_vjepa(device, dtype, weights=None):
    """Minus V-JEPA 2's own masked prediction loss (Assran et al. 2025), from 0 down: how plausible a clip is.

    Wants all frames (an odd last one is left out); --decode_frames 16 bounds what that costs.
    """
    source = weights or "facebook/vjepa2-vitl-fpc64-256"
    model = load(transformers.VJEPA2Model, source, "vjepa", dtype=dtype, device=device)
    side, tube = model.config.crop_size, model.config.tubelet_size

    def reward(frames, prompts):
        require(frames.shape[1] >= tube, f"vjepa needs {tube} frames: raise --decode_frames or --num_frames")
        clips, crop = frames[:, : frames.shape[1] // tube * tube], dict(short_side=True, crop=side)
        pixels = preprocess(clips, side * 256 // 224, IMAGENET_MEAN, IMAGENET_STD, mode="bilinear", **crop)
        return jepa_score(model, pixels.view(*clips.shape[:3], side, side).to(dtype))

    reward.frames, reward.networks = "all", [model]
    return reward


def changes(frames):
    """Differences of neighbouring frames at 16 x 16 pixels: (B, N, 3, H, W) -> (B, N - 1, 3, 16, 16)."""
    return F.adaptive_avg_pool2d(exact(frames).flatten(0, 1), 16).unflatten(0, frames.shape[:2]).diff(dim=1)


def make_smooth(device, dtype, weights=None):
    """Minus mean squared second differences in time over first ones, at 16 x 16: 0 is steady, noise is -3."""

    def reward(frames, prompts):
        require(frames.shape[1] >= 3, "smooth needs 3 frames: raise --decode_frames or --num_frames")
        first, second = changes(frames), changes(frames).diff(dim=1)
        # the small number is a change of 1/100 of the range: less than that is still
        return -second.square().mean((1, 2, 3, 4)) / (first.square().mean((1, 2, 3, 4)) + 1e-4)

    reward.frames = "all"
    return reward


def make_dynamic(device, dtype, weights=None):
    """How much moves: mean absolute difference of neighbouring frames at 16 x 16, in percent. No network."""

    def reward(frames, prompts):
        require(frames.shape[1] >= 2, "dynamic needs 2 frames: raise --decode_frames or --num_frames")
        return 100 * changes(frames).abs().mean((1, 2, 3, 4))

    reward.frames = "all"
    return reward


def camera_rates(frames):
    """How the camera moves from each frame to the next: (B, N - 1, 4), and how much shows it, (B, N - 1).

    Pan right, pan up, zoom in, roll right in percent: of the frame's width, its height, its size, a radian.
    The similarity motion between frames by Gauss-Newton on brightness constancy (Lucas & Kanade 1981; Bergen
    et al. 1992), coarse then fine, differentiated through the last step. Weights keep moving objects out, a
    ridge pulls to 0 where texture lacks. The second is the share of the frame that carries the estimate.
    """

    def step(p, a, b):
        """p: (M, 4) right, down, larger, clockwise, in half frames; a, b: (M, h, w) grey -> p, seen."""
        h, w = a.shape[1:]
        y, x = torch.meshgrid(*((torch.arange(n).to(a) + 0.5) / n * 2 - 1 for n in (h, w)), indexing="ij")
        one, zero, here = torch.ones_like(x), torch.zeros_like(x), torch.stack([x, y], -1)
        right, down = torch.stack([one, zero, x, -y * h / w]), torch.stack([zero, one, y, x * w / h])
        flow = torch.stack([torch.einsum("mk,khw->mhw", p, move) for move in (right, down)], -1)
        # each frame goes half the way, so both are blurred alike
        grids = torch.cat([here - flow / 2, here + flow / 2]).nan_to_num().clamp(-2, 2)
        a, b = F.grid_sample(torch.cat([a, b])[:, None], grids, "bilinear", "border", False)[:, 0].chunk(2)
        residual, (slope_y, slope_x) = a - b, torch.gradient((a + b) / 2, dim=(1, 2))
        slope = slope_x[:, None] * right * w / 2 + slope_y[:, None] * down * h / 2  # (M, 4, h, w)
        with torch.no_grad():
            inside = torch.stack((grids.abs() <= 1).all(-1).chunk(2)).all(0)
            median = residual.abs().masked_fill(~inside, torch.nan).flatten(1).nanmedian(1).values
            scale = 2 * median.nan_to_num()[:, None, None] + 0.001  # where nothing is inside
            sure = inside / (1 + (residual / scale) ** 2) ** 2
            told = (sure * slope[:, :2].square().sum(1)).flatten(1)
            seen, sure = told.mean(1) ** 2 / (told.square().mean(1) + 1e-20), sure / (h * w)
        normal = torch.einsum("mkhw,mlhw,mhw->mkl", slope, slope, sure) + 1e-5 * torch.eye(4).to(a)
        pull = torch.einsum("mkhw,mhw->mk", slope, sure * residual) - 1e-5 * p
        return p + torch.linalg.solve(normal, pull), seen

    shrink = max(1, min(frames.shape[-2:]) / 64)
    grey = F.interpolate(exact(frames).mean(2), scale_factor=1 / shrink, mode="bilinear", antialias=True)
    for _ in range(4):
        grey = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    pairs = grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)
    p = grey.new_zeros(len(pairs[0]), 4)
    with torch.no_grad():
        for level in [[F.avg_pool2d(side, 4) for side in pairs]] * 8 + [pairs] * 8:
            p, _ = step(p, *level)
    p, seen = step(p, *pairs)
    rates = p * torch.tensor([-50.0, 50.0, 100.0, -100.0]).to(p)
    return rates.unflatten(0, (len(frames), -1)), seen.unflatten(0, (len(frames), -1))


def make_camera(device, dtype, weights=None, *, arg):
    """How well the camera does as told, see `camera_rates`. arg: smooth, still, zoom in, pan left, ...

    smooth: minus the rates' mean squared change over their mean square, 0 at best; still: minus their mean
    size; a move: its mean rate, less half of the others' and of its own change. Reports the rates and `seen`.
    """
    moves = ["pan right", "pan up", "zoom in", "roll right", "pan left", "pan down", "zoom out", "roll left"]
    kind, warned = pick_label(dict(enumerate([*moves, "smooth", "still"])), arg, "camera move"), []

    def reward(frames, prompts):
        require(
            frames.shape[1] >= 3 and min(frames.shape[-2:]) >= 16, "camera needs 3 frames of 16 x 16 pixels"
        )
        rates, seen = camera_rates(frames)
        reward.report = dict(zip(moves, rates.detach().mean(1).T, strict=False)) | {"seen": seen.mean(1)}
        if (share := seen.mean().item()) < 0.1 and not warned:
            advice = "add a reward that looks at the picture, as + 5*hps"
            warned.append(tqdm.write(f"camera: {share:.0%} of the frame has texture to see it by; {advice}"))
        jerk, size = rates.diff(dim=1), rates.abs().mean(1)
        if kind == 8:  # smooth
            return -jerk.square().mean((1, 2)) / (rates.square().mean((1, 2)) + 0.01)
        if kind == 9:  # still
            return -size.mean(1)
        own, sign = kind % 4, 1 if kind < 4 else -1
        others = size.sum(1) - size[:, own] + jerk[..., own].abs().mean(1)
        return sign * rates[..., own].mean(1) - others / 2

    reward.frames = "all"
    return reward


def make_ask(
    device, dtype, weights=None, arg='Does the video show "{prompt}"? Answer yes or no.', quantize="none"
):
    """Log odds of yes against no, of a vision-language model that is asked about 8 frames. arg: the question.

    VQAScore (Lin et al. 2024, arXiv 2404.01291) of a frozen critic, differentiated as in Diffusion-DRF (arXiv
    2601.04153). `{prompt}` in the question is the video's. Reports `p(yes)`, of the whole vocabulary.
    weights: a folder or hub id, also of --vlm, that AutoModelForImageTextToText loads.
    """
    source = weights or "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    kind, flag = transformers.AutoModelForImageTextToText, "ask (--vlm)"
    processor = load(transformers.AutoProcessor, source, flag)
    require(hasattr(processor, "video_processor"), f"{flag}: {source} takes no videos")
    network = load(kind, source, flag, dtype=dtype, device=device)
    if quantize != "none":
        from extras.base_lora import quantize as quantize_linear_layers

        quantize_linear_layers(network, quantize, dtype)
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", 1e9)
    resize = processor.video_processor.resize
    # as on the 8 bits a channel that processors expect: what overshoots when it is resized is cut
    processor.video_processor.resize = lambda *args, **kwargs: resize(*args, **kwargs).clamp(0, 255)

    def tokens(word):
        ways = [space + way for space in ("", " ") for way in (word, word.title(), word.upper())]
        numbers = [processor.tokenizer(way, add_special_tokens=False).input_ids for way in ways]
        return sorted({number for number, *more in numbers if not more})

    def inputs(clip, prompt):
        """clip: (8, 3, H, W) -> what the network takes: the processor's own, of float pixels."""
        content = [{"type": "video"}, {"type": "text", "text": arg.replace("{prompt}", prompt)}]
        said = [{"role": "user", "content": content}]
        chat = processor.apply_chat_template(said, add_generation_prompt=True)
        clip = 255 * exact(clip) + 1e-3  # SmolVLM drops a frame that is exactly 0 after its processor
        with as_bad_input(f"{flag}: {source} can't take {content[1]['text'][:60]!r} and a video"):
            given = processor(text=[chat], videos=[[clip]], do_sample_frames=False, return_tensors="pt")
        require(given.input_ids.shape[1] <= longest, f"ask: question and prompt have over {longest} tokens")
        return given.to(device)

    yes, no = tokens("yes"), tokens("no")
    told = yes and no and not {*yes} & {*no}
    require(told, f"{flag}: the tokenizer of {source} has no token for yes or no: give another --vlm")
    given = inputs(noise := torch.rand(8, 3, 64, 64, requires_grad=True), "")
    kept = any(part.requires_grad for part in given.values() if isinstance(part, torch.Tensor))
    kept = kept or not torch.is_grad_enabled()
    require(kept, f"{flag}: the processor of {source} loses the gradient: give another --vlm, as SmolVLM2")
    with torch.no_grad(), as_bad_input(f"{flag}: network and processor of {source} do not fit together"):
        network(**given, use_cache=False, logits_to_keep=1)

    def check(prompts):
        for prompt in {p for p in prompts if "<" in p or p == max(prompts, key=len)}:
            inputs(noise, prompt)

    def reward(frames, prompts):
        given = [inputs(*pair) for pair in zip(frames, prompts, strict=True)]
        logits = [network(**each, use_cache=False, logits_to_keep=1).logits[0, -1] for each in given]
        logits = exact(torch.stack(logits))  # (B, vocabulary)
        reward.report = {"p(yes)": logits.detach().softmax(-1)[:, yes].sum(-1)}
        return logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)

    reward.frames, reward.networks, reward.check = 8, [network], check
    return reward


# ---- 4. Names and weighted sums ----------------------------------------------------------------------------
# SWAP: your reward. A `make_mine` above is `--reward mine`, or `--reward mine:arg`, alone and in sums.
REWARDS = {name[5:]: make for name, make in [*globals().items()] if name.startswith("make_")}


def parse(spec: str) -> list[tuple[float, str, str | None]]:
    """Split "hps + 0.5*remove:book" into [(1.0, "hps", None), (0.5, "remove", "book")]. Raises BadInput."""
    number = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    arg = r"""\s*:\s*("[^"]*"|'[^']*'|[^\s"'+][^+]*?|)(?=\s*(?:\+|$)|\s+-[\s\d.])"""
    term = rf"\s*([+-]?)\s*(-?)\s*(?:({number})\s*\*)?\s*([A-Za-z_]\w*)(?:{arg})?\s*(?=[+-]|$)"
    terms, rest = [], spec
    while rest or not terms:
        found = re.match(term, rest)
        good = found and (bool(found[1]) == bool(terms) or found[1] == "-")
        example = "write as \"hps + 0.5*clip\", what has + or - in it in quotes: ask:'Is it 1 + 1?'"
        require(good, f"can't read {rest.strip()!r} in --reward {spec!r}: {example}")
        sign, minus, weight, name, arg = found.groups()
        rest, name, arg = rest[found.end() :], name.lower(), arg and arg.strip("\"' ")
        weight = float(weight or 1) * (-1) ** [sign, minus].count("-")
        near = "".join(f"did you mean {near!r}? " for near in difflib.get_close_matches(name, REWARDS, n=1))
        require(name in REWARDS, f"--reward: unknown reward {name!r}: {near}There are: {', '.join(REWARDS)}")
        require(
            (name, arg) not in [one[1:] for one in terms], f"{name} stands twice in --reward: weigh it once"
        )
        require(abs(weight) <= 1e9, f"the weight of {name} in --reward: give one from -1e9 to 1e9")
        takes = inspect.signature(REWARDS[name]).parameters.get("arg")
        require(takes or not arg, f"{name} takes nothing after the colon: --reward {name}")
        told = arg or not takes or takes.default is not takes.empty and arg is None
        require(told, f"{name} must be told of what, after a colon: --reward {name}:...")
        terms.append((weight, name, arg))
    return terms


def make_terms(spec: str, device, dtype, weights=None, prompts=(), vlm=None, quantize="none") -> dict:
    """Load the rewards of a weighted sum: {"name" or "name:arg": (weight, reward)}.

    weights: a folder or several: a reward's are in the first with a sub-folder of its name, else published;
    vlm, quantize: of `ask`. Raises BadInput when one can't be loaded, or can't work with the prompts.
    """
    terms, folders = {}, [weights] if isinstance(weights, str) else weights or []
    for weight, name, arg in parse(spec):
        own = next((str(Path(f) / name) for f in folders if f and (Path(f) / name).is_dir()), None)
        own = vlm if vlm and name == "ask" else own
        how = {"arg": arg} if arg else {}
        how |= {"quantize": quantize} if name == "ask" else {}
        reward = REWARDS[name](device, dtype, weights=own, **how)
        if hasattr(reward, "check"):
            reward.check(prompts)
        terms[name if arg is None else f"{name}:{arg}"] = (weight, reward)
    return terms


def weighted_rewards(terms: dict, video, prompts: list[str], chunk=1, scale=None) -> dict:
    """Rewards of video (B, N, 3, H, W): {"reward": (B,) weighted sum, term: (B,), "term figure": (B,)}.

    terms: of `make_terms`; chunk: frames that an image reward gets at once. With a scale, `scale` times the
    sum over videos is differentiated. Raises BadInput for a wrong shape, or then no gradient.
    """
    found = {"reward": torch.zeros(len(prompts), device=video.device)}
    for name, (weight, reward) in terms.items():
        wanted = getattr(reward, "frames", 1)
        clip = video if wanted in (1, "all") else video[:, evenly_spaced(wanted, video.shape[1])]
        for view in clip.split(chunk if wanted == 1 else clip.shape[1], dim=1):
            share = view.shape[1] / clip.shape[1]
            value = reward(view, prompts)
            good = isinstance(value, torch.Tensor) and value.shape == (len(prompts),)
            good = good and (value.requires_grad or scale is None)
            require(good, f"reward {name!r} must return ({len(prompts)},), one per video, with a gradient")
            if scale is not None:
                (scale * (weight * share * value).sum()).backward()
            figures = {f"{name} {key}": v for key, v in getattr(reward, "report", {}).items()}
            for key, part in {"reward": weight * value, name: value, **figures}.items():
                found[key] = found.get(key, 0) + share * part.detach()
    return found


# ---- 5. Loading weights, from a folder or the hub ----------------------------------------------------------
class BadInput(Exception):
    """A setting or file that can't be used; its message is one line that says what to do."""


def require(ok, message: str):
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def hub_problem(error: Exception, source: str) -> str:
    """What to do about an exception of huggingface_hub; its more particular classes come first."""
    status = getattr(getattr(error, "response", None), "status_code", "")
    late = "does not answer" if "Timeout" in type(error).__name__ else "can't be reached"
    offline = "check the network, or take --model tiny, needing none"
    rows = {
        hub.GatedRepoError: f"accept its terms on huggingface.co/{source}, then run `hf auth login`",
        hub.RepositoryNotFoundError: "no such folder, nor on the hub: check it, or run `hf auth login`",
        hub.HFValidationError: "no such folder, and no hub id either: check the spelling",
        hub.OfflineModeIsEnabled: f"it is not in the cache, and HF_HUB_OFFLINE is set: {offline}",
        (hub.HfHubHTTPError, hub.LocalTokenNotFoundError): f"error {status}: wait, or run `hf auth login`",
        (hub.HTTPError, hub.LocalEntryNotFoundError, ConnectionError): f"the hub {late}: {offline}",
        OSError: f"{error}: make room, or set HF_HOME to a place on another disk",
    }
    return next(text for kinds, text in rows.items() if isinstance(error, kinds))


@functools.cache
def list_hub(source: str) -> list[str]:
    """The files of a hub repository. One request without retries: what is wrong shows within seconds."""
    return [file.rfilename for file in HfApi().model_info(source, timeout=8).siblings]


@contextlib.contextmanager
def asking_hub(source: str, flag: str):
    """Inside, what huggingface_hub raises is one line. Raises BadInput."""
    try:
        yield
    except (hub.HTTPError, OSError, hub.HFValidationError) as error:
        raise BadInput(f"{flag}: can't get {source!r}: {hub_problem(error, source)}") from None


def fetch(source: str, name: str, flag: str) -> Path:
    """One file of a folder; or of a hub repository, from the cache, else downloaded. Raises BadInput."""
    where = Path(source)
    require(not where.is_file(), f"{flag}: {source} is a file: give the folder that has its config beside it")
    if where.is_dir():
        require((where / name).is_file(), f"{flag}: there is no {name} in the folder {source}")
        return where / name
    with asking_hub(source, flag):
        cached = try_to_load_from_cache(source, name)
        if not isinstance(cached, str):
            require(name in list_hub(source), f"{flag}: there is no {name} in {source} on the hub")
            cached = hf_hub_download(source, name)
        return Path(cached)


DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
DAMAGED += (RuntimeError, EOFError, SyntaxError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)
DAMAGED += (SafetensorError, Image.DecompressionBombError, hub.StrictDataclassError, ImportError)


class as_bad_input(contextlib.AbstractContextManager):
    """Inside, what libraries raise on damaged files is one line, `problem` first. Raises BadInput."""

    def __init__(self, problem: str):
        self.problem = problem

    def __exit__(self, kind, error, trace):
        if kind is Exception or isinstance(error, DAMAGED):  # tokenizers raise the bare class
            said = f"{kind.__name__}: {' '.join(str(error).split())[:120]}"
            raise BadInput(f"{self.problem} ({said})") from None


def read_json(path: Path) -> dict:
    with as_bad_input(f"{path} is damaged, get it again"):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


# Files of weights: (fp16 or not, of how many, kind). What a tokenizer can't do without.
WEIGHTS = r"(?:diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(?:-\d+-of-(\d+))?(\.safetensors|\.bin)"
VOCABULARIES = [{"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"tokenizer.model"}]
VOCABULARIES += [{"preprocessor_config.json"}]  # that of a processor


def pick_files(names, network: bool, half: bool) -> list[str]:
    """Which of a folder's files to take: safetensors before .bin, fp16 if `half`. Incomplete: none."""
    if not network:
        return next((sorted(files) for files in VOCABULARIES if files <= {*names}), [])
    groups = {}
    for found in filter(None, (re.fullmatch(WEIGHTS, name) for name in names)):
        fp16, parts, kind = found.groups()
        groups.setdefault((kind, bool(fp16) == half, int(parts or 1)), []).append(found[0])
    return groups.get(max((key for key, files in groups.items() if len(files) == key[2]), default=None), [])


def load(kind, source: str, flag: str, subfolder="", dtype=None, device=None, more="$"):
    """`kind.from_pretrained`, whole: nothing missing, nothing that nobody takes, every number finite.

    kind: class of a network or tokenizer in transformers or diffusers; source: a folder or hub id; device:
    of what is to be `frozen`; more: pattern of the keys that the published file holds. Raises BadInput.
    """
    network = hasattr(kind, "state_dict") or "AutoModel" in kind.__name__
    half = dtype in (torch.float16, torch.bfloat16)
    prefix = f"{subfolder}/" if subfolder else ""
    config = "preprocessor" if "ImageProcessor" in kind.__name__ else "tokenizer"
    folder = fetch(source, prefix + ("config.json" if network else f"{config}_config.json"), flag).parent
    files = pick_files(os.listdir(folder), network, half)
    if not files and not Path(source).is_dir():
        names = [name.removeprefix(prefix) for name in list_hub(source) if name.startswith(prefix)]
        files = pick_files(names, network, half)
        for name in [*filter(re.compile(r"[^/]*\.(json|txt|model|jinja)").fullmatch, names), *files]:
            fetch(source, prefix + name, flag)
    what = "weights" if network else "its vocabulary"
    require(files, f"{flag}: {folder} lacks {what}, or a part: get it again")
    with as_bad_input(f"{flag}: {folder} holds no {kind.__name__}, or a damaged one: get it again"):
        if not network:
            require(
                "tokenizer.json" not in files or read_json(folder / "tokenizer.json")["model"]["vocab"], ""
            )
            return kind.from_pretrained(str(folder), local_files_only=True)
        variant = "fp16" if ".fp16" in files[0] else None
        made, info = kind.from_pretrained(str(folder), dtype=dtype, variant=variant, output_loading_info=True)
    odd = [key for key in info["unexpected_keys"] if not re.match(f"{more}|.*position_ids$", key)]
    odd += [*info["missing_keys"], *info["mismatched_keys"]]
    state = {key: w for key, w in made.state_dict().items() if w.is_floating_point() and not w.is_meta}
    odd += [key for key, w in state.items() if not w.isfinite().all()]
    said = f"{flag}: {len(odd)} weights of the {kind.__name__} in {folder} are missing, odd or not finite"
    require(not odd, f"{said}, as {min(map(str, odd), default='')}: get it again")
    return made if device is None else frozen(made, device, dtype)


def load_state(network, path: Path, inside: str | None = None):
    """Load a file of torch.save into a network, all of it. inside: the key it is under. Raises BadInput."""
    with as_bad_input(f"{path} is damaged, get it again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state[inside] if inside else state)
        require(all(w.isfinite().all() for w in network.state_dict().values()), f"{path}: not all is finite")
    return network
