"""--watch: judges, rewards that evaluations score and that nothing is trained on. What they say of a run."""

import math
import re
from pathlib import Path

import numpy as np
import torch

import rewards
import vader
from extras import page
from rewards import BadInput, require

FALLEN = 2.0  # standard errors below the base at which a judge has fallen; see bench/alarms.py


# ---- The judges --------------------------------------------------------------------------------------------
def spec_of(cfg) -> str:
    """--watch of a full config, as rewards are written; "none" where nothing is watched."""
    if cfg.watch.lower() == "none":
        return "none"
    if cfg.watch != "auto":
        return cfg.watch
    if cfg.mode in ("train", "strength") and cfg.eval_videos:
        words = re.findall(r"\w+", cfg.reward)
        for name in ("clip", "aesthetic", "hps"):
            if name not in words:
                return name
    return "none"


def judges_of(cfg) -> list[tuple]:
    """The (name, argument) of each judge of a full config. Raises BadInput."""
    spec = spec_of(cfg)
    if spec == "none":
        return []
    try:
        terms = rewards.parse(spec)
    except BadInput as error:
        raise BadInput(str(error).replace("--reward", "--watch").replace("0.5*", "")) from None
    judges = []
    for weight, *judge in terms:
        require(weight == 1, f"--watch {spec}: judges have no weights, of each a higher score is better")
        require(not is_among(judge, judges), f"--watch {spec}: {judge[0]} stands there twice, leave one out")
        judges.append(tuple(judge))
    return judges


def is_among(judge, judges) -> bool:
    """Is this (name, argument) one of these, in whatever spelling?"""
    same = [(name, rewards.plain(arg or "")) for name, arg in [judge, *judges]]
    return same[0] in same[1:]


def names_of(cfg) -> list[str]:
    """The judges' names in an evaluation."""
    return [f"{name}:{arg}" if arg else name for name, arg in judges_of(cfg)]


def check_watch(cfg, reward=None):
    """Are the judges rewards that are not trained on? reward: one's own. Raises BadInput."""
    judges = judges_of(cfg)
    trains = cfg.mode in ("train", "strength")
    require(trains or not cfg.stop_when_worse, "--stop_when_worse is for training: leave it out")
    if not judges:
        require(not cfg.stop_when_worse, "--stop_when_worse needs judges: give --watch, and --eval_videos")
        require(cfg.mode != "strength", "--mode strength needs judges: give --watch, and --eval_videos")
        return
    require(trains, "--watch is for training: score both by --reward, as a sum")
    require(cfg.eval_videos, "--watch is for evaluations: give --eval_videos")
    if reward:
        has_name = cfg.reward in names_of(cfg)
        require(not has_name, f"--watch {cfg.watch}: your own reward is called {cfg.reward}, too: rename it")
    else:
        for _, *judge in rewards.parse(cfg.reward):
            trained = is_among(judge, judges)
            require(not trained, f"--watch {cfg.watch}: {judge[0]} is trained on, watch another reward")


def load_judges(cfg, texts: list[str]) -> dict:
    """The judges' terms, {name: (1, reward)}. Raises BadInput."""
    spec = spec_of(cfg)
    if spec == "none":
        return {}
    places = [cfg.reward_weights, vader.find_model(cfg.model)[2].get("rewards")]
    dtype = vader.DTYPES[cfg.dtype]
    try:
        return rewards.make_terms(spec, cfg.device, dtype, places, texts, cfg.vlm, cfg.quantize)
    except BadInput as error:
        raise BadInput(f"--watch {spec}: {error}; or give --watch none") from None


@torch.no_grad()
def score_judges(run, videos, texts: list[str]) -> dict:
    """Figures of the judges, {name: (B,)}. Their networks then wait in host memory."""
    networks = rewards.networks_of(run.judges).to(run.model.device)
    figures = rewards.weighted_rewards(run.judges, videos, texts, run.cfg.decode_chunk)
    networks.to("cpu")
    del figures["reward"]
    return figures


# ---- What they say -----------------------------------------------------------------------------------------
def paired_gain(base: list, tuned: list) -> tuple[float, float]:
    """Mean of the differences between videos of the same prompt and noise, and its standard error."""
    gains = np.array(tuned, dtype=float) - np.array(base, dtype=float)  # NaN where a file has null
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return float(gains.mean()), float(error)


def summary(base, tuned) -> str:
    """The change from one list of figures to the other, in words."""
    gain, error = paired_gain(base, tuned)
    before, after = np.array([base, tuned], dtype=float).mean(axis=1)
    change = f"{before:.3f} -> {after:.3f} ({gain:+.3f}, standard error {error:.3f}"
    return f"{change}, {len(base)} videos, paired seeds)"


def has_fallen(base: list, tuned: list, errors: float) -> bool:
    """Is a judge's mean this many standard errors below the base's, or no number? One video has no error."""
    gain, error = paired_gain(base, tuned)
    if math.isfinite(gain) and len(base) == 1:
        return False
    return not (gain >= 0 or gain > -errors * error)


def evaluations_of(cfg) -> list[dict]:
    """The run's rows of evaluations, that of the base model first."""
    rows = [row for row in vader.read_metrics(Path(cfg.out)) if "eval" in row]
    return sorted(rows, key=lambda row: row["step"])


def since_when(cfg, name: str) -> list[int]:
    """Updates of the last evaluations in a row in which this judge has fallen, up to the last one."""
    rows = [row for row in evaluations_of(cfg) if name in row["eval"]]  # it may be watched since then only
    steps = []
    for row in reversed(rows[1:]):
        if not has_fallen(rows[0]["eval"][name], row["eval"][name], FALLEN):
            break
        steps.insert(0, row["step"])
    return steps


def warnings_of(cfg) -> list[str]:
    """A sentence for each judge that has fallen by the last evaluation."""
    rows = evaluations_of(cfg)
    sentences = []
    for name in names_of(cfg):
        steps = since_when(cfg, name)
        if steps:
            gain, _ = paired_gain(rows[0]["eval"]["reward"], rows[-1]["eval"]["reward"])
            rose = "rose" if gain > 0 else "did not rise"
            since = f"{name} has fallen since update {steps[0]}"
            sentences.append(f"the videos get worse: {since}, while {cfg.reward} {rose}")
    return sentences


def write_page(cfg):
    """The run's page, with what the judges say."""
    page.write(cfg, names_of(cfg), warnings_of(cfg))


def tell(cfg, step: int):
    """Print what the evaluation after `step` updates says beside the base's, and write the page.

    Raises FloatingPointError when the base's reward, or a judge's score of it, is not finite.
    """
    write_page(cfg)
    rows = evaluations_of(cfg)
    if step == 0 and rows:
        for name in ("reward", *names_of(cfg)):
            scores = np.array(rows[0]["eval"][name], dtype=float)
            if not np.isfinite(scores).all():
                raise FloatingPointError(f"{name} of the videos before training is not finite")
    if len(rows) < 2 or rows[-1]["step"] != step:
        return
    base, last = rows[0]["eval"], rows[-1]["eval"]
    print(f"  reward: {summary(base['reward'], last['reward'])}")
    for name in names_of(cfg):
        print(f"  {name}, not trained on: {summary(base[name], last[name])}")
    for sentence in warnings_of(cfg):
        print(f"  {sentence}")


def after_evaluation(cfg, step: int) -> bool:
    """`tell`, by the first process. To all: is the run to end, as --stop_when_worse has it?"""
    verdict = False
    if vader.ranks()[0] == 0:
        tell(cfg, step)
        for name in names_of(cfg):
            looks = len(since_when(cfg, name))
            if cfg.stop_when_worse and looks >= cfg.stop_when_worse:
                verdict = True
                print(f"stopped: {name} has fallen in {looks} evaluations in a row (--stop_when_worse)")
    return vader.gather(verdict)[0]
