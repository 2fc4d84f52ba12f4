"""--resume, and what an --out that holds something must be for a run to begin or to go on in it."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import torch

import vader
from extras import page, watch
from extras.find_lora import is_same_path
from extras.holding import hold_folder
from extras.record import run_settings
from rewards import as_bad_input, read_json, require

# What may change when a run goes on, and what is the same by another path.
FREE = "out resume steps eval_every tracker push_to_hub device prompts eval_prompts versions".split()
FREE += ["stop_when_worse"]
FREE_IN_STRENGTH = ["mode", "watch", "eval_videos", "eval_batch_size", "processes"]
PATHS = ("model", "lora", "base_lora", "reward_weights", "vlm")

DONE = "videos.jsonl"  # of --mode sample and eval: a row for each batch of videos, with its scores


# ---- What is written ---------------------------------------------------------------------------------------
def save_checkpoint(run, optimizer, step: int, skipped: int):
    """Write what `restore_checkpoint` reads."""
    state = {"lora": vader.lora_parameters(run.model), "optimizer": optimizer.state_dict()}
    state |= {"scaler": run.scaler.state_dict(), "step": step, "skipped": skipped}
    file = io.BytesIO()
    torch.save(state, file)
    vader.write_atomic(Path(run.cfg.out) / "checkpoint" / "state.pt", file.getvalue())


# ---- What is checked ---------------------------------------------------------------------------------------
def check_out(cfg):
    """Can --out be written, by nobody else? What a kill left half written is cleared."""
    out = Path(cfg.out)
    with as_bad_input(f"--out {out} can't be written: give another"):
        if vader.ranks()[0] == 0:
            with hold_folder(out):
                is_run = (out / "config.json").exists()  # below another folder somebody may be writing
                leftovers = out.rglob(".tmp-vader-*") if is_run else out.glob(".tmp-vader-*")
                for leftover in list(leftovers):
                    if leftover.is_dir():
                        shutil.rmtree(leftover)
                    else:
                        leftover.unlink()
                room = out / ".room"
                try:
                    room.write_bytes(bytes(1 << 20))
                finally:
                    room.unlink(missing_ok=True)


def check_folder(cfg, prompts: list):
    """Refuse an --out that a run can't begin in, or with --resume go on in. Raises BadInput.

    prompts: those of the run, trained on and held out.
    """
    out = Path(cfg.out)
    names = {path.name for path in out.glob("[!.]*")}
    if cfg.mode == "strength":
        advice = "give the command that made the run, with --mode strength"
        is_run = names >= {"config.json", "metrics.jsonl", "lora", "samples"}
        require(is_run, f"{out} holds no run with evaluations: {advice}")
        check_settings(out, run_settings(cfg, prompts), FREE + FREE_IN_STRENGTH)
        check_metrics(out)
        rows = watch.evaluations_of(cfg)
        has_base = rows and rows[0]["step"] == 0
        require(has_base, f"{out}/metrics.jsonl has no evaluation of the base: {advice}, elsewhere")
        page.read_strength(out)
        return
    if not names:
        if cfg.resume:
            print(f"{out} is empty: there is nothing to go on with, so all is done from the start")
        return
    require("config.json" in names, f"{out} is not empty: give another --out")
    if cfg.mode != "train":
        advice = "give another --out, or --resume to go on with videos that this command began"
        require(cfg.resume, f"{out} is not empty: {advice}")
        check_settings(out, run_settings(cfg, prompts), [*FREE, "processes"])
        read_done(out)
        return
    mode = read_json(out / "config.json").get("mode")
    require(mode == "train", f"{out} is of --mode {mode}: give another --out")
    updates = check_metrics(out)
    checkpoint = out / "checkpoint" / "state.pt"
    if updates < 2 and not checkpoint.exists() and (cfg.resume or "lora" not in names):
        return  # A kill in the first update: at most its LoRA is written, and nothing is lost.
    page.read_strength(out)
    require(cfg.resume, f"{out} holds a run: add --resume to go on with it, or give another --out")
    check_settings(out, run_settings(cfg, prompts))
    check_checkpoint(checkpoint, cfg, updates)


def check_metrics(out: Path) -> int:
    """How many updates metrics.jsonl tells of, and a line if videos of its evaluations are gone."""
    path = out / "metrics.jsonl"
    updates, lost = 0, []
    with as_bad_input(f"{path} is damaged: give another --out"):
        for row in vader.read_metrics(out):
            updates = max(updates, int(row["step"]))
            if "eval" not in row:
                continue
            evaluation = row["eval"]
            folder = out / evaluation["folder"]
            if not (folder / "000.mp4").exists():
                lost.append(folder.name)
            if "reward" in evaluation:
                zeros = [0.0] * len(evaluation["prompts"])
                watch.paired_gain(evaluation["reward"], zeros)  # raises unless there is a number for each
    if lost:
        print(f"the page has no videos of {', '.join(lost)}: they are gone")
    return updates


def read_done(out: Path) -> dict:
    """The evaluations of videos.jsonl, by folder and number of the first video. Raises BadInput."""
    done = {}
    with as_bad_input(f"{out}/{DONE} is damaged: give another --out"):
        for row in vader.read_metrics(out, DONE):
            evaluation = row["eval"]
            count = len(evaluation["prompts"])
            for name, values in evaluation.items():
                whole = name == "folder" or len(values) == count
                require(whole, f"{out}/{DONE} is damaged: give another --out")
            done[evaluation["folder"], int(row["first"])] = evaluation
    return done


def check_settings(out: Path, settings: dict, free=FREE):
    """Refuse settings that are not those of config.json, but for what is free."""
    before = read_json(out / "config.json")
    settings = json.loads(json.dumps(settings, default=str))
    for name, value in settings.items():
        old = before.get(name)
        if name in free or old == value or (name in PATHS and is_same_path(old, value)):
            continue
        if name == "prompts_used":
            started = "with other prompts"
        elif name.startswith("content of"):
            started = f"with another {name}"
        elif name == "processes":
            started = f"with {old} processes"
        elif old is None:
            started = f"without --{name}"
        else:
            started = f"with --{name} {old}"
        require(False, f"{out} was started {started}: resume it so, or give another --out")


def check_checkpoint(path: Path, cfg, updates: int):
    """Refuse a checkpoint that is damaged, or that does not fit --steps and metrics.jsonl."""
    out, advice = cfg.out, f"go on with --lora {cfg.out}/lora and another --out"
    with as_bad_input(f"{path} is gone or damaged: {advice}"):
        require(zipfile.ZipFile(path).testzip() is None, f"{path} is damaged: {advice}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, skipped = state["step"], state["skipped"]
        require(type(step) is type(skipped) is int, f"{path} is damaged: {advice}")
        for weights in state["lora"].values():
            require(weights.isfinite().all(), f"{path} is damaged: {advice}")
    require(step <= cfg.steps, f"{out} has {step} updates: give --steps as many, or more")
    require(updates >= step >= 1, f"{out} has lost rows of its metrics.jsonl: {advice}")


# ---- What is read ------------------------------------------------------------------------------------------
def restore_checkpoint(run, optimizer) -> tuple[int, int]:
    """With --resume, go on with the checkpoint of --out -> updates made, and skipped of these.

    Rows of metrics.jsonl after it are cut off: they are made again.
    """
    path = Path(run.cfg.out) / "checkpoint" / "state.pt"
    if not (run.cfg.resume and path.exists()):
        return 0, 0
    parameters = vader.lora_parameters(run.model)
    with as_bad_input(f"{path} is damaged: give another --out"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(state["lora"].keys() == parameters.keys(), f"{path} holds another LoRA: give another --out")
        groups = zip(state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
        same = all(old.keys() == new.keys() for old, new in groups)
        require(same, f"{path} is of another optimizer: resume with that one, or give another --out")
        run.model.denoiser.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
    if vader.ranks()[0] == 0:
        kept = ""
        for row in vader.read_metrics(Path(run.cfg.out)):
            if row["step"] <= state["step"]:
                kept += json.dumps(row, ensure_ascii=False) + "\n"
        vader.write_atomic(Path(run.cfg.out) / "metrics.jsonl", kept)
    return state["step"], state["skipped"]
