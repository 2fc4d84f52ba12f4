"""Every reward, one shape: `make(device, dtype, weights) -> reward`, `reward(frames, prompts) -> (B,)`.

    frames:  (B, N, 3, H, W) float32 in [0, 1]       prompts: list of B strings
    returns: (B,) float32, higher is better, one number per video, differentiable with respect to frames

Your own reward is a function `make_mine`, written like `make_colorful`, and its line in REWARDS. `weights` is
None for the published weights, or the folder of that name in `--reward_weights`, with the same files. `arg`,
where `make` takes one, is what follows the colon in `--reward name:arg`; without a default it must be given.
`reward.frames` says what it wants to see: 1 for an image reward (a mean over any frames), n for a clip of n
evenly spaced frames, "all" for every frame. Optional: `reward.report`, {name: (B,)}, figures to log;
`reward.check(prompts)`, before training; `reward.networks`, modules that `--offload` moves."""

import contextlib
import difflib
import functools
import inspect
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

EXTRAS = Path(__file__).resolve().with_name("extras")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
QUESTION = 'Does the video show "{prompt}"? Answer yes or no.'  # of the reward ask


class BadInput(Exception):
    """A setting or file that can't be used; its message is one line that says what to do."""


def require(condition, message):
    """Raise BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


# ---- 1. What rewards share ---------------------------------------------------------------------------------
def exact(x):
    """At least float32 (float64 stays): half precision is for the inside of networks only."""
    return x if x.dtype == torch.float64 else x.float()


def evenly_spaced(n, size):
    """n indices of `size` things, the first and the last among them; some twice where n is larger."""
    return np.linspace(0, size - 1, n).round().astype(int).tolist()


def preprocess(frames, size, mean, std, short_side=False, crop=None, mode="bicubic"):
    """Frames as a network wants them: resized with antialiasing, cropped, normalised; differentiable.
    frames: (..., 3, H, W) in [0, 1] -> (n, 3, h, w). size: (h, w), or the side of a square, to squash to.
    With short_side size is the shorter side's, the shape is kept. crop: side of a square in the middle."""
    pictures = exact(frames).flatten(0, -4)
    height, width = pictures.shape[-2:]
    if short_side:
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    elif isinstance(size, int):
        size = (size, size)
    if size != (height, width):  # the clamp would stop the gradient of pixels that are 0 or 1
        pictures = F.interpolate(pictures, size, mode=mode, antialias=True).clamp(0, 1)
    if crop:
        top = (size[0] - crop) // 2
        left = (size[1] - crop) // 2
        pictures = pictures[..., top : top + crop, left : left + crop]
    mean, std = pictures.new_tensor([mean, std])[:, :, None, None]
    return (pictures - mean) / std


def plain(text):
    """The words of a text in lower case, without articles: so "playing the piano" is "playing piano"."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def pick_label(names, wanted, what):
    """Index of a label by its name, in whatever case. names: {index: name}. Raises BadInput."""
    numbers = {plain(name): int(number) for number, name in names.items()}
    label = plain(wanted)
    if label not in numbers:
        near = ", ".join(difflib.get_close_matches(label, numbers, n=4, cutoff=0))
        raise BadInput(f"no {what} {wanted!r} among the {len(numbers)} known; the nearest are: {near}")
    return numbers[label]


# ---- 2. Image rewards --------------------------------------------------------------------------------------
def aesthetic_head(width):
    """LAION's aesthetic predictor: linear layers, dropouts between, no activations (layers.0/2/4/6/7)."""
    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return nn.ModuleDict({"layers": layers})


def make_aesthetic(device, dtype, weights=None):
    """LAION aesthetic score, about 1 to 10: a linear head on the normalised CLIP ViT-L/14 image embedding.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`."""
    file = fetch(weights or "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "aesthetic")
    clip = load(
        transformers.CLIPVisionModelWithProjection,
        weights or "openai/clip-vit-large-patch14",
        "aesthetic",
        dtype=dtype,
        device=device,
        more=("text_", "logit_scale"),  # of a whole CLIP
    )
    head = load_state(aesthetic_head(clip.config.projection_dim), file)
    head = frozen(head, device, torch.promote_types(dtype, torch.float32))

    def reward(frames, prompts):
        pixels = preprocess(frames, clip.config.image_size, CLIP_MEAN, CLIP_STD)  # (B * N, 3, S, S)
        embedding = exact(clip(pixels.to(dtype)).image_embeds)  # (B * N, D)
        scores = head.layers(F.normalize(embedding, dim=-1))
        return scores.view(frames.shape[:2]).mean(1)

    reward.frames = 1
    reward.networks = [clip, head]
    return reward


def image_text_reward(network, embed_image, embed_text, scale=1.0):
    """The reward scale x mean cosine of frames (B, N, 3, H, W) -> (B * N, D) with their prompt -> (1, D)."""

    @functools.cache
    @torch.no_grad()
    def text_direction(prompt):
        return F.normalize(exact(embed_text(prompt)), dim=-1)

    def reward(frames, prompts):
        texts = torch.stack([text_direction(prompt) for prompt in prompts])  # (B, 1, D)
        images = F.normalize(exact(embed_image(frames)), dim=-1)
        images = images.unflatten(0, frames.shape[:2])  # (B, N, D)
        cosines = (images * texts).sum(-1)
        return scale * cosines.mean(1)

    reward.frames = 1
    reward.networks = [network]
    reward.text_direction = text_direction
    return reward


def load_clip(model, text_model, flag, device, dtype, cropped=False):
    """A transformers CLIP: the model, frames (B, N, 3, H, W) -> (B * N, D), and a prompt -> (1, D)."""
    tokenizer = load(transformers.CLIPTokenizer, text_model, flag)
    clip = load(transformers.CLIPModel, model, flag, dtype=dtype, device=device)
    size = clip.config.vision_config.image_size
    length = clip.config.text_config.max_position_embeddings
    crop = size if cropped else None

    def embed_image(frames):
        pixels = preprocess(frames, size, CLIP_MEAN, CLIP_STD, short_side=cropped, crop=crop)
        return clip.visual_projection(clip.vision_model(pixels.to(dtype)).pooler_output)

    def embed_text(prompt):
        tokens = tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        return clip.text_projection(clip.text_model(**tokens).pooler_output)

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
    """HPSv2.1 (Wu et al. 2023, github.com/tgxs002/HPSv2): cosine of frame and prompt, about 0.2 to 0.35."""
    import open_clip  # takes seconds

    folder = weights or "xswu/HPSv2"
    file = fetch(folder, "HPS_v2.1_compressed.pt", "hps")
    own_config = Path(folder) / "open_clip_config.json"
    if own_config.exists():
        load(transformers.CLIPTokenizer, folder, "hps")  # raises for one that is damaged
        config = read_json(own_config).get("model_cfg")
        name = f"local-dir:{folder}"
    else:
        config = open_clip.get_model_config("ViT-H-14")
        name = "ViT-H-14"
    with as_bad_input(f"{own_config} is damaged"):
        clip = open_clip.CLIP(**config)
        tokenizer = open_clip.get_tokenizer(name)
    clip = frozen(load_state(clip, file, inside="state_dict"), device, dtype)

    def embed_image(frames):
        pixels = preprocess(frames, clip.visual.image_size, CLIP_MEAN, CLIP_STD)
        return clip.encode_image(pixels.to(dtype))

    def embed_text(prompt):
        return clip.encode_text(tokenizer([prompt]).to(device))

    return image_text_reward(clip, embed_image, embed_text)


def make_remove(device, dtype, weights=None, *, arg):
    """Minus how much of an object YOLOS (Fang et al. 2021) sees in a frame, from 0 down. arg: a COCO name.
    p, its softmax probability, counts as p sigmoid((p - 0.2) / 0.05), summed over queries: a faint detection
    counts for little and has a gradient. Reports the detections above 0.2 as `count`."""
    source = weights or "hustvl/yolos-base"
    yolos = load(transformers.YolosForObjectDetection, source, "remove", dtype=dtype, device=device)
    number = pick_label(yolos.config.id2label, arg, "object")

    def reward(frames, prompts):
        sides = frames.shape[-2:]
        # the shorter side is 512, or what the network was trained at; the longer at most 1333
        short = min(512, yolos.config.image_size[0], 1333 * min(sides) / max(sides))
        size = tuple(int(short * side / min(sides)) // 16 * 16 for side in sides)
        pixels = preprocess(frames, size, IMAGENET_MEAN, IMAGENET_STD, mode="bilinear")
        logits = exact(yolos(pixels.to(dtype)).logits)  # (B * N, queries, labels)
        p = logits.softmax(-1)[..., number].unflatten(0, frames.shape[:2])
        reward.report = {"count": (p > 0.2).sum(-1).float().mean(1)}
        return -(p * torch.sigmoid((p - 0.2) / 0.05)).sum(-1).mean(1)

    reward.frames = 1
    reward.networks = [yolos]
    return reward


def make_colorful(device, dtype, weights=None):
    """Colourfulness M3 of Hasler & Suesstrunk 2003 / 100: 0 is grey, 1 extremely colourful. No network."""

    def reward(frames, prompts):
        r, g, b = (255 * exact(frames)).flatten(3).unbind(2)  # each (B, N, H * W)
        rg = r - g
        yb = (r + g) / 2 - b
        # the small number keeps the square root's slope finite on a grey frame
        spread = (rg.var(-1, correction=0) + yb.var(-1, correction=0) + 1e-6).sqrt()
        mean = (rg.mean(-1) ** 2 + yb.mean(-1) ** 2 + 1e-6).sqrt()
        return (spread + 0.3 * mean).mean(1) / 100

    reward.frames = 1
    return reward


def make_compressible(device, dtype, weights=None):
    """Minus the estimated size of a frame as JPEG, in kB: bits of its quantised 8 x 8 DCT, no network.
    A coefficient of k quantisation steps counts 2.2 log2(1 + |k|) bits; with 0.6 kB that fits photographs."""
    table = """
        16 11 10 16 24 40 51 61
        12 12 14 19 26 58 60 55
        14 13 16 24 40 57 69 56
        14 17 22 29 51 87 80 62
        18 22 37 56 68 109 103 77
        24 35 55 64 81 104 113 92
        49 64 78 87 103 121 120 101
        72 92 95 98 112 100 103 99"""  # for luminance at quality 50, ITU-T T.81, table K.1
    steps = torch.tensor([float(q) for q in table.split()]).view(64, 1, 1, 1)
    n = torch.arange(8.0)
    dct = torch.cos((2 * n + 1) * n[:, None] * torch.pi / 16) / 2
    dct[0] /= 2**0.5
    waves = torch.einsum("ux,vy->uvxy", dct, dct).view(64, 1, 8, 8) / steps
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]  # T.871

    def reward(frames, prompts):
        pictures = 255 * exact(frames).flatten(0, 1)
        planes = torch.einsum("yc,nchw->ynhw", pictures.new_tensor(matrix), pictures)
        light, blue, red = planes[:, :, None]
        bits = 0
        for plane in (light - 128, F.avg_pool2d(blue, 2), F.avg_pool2d(red, 2)):
            coefficients = F.conv2d(plane, waves.to(plane), stride=8)
            bits = bits + torch.log2(1 + coefficients.abs()).flatten(1).sum(1)
        kilobytes = 0.6 + 2.2 * bits / 8000
        return -kilobytes.view(frames.shape[:2]).mean(1)

    reward.frames = 1
    return reward


# ---- 3. Clip rewards ---------------------------------------------------------------------------------------
def make_action(device, dtype, weights=None, arg=None):
    """Log probability of an action by VideoMAE (Tong et al. 2022), from 0 down. arg: a Kinetics-400 name.
    Without arg each prompt must hold the name of an action; the longest counts. Reports `probability`."""
    source = weights or "MCG-NJU/videomae-base-finetuned-kinetics"
    network = load(transformers.VideoMAEForVideoClassification, source, "action", dtype=dtype, device=device)
    size = network.config.image_size
    names = network.config.id2label
    label = None if arg is None else pick_label(names, arg, "action")

    def label_of(prompt):
        held = [name for name in names.values() if f" {plain(name)} " in f" {plain(prompt)} "]
        if not held:
            near = difflib.get_close_matches(prompt, names.values(), n=1, cutoff=0)[0]
            raise BadInput(f"prompt {prompt!r} names no action; give one, as in action:{near}")
        return pick_label(names, max(held, key=len), "action")

    def check(prompts):
        for prompt in dict.fromkeys(prompts):
            print(f"action: {names[label_of(prompt)]!r} in {prompt!r}")

    def reward(frames, prompts):
        pixels = preprocess(frames, size, IMAGENET_MEAN, IMAGENET_STD, True, size, mode="bilinear")
        clips = pixels.unflatten(0, frames.shape[:2])
        logits = exact(network(clips.to(dtype)).logits)  # (B, labels)
        labels = [label_of(prompt) for prompt in prompts] if label is None else label
        value = logits.log_softmax(-1)[torch.arange(len(prompts)), labels]
        reward.report = {"probability": value.detach().exp()}
        return value

    if label is None:
        reward.check = check
    reward.frames = network.config.num_frames
    reward.networks = [network]
    return reward


def jepa_masks(time, height, width, blocks, area, generator):
    """V-JEPA's mask: `blocks` rectangles, each `area` of a frame, aspect 0.75 to 1.5, through all of time.
    Returns token indices (context,), (target,) of time x height x width tokens; neither is empty."""
    masked = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(blocks):
        aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
        tokens = area * height * width
        h = min(round((tokens * aspect) ** 0.5), height)
        w = min(round((tokens / aspect) ** 0.5), width)
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        masked[top : top + h, left : left + w] = True
    if masked.all():
        masked[0, 0] = False
    masked = masked.expand(time, -1, -1).flatten()
    return (~masked).nonzero()[:, 0], masked.nonzero()[:, 0]


def jepa_loss(model, pixels, true, context, target):
    """V-JEPA's loss (Bardes et al. 2024, eq. 1) of each clip, (B,): L1 of predicted and true features.
    pixels: (B, N, 3, S, S) normalised; true: (B, T, D) of the full clip; context (C,), target (M,): tokens.
    The masked tokens are dropped before any layer; `VJEPA2Model.forward` does it when all have seen them."""
    contexts = context.expand(len(pixels), -1)
    targets = target.expand(len(pixels), -1)
    seen = model.encoder.embeddings(pixels)[:, context]
    for layer in model.encoder.layer:
        seen = layer(seen, contexts)[0]
    # the predictor picks the context out of a whole clip of features
    features = torch.zeros_like(true).index_copy(1, context, model.encoder.layernorm(seen))
    predicted = model.predictor(features, [contexts], [targets]).last_hidden_state
    true = F.layer_norm(exact(true[:, target]), true.shape[-1:])
    return (exact(predicted) - true).abs().mean((1, 2))


def jepa_score(model, pixels):
    """Minus the loss of each clip, (B,): the mean of four fixed masks. pixels: (B, N, 3, S, S) normalised."""
    true = model.encoder(pixels).last_hidden_state  # with gradient: the loss as a function of the pixels
    side = model.config.crop_size // model.config.patch_size
    time = pixels.shape[1] // model.config.tubelet_size
    generator = torch.Generator().manual_seed(0)
    losses = []
    for blocks, area in [(8, 0.15), (2, 0.7)] * 2:  # as many blocks, each this share of a frame
        context, target = jepa_masks(time, side, side, blocks, area, generator)
        losses.append(jepa_loss(model, pixels, true, context.to(pixels.device), target.to(pixels.device)))
    return -torch.stack(losses).mean(0)


def make_vjepa(device, dtype, weights=None):
    """Minus V-JEPA 2's own masked prediction loss (Assran et al. 2025), from 0 down: is a clip plausible?"""
    source = weights or "facebook/vjepa2-vitl-fpc64-256"
    model = load(transformers.VJEPA2Model, source, "vjepa", dtype=dtype, device=device)
    side = model.config.crop_size
    tube = model.config.tubelet_size

    def reward(frames, prompts):
        n = frames.shape[1] // tube * tube  # an odd last frame is left out
        require(n, f"vjepa needs {tube} frames: raise --decode_frames or --num_frames")
        larger = side * 256 // 224
        pixels = preprocess(frames[:, :n], larger, IMAGENET_MEAN, IMAGENET_STD, True, side, mode="bilinear")
        return jepa_score(model, pixels.unflatten(0, (-1, n)).to(dtype))

    reward.frames = "all"
    reward.networks = [model]
    return reward


def changes(frames):
    """Differences of neighbouring frames at 16 x 16 pixels: (B, N, 3, H, W) -> (B, N - 1, 3, 16, 16).
    Of each frame less its mean and over its contrast, so that light which changes is no motion."""
    small = F.adaptive_avg_pool2d(exact(frames).flatten(0, 1), 16)
    small = small - small.mean((2, 3), keepdim=True)
    contrast = (small.square().mean((1, 2, 3), keepdim=True) + 0.005**2).sqrt()
    return (small / contrast).unflatten(0, frames.shape[:2]).diff(dim=1)


def make_smooth(device, dtype, weights=None):
    """Minus mean squared second differences in time over first ones, at 16 x 16: 0 is steady, noise is -3."""

    def reward(frames, prompts):
        require(frames.shape[1] >= 3, "smooth needs 3 frames: raise --decode_frames or --num_frames")
        first = changes(frames)
        second = first.diff(dim=1)
        jerk = second.square().mean((1, 2, 3, 4))
        motion = first.square().mean((1, 2, 3, 4))
        return -jerk / (motion + 1e-4)  # less than a change of 1/100 of the contrast is still

    reward.frames = "all"
    return reward


def make_dynamic(device, dtype, weights=None):
    """How much moves: mean absolute difference of neighbouring frames at 16 x 16, in percent of contrast."""

    def reward(frames, prompts):
        require(frames.shape[1] >= 2, "dynamic needs 2 frames: raise --decode_frames or --num_frames")
        return 100 * changes(frames).abs().mean((1, 2, 3, 4))

    reward.frames = "all"
    return reward


def make_camera(device, dtype, weights=None, *, arg):
    """How well the camera does as told, by extras/camera.py. arg: smooth, still, zoom in, pan left, ...
    smooth: -J / (S + 0.1), J the rates' mean change from step to step, S their mean size; still: -S; a move:
    its mean rate, through 2 tanh(rate / 2), less an eighth of the others' sizes and of its change. The lower
    of two: for neighbouring frames, and for frames four steps (or half the clip) apart, over which shading
    passes for motion less. Rates are in percent a scored frame. Reports them and `seen`."""
    from extras.camera import camera_rates

    names = ["pan right", "pan up", "zoom in", "roll right"]  # the rates; then their opposites
    names += ["pan left", "pan down", "zoom out", "roll left", "smooth", "still"]
    move = pick_label(dict(enumerate(names)), arg, "camera move")

    def worth(rates):
        """How well rates (B, n, 4) are as told: (B,)."""
        jerk = rates.diff(dim=1)
        size = rates.abs().mean(1)
        if names[move] == "smooth":
            return -jerk.abs().mean((1, 2)) / (size.mean(1) + 0.1)
        if names[move] == "still":
            return -size.mean(1)
        axis = move % 4
        own = torch.cat([rates, -rates], dim=-1)[..., move].mean(1)
        own = 2 * torch.tanh(own / 2)  # more is sooner had by shading
        others = size.sum(1) - size[:, axis]
        return own - (others + jerk[..., axis].abs().mean(1)) / 8

    def reward(frames, prompts):
        shape = frames.shape[1:]
        enough = shape[0] >= 3 and min(shape[2:]) >= 16
        require(enough, "camera needs 3 frames, of 16 x 16: raise --num_frames, --decode_frames or the size")
        rates, seen = camera_rates(frames)
        reward.report = dict(zip(names, rates.detach().mean(1).T, strict=False))
        reward.report["seen"] = seen.mean(1)
        share = seen.mean().item()
        if share < 0.15 and not reward.warned:
            reward.warned = True
            advice = "a reward of the picture beside it, as + 5*hps, keeps it from fading what moves"
            print(f"camera:{arg}: {share:.0%} of the frame has texture to see it by; {advice}")
        apart = min(4, shape[0] // 2)
        far, _ = camera_rates(frames, apart)
        return torch.minimum(worth(rates), worth(far))

    reward.frames = "all"
    reward.warned = False
    return reward


def make_ask(device, dtype, weights=None, arg=QUESTION, quantize="none"):
    """Log odds of yes against no, of a vision-language model that is asked about 8 frames. arg: the question.
    VQAScore (Lin et al. 2024, arXiv 2404.01291), differentiated as in Diffusion-DRF (arXiv 2601.04153).
    `{prompt}` in it is the video's. Reports `p(yes)`. weights: a folder or hub id, also that of --vlm."""
    from extras.vlm import VisionLanguageModel

    source = weights or "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    model = VisionLanguageModel(source, device, dtype, quantize)

    def questions(prompts):
        return [arg.replace("{prompt}", prompt) for prompt in prompts]

    def check(prompts):
        model.check(questions(["", *prompts]))

    def reward(frames, prompts):
        logits = exact(model.answers(frames, questions(prompts)))  # (B, vocabulary)
        probabilities = logits.detach().softmax(-1)
        reward.report = {"p(yes)": probabilities[:, model.yes].sum(-1)}
        yes = logits[:, model.yes].logsumexp(-1)
        no = logits[:, model.no].logsumexp(-1)
        return yes - no

    reward.frames = 8
    reward.networks = [model.network]
    reward.check = check
    return reward


# ---- 4. Names and weighted sums ----------------------------------------------------------------------------
# SWAP: your reward. With a line "mine": make_mine it is `--reward mine` or `--reward mine:arg`, also in sums.
# A name is letters, digits and _.
REWARDS = {
    "aesthetic": make_aesthetic,
    "clip": make_clip,
    "pickscore": make_pickscore,
    "hps": make_hps,
    "remove": make_remove,
    "colorful": make_colorful,
    "compressible": make_compressible,
    "action": make_action,
    "vjepa": make_vjepa,
    "smooth": make_smooth,
    "dynamic": make_dynamic,
    "camera": make_camera,
    "ask": make_ask,
}


def parse(spec):
    """Split "hps + 0.5*remove:book" into [(1.0, "hps", None), (0.5, "remove", "book")]. Raises BadInput."""
    pattern = r"""
        \s* (?P<sign> [+-]) \s*
        ((?P<weight> -? (\d+\.?\d*|\.\d+) ([eE][+-]?\d+)?) \s*\*)? \s*  # a number and a star
        (?P<name> [A-Za-z_]\w*)
        (\s*:\s* (?P<arg> "[^"]*" | '[^']*' | [^\s"'+][^+]*? | )        # a colon and some text
            (?=\s*(\+|$) | \s+-[\s\d.]))?                              # up to the next term
        \s* (?=[+-]|$)"""
    names = {name.lower(): name for name in REWARDS}
    terms = []
    rest = spec if spec.lstrip().startswith("-") else f"+{spec}"
    while rest:
        term = re.match(pattern, rest, re.VERBOSE)
        if term is None:
            example = "write as \"hps + 0.5*clip\", what has + or - in it in quotes: ask:'Is it 1 + 1?'"
            wrong = rest if terms else spec
            raise BadInput(f"can't read {wrong.strip()!r} in --reward {spec!r}: {example}")
        rest = rest[term.end() :]
        name = names.get(term["name"].lower())
        if name is None:
            wrong = term["name"]
            near = difflib.get_close_matches(wrong, REWARDS, n=1, cutoff=0)[0]
            known = ", ".join(REWARDS)
            raise BadInput(f"--reward: unknown reward {wrong!r}: did you mean {near!r}? There are: {known}")
        arg = term["arg"]
        if arg is not None:
            arg = arg.strip("\"' ")
        parameter = inspect.signature(REWARDS[name]).parameters.get("arg")
        require(parameter or arg is None, f"{name} takes nothing after the colon: --reward {name}")
        required = parameter and parameter.default is parameter.empty
        missing = arg == "" or (required and arg is None)
        require(not missing, f"{name} must be told of what, after a colon: --reward {name}:...")
        weight = float(term["weight"] or 1)
        if term["sign"] == "-":
            weight = -weight
        terms.append((weight, name, arg))
    return terms


def make_terms(spec, device, dtype, weights=None, prompts=(), vlm=None, quantize="none"):
    """Load the rewards of a weighted sum: {"name" or "name:arg": (weight, reward)}. Raises BadInput.
    weights: a folder or several, the first with one of a reward's name counts; vlm, quantize: of ask."""
    folders = [weights] if isinstance(weights, str) else weights or []
    terms = {}
    for weight, name, arg in parse(spec):
        label = name
        kwargs = {"weights": None}
        for folder in reversed(folders):
            if folder and Path(folder, name).is_dir():
                kwargs["weights"] = str(Path(folder, name))
        if name == "ask":
            kwargs["quantize"] = quantize
            kwargs["weights"] = vlm or kwargs["weights"]
        if arg:
            kwargs["arg"] = arg
            label = f"{name}:{arg}"
        reward = REWARDS[name](device, dtype, **kwargs)
        if hasattr(reward, "check"):
            reward.check(prompts)
        terms[label] = (weight, reward)
    return terms


def weighted_rewards(terms, video, prompts, chunk=1, scale=None):
    """Rewards of video (B, N, 3, H, W): {"reward": (B,) weighted sum, term: (B,), "term figure": (B,)}.
    chunk: frames that an image reward gets at once. With a scale, scale x their sum goes backward."""
    totals = {}
    for name, (weight, reward) in terms.items():
        wanted = getattr(reward, "frames", 1)
        clip = video
        if wanted not in (1, "all"):
            clip = video[:, evenly_spaced(wanted, video.shape[1])]
        for view in clip.split(chunk if wanted == 1 else clip.shape[1], dim=1):
            share = view.shape[1] / clip.shape[1]
            value = reward(view, prompts)
            expected = f"reward {name!r} must return ({len(prompts)},), one per video, with a gradient"
            shape = tuple(getattr(value, "shape", ()))
            fits = isinstance(value, torch.Tensor) and shape == (len(prompts),)
            require(fits, f"{expected}: this is a {type(value).__name__} of shape {shape}")
            require(scale is None or value.requires_grad, f"{expected}: this has none")
            if scale is not None:
                (scale * (weight * share * value).sum()).backward()
            figures = {"reward": weight * value, name: value}
            for key, figure in getattr(reward, "report", {}).items():
                figures[f"{name} {key}"] = figure
            for key, figure in figures.items():
                totals[key] = totals.get(key, 0) + share * figure.detach()
    return totals


def networks_of(terms: dict) -> nn.ModuleList:
    """The networks of rewards, so that they can be moved."""
    networks = nn.ModuleList()
    for _, reward in terms.values():
        networks.extend(getattr(reward, "networks", []))
    return networks


# ---- 5. Loading weights, from a folder or the hub ----------------------------------------------------------
def as_bad_input(problem):
    """A context that turns what a library raises on a damaged file into BadInput. Never put it around code
    that people write! A fork without extras/ gets the library's own exceptions."""
    if not EXTRAS.is_dir():
        return contextlib.nullcontext()
    from extras.damaged import Reading

    return Reading(problem)


@contextlib.contextmanager
def asking_hub(source, flag):
    """Inside, what huggingface_hub raises is one line, where extras/ is there. Raises BadInput."""
    try:
        yield
    except (HTTPError, OSError, HFValidationError) as error:
        if not EXTRAS.is_dir():
            raise
        from extras.hub_errors import advice

        raise BadInput(f"{flag}: can't get {source!r}: {advice(error, source, flag)}") from None


@functools.cache
def list_hub(source):
    """The files of a hub repository. One request without retries: what is wrong shows within seconds."""
    return [file.rfilename for file in HfApi().model_info(source, timeout=8).siblings]


def fetch(source, name, flag):
    """Path of a file in a folder; or on the hub, from the cache, else downloaded. Raises BadInput."""
    if Path(source).is_dir():
        path = Path(source, name)
        require(path.is_file(), f"{flag}: there is no {name} in the folder {source}")
        return path
    with asking_hub(source, flag):
        cached = try_to_load_from_cache(source, name)
        if isinstance(cached, str):
            return Path(cached)
        require(name in list_hub(source), f"{flag}: there is no {name} in {source} on the hub")
        return Path(hf_hub_download(source, name))


def read_json(path):
    """The object that a json file holds. Raises BadInput."""
    with as_bad_input(f"{path} is damaged, get it again"):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


def read_config(source: str, name: str) -> dict:
    """A json file of a model that is a folder or a hub id (then it is downloaded). Raises BadInput."""
    return read_json(fetch(source, name, "--model"))


def pick_files(names, network, half):
    """Which files of a folder to load: safetensors before .bin, fp16 if `half`; none if one is missing."""
    if not network:  # what a tokenizer, or a processor, can't do without
        needed = "tokenizer.json merges.txt spiece.model tokenizer.model preprocessor_config.json".split()
        return [name for name in needed if name in names]
    stems = ("diffusion_pytorch_model", "pytorch_model", "model")
    for ending in (".safetensors", ".bin"):
        for fp16 in (half, not half):
            files = []
            for name in sorted(names):
                if name.startswith(stems) and name.endswith(ending) and (".fp16" in name) == fp16:
                    files.append(name)
            if files and "-of-" not in files[-1]:  # it is sorted behind what is in parts
                return files[-1:]
            if files and files[-1].endswith(f"-of-{len(files):05}{ending}"):
                return files
    return []


def load(kind, source, flag, subfolder="", dtype=None, device=None, more=(), options=()):
    """`kind.from_pretrained` of a folder or hub id, whose weights must all be there, be used, and be finite.
    device: of what is to be `frozen`; more: how keys begin that only the published file holds.
    options: more arguments of from_pretrained, which quantise."""
    network = hasattr(kind, "state_dict") or "AutoModel" in kind.__name__
    half = dtype in (torch.float16, torch.bfloat16)
    config = "config.json" if network else "tokenizer_config.json"
    if "ImageProcessor" in kind.__name__:
        config = "preprocessor_config.json"
    prefix = f"{subfolder}/" if subfolder else ""
    folder = fetch(source, prefix + config, flag).parent
    files = pick_files(os.listdir(folder), network, half)
    if not files and not Path(source).is_dir():
        names = [os.path.basename(path) for path in list_hub(source) if os.path.dirname(path) == subfolder]
        files = pick_files(names, network, half)
        for name in names:
            if name in files or name.endswith((".json", ".txt", ".model", ".jinja")):
                fetch(source, prefix + name, flag)
    require(files, f"{flag}: {folder} lacks its weights or its vocabulary, or a part: get it again")
    with as_bad_input(f"{flag}: {folder} holds no {kind.__name__}, or a damaged one: get it again"):
        if not network:
            return kind.from_pretrained(str(folder), local_files_only=True)
        variant = "fp16" if ".fp16" in files[0] else None
        more_options = dict(options, dtype=dtype, variant=variant)
        made, info = kind.from_pretrained(str(folder), output_loading_info=True, **more_options)
    odd = [*info["missing_keys"], *info["mismatched_keys"]]
    odd += [key for key in info["unexpected_keys"] if not key.startswith(more)]
    some = ", ".join(map(str, odd[:3]))
    require(not odd, f"{flag}: weights are missing or odd in {folder}, get it again: {some}")
    if options:
        from extras.base_lora import check_quantised

        check_quantised(made, folder)
    else:
        check_finite(made, folder)
    return made if device is None else frozen(made, device, dtype)


def load_state(network, path, inside=None):
    """Load a file of torch.save into a network, all of it. inside: the key it is under. Raises BadInput."""
    with as_bad_input(f"{path} is damaged, get it again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state[inside] if inside else state)
    check_finite(network, path)
    return network


def check_finite(network, source):
    """Raises BadInput where a weight is infinite or no number."""
    for name, weight in network.state_dict().items():
        require(weight.isfinite().all(), f"{source} is damaged, get it again: {name} is not finite")


def checkpoint_blocks(network, classes):
    """Recompute the activations of every block of these classes in the backward pass (Chen et al. 2016)."""

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
    """The network in eval mode, without gradients of its weights; checkpointed on a GPU."""
    if str(device).startswith("cuda"):
        names = ["ResidualAttentionBlock"]  # of open_clip
        for block in network.modules():
            if isinstance(block, GradientCheckpointingLayer):
                names.append(type(block).__name__)
        checkpoint_blocks(network, names)
    return network.to(device, dtype).eval().requires_grad_(False)
