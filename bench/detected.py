"""What the detectors of tiny/, which no reward uses, see in a run's held-out videos, before and after.

    python bench/detected.py runs/ask-tiny      # colour, object, motion, place as told; the sky's blueness

Reads the first and the last evaluation of a run of `--model tiny`: the videos in samples/, their prompts in
metrics.jsonl. Blueness is the median of blue less red in the upper eighth (`sky_blueness` in tiny/).
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
import judges  # noqa: E402 (needs the line above)
from train_ask import sky_blueness  # noqa: E402

import vader  # noqa: E402
from extras import watch  # noqa: E402


def videos_of(folder: Path, n: int):
    """The first n videos of a folder, (n, F, 3, 64, 64) in [0, 1], as they were before they were enlarged."""
    clips = [iio.imread(folder / f"{k:03d}.mp4", plugin="FFMPEG") for k in range(n)]
    frames = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255
    return torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 4).unflatten(0, frames.shape[:2])


@torch.no_grad()
def seen(run: Path, row: dict) -> dict[str, np.ndarray]:
    """For each video of an evaluation: is each word as told? and the blueness of its sky."""
    found = row["eval"]
    videos = videos_of(run / found["folder"], len(found["prompts"]))
    _, detector = judges.load()
    right = {}
    for word, values in judges.detected(detector, videos, found["prompts"]).items():
        right[word] = values.numpy()
    return right | {"sky's blueness": sky_blueness(videos).numpy()}


def main(run: Path):
    rows = [row for row in vader.read_metrics(run) if "eval" in row]
    print(f"reward: {watch.summary(rows[0]['eval']['reward'], rows[-1]['eval']['reward'])}")
    first, last = (seen(run, row) for row in (rows[0], rows[-1]))
    for name, base in first.items():
        print(f"{name}: {watch.summary(base.tolist(), last[name].tolist())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
