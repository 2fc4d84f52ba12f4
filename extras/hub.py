"""--push_to_hub: a trained LoRA on the Hugging Face hub, with a model card and videos that show it."""

import shlex
import shutil
from pathlib import Path

import imageio.v3 as iio
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from extras.images import strip
from extras.lora_files import describe
from extras.page import read_strength
from extras.watch import names_of, summary
from rewards import BadInput, read_json, require
from vader import Config, find_model, read_config

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
    base, tuned, first = shown_evaluations(Path(cfg.out), rows)
    lora = Path(cfg.out) / "lora"
    if first:
        lora = Path(cfg.out) / "best"
    shutil.copytree(lora, folder)
    videos, widget = show_videos(cfg, base, tuned, first, folder)
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
        second = ", load_into_transformer_2=True" if family.folder == "transformer_2" else ""
        load = f'pipe.load_lora_weights("{cfg.push_to_hub}"{second})'
    else:
        data.library_name = "peft"
        pipeline = read_config(source, "model_index.json")["_class_name"]
        part = f"pipe.{family.folder}"
        load = f'{part} = peft.PeftModel.from_pretrained({part}, "{cfg.push_to_hub}")'
    has_comfy = (folder / "comfyui.safetensors").exists()
    return CARD.format(
        data=data.to_yaml(),
        about=describe(about["base_model"], about["base_lora"], family),
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


def shown_evaluations(out: Path, rows: list[dict]) -> tuple[dict | None, dict | None, int]:
    """Evaluations of the base and of the LoRA that is shown, and the number of their first video.

    best/, where there is one, is shown by the videos that did not choose it; else lora/ by the last ones.
    """
    found = read_strength(out)
    if found and found["best"]:
        report = found["report"]
        return report["base"], report["best"], report["first"]
    evaluations = [row["eval"] for row in rows if "eval" in row]
    if not evaluations:
        return None, None, 0
    return evaluations[0], evaluations[-1], 0


def show_videos(cfg, base, tuned, first: int, folder: Path) -> tuple[str, list[dict]]:
    """Put the first videos of `shown_evaluations` into folder -> their part of the card, and its `widget`."""
    if not base:
        return "", []
    text = f"Held out, base -> tuned: {summary(base['reward'], tuned['reward'])}."
    for name in names_of(cfg):
        if name in base:
            text += f" {name}, not trained on: {summary(base[name], tuned[name])}."
    if cfg.lora:
        text += " Base is the LoRA that training began from."
    shown, table, widget = [], "", []
    folders = [Path(cfg.out) / evaluation["folder"] for evaluation in (base, tuned)]
    for n in range(first, first + SHOWN):
        files = [videos / f"{n:03d}.mp4" for videos in folders]
        if not all(file.exists() for file in files):
            continue
        shown.append(n)
        base_copy, tuned_copy = f"videos/{n:03d}-base.mp4", f"videos/{n:03d}-tuned.mp4"
        (folder / "videos").mkdir(exist_ok=True)
        shutil.copy(files[0], folder / base_copy)
        shutil.copy(files[1], folder / tuned_copy)
        prompt = " ".join(tuned["prompts"][n - first].split())
        cell = prompt.replace("|", "/")
        table += f"| {cell} | [base]({base_copy}) | [tuned]({tuned_copy}) |\n"
        widget.append({"text": prompt or "-", "output": {"url": tuned_copy}})
    if shown:
        iio.imwrite(folder / "strip.png", strip(*folders, shown))
        text += "\n\n![left: base, right: tuned](strip.png)\n\n| prompt | | |\n|---|---|---|\n"
        text += table.rstrip("\n")
    return f"\n{text}\n", widget
