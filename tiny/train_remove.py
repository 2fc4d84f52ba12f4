"""The remove reward's detector of objects, a YOLOS."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from training import fit, frames_of
from transformers import YolosConfig, YolosForObjectDetection
from world import OBJECTS, SIZE, blur_rows, uniform

from rewards import IMAGENET_MEAN, IMAGENET_STD, preprocess


def train_remove(out: Path, pool, updates: int, seed: int):
    """YOLOS by its set loss; with one object the best match is one query. One frame in five is empty.

    Shapes are bent, and labels smoothed: a detector that is always sure leaves a reward no gradient.

    The published ones start from a trained classifier; here the class token reads the picture along the way,
    by heads that are thrown away. Without them nothing was learned in 4,000 updates.
    """
    torch.manual_seed(seed + 42)
    generator = torch.Generator().manual_seed(seed + 42)
    video, labels, _, boxes = pool
    config = YolosConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=[SIZE, SIZE],
        patch_size=8,
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        initializer_range=0.1,
        id2label=dict(enumerate(OBJECTS)),
        label2id={name: i for i, name in enumerate(OBJECTS)},
    )
    yolos = YolosForObjectDetection(config)
    for start in (yolos.vit.embeddings.position_embeddings, yolos.vit.embeddings.detection_tokens):
        nn.init.normal_(start, std=0.3)  # they start at zero, where all queries are the same
    reads = nn.ModuleList(nn.Linear(64, n) for n in (6, 7, 4))

    def loss_of(update):
        rows = torch.randint(len(video), (64,), generator=generator)
        pictures, moments = frames_of(video, rows, generator)
        pictures = warped(pictures, generator)
        true_box, true_class = boxes[rows, moments], labels[rows, 1].clone()
        # an empty frame: the band of rows above or below the object, or beside it, stretched over the frame
        for i in range(0, 64, 5):
            x0, x1 = ((true_box[i, 0] + torch.tensor([-0.5, 0.5]) * true_box[i, 2]) * SIZE).tolist()
            left, right = max(int(x0) - 2, 0), min(math.ceil(x1) + 2, SIZE)
            part = pictures[i, :, :, :left] if left >= SIZE - right else pictures[i, :, :, right:]
            if part.shape[-1] > 3:
                pictures[i] = F.interpolate(part[None], (SIZE, SIZE), mode="bilinear")[0]
                true_class[i] = len(OBJECTS)
        output = yolos(pixel_values=preprocess(pictures[None], SIZE, IMAGENET_MEAN, IMAGENET_STD))
        logits, found = output.logits, output.pred_boxes
        facts = (labels[rows, 0], true_class, labels[rows, 3])
        token = output.last_hidden_state[:, 0]
        read = sum(F.cross_entropy(f(token), fact) for f, fact in zip(reads, facts, strict=True))
        distance = (found - true_box[:, None]).abs().sum(-1)
        shared = overlap(found, true_box[:, None])
        with torch.no_grad():
            p = logits.softmax(-1).gather(-1, true_class[:, None, None].expand(-1, 5, 1))[..., 0]
            best = (5 * distance + 2 * (1 - shared) - p).argmin(1)
        there, each = true_class < len(OBJECTS), torch.arange(64)
        wanted = torch.full((64, 5), len(OBJECTS))
        wanted[each, best] = true_class
        weight = torch.ones(len(OBJECTS) + 1)
        weight[-1] = 0.3
        classes = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, label_smoothing=0.1)
        near = ((5 * distance + 2 * (1 - shared))[each, best] * there).sum() / there.sum()
        right = (logits[each, best].argmax(-1) == true_class).float().mean()
        return classes + near + 0.5 * read, {"class": classes, "box": near, "read": read, "right": right}

    fit([*yolos.parameters(), *reads.parameters()], updates, 2e-3, "remove", loss_of)
    yolos.half().save_pretrained(out / "rewards" / "remove")


def warped(pictures, generator):
    """Pictures bent and softened by up to a few pixels, as the video model's shapes are."""
    n = len(pictures)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bend = F.interpolate(torch.randn(n, 2, 9, 9, generator=generator), (SIZE, SIZE), mode="bicubic")
    bend = bend * uniform((n, 1, 1, 1), 0, 0.08, generator)
    grid = torch.stack([x, y], -1) + bend.permute(0, 2, 3, 1)
    bent = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    sigma = uniform((n,), 0, 1.2, generator)
    return blur_rows(blur_rows(bent, sigma).transpose(-1, -2), sigma).transpose(-1, -2)


def overlap(a, b):
    """Intersection over union of boxes (..., 4) given as centre and size."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    both = (high - low).clamp(min=0).prod(-1)
    return both / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both)
