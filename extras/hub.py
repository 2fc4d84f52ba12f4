"""--push_to_hub: a trained LoRA on the Hugging Face hub, with a model card and videos that show it."""

import re
import shlex
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from rewards import BadInput, as_bad_input, require
from vader import Config, evenly_spaced, find_model, read_config, read_metrics, summary

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
# settings that say nothing of the LoRA, or are places on one's own machine
PRIVATE = "model prompts eval_prompts lora base_lora out resume reward_weights vlm device tracker push_to_hub"


def check_hub(cfg):
    """Raises BadInput unless cfg.push_to_hub is a repository's name, and the hub knows who asks."""
    repo, wanted = cfg.push_to_hub, f"--push_to_hub {cfg.push_to_hub}: give owner/name, of a repository"
    require(cfg.mode == "train", "--push_to_hub is for a run that trains: give it there, with --resume")
    with as_bad_input(wanted):
        validate_repo_id(repo)
    require("/" in repo, wanted)
    login = "you are not logged in to the hub: run `hf auth login`"
    require(get_token(), f"--push_to_hub {repo}: {login}")
    ask(repo, f"{login}, or see to the network", HfApi().whoami)


def ask(repo: str, problem: str, question, **given):
    """question(**given), of the hub. Raises BadInput where that fails: problem, and why."""
    try:
        return question(**given)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise BadInput(f"--push_to_hub {repo}: {problem} ({said})") from None


def strip(run: Path, numbers=range(6)):
    """Videos of a run as a picture, a row each: three frames of the base, three after training.

    (H, W, 3) uint8, the videos at half their size, from the first and the last evaluation.
    """
    folders = [row["eval"]["folder"] for row in read_metrics(run) if "eval" in row]
    lines = []
    for n in numbers:
        files = [run / folder / f"{n:03d}.mp4" for folder in (folders[0], folders[-1])]
        films = [iio.imread(file, plugin="FFMPEG") for file in files]
        stills = [frame for film in films for frame in film[evenly_spaced(3, len(film)), ::2, ::2]]
        lines.append(np.concatenate(stills, axis=1))
    return np.concatenate(lines)


def show_videos(cfg, rows: list[dict], folder: Path) -> tuple[str, list]:
    """Put the first held-out videos into folder -> their part of the card, and its metadata's `widget`."""
    found = [row["eval"] for row in rows if "eval" in row]
    if not found:
        return "", []
    first, last, out, lines, widget = found[0], found[-1], Path(cfg.out), [], []
    files = {n: [out / one["folder"] / f"{n:03d}.mp4" for one in (first, last)] for n in range(6)}
    shown = [n for n, pair in files.items() if all(file.exists() for file in pair)]
    for n in shown:
        names = [f"videos/{n:03d}-{which}.mp4" for which in ("base", "tuned")]
        (folder / "videos").mkdir(exist_ok=True)
        for file, name in zip(files[n], names, strict=True):
            shutil.copy(file, folder / name)
        text = " ".join(last["prompts"][n].split())
        lines.append(f"| {text.replace('|', '/')} | [base]({names[0]}) | [tuned]({names[1]}) |")
        widget.append({"text": text or "-", "output": {"url": names[1]}})
    said = f"Held out, base -> tuned: {summary(first['reward'], last['reward'])}."
    said += " Base is the LoRA that training began from." * bool(cfg.lora)
    if shown:
        iio.imwrite(folder / "strip.png", strip(out, shown))
        said += "\n\n![left: base, right: tuned](strip.png)\n\n| prompt | | |\n|---|---|---|\n" + "\n".join(
            lines
        )
    return f"\n{said}\n", widget


def write_repository(cfg, rows: list[dict]) -> Path:
    """The folder hub/ of the run, which is pushed: the LoRA's files, videos, strip.png, README.md."""
    folder, (family, source, preset) = Path(cfg.out) / "hub", find_model(cfg.model)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(cfg.out) / "lora", folder)
    about = "".join(re.findall("^A LoRA .*", (folder / "README.md").read_text(encoding="utf-8"), re.M))
    videos, widget = show_videos(cfg, rows, folder)
    stock, part, local = family.lora_pipeline, f"pipe.{family.folder}", Path(source).exists()
    load = f'{part} = peft.PeftModel.from_pretrained({part}, "{cfg.push_to_hub}")'
    kind = "image-to-video" if family.images == "must" else "text-to-video"
    data = ModelCardData(base_model=None if local else source, library_name="diffusers" if stock else "peft")
    data.pipeline_tag, data.tags, data.widget = kind, ["lora", "vader", kind], widget
    given = {"model": Path(cfg.model).name if local else cfg.model}
    given |= {k: v for k, v in vars(cfg).items() if v != getattr(Config, k) and k not in PRIVATE.split()}
    words = (word for name, value in given.items() for word in (f"--{name}", str(value)))
    comfy = (
        "With ComfyUI: put `comfyui.safetensors` into `models/loras`; the node is *LoraLoaderModelOnly*.\n"
    )
    parts = dict(data=data.to_yaml(), about=about, reward=cfg.reward, videos=videos)
    parts["toy"] = ", on a toy model" * ("rewards" in preset)
    parts["pipeline"] = stock.__name__ if stock else read_config(source, "model_index.json")["_class_name"]
    parts["load"] = f'pipe.load_lora_weights("{cfg.push_to_hub}")' if stock else load
    parts["comfy"] = f"\n{comfy}" * (folder / "comfyui.safetensors").exists()
    parts["command"] = shlex.join(["vader.py", *words])
    ModelCard(CARD.format(**parts)).save(folder / "README.md")
    return folder


def push(cfg, rows: list[dict]):
    """Write the folder hub/ of the run and push it. Raises BadInput, with what to do: the run is whole."""
    repo, folder = cfg.push_to_hub, write_repository(cfg, rows)
    again = f"not pushed, the run is whole in {cfg.out}: give the command again with --resume,"
    again += f" or `hf upload {repo} {folder}`"
    ask(repo, again, HfApi().create_repo, repo_id=repo, exist_ok=True)
    words = f"A LoRA made by reward gradients: {cfg.reward}"
    ask(repo, again, HfApi().upload_folder, repo_id=repo, folder_path=folder, commit_message=words)
    print(f"pushed: https://huggingface.co/{repo}")
