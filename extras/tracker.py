"""--tracker: rows of metrics.jsonl, and videos of evaluations, in TensorBoard, W&B or Trackio as well."""

import importlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch


def make_tracker(cfg):
    """A function of a row of metrics.jsonl, which logs it where cfg.tracker says.

    Numbers keep their names, an evaluation's means get `eval/` before them, its videos are named by number.
    """
    name, out = cfg.tracker, cfg.out
    if name == "tensorboard":
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out)
    else:  # these two have the same calls
        library = importlib.import_module(name)
        board = library.init(project="vader", name=Path(out).name, config=vars(cfg))

    def log(row):
        columns, step = row.get("eval", {}), row["step"]
        found = {key: value for key, value in row.items() if isinstance(value, float)}
        found |= {f"eval/{key}": np.mean(v) for key, v in columns.items() if isinstance(v[0], float)}
        films = sorted((Path(out) / columns["folder"]).glob("*.mp4")) if columns else []
        if name != "tensorboard":
            board.log(found | {f"eval/{film.stem}": library.Video(str(film)) for film in films}, step=step)
            return
        for key, value in found.items():
            board.add_scalar(key, value, step)
        for film in films:
            frames = torch.from_numpy(iio.imread(film, plugin="FFMPEG")).permute(0, 3, 1, 2)[None]
            board.add_video(f"eval/{film.stem}", frames, step, fps=8)
        board.flush()

    return log
