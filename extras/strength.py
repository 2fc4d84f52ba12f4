"""best/: the LoRA of the run, among evaluations and strengths, that no judge of --watch finds worse.

The candidates are the LoRA of each evaluation, and the last one at STRENGTHS, on the same prompts and noise.
Chosen is that with the highest reward of those at which no judge is ERRORS standard errors below the base.
How good it is is then told by videos with other noise, which did not choose it.
"""

import json
import shutil
from pathlib import Path

import numpy as np

import vader
from extras import checks, holding, page, watch
from extras.lora_scale import at_strength, multiply, with_lora_of
from vader import write_atomic

STRENGTHS = (0.25, 0.5, 0.75)
ERRORS = 0.5  # see bench/alarms.py: a false alarm costs some of the strength, a miss all that was good


# ---- --mode strength ---------------------------------------------------------------------------------------
def try_strengths(cfg, reward=None):
    """Choose best/ of a run that is done anew, maybe by other judges or more videos. Raises BadInput.

    reward: a function of one's own, that of the run.
    """
    checks.check_input(cfg, reward)
    cfg = vader.resolve(cfg, reward)
    _, held_out = vader.split_prompts(cfg)
    prompts = [held_out[n % len(held_out)] for n in range(2 * cfg.eval_videos)]
    with holding.hold_run(cfg):
        find_best(vader.load_run(cfg, prompts, reward), prompts)


def find_best(run, prompts: list):
    """Choose best/ of a run, of the LoRAs that its evaluations have kept, and write strength.json.

    prompts: two for each video of an evaluation; the second half is for videos that choose nothing.
    """
    if vader.ranks()[0] == 0:
        choose_best(run, prompts)
        vader.gather(None)
        return
    while asked := vader.gather(None)[0]:  # the others make their share of the videos
        make_share(run, prompts, *asked)


def choose_best(run, prompts: list):
    """The first process's part of `find_best`."""
    cfg = run.cfg
    half, judges = cfg.eval_videos, watch.names_of(cfg)
    found = page.read_strength(Path(cfg.out)) or {"looks": []}
    kept = lora_folder(cfg, watch.evaluations_of(cfg)[0]["step"])
    if not kept.exists():
        print(f"no best/: {kept} is gone, which all are compared with")
        return
    base, looks = look_at_all(run, prompts, found)
    best = choose(cfg, base, looks)
    if best is None:
        print(f"no best/: {why_none(cfg, base, looks)}")
        earlier = Path(cfg.out) / "best"
        if earlier.exists():
            print("what best/ held, by an earlier choice, is deleted; the LoRAs of the evaluations are kept")
            shutil.rmtree(earlier)
        write(cfg, {"looks": found["looks"], "best": None})
        return
    chosen = {"step": best["step"], "strength": best["strength"]}
    same = found.get("best") == chosen and found["report"]["judges"] == judges
    folders = ("best", "samples/report_base", "samples/report_best")
    there = all((Path(cfg.out) / name).exists() for name in folders)
    if not (same and there) or found["report"]["first"] != half:
        report = {"judges": judges, "first": half}
        for name, look in (("base", base), ("best", best)):
            report[name] = evaluate(run, prompts, look, f"samples/report_{name}", half)
        save_best(run, best)
        found = {"looks": found["looks"], "best": chosen, "why": describe(cfg, best), "report": report}
        write(cfg, found)
    tell(cfg, found)


def write(cfg, found: dict):
    """Write strength.json, in which what is not finite is null, and the page."""
    finite = json.loads(json.dumps(found), parse_constant=lambda name: None)
    write_atomic(Path(cfg.out) / "strength.json", json.dumps(finite, indent=1))
    watch.write_page(cfg)


# ---- The choice --------------------------------------------------------------------------------------------
def look_at_all(run, prompts, found: dict) -> tuple[dict, list[dict]]:
    """Evaluations of the base and of the candidates, {"step", "strength", "eval"}.

    What is not there yet, with this many videos and these judges, is made, and added to found["looks"].
    """
    cfg = run.cfg
    rows = watch.evaluations_of(cfg)
    done, wanted = {}, []
    for row in [*rows, *found["looks"]]:  # looks of a shorter run, maybe
        look = {"step": row["step"], "strength": row.get("strength", 1.0), "eval": row["eval"]}
        place = look["step"], look["strength"]
        wanted.append(place)
        complete = len(row["eval"]["prompts"]) == cfg.eval_videos
        if complete and row["eval"].keys() >= set(watch.names_of(cfg)):
            done[place] = look
    for strength in STRENGTHS:
        wanted.append((rows[-1]["step"], strength))
    looks = []
    for step, strength in dict.fromkeys(wanted):  # each once
        look = {"step": step, "strength": strength}
        if not lora_folder(cfg, step).exists():
            continue  # of a run that kept none
        if (step, strength) not in done:
            look["eval"] = evaluate(run, prompts, look, f"samples/step_{step:06d}_x{strength:g}")
            others = [old for old in found["looks"] if (old["step"], old["strength"]) != (step, strength)]
            found["looks"] = [*others, look]
            done[step, strength] = look
            write(cfg, found)
        looks.append(done[step, strength])
    return looks[0], looks[1:]


def lora_folder(cfg, step: int) -> Path:
    """Where the LoRA of an evaluation is kept."""
    return Path(cfg.out) / f"samples/step_{step:06d}" / "lora"


def evaluate(run, prompts, look: dict, folder: str, first=0) -> dict:
    """Videos of a candidate, numbered from `first`, and their scores, as those of `vader.evaluate`."""
    place = look["step"], look["strength"]
    vader.gather((*place, folder, first))
    return make_share(run, prompts, *place, folder, first)


def make_share(run, prompts, step: int, strength: float, folder: str, first: int) -> dict:
    """What `evaluate` asks of each process."""
    chosen = prompts[first : first + run.cfg.eval_videos]
    with with_lora_of(run.model, lora_folder(run.cfg, step)), at_strength(run.model, strength):
        return vader.evaluate(run, chosen, folder, first)


def fallen(cfg, base: dict, look: dict) -> list[str]:
    """The judges that are below the base."""
    names = []
    for name in watch.names_of(cfg):
        if watch.has_fallen(base["eval"][name], look["eval"][name], ERRORS):
            names.append(name)
    return names


def choose(cfg, base: dict, looks: list[dict]) -> dict | None:
    """The look of highest reward at which no judge has fallen; None if none of these is above the base."""
    best, highest = None, np.mean(base["eval"]["reward"])
    for look in looks:
        mean = np.mean(look["eval"]["reward"])
        if mean > highest and not fallen(cfg, base, look):
            best, highest = look, mean
    return best


def why_none(cfg, base: dict, looks: list[dict]) -> str:
    """Why there is no best/, in words."""
    judges = set()
    for look in looks:
        if np.mean(look["eval"]["reward"]) > np.mean(base["eval"]["reward"]):
            judges.update(fallen(cfg, base, look))
    if not judges:
        return "the reward is nowhere above the base's"
    names = " or ".join(sorted(judges))
    return f"where the reward is above the base's, {names} is {ERRORS} standard errors below it"


# ---- What is written and told ------------------------------------------------------------------------------
def save_best(run, best: dict):
    """Write best/: as lora/, but of that evaluation, and of that strength at strength 1."""
    cfg = run.cfg
    folder = Path(cfg.out) / "best"
    with with_lora_of(run.model, lora_folder(cfg, best["step"])):
        multiply(run.model, best["strength"])
        vader.save_lora(run.model, folder, cfg)
    card = folder / "README.md"
    write_atomic(card, card.read_text() + f"\nIt is {describe(cfg, best)}.\n")


def describe(cfg, best: dict) -> str:
    """Which LoRA is in best/ and why, in words."""
    words = f"that after update {best['step']}"
    if best["strength"] != 1:
        words += f" at {best['strength']:g} of its strength (at strength 1 here)"
    judges = " or ".join(watch.names_of(cfg))
    return f"{words}, of highest reward among those where {judges}, not trained on, did not fall"


def tell(cfg, found: dict):
    """Print which LoRA best/ is, and how good on videos that did not choose it."""
    base, best = found["report"]["base"], found["report"]["best"]
    count = len(base["prompts"])
    print(f"best/ is {describe(cfg, found['best'])}; on {count} videos that did not choose it:")
    for name in ("reward", *watch.names_of(cfg)):
        print(f"  {name}: {watch.summary(base[name], best[name])}")
