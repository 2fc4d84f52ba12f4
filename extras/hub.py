"""--push_to_hub: a trained LoRA on the Hugging Face hub, with a model card and videos that show it."""

import shlex
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from extras.lora_files import describe
from rewards import BadInput, evenly_spaced, read_json, require
from vader import Config, find_model, read_config, read_metrics, summary

CARD = """\
---
{data}
---

{about} The method: [VADER](https://arxiv.org/abs/2407.08737). The reward: `{reward}`{toy}.
{videos}
With diffusers, in a {pipeline} of the base model: `{load}`.
{comfy}
The run: `{command}`
"""
COMFY = """
With ComfyUI: put `comfyui.safetensors` into `models/loras`; the node is *LoraLoaderModelOnly*.
"""
# settings that say nothing of the LoRA, or are places on one's own machine
PRIVATE = "model prompts eval_prompts lora base_lora out resume reward_weights vlm device tracker push_to_hub"
SHOWN = 6  # videos in a card


# ---- Asking the hub ----------------------------------------------------------------------------------------
def check_hub(cfg):
    """Raises BadInput unless cfg.push_to_hub is a repository's name, and the hub knows who asks."""
    repo = cfg.push_to_hub
    require(cfg.mode == "train", "--push_to_hub is for a run that trains: give it there, with --resume")
    problem = f"--push_to_hub {repo}: give owner/name, of a repository"
    require("/" in repo, problem)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"{problem} ({one_line(error)})") from None
    login = "you are not logged in to the hub: run `hf auth login`"
    require(get_token(), f"--push_to_hub {repo}: {login}")
    ask(repo, f"{login}, or see to the network", HfApi().whoami)


def ask(repo: str, problem: str, question, **kwargs):
    """question(**kwargs), of the hub. Raises BadInput where that fails: problem, and why."""
    try:
        return question(**kwargs)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"--push_to_hub {repo}: {problem} ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:150]}"


def push(cfg, rows: list[dict]):
    """Write the folder hub/ of the run and push it. Raises BadInput, with what to do: the run is whole."""
    repo = cfg.push_to_hub
    folder = write_repository(cfg, rows)
    problem = f"not pushed, the run is whole in {cfg.out}: give the command again with --resume,"
    problem += f" or `hf upload {repo} {folder}`"
    ask(repo, problem, HfApi().create_repo, repo_id=repo, exist_ok=True)
    message = f"A LoRA made by reward gradients: {cfg.reward}"
    ask(repo, problem, HfApi().upload_folder, repo_id=repo, folder_path=folder, commit_message=message)
    print(f"pushed: https://huggingface.co/{repo}")


# ---- What is pushed ----------------------------------------------------------------------------------------
def write_repository(cfg, rows: list[dict]) -> Path:
    """The folder hub/ of the run, which is pushed: the LoRA's files, videos, strip.png, README.md.

    rows: of metrics.jsonl. Raises BadInput when the LoRA's vader.json is gone or damaged.
    """
    folder = Path(cfg.out) / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(cfg.out) / "lora", folder)
    videos, widget = show_videos(cfg, rows, folder)
    card = ModelCard(make_card(cfg, folder, videos, widget))
    card.save(folder / "README.md")
    return folder


def make_card(cfg, folder: Path, videos: str, widget: list[dict]) -> str:
    """The text of the model card. folder: the LoRA's files; videos, widget: of `show_videos`."""
    family, source, preset = find_model(cfg.model)
    about = read_json(folder / "vader.json")
    kind = "image-to-video" if family.images == "must" else "text-to-video"
    data = ModelCardData(pipeline_tag=kind, tags=["lora", "vader", kind], widget=widget)
    if not Path(source).exists():
        data.base_model = source
    if family.lora_pipeline:
        data.library_name = "diffusers"
        pipeline = family.lora_pipeline.__name__
        load = f'pipe.load_lora_weights("{cfg.push_to_hub}")'
    else:
        data.library_name = "peft"
        pipeline = read_config(source, "model_index.json")["_class_name"]
        part = f"pipe.{family.folder}"
        load = f'{part} = peft.PeftModel.from_pretrained({part}, "{cfg.push_to_hub}")'
    has_comfy = (folder / "comfyui.safetensors").exists()
    return CARD.format(
        data=data.to_yaml(),
        about=describe(about["base_model"], about["base_lora"]),
        reward=cfg.reward,
        toy=", on a toy model" if "rewards" in preset else "",
        videos=videos,
        pipeline=pipeline,
        load=load,
        comfy=COMFY if has_comfy else "",
        command=public_command(cfg),
    )


def public_command(cfg) -> str:
    """The command that makes such a run, without what is private."""
    _, source, _ = find_model(cfg.model)
    model = cfg.model
    if Path(source).exists():
        model = Path(model).name
    words = ["vader.py", "--model", model]
    for name, value in vars(cfg).items():
        is_default = value == getattr(Config, name)
        if not is_default and name not in PRIVATE.split():
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def show_videos(cfg, rows: list[dict], folder: Path) -> tuple[str, list[dict]]:
    """Put the first held-out videos into folder -> their part of the card, and its metadata's `widget`."""
    evaluations = [row["eval"] for row in rows if "eval" in row]
    if not evaluations:
        return "", []
    first, last = evaluations[0], evaluations[-1]
    text = f"Held out, base -> tuned: {summary(first['reward'], last['reward'])}."
    if cfg.lora:
        text += " Base is the LoRA that training began from."
    shown, table, widget = [], "", []
    for n in range(SHOWN):
        base = Path(cfg.out) / first["folder"] / f"{n:03d}.mp4"
        tuned = Path(cfg.out) / last["folder"] / f"{n:03d}.mp4"
        if not (base.exists() and tuned.exists()):
            continue
        shown.append(n)
        base_copy, tuned_copy = f"videos/{n:03d}-base.mp4", f"videos/{n:03d}-tuned.mp4"
        (folder / "videos").mkdir(exist_ok=True)
        shutil.copy(base, folder / base_copy)
        shutil.copy(tuned, folder / tuned_copy)
        prompt = " ".join(last["prompts"][n].split())
        cell = prompt.replace("|", "/")
        table += f"| {cell} | [base]({base_copy}) | [tuned]({tuned_copy}) |\n"
        widget.append({"text": prompt or "-", "output": {"url": tuned_copy}})
    if shown:
        iio.imwrite(folder / "strip.png", strip(Path(cfg.out), shown))
        text += "\n\n![left: base, right: tuned](strip.png)\n\n| prompt | | |\n|---|---|---|\n"
        text += table.rstrip("\n")
    return f"\n{text}\n", widget


def strip(run: Path, numbers=range(SHOWN)):
    """Videos of a run as a picture, a row each: three frames of the base, three after training.

    (H, W, 3) uint8, the videos at half their size, from the first and the last evaluation.
    """
    folders = [row["eval"]["folder"] for row in read_metrics(run) if "eval" in row]
    lines = []
    for n in numbers:
        stills = []
        for folder in (folders[0], folders[-1]):
            video = iio.imread(run / folder / f"{n:03d}.mp4", plugin="FFMPEG")  # (F, H, W, 3)
            stills += list(video[evenly_spaced(3, len(video)), ::2, ::2])
        lines.append(np.concatenate(stills, axis=1))
    return np.concatenate(lines)
