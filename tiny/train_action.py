"""The action reward's classifier of motions, a VideoMAE."""

from pathlib import Path

import torch
import torch.nn.functional as F
from training import fit
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from world import FRAMES, MOTIONS, SIZE, uniform

from rewards import IMAGENET_MEAN, IMAGENET_STD, preprocess


def train_action(out: Path, pool, updates: int, seed: int):
    """VideoMAE's classifier on the four motions, from scratch.

    After a start at full speed, clips are played at -1 to 1 times it: backwards is the opposite motion, and
    the slower, the less sure the label. So a reward can climb all the way from one motion to another.
    """
    torch.manual_seed(seed + 43)
    generator = torch.Generator().manual_seed(seed + 43)
    video, labels, _, _ = pool
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=16,
        num_frames=FRAMES,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label=dict(enumerate(MOTIONS)),
        label2id={name: i for i, name in enumerate(MOTIONS)},
    )
    network = VideoMAEForVideoClassification(config)

    def loss_of(update):
        rows = torch.randint(len(video), (48,), generator=generator)
        speed = uniform((48,), -1.3, 1.3, generator).clamp(-1, 1)
        speed = torch.ones(48) if update < 0.5 * updates else speed
        moments = (3.5 + speed[:, None] * (torch.arange(FRAMES) - 3.5)).round().long()
        clips = video[rows[:, None], moments].float() / 255
        strength = uniform((48, 1, 1, 1, 1), 0, 0.08, generator)
        clips = (clips + strength * torch.randn(clips.shape, generator=generator)).clamp(0, 1)
        motion = torch.where(speed > 0, labels[rows, 2], labels[rows, 2] ^ 1)  # 0 and 1, 2 and 3 are opposite
        sure = 0.95 * speed.abs()[:, None]
        wanted = sure * F.one_hot(motion, 4) + (1 - sure) / 4
        pixels = preprocess(clips, SIZE, IMAGENET_MEAN, IMAGENET_STD).view_as(clips)
        logits = network(pixel_values=pixels).logits
        right = (logits.argmax(-1) == motion)[speed.abs() > 0.5].float().mean()
        return F.cross_entropy(logits, wanted), {"right": right}

    fit(network.parameters(), updates, 1.5e-3, "action", loss_of)
    network.half().save_pretrained(out / "rewards" / "action")
