"""The detectors that read a clip's four words off it, to score the video models with."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import trange
from world import COMBINATIONS, FRAMES, draw, pick


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
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3, weight_decay=0.01)
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


def load_detector(out: Path) -> Detector:
    detector = Detector()
    detector.load_state_dict({k: v.float() for k, v in load_file(out / "detector.safetensors").items()})
    return detector


@torch.no_grad()
def right_answers(detector, videos, combinations) -> dict[str, float]:
    """Share of clips whose colour, object, motion, place is what the caption says."""
    labels = torch.tensor(combinations)
    found = [torch.cat([detector(part)[i] for part in videos.split(32)]).argmax(1) for i in range(4)]
    names = ("colour", "object", "motion", "place")
    return {name: round((found[i] == labels[:, i]).float().mean().item(), 3) for i, name in enumerate(names)}
