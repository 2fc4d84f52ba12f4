"""The first videos of a run as a picture, a row each: three frames of the base, three after training.

python bench/strip.py runs/aesthetic-tiny-few bench/aesthetic.png
"""

import sys
from pathlib import Path

import imageio.v3 as iio

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from extras.hub import strip  # noqa: E402 (needs the line above)

if __name__ == "__main__":
    iio.imwrite(sys.argv[2], strip(Path(sys.argv[1])))
