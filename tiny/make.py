"""Draw the tiny world and train every model of it: a text-to-video pipeline and its reward models.

    python tiny/make.py            # everything, from seed 0, into tiny/
    python tiny/make.py --score    # measure what is in tiny/

Takes about 90 minutes on 2 cores: CLIP 11, autoencoder 25, U-Net 42, aesthetic 8, detectors 3. Scores of
the weights in the repository: 256 videos of held-out captions sampled by stock diffusers (10 steps, guidance
4) have the right colour in 85.9 %, object in 67.2 %, motion in 95.3 %, place in 100 %. The detectors that say
so are right on 100 / 98.0 / 100 / 100 % of 256 drawn clips, and on 100 / 93.8 / 100 / 100 % of 64 of those
after the autoencoder (mean absolute error 0.015 of [-1, 1]). The aesthetic score's rank correlation with its
target is 0.933. These weights were trained in pieces that shared the two cores, so another run gives others.

The world: one object of one colour moves through one place, `a {colour} {object} {motion} {place}`, in 64 x
64 pixels and 8 frames. One caption in six is held out of training and of prompts.txt (`held_out`). Most clips
are dull and unevenly lit, and a quarter of them jitter, so that a reward has something to improve.
All frames here are (..., 3, 64, 64) float32 in [0, 1].
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm, trange
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rewards import CLIP_MEAN, CLIP_STD, AestheticHead, make_aesthetic, preprocess  # noqa: E402 (needs the line above)

SIZE, FRAMES = 64, 8
COLOURS = {
    "red": (0.93, 0.12, 0.14),
    "yellow": (1.0, 0.86, 0.08),
    "green": (0.1, 0.75, 0.2),
    "blue": (0.12, 0.3, 0.95),
    "purple": (0.6, 0.15, 0.8),
    "white": (0.98, 0.98, 0.98),
}
OBJECTS = ["balloon", "star", "heart", "kite", "cube", "moon"]
MOTIONS = {"rising": (0, -1), "falling": (0, 1), "drifting left": (-1, 0), "drifting right": (1, 0)}
PLACES = ["over the sea", "in the night sky", "over the desert", "over a meadow"]
# sky at the top, sky at the horizon, ground at the horizon, ground at the bottom
PLACE_COLOURS = [
    [(0.35, 0.65, 0.95), (0.8, 0.9, 0.98), (0.1, 0.45, 0.65), (0.03, 0.2, 0.4)],
    [(0.02, 0.02, 0.12), (0.1, 0.1, 0.32), (0.1, 0.1, 0.32), (0.16, 0.14, 0.4)],
    [(0.45, 0.7, 0.9), (0.98, 0.85, 0.65), (0.92, 0.7, 0.38), (0.75, 0.48, 0.2)],
    [(0.4, 0.72, 0.98), (0.85, 0.95, 0.98), (0.45, 0.75, 0.25), (0.2, 0.5, 0.12)],
]
COMBINATIONS = list(itertools.product(range(6), range(6), range(4), range(4)))


def caption(combination) -> str:
    """The words for (colour, object, motion, place) indices."""
    colour, thing, motion, place = combination
    return f"a {list(COLOURS)[colour]} {OBJECTS[thing]} {list(MOTIONS)[motion]} {PLACES[place]}"


def held_out(combination) -> bool:
    """One combination in six is never trained on; every pair of words is still seen together."""
    colour, thing, motion, place = combination
    return (colour + thing + 2 * motion + 3 * place) % 6 == 5


SEEN = [c for c in COMBINATIONS if not held_out(c)]
UNSEEN = [c for c in COMBINATIONS if held_out(c)]


# ---- 1. Drawing --------------------------------------------------------------------------------------------


def star_distance(x, y):
    """Signed distance (about) to a five-pointed star of outer radius 1, negative inside."""
    angle = torch.atan2(x, -y)
    radius = torch.hypot(x, y)
    fold = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    u, v = radius * torch.cos(fold), radius * torch.sin(fold).abs()
    tip = torch.tensor([1.05, 0.0])
    notch = 0.5 * torch.tensor([math.cos(math.pi / 5), math.sin(math.pi / 5)])
    edge = notch - tip
    normal = torch.tensor([edge[1], -edge[0]]) / edge.norm()
    return (u - tip[0]) * normal[0] + (v - tip[1]) * normal[1]


def shape_distance(thing: int, x, y):
    """Signed distance (about) from points x, y to object number `thing` of radius 1; y grows downwards."""
    name = OBJECTS[thing]
    if name == "balloon":
        body = torch.hypot(x, (y + 0.2) * 0.92) - 0.8
        knot = torch.maximum((x.abs() - 0.09), (y - 0.95).abs() - 0.3)
        return torch.minimum(body, knot)
    if name == "star":
        return star_distance(x, y)
    if name == "heart":
        # a square on its corner, and a circle on each of its upper sides
        point = (x.abs() + (y - 0.12).abs() - 0.8) / math.sqrt(2)
        lobe = torch.hypot(x.abs() - 0.4, y + 0.28) - 0.8 / math.sqrt(2)
        return torch.minimum(lobe, point)
    if name == "kite":
        top = (x.abs() * 1.5 - (y + 1.05)) * 0.55
        bottom = (x.abs() * 1.7 + (y - 1.05)) * 0.5
        return torch.maximum(top, bottom)
    if name == "cube":
        return torch.maximum(x.abs(), y.abs()) - 0.78
    outer = torch.hypot(x, y) - 0.95
    bite = torch.hypot(x - 0.5, y + 0.15) - 0.75
    return torch.maximum(outer, -bite)


def uniform(n, low, high, generator):
    return low + (high - low) * torch.rand(n, generator=generator)


def quality(n: int, generator, full: bool):
    """How a clip is graded: saturation, light, sharpness, grain; evenly over the range if `full`, else dull.

    Returns four (n,) tensors: saturation 0-1, light 0-1, blur in pixels 0-2.5, grain 0-0.12.
    """
    if full:
        saturation, light = uniform(n, 0, 1, generator), uniform(n, 0, 1, generator)
        soft = uniform(n, 0, 1, generator) < 0.5
        blur = torch.where(soft, uniform(n, 0, 2.5, generator), torch.zeros(n))
        grainy = uniform(n, 0, 1, generator) < 0.3
        grain = torch.where(grainy, uniform(n, 0, 0.12, generator), torch.zeros(n))
        return saturation, light, blur, grain
    saturation = 0.05 + 0.75 * uniform(n, 0, 1, generator) ** 1.5
    light = 0.1 + 0.75 * uniform(n, 0, 1, generator)
    return saturation, light, torch.zeros(n), torch.zeros(n)


def aesthetic_target(saturation, light, blur, grain):
    """The target of the tiny aesthetic model, 1 to 10: vivid, sharp, well lit beats dull, blurred, dim."""
    score = 0.45 * saturation + 0.35 * light + 0.2 * (1 - blur / 2.5)
    return 1 + 9 * score * (1 - 0.5 * grain / 0.12)


def blur_rows(frames, sigma):
    """Gaussian blur along the last axis, a different sigma (n,) for each clip of frames (n, ..., W)."""
    offsets = torch.arange(-6, 7)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, width = frames.shape[0], frames.shape[-1]
    padded = F.pad(frames.reshape(n, -1, width), (6, 6), mode="replicate")
    windows = padded.unfold(-1, 13, 1)
    return torch.einsum("nrwk,nk->nrw", windows, kernel).reshape(frames.shape)


def draw(combinations, generator, full=False, moments=None):
    """Draw a clip for each (colour, object, motion, place); `moments` (n, k) picks frames, else it is all 8.

    Returns video: (n, k, 3, 64, 64) float32 in [0, 1]; target: (n,) float32 in [1, 10], the aesthetic target;
    inside: (n, k, 1, 64, 64) float32 in [0, 1], 1 where the object is.
    """
    n = len(combinations)
    moments = torch.arange(FRAMES).expand(n, FRAMES) if moments is None else moments
    colour, thing, motion, place = torch.tensor(combinations).T
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    saturation, light, blur, grain = quality(n, generator, full)

    # place: sky and ground with a wavy horizon, ripples on the sea, small stars at night
    wide = torch.tensor(PLACE_COLOURS)[place]  # (n, 4, 3)
    horizon = uniform(n, 0.3, 0.55, generator)[:, None, None]
    wave = torch.tensor([0.0, 0.0, 0.12, 0.08])[place][:, None, None]
    phase = uniform(n, 0, 2 * math.pi, generator)[:, None, None]
    edge = horizon + wave * torch.sin(2.2 * x + phase)
    ground = torch.sigmoid((y - edge) * 40)[:, None]
    sky_mix = ((y + 1) / (edge + 1)).clamp(0, 1)[:, None]
    ground_mix = ((y - edge) / (1.001 - edge)).clamp(0, 1)[:, None]
    sky = wide[:, 0, :, None, None] * (1 - sky_mix) + wide[:, 1, :, None, None] * sky_mix
    soil = wide[:, 2, :, None, None] * (1 - ground_mix) + wide[:, 3, :, None, None] * ground_mix
    scene = sky * (1 - ground) + soil * ground
    ripple = torch.sin(26 * y + 2 * torch.sin(3 * x + phase)) * ground[:, 0] * (place == 0)[:, None, None]
    scene = scene + 0.06 * ripple[:, None]
    star_x, star_y = (uniform((n, 5, 1, 1), -0.95, 0.95, generator) for _ in range(2))
    twinkle = (
        torch.exp(-((x - star_x) ** 2 + (y - star_y) ** 2) / 0.002).amax(1) * (place == 1)[:, None, None]
    )
    scene = (scene + 0.75 * twinkle[:, None])[:, None]  # (n, 1, 3, H, W)

    # object: a straight path through about the middle, some clips with jitter
    direction = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion]
    travel = uniform(n, 0.75, 1.1, generator)[:, None, None]
    middle = uniform((n, 1, 2), -0.18, 0.18, generator) - torch.tensor([0.0, 0.08])
    clock = torch.linspace(-0.5, 0.5, FRAMES)[moments][..., None]
    shaky = (uniform(n, 0, 1, generator) < 0.25)[:, None, None]
    jitter = (
        0.035
        * torch.randn((n, FRAMES, 2), generator=generator).gather(1, moments[..., None].expand(-1, -1, 2))
        * shaky
    )
    centre = middle + direction[:, None] * travel * clock + jitter
    radius = uniform(n, 0.31, 0.39, generator)[:, None, None, None]
    u = (x - centre[:, :, 0, None, None]) / radius
    v = (y - centre[:, :, 1, None, None]) / radius
    distance = torch.empty_like(u)
    for number in range(len(OBJECTS)):
        chosen = thing == number
        distance[chosen] = shape_distance(number, u[chosen], v[chosen])
    distance = distance * radius * SIZE / 2  # pixels
    inside = torch.sigmoid(-distance * 2.5)[:, :, None]
    rim = torch.sigmoid((distance + 1.2) * 2.5)[:, :, None]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, None, :, None, None]
    shade = (1.0 - 0.16 * (u + v)).clamp(0.6, 1.25)[:, :, None]  # lit from the upper left
    body = (paint * shade).clamp(0, 1) * (1 - 0.65 * rim)
    video = scene * (1 - inside) + body * inside

    # grading: dull colours, dim and uneven light, softness, grain
    grey = video.mean(2, keepdim=True)
    video = grey + (video - grey) * (0.3 + 0.7 * saturation)[:, None, None, None, None]
    side = uniform(n, 0, 2 * math.pi, generator)[:, None, None]
    slope = ((torch.cos(side) * x + torch.sin(side) * y) * 0.5)[:, None, None]
    lack = (1 - light)[:, None, None, None, None]
    video = video * (1 - 0.38 * lack) * (1 + 0.55 * lack * slope)
    if full:
        video = blur_rows(blur_rows(video, blur).transpose(-1, -2), blur).transpose(-1, -2)
        video = video + grain[:, None, None, None, None] * torch.randn(video.shape, generator=generator)
    return video.clamp(0, 1), aesthetic_target(saturation, light, blur, grain), inside


def pick(pool, n, generator):
    """n random combinations of a pool."""
    return [pool[i] for i in torch.randint(len(pool), (n,), generator=generator).tolist()]


# ---- 2. Words and pictures: tokenizer, CLIP, the aesthetic head --------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned from the captions: their words are one token, others split."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((caption(c) for c in COMBINATIONS), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    result = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=32,
        pad_token="<|endoftext|>",
    )
    result.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, prompts):
    return tokenizer(
        prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids


def make_clip(tokenizer) -> CLIPModel:
    common = dict(hidden_size=96, intermediate_size=256, num_attention_heads=4, projection_dim=64)
    text = dict(
        **common,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(**common, image_size=SIZE, patch_size=8, num_hidden_layers=3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def image_embedding(clip, pictures):
    """pictures: (n, 3, 64, 64) in [0, 1] -> (n, 64) of length 1."""
    hidden = clip.vision_model(
        pixel_values=preprocess(pictures[None], SIZE, CLIP_MEAN, CLIP_STD)
    ).pooler_output
    return F.normalize(clip.visual_projection(hidden), dim=-1)


def text_embedding(clip, tokens):
    return F.normalize(clip.text_projection(clip.text_model(input_ids=tokens).pooler_output), dim=-1)


def train_clip(out: Path, updates: int, seed: int):
    """CLIP by its contrastive loss, with the aesthetic head on its picture embedding.

    A single picture shows no motion, so the caption embedding also predicts its four words (by heads that are
    thrown away): all words, motions too, end up apart. The score is trained on pictures moved against it by
    up to 0.05 (one fast-gradient step), so its gradient is about what can be seen, not invisible patterns.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer(out / "t2v" / "tokenizer")
    clip, head = make_clip(tokenizer), AestheticHead(64)
    words = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4, 4))
    sees = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4))
    weights = [*clip.parameters(), *head.parameters(), *words.parameters(), *sees.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, updates)
    for update in (bar := trange(updates, desc="clip")):
        combinations = pick(SEEN, 64, generator)
        moments = torch.randint(FRAMES, (64, 1), generator=generator)
        video, target, _ = draw(combinations, generator, full=True, moments=moments)
        pictures = video[:, 0]
        tokens = tokenize(tokenizer, [caption(c) for c in combinations])
        labels = torch.tensor(combinations)
        if update > updates // 4:
            pictures.requires_grad_()
            score = head(image_embedding(clip, pictures))[:, 0]
            (slope,) = torch.autograd.grad(F.mse_loss(score, target), pictures)
            step = uniform((64, 1, 1, 1), 0, 0.05, generator)
            pictures = (pictures + step * slope.sign()).clamp(0, 1).detach()
        image, text = image_embedding(clip, pictures), text_embedding(clip, tokens)
        logits = image @ text.T * clip.logit_scale.exp().clamp(max=50)
        # captions that look the same in one picture (only the motion differs) are not wrong answers
        visible = labels[:, [0, 1, 3]]
        same = (visible[:, None] == visible[None]).all(-1) & ~torch.eye(64, dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        contrast = (
            F.cross_entropy(logits, torch.arange(64)) + F.cross_entropy(logits.T, torch.arange(64))
        ) / 2
        read = sum(F.cross_entropy(f(text), labels[:, i]) for i, f in enumerate(words))
        look = sum(F.cross_entropy(f(image), labels[:, i]) for f, i in zip(sees, (0, 1, 3), strict=True))
        score = head(image)[:, 0]
        loss = contrast + read + 0.5 * look + F.mse_loss(score, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if update % 20 == 0:
            bar.set_postfix(
                contrast=f"{contrast:.3f}",
                read=f"{read:.3f}",
                look=f"{look:.2f}",
                score=f"{F.l1_loss(score, target):.3f}",
            )
    folder = out / "rewards" / "aesthetic"
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(head.half().state_dict(), folder / "aesthetic-model.pth")
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(clip.config.text_config.to_dict()))
    missing, unexpected = text_encoder.load_state_dict(clip.float().text_model.state_dict(), strict=False)
    if missing or unexpected:
        text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    text_encoder.half().save_pretrained(out / "t2v" / "text_encoder")


def train_aesthetic(out: Path, updates: int, seed: int):
    """Go on with the picture side of that CLIP and the head, on 8,000 drawn pictures, the text side frozen.

    Steps against the score only in the last quarter and up to 0.01: those of `train_clip` left it unsharp.
    """
    torch.manual_seed(seed + 4)
    generator = torch.Generator().manual_seed(seed + 4)
    folder = out / "rewards" / "aesthetic"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    head = AestheticHead(64).eval()
    head.load_state_dict(torch.load(folder / "aesthetic-model.pth", weights_only=True))
    drawn, scores, chosen = [], [], pick(SEEN, 8000, generator)
    for first in trange(0, 8000, 80, desc="pictures"):
        moments = torch.randint(FRAMES, (80, 1), generator=generator)
        video, target, _ = draw(chosen[first : first + 80], generator, full=first % 240 != 0, moments=moments)
        drawn.append(video[:, 0])
        scores.append(target)
    drawn, scores = torch.cat(drawn), torch.cat(scores)
    with torch.no_grad():
        texts = text_embedding(clip, tokenize(tokenizer, [caption(c) for c in SEEN]))
    numbers = torch.tensor([SEEN.index(c) for c in chosen])
    weights = [*clip.vision_model.parameters(), *clip.visual_projection.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, updates)
    for update in (bar := trange(updates, desc="aesthetic")):
        batch = torch.randint(8000, (64,), generator=generator)
        pictures, target = drawn[batch], scores[batch]
        flipped = uniform((64, 1, 1, 1), 0, 1, generator) < 0.5
        pictures = torch.where(flipped, pictures.flip(-1), pictures)
        if update > updates * 3 // 4:
            pictures.requires_grad_()
            error = F.mse_loss(head(image_embedding(clip, pictures))[:, 0], target)
            (slope,) = torch.autograd.grad(error, pictures)
            step = uniform((64, 1, 1, 1), 0, 0.01, generator)
            pictures = (pictures + step * slope.sign()).clamp(0, 1).detach()
        image = image_embedding(clip, pictures)
        score = head(image)[:, 0]
        contrast = F.cross_entropy(image @ texts.T * clip.logit_scale.exp().detach(), numbers[batch])
        loss = F.mse_loss(score, target) + 0.05 * contrast
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if update % 20 == 0:
            bar.set_postfix(contrast=f"{contrast:.3f}", score=f"{F.l1_loss(score, target):.3f}")
    clip.half().save_pretrained(folder)
    torch.save(head.half().state_dict(), folder / "aesthetic-model.pth")


# ---- 3. The video model: autoencoder, U-Net ----------------------------------------------------------------


def train_vae(out: Path, legs, seed: int):
    """A KL autoencoder of single pictures, 64 x 64 x 3 to 8 x 8 x 4, on the whole range of gradings.

    legs: (updates, highest learning rate, extra weight of the object's pixels) each; the second leg mends the
    objects' colours, which are too few pixels to count in the first. A leg that is done is kept in work/.
    """
    for number, (updates, lr, extra) in enumerate(legs):
        torch.manual_seed(seed + number)
        generator = torch.Generator().manual_seed(seed + 1 + 10 * number)
        vae = make_vae()
        done = out / "work" / f"vae-{number}.safetensors"
        if number or done.exists():
            before = done if done.exists() else out / "work" / f"vae-{number - 1}.safetensors"
            vae.load_state_dict(load_file(before))
        if done.exists():
            continue
        optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates, pct_start=0.05)
        for update in (bar := trange(updates, desc=f"vae leg {number}")):
            moments = torch.randint(FRAMES, (32, 1), generator=generator)
            chosen = pick(SEEN, 32, generator)
            video, _, inside = draw(chosen, generator, full=update % 2 == 0, moments=moments)
            pictures, weight = video[:, 0] * 2 - 1, 1 + extra * inside[:, 0]
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pictures).latent_dist
                latents = (
                    posterior.mean + torch.randn(posterior.mean.shape, generator=generator) * posterior.std
                )
                decoded = vae.decode(latents).sample
            decoded = decoded.float()
            error = (decoded - pictures).abs()
            edges = sum((decoded.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (-1, -2))
            kl = (
                0.5
                * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
            )
            loss = (error * weight).mean() + 0.5 * (error**2 * weight).mean() + edges + 2e-4 * kl
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if update % 25 == 0:
                inner = (error * inside[:, 0]).sum() / (3 * inside[:, 0].sum())
                bar.set_postfix(mae=f"{error.mean():.4f}", object=f"{inner:.4f}", kl=f"{kl:.2f}")
        done.parent.mkdir(parents=True, exist_ok=True)
        save_file(vae.state_dict(), done)
    vae.eval()
    with torch.no_grad():
        video, _, _ = draw(pick(SEEN, 32, generator), generator)
        spread = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.half().save_pretrained(out / "t2v" / "vae")


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def make_unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=96,
        attention_head_dim=16,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_clips(out: Path, clips: int, seed: int):
    """Latents of drawn clips (clips, 4, 8, 8, 8), and each one's caption number in SEEN; cached in work/."""
    cache = out / "work" / f"latents-{clips}-{seed}.safetensors"
    if cache.exists():
        stored = load_file(cache)
        return stored["latents"].float(), stored["labels"]
    generator = torch.Generator().manual_seed(seed + 2)
    vae = AutoencoderKL.from_pretrained(out / "t2v" / "vae", dtype=torch.float32).eval()
    order = torch.cat(
        [torch.randperm(len(SEEN), generator=generator) for _ in range(clips // len(SEEN) + 1)]
    )[:clips]
    latents = torch.empty(clips, 4, FRAMES, SIZE // 8, SIZE // 8)
    for first in trange(0, clips, 16, desc="latents"):
        chosen = order[first : first + 16].tolist()
        video, _, _ = draw([SEEN[i] for i in chosen], generator)
        with torch.autocast("cpu", torch.bfloat16):
            mean = (
                vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean.float() * vae.config.scaling_factor
            )
        latents[first : first + 16] = mean.unflatten(0, (len(chosen), FRAMES)).transpose(1, 2)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.half(), "labels": order}, cache)
    return latents, order


def train_unet(out: Path, updates: int, clips: int, batch: int, seed: int):
    """The U-Net by the v-prediction loss on frozen text states, one caption in ten empty; EMA."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 3)
    latents, labels = encode_clips(out, clips, seed)
    tokenizer = CLIPTokenizer.from_pretrained(out / "t2v" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(out / "t2v" / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        states = text_encoder(tokenize(tokenizer, [caption(c) for c in SEEN] + [""])).last_hidden_state
    alphas = make_scheduler().alphas_cumprod
    unet = make_unet().eval()  # eval: its dropout stays off; there is no other difference
    unet.set_attn_processor(
        AttnProcessor()
    )  # plain attention: on so few tokens twice as fast as the fused one
    average = {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 8e-4, updates, pct_start=0.05, final_div_factor=50
    )
    work = out / "work" / "unet.pt"
    first, recent = 0, 0.0
    if work.exists():
        stored = torch.load(work, weights_only=True)
        first, average = stored["update"], stored["average"]
        unet.load_state_dict(stored["unet"])
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        generator.set_state(stored["generator"])
    for update in (
        bar := tqdm(range(first, updates), desc="unet", initial=first, total=updates, mininterval=5)
    ):
        chosen = torch.randint(clips, (batch,), generator=generator)
        clean, label = latents[chosen], labels[chosen].clone()
        label[torch.rand(batch, generator=generator) < 0.1] = len(SEEN)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        alpha = alphas[t].sqrt()[:, None, None, None, None]
        sigma = (1 - alphas[t]).sqrt()[:, None, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            out_v = unet(alpha * clean + sigma * noise, t, states[label], return_dict=False)[0]
        loss = F.mse_loss(out_v.float(), alpha * noise - sigma * clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        keep = min(0.998, (update + 1) / (update + 10))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        recent = loss.item() if update == first else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (update + 1) % 250 == 0 or update + 1 == updates:
            stored = {
                "update": update + 1,
                "average": average,
                "unet": unet.state_dict(),
                "generator": generator.get_state(),
            }
            torch.save(
                {**stored, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, work
            )
            save_unet(out, average)


def save_unet(out: Path, weights):
    """Write the U-Net, the scheduler and model_index.json beside the parts that are there."""
    unet = make_unet()
    unet.load_state_dict(weights)
    folder = out / "t2v"
    pipeline = TextToVideoSDPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.half(),
        scheduler=make_scheduler(),
    )
    pipeline.vae.register_to_config(_name_or_path="")  # else the config would name this machine's folder
    pipeline.save_pretrained(folder)


# ---- 4. Detectors and scores -------------------------------------------------------------------------------


class Detector(nn.Module):
    """Reads colour, object, motion and place off a clip. Only for measuring; no reward uses it."""

    def __init__(self):
        super().__init__()
        layers, sizes = [], [(3, 24, 2), (24, 48, 2), (48, 64, 2), (64, 96, 2), (96, 96, 1)]
        for i, o, stride in sizes:
            layers += [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU()]
        self.frame = nn.Sequential(*layers)
        self.where = nn.Sequential(nn.Conv2d(96, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 32))
        self.colour, self.thing = (
            nn.Sequential(nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 6)) for _ in "ab"
        )
        self.motion = nn.Sequential(nn.Linear(32 * FRAMES, 64), nn.ReLU(), nn.Linear(64, 4))
        self.place = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, video):
        """video: (n, 8, 3, 64, 64) -> logits (n, 6), (n, 6), (n, 4), (n, 4)."""
        n = video.shape[0]
        features = self.frame(video.flatten(0, 1) * 2 - 1)
        pooled = torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1).view(n, FRAMES, 192).mean(1)
        path = self.where(features).view(n, -1)
        return self.colour(pooled), self.thing(pooled), self.motion(path), self.place(pooled)


def train_detector(out: Path, updates: int, seed: int):
    """Plain classification of drawn clips of all captions."""
    torch.manual_seed(seed + 20)
    generator = torch.Generator().manual_seed(seed + 20)
    detector = Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
    for update in (bar := trange(updates, desc="detector")):
        combinations = pick(COMBINATIONS, 32, generator)
        video, _, _ = draw(combinations, generator, full=update % 8 == 7)
        labels = torch.tensor(combinations)
        losses = [F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(detector(video))]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
        if update % 20 == 0:
            bar.set_postfix({name: f"{v:.2f}" for name, v in zip("comp", losses, strict=True)})
    save_file({k: v.half() for k, v in detector.state_dict().items()}, out / "detector.safetensors")


@torch.no_grad()
def right_answers(detector, videos, combinations) -> dict[str, float]:
    """Share of clips whose colour, object, motion, place is what the caption says."""
    labels = torch.tensor(combinations)
    found = [torch.cat([detector(part)[i] for part in videos.split(32)]).argmax(1) for i in range(4)]
    names = ("colour", "object", "motion", "place")
    return {name: round((found[i] == labels[:, i]).float().mean().item(), 3) for i, name in enumerate(names)}


@torch.no_grad()
def measure(out: Path, samples: int, seed: int):
    """Print what the weights in `out` score, sampled by stock diffusers on held-out captions."""
    import vader

    generator = torch.Generator().manual_seed(seed + 30)
    detector = Detector()
    detector.load_state_dict({k: v.float() for k, v in load_file(out / "detector.safetensors").items()})
    combinations = [UNSEEN[i % len(UNSEEN)] for i in range(samples)]
    video, _, _ = draw(combinations, generator)
    print("detectors on drawn held-out clips:", right_answers(detector, video, combinations))

    pipe = TextToVideoSDPipeline.from_pretrained(out / "t2v", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = video[:64].flatten(0, 1) * 2 - 1
    error = (pipe.vae(pictures).sample - pictures).abs().mean()
    print(f"autoencoder: mean absolute error {error:.4f} of [-1, 1]")
    decoded = (pipe.vae(pictures).sample / 2 + 0.5).clamp(0, 1).view_as(video[:64])
    print(
        "detectors on those clips through the autoencoder:",
        right_answers(detector, decoded, combinations[:64]),
    )
    preset = dict(zip(vader.PRESET_FIELDS, vader.PRESETS["tiny"], strict=True))
    run = {
        name: preset[name]
        for name in ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
    }
    parts, start = [], time.time()
    for first in trange(0, samples, 8, desc="samples"):
        captions = [caption(c) for c in combinations[first : first + 8]]
        latents = pipe(captions, generator=generator, output_type="latent", **run).frames
        parts.append((pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    made = torch.cat(parts)
    print(f"samples of held-out captions, {run}:", right_answers(detector, made, combinations))
    print(f"{(time.time() - start) / samples:.2f} s a sample in batches of 8")

    chosen, moments = pick(UNSEEN, 256, generator), torch.zeros(256, 1).long()
    video, target, _ = draw(chosen, generator, full=True, moments=moments)
    score = make_aesthetic("cpu", torch.float32, None, str(out / "rewards"))(video, None)
    ranks = torch.stack([score.argsort().argsort(), target.argsort().argsort()]).float()
    print(
        f"aesthetic: rank correlation with the target {torch.corrcoef(ranks)[0, 1]:.3f} on 256 drawn pictures"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--score", action="store_true", help="measure instead of training")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    out, seed = args.out, args.seed
    if not args.score:
        train_clip(out, 1000, seed)
        train_vae(out, [(1700, 2e-3, 0.0), (1000, 1e-3, 6.0)], seed)
        train_unet(out, 3000, 6000, 16, seed)
        train_aesthetic(out, 1000, seed)
        train_aesthetic(out, 800, seed + 1)
        train_detector(out, 800, seed)
    measure(out, args.samples, seed)


if __name__ == "__main__":
    main()
