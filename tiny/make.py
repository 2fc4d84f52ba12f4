"""Draw the tiny world and train every model of it: text to video, image to video, and their rewards.

    python tiny/make.py            # everything, from seed 0, into tiny/
    python tiny/make.py --score    # measure what is in tiny/

world.py draws, a train_*.py trains each model, scores.py measures them, and its head has what they scored.

Takes about six hours on 2 cores: CLIP 11 minutes, autoencoder 25, U-Net 42, aesthetic 8, detectors 3, the
other rewards about 120, ask 52; image to video see below, Wan about 50, few 65 on one core.

The weights in the repository were trained in pieces that shared the two cores, remove first on shapes that
were not bent (4,000 updates) and then on bent ones (1,800), clip first without spoiled pictures (4,000) and
then with them (2,500; hps and pickscore were tuned from the first), vjepa on drawn clips (13,000), then on
marked ones (3,000 at a high rate), then with a new and larger predictor (5,600), so another run gives
others. For Wan one busy thread took 10 minutes for pictures (4,690 updates) and 13 for clips (2,472), both on
a cosine by the clock, and 20 for the transformer: 4,000 updates with 256 hidden units, then the 200 of each
layer with the largest weights for 800 more at half the learning rate. Image to video in bf16, on two cores
in 90 minutes: the autoencoder for 2,600 updates, then its decoder alone for 1,500; the U-Net, compiled, in
two processes of 16 clips each: 1,000 updates by AdamW and 1,500 by Muon on SVD's own loss, then 1,623 on that
of train_i2v.py. The U-Net saw 0.34 of a clip's pan at sigma 1 after 1,000 updates by Muon, 0.59 at the end.
All of that with cameras of 4 percent at most; then 1,500 updates of 32 clips on 4,096 new ones with cameras
of up to 10, 45 minutes on one core; then 3,300 of 32 on 6,144 new ones as views.py has them now, with more
texture and cameras that do one thing, in bf16, compiled, at six tenths of the rates: 30 minutes on two.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # rewards.py and vader.py are there
from scores import measure, measure_few, measure_i2v, measure_rewards, measure_wan
from train_action import train_action
from train_ask import train_ask
from train_clip import train_aesthetic, train_clip
from train_detector import train_detector
from train_few import train_few
from train_i2v import save_i2v, train_i2v_unet, train_i2v_vae
from train_preferences import train_clip_reward, train_preference
from train_remove import train_remove
from train_t2v import train_unet, train_vae
from train_vjepa import train_vjepa
from train_wan import WAN_FRAMES, save_wan, train_wan, train_wan_text, train_wan_vae
from training import make_pool
from views import draw_images
from world import SEEN

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--score", action="store_true", help="measure instead of training")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    out, seed = args.out, args.seed
    if not args.score:
        train_clip(out, 1000, seed)
        train_vae(out, [(1700, 2e-3, 0.0), (1000, 1e-3, 6.0)], seed)
        train_unet(out, 3000, 6000, 16, seed)
        train_aesthetic(out, 1000, seed)
        train_aesthetic(out, 800, seed + 1)
        train_detector(out, 800, seed)
        pool = make_pool(SEEN, 4096, seed + 60)
        train_clip_reward(out, pool, 4000, seed)
        train_preference(out, pool, "hps", 1500, seed)
        train_preference(out, pool, "pickscore", 1500, seed)
        train_remove(out, pool, 4000, seed)
        train_action(out, pool, 5000, seed)
        train_ask(out, make_pool(SEEN, 3072, seed + 60), 3000, seed)
        train_i2v_vae(out, 4100, 4096, seed)
        train_i2v_unet(out, 4100, 12288, seed)
        train_i2v_unet(out, 1500, 4096, seed + 7)
        train_i2v_unet(out, 3300, 6144, seed + 3)
        save_i2v(out)
        for leg in range(3):
            train_vjepa(out, 5600, 3584, seed + leg)
        train_wan_vae(out, [(1, 8, 4700, 2e-3), (WAN_FRAMES, 2, 2500, 1.5e-3)], seed)
        train_wan_text(out, 400, seed)
        train_wan(out, 4800, 5000, seed)
        save_wan(out)
        train_few(out, 1200, 700, 8, (32, 24), seed)
        draw_images(out, 60, seed)
    measure(out, args.samples, seed)
    measure_few(out, args.samples, seed)
    measure_rewards(out, seed)
    measure_i2v(out, args.samples // 2, seed)
    measure_wan(out, args.samples // 2, seed)


if __name__ == "__main__":
    main()
