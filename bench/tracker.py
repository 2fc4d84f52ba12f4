"""How the camera moves, by features and RANSAC of OpenCV: a tracker that shares nothing with `camera_rates`.

Corners (Shi and Tomasi 1994) are followed from frame to frame by themselves, in pictures whose local mean and
contrast are taken out, so light does not move them; a similarity is fitted to where they went by RANSAC, so
what moves by itself is left out. Detail of less than a pixel or two is not looked at: it stays where the
pixels are. Right to 0.1 percent a step from 128 pixels on. Needs opencv-python-headless.
"""

import cv2
import numpy as np

NAMES = ("pan right", "pan up", "zoom in", "roll right")
SIDE = 256  # the shorter side at which corners are followed, in pixels
FEWEST = 8  # corners that must agree, or nothing was seen


def prepared(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W) in [0, 1] at SIDE, less its local mean and over its local contrast, uint8."""
    picture = picture.astype(np.float32)
    scale = SIDE / min(picture.shape)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=how)
    fine = max(2, scale)  # one pixel of the picture: finer is what lies between pixels, which does not move
    wide = 6 * fine
    large = cv2.GaussianBlur(large, (0, 0), fine)
    detail = large - cv2.GaussianBlur(large, (0, 0), wide)
    contrast = np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), wide))
    even = np.clip(detail / (contrast + 0.01), -3, 3)
    return (even * 42 + 127).astype(np.uint8)


def followed(first, second):
    """Where corners of the first picture are in it and in the second, (n, 2) each, in pixels."""
    corners = cv2.goodFeaturesToTrack(first, 400, 0.01, 5)
    if corners is None:
        return np.zeros((0, 2)), np.zeros((0, 2))
    how = dict(
        winSize=(31, 31),
        maxLevel=4,
        criteria=(3, 40, 0.003),
    )
    there, seen, _ = cv2.calcOpticalFlowPyrLK(first, second, corners, None, **how)
    back, seen_back, _ = cv2.calcOpticalFlowPyrLK(second, first, there, None, **how)
    apart = np.linalg.norm(corners - back, axis=-1)
    kept = (seen * seen_back * (apart < 1)).ravel() > 0
    return corners[kept, 0], there[kept, 0]


def step_rates(first, second) -> list[float]:
    """The four rates from one prepared picture to the next; NaN where too few corners agree."""
    unseen = [np.nan] * 4
    here, there = followed(first, second)
    if len(here) < FEWEST:
        return unseen
    h, w = first.shape
    centre = np.array([w, h]) / 2
    cv2.setRNGSeed(0)
    matrix, agree = cv2.estimateAffinePartial2D(
        here - centre,
        there - centre,
        method=cv2.RANSAC,
        ransacReprojThreshold=1.0,
        maxIters=5000,
        confidence=0.999,
    )
    if matrix is None or agree.sum() < FEWEST:
        return unseen
    (a, _, right), (b, _, down) = matrix
    zoom = np.log(np.hypot(a, b))
    turn = np.arctan2(b, a)
    return [-100 * right / w, 100 * down / h, 100 * zoom, -100 * turn]


def track(frames) -> np.ndarray:
    """A clip (N, 3, H, W) in [0, 1] -> rates (N - 1, 4), as extras/camera.py has them; NaN: unseen."""
    grey = frames.float().mean(1).numpy()
    pictures = [prepared(picture) for picture in grey]
    rates = []
    for first, second in zip(pictures, pictures[1:], strict=False):
        rates.append(step_rates(first, second))
    return np.array(rates)


def amount(rates: np.ndarray, move: str) -> float:
    """The told rate; for `still` the mean size of all four; for `smooth` that of their change in time; for
    `drift` that of their means, which is what a shaking camera has left when it is smooth."""
    if move in NAMES:
        return float(np.nanmean(rates[:, NAMES.index(move)]))
    if move == "smooth":
        rates = np.diff(rates, axis=0)
    if move == "drift":
        rates = np.nanmean(rates, axis=0)
    return float(np.nanmean(np.abs(rates)))
