"""Gold beside the proxy: what judges see that nothing is trained on.

Proxy: the reward that is trained on. Judges: the other rewards of REWARDS. Gold: the share of a prompt's four
words that the detectors of tiny/ see as told, which no reward uses (Gao et al. 2023, arXiv 2210.10760, do so
for language models).
"""

import functools
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
from train_detector import load_detector  # noqa: E402 (needs the line above)
from world import COMBINATIONS, caption  # noqa: E402

import rewards  # noqa: E402
import vader  # noqa: E402

REWARDS = ("aesthetic", "clip", "hps")
WORDS = ("colour", "object", "motion", "place")
KNOWN = {caption(words): words for words in COMBINATIONS}


@functools.cache
def load():
    """The rewards' terms, and the detector."""
    terms = rewards.make_terms(" + ".join(REWARDS), "cpu", torch.float32, vader.TOY)
    return terms, load_detector(HERE.parent / "tiny")


def unseen_prompts() -> list[vader.Prompt]:
    """32 prompts of words that were never trained on together."""
    return vader.read_prompts(str(HERE.parent / "tiny" / "unseen.txt"))


def detected(detector, videos, texts: list[str]) -> dict[str, torch.Tensor]:
    """Of each word, (B,): 1 where the detector sees what the video's prompt says, else 0."""
    told = torch.tensor([KNOWN[text] for text in texts])
    found = {}
    for k, logits in enumerate(detector(videos)):
        found[WORDS[k]] = (logits.argmax(1) == told[:, k]).float()
    return found


@torch.no_grad()
def judge(run, prompts, terms, detector, number=0) -> dict[str, list[float]]:
    """Each judge's value of each prompt's video; of the detector: 1 where it sees what is told.

    number: of the first video, which its noise depends on.
    """
    values = {}
    for first in range(0, len(prompts), 8):
        chosen = prompts[first : first + 8]
        texts = [prompt.text for prompt in chosen]
        videos = vader.make_videos(run, chosen, number + first)
        figures = rewards.weighted_rewards(terms, videos, texts, videos.shape[1])
        del figures["reward"]
        figures |= detected(detector, videos, texts)
        for name, value in figures.items():
            values.setdefault(name, []).extend(value.tolist())
    return values
