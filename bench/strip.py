"""The first videos of a run as a picture, a row each: three frames of the base, three after training.

python bench/strip.py runs/aesthetic-tiny bench/aesthetic.png
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)


def strip(run: Path, rows=6):
    """(H, W, 3) uint8, the videos at half their size, from the first and the last evaluation of a run."""
    folders = [row["eval"]["folder"] for row in vader.read_metrics(run) if "eval" in row]
    lines = []
    for n in range(rows):
        files = [run / folder / f"{n:03d}.mp4" for folder in (folders[0], folders[-1])]
        films = [iio.imread(file, plugin="FFMPEG") for file in files]
        stills = [frame for film in films for frame in film[vader.evenly_spaced(3, len(film)), ::2, ::2]]
        lines.append(np.concatenate(stills, axis=1))
    return np.concatenate(lines)


if __name__ == "__main__":
    iio.imwrite(sys.argv[2], strip(Path(sys.argv[1])))
