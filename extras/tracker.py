"""--tracker: rows of metrics.jsonl, and videos of evaluations, in TensorBoard, W&B or Trackio as well."""

import importlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

TRACKERS = {}  # of runs that this process has logged


def log(cfg, row: dict):
    """Log a row of metrics.jsonl where cfg.tracker says."""
    run = (cfg.tracker, cfg.out)
    if run not in TRACKERS:
        TRACKERS[run] = make_tracker(cfg)
    TRACKERS[run](row)


def finish():
    """End all that this process has open."""
    TRACKERS.clear()


def make_tracker(cfg):
    """A function of a row of metrics.jsonl, which logs it where cfg.tracker says.

    Numbers keep their names, an evaluation's means get `eval/` before them, its videos are named by number.
    """
    if cfg.tracker == "tensorboard":
        return make_tensorboard(cfg)
    library = importlib.import_module(cfg.tracker)  # wandb and trackio have the same calls
    board = library.init(project="vader", name=Path(cfg.out).name, config=vars(cfg))

    def log(row):
        values = numbers_of(row)
        for name, file in videos_of(row, cfg.out).items():
            values[name] = library.Video(str(file))
        board.log(values, step=row["step"])

    return log


def make_tensorboard(cfg):
    board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(cfg.out)

    def log(row):
        for name, value in numbers_of(row).items():
            board.add_scalar(name, value, row["step"])
        for name, file in videos_of(row, cfg.out).items():
            frames = torch.from_numpy(iio.imread(file, plugin="FFMPEG"))  # (F, H, W, 3) uint8
            board.add_video(name, frames.permute(0, 3, 1, 2)[None], row["step"], fps=8)
        board.flush()

    return log


def numbers_of(row: dict) -> dict[str, float]:
    """What a row of metrics.jsonl holds that can be drawn as a curve."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, float):
            numbers[name] = value
    for name, values in row.get("eval", {}).items():
        if isinstance(values[0], float):
            numbers[f"eval/{name}"] = np.mean(values)
    return numbers


def videos_of(row: dict, out: str) -> dict[str, Path]:
    """The files of an evaluation's videos, by the names that they are logged under."""
    videos = {}
    if "eval" in row:
        for file in sorted(Path(out, row["eval"]["folder"]).glob("*.mp4")):
            videos[f"eval/{file.stem}"] = file
    return videos
