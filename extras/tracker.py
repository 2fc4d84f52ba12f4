"""--tracker: rows of metrics.jsonl, and videos of evaluations, in TensorBoard, W&B or Trackio as well.

A training is a run there. It begins with the first row, `finish` ends it, and --resume goes on with it: its
id is kept in tracker.json of --out. A row that a kill made incomplete is made again, and then logged twice.
"""

import importlib
import json
import signal
from pathlib import Path

import imageio.v3 as iio
import numpy as np

import vader
from extras.tracker_login import PROJECT, asking, run_id, run_name
from rewards import as_bad_input

OPEN = {}  # the run that this process logs, by tracker and folder: at most one


def log(cfg, row: dict):
    """Log a row that metrics.jsonl has got, where cfg.tracker says."""
    run = (cfg.tracker, cfg.out)
    if run not in OPEN:
        finish()
        if signal.getsignal(signal.SIGINT) is vader.stop:
            signal.signal(signal.SIGINT, interrupt)
        OPEN[run] = BOARDS[cfg.tracker](cfg)
    OPEN[run].log(row)


def finish(failed: bool = False):
    """End the run that is open, if one is: all of it is written, and the next training is another run."""
    while OPEN:
        _, board = OPEN.popitem()
        board.finish(failed)
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, vader.stop)


def interrupt(*_):
    """On the first Ctrl-C. vader.stop, on the second, is too quick: W&B would lose rows of 15 seconds."""
    signal.signal(signal.SIGINT, vader.stop)
    raise KeyboardInterrupt


# ---- The trackers ------------------------------------------------------------------------------------------
class TensorBoard:
    """Event files in --out. A video is an animated GIF among the images: add_video fails with moviepy 2."""

    def __init__(self, cfg):
        self.out = cfg.out
        library = importlib.import_module("torch.utils.tensorboard")
        # On --resume, what is left of rows that are made again is hidden: all after the rows that were kept.
        kept = [row["step"] for row in vader.read_metrics(Path(cfg.out))[:-1]]
        first = max(kept, default=-1) + 1
        self.board = library.SummaryWriter(cfg.out, purge_step=first)
        settings = json.dumps(vars(cfg), indent=1).replace("\n", "\n    ")
        self.board.add_text("config", "    " + settings, first)  # four spaces: as it is, in Markdown

    def log(self, row):
        for name, value in numbers_of(row).items():
            self.board.add_scalar(name, value, row["step"])
        for name, file, _ in videos_of(row, self.out):
            self.board.file_writer.add_summary(gif_summary(name, file), row["step"])
        self.board.flush()

    def finish(self, failed):
        self.board.close()


class Wandb:
    """Its own step may not go back, so `step` is a number like others, and the x axis of all."""

    def __init__(self, cfg):
        self.out = cfg.out
        self.library = importlib.import_module("wandb")
        with asking(self.library):
            self.board = self.library.init(
                project=PROJECT,
                id=run_id(cfg),
                name=run_name(cfg),
                config=vars(cfg),
                resume="allow",
                reinit="create_new",  # a run of one's own stays as it is
                settings=self.library.Settings(quiet=True),
            )
        self.board.define_metric("*", step_metric="step")

    def log(self, row):
        values = numbers_of(row) | {"step": row["step"]}
        for name, file, prompt in videos_of(row, self.out):
            values[name] = self.library.Video(str(file), caption=prompt)
        self.board.log(values)

    def finish(self, failed):
        self.board.finish(exit_code=int(failed))


class Trackio:
    """It knows runs by their names, so the id is part of the name."""

    def __init__(self, cfg):
        self.out = cfg.out
        self.library = importlib.import_module("trackio")
        name = f"{run_name(cfg)}-{run_id(cfg)}"
        with as_bad_input("--tracker trackio can't begin a run"):
            self.board = self.library.init(project=PROJECT, name=name, config=vars(cfg), resume="allow")

    def log(self, row):
        values = numbers_of(row)
        for name, file, prompt in videos_of(row, self.out):
            values[name] = self.library.Video(str(file), caption=prompt)
        self.board.log(values, step=row["step"])

    def finish(self, failed):
        self.library.finish()


BOARDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


# ---- What is logged ----------------------------------------------------------------------------------------
def numbers_of(row: dict) -> dict[str, float]:
    """What a row can draw as a curve; an evaluation's means get `eval/` before their names."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, float):
            numbers[name] = value
    for name, values in row.get("eval", {}).items():
        if name not in ("folder", "prompts"):
            numbers[f"eval/{name}"] = float(np.mean(np.array(values, dtype=float)))  # None is NaN
    return numbers


def videos_of(row: dict, out: str) -> list[tuple[str, Path, str]]:
    """Of an evaluation's videos: the names that they are logged under, their files, their prompts."""
    videos = []
    if "eval" in row:
        evaluation = row["eval"]
        for n, prompt in enumerate(evaluation["prompts"]):
            file = Path(out, evaluation["folder"], f"{n:03d}.mp4")
            videos.append((f"eval/{file.stem}", file, prompt))
    return videos


def gif_summary(name: str, file: Path):
    """A video as what TensorBoard takes for an image, and plays: an animated GIF, as fast as the video."""
    proto = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    frames = iio.imread(file, plugin="FFMPEG")  # (F, H, W, 3) uint8
    rate = iio.immeta(file, plugin="FFMPEG")["fps"]
    ends = np.round(100 / rate * np.arange(len(frames) + 1))  # GIFs count in hundredths of a second
    durations = (10 * np.diff(ends)).tolist()
    gif = iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=durations, loop=0)
    _, height, width, channels = frames.shape
    image = proto.Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif)
    return proto.Summary(value=[proto.Summary.Value(tag=name, image=image)])
