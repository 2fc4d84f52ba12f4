"""The first videos of a run as a picture, a row each: three frames of the base, three of best/ or of lora/.

python bench/strip.py runs/aesthetic-tiny-few bench/aesthetic.png
"""

import sys
from pathlib import Path

import imageio.v3 as iio

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import hub, images  # noqa: E402


def picture_of(run: Path):
    """(H, W, 3) uint8."""
    base, tuned, first = hub.shown_evaluations(run, vader.read_metrics(run))
    return images.strip(run / base["folder"], run / tuned["folder"], range(first, first + 6))


if __name__ == "__main__":
    iio.imwrite(sys.argv[2], picture_of(Path(sys.argv[1])))
