"""Files of prompts: .jsonl files that name images, and what a file must be for a run to begin."""

import inspect
import json
import os
import re
from pathlib import Path

import torch

import rewards
import vader
from extras.images import open_image
from rewards import as_bad_input, require
from vader import Config, Prompt, VideoModel


def read_rows(path: str) -> list[Prompt]:
    """The prompts of a file of {"prompt": ..., "image": ...} lines; either may be left out. Raises BadInput.

    Image paths are relative to the file. Empty lines and # lines are left out.
    """
    prompts = []
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        prompt = read_row(where, line)
        if prompt.image:
            file = Path(path).parent / os.path.expanduser(prompt.image)
            require(os.path.isfile(file), f"{where}: can't read the image {file}: no file")
            prompt = prompt._replace(image=str(file))
        prompts.append(prompt)
    return prompts


def read_row(where: str, line: str) -> Prompt:
    """The prompt of a line of JSON, its image as it stands there. Raises BadInput, beginning with `where`."""
    problem = f'{where}: write {{"prompt": "...", "image": "file.png"}}'
    with as_bad_input(problem):
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # an escape can stand for half a character
    require(isinstance(row, dict), problem)
    require(row.keys() <= {"prompt", "image"}, problem)
    text = row.get("prompt", "")
    image = row.get("image") or None
    require(isinstance(text, str) and isinstance(image, str | None), problem)
    text = text.strip()
    require(text or image, problem)
    return Prompt(text, image)


def check_prompts(cfg: Config) -> list[Prompt]:
    """The prompts of the run, trained on and held out, of files that are as they should be."""
    family, source, _ = vader.find_model(cfg.model)
    prompts = check_prompt_file("--prompts", cfg.prompts, family)
    held_out = []
    if cfg.mode in ("train", "strength"):
        if cfg.eval_prompts:
            check_prompt_file("--eval_prompts", cfg.eval_prompts, family)
        lines = len(prompts)
        prompts, held_out = vader.split_prompts(cfg)
        tell_of_held_out(cfg, lines, prompts, held_out)
    warn_of_long_prompts(cfg, source, used_prompts(cfg, prompts, held_out))
    return prompts + held_out


def used_prompts(cfg: Config, prompts: list, held_out: list) -> list[Prompt]:
    """Those that the run draws or evaluates."""
    if cfg.mode in ("sample", "eval"):
        return prompts
    return vader.drawn_prompts(prompts, cfg) + held_out[: 2 * cfg.eval_videos]


def check_prompt_file(flag: str, path: str, family: type[VideoModel]) -> list[Prompt]:
    require(Path(path).is_file(), f"no prompt file {path}: give {flag} a text file, one prompt a line")
    kind = Path(path).suffix.lower()
    require(kind in ("", ".txt", ".jsonl"), f"{path}: prompts are read from .txt and .jsonl files")
    with as_bad_input(f"{flag} {path} can't be read"):
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    is_text = "\0" not in text and "\ufffd" not in text
    require(is_text, f"{path} is not a text file: give one prompt a line, in UTF-8")
    prompts = vader.read_prompts(path)
    require(prompts, f"{path} holds no prompts: write one a line")
    with_image = [prompt.image for prompt in prompts if prompt.image]
    if family.images == "no":
        if with_image:
            print(f"{path}: this model makes no video from an image, the images are left out")
        return prompts
    right = len(with_image) == len(prompts) or (family.images == "may" and not with_image)
    require(right, f"{path}: this model starts from an image: each line of a .jsonl file has one")
    for image in with_image:
        open_image(image)
    return prompts


def tell_of_held_out(cfg: Config, lines: int, prompts: list, held_out: list):
    """A line where prompts stand twice, or are held out though they stand in --prompts as well."""
    if set(prompts) & set(held_out):
        require(cfg.eval_prompts, f"{cfg.prompts} has one prompt, held back: add more, or --eval_prompts")
        print(f"{cfg.prompts}: of {lines} prompts all are held out: they train too, no gain is held out")
        return
    others = len(prompts)
    if not cfg.eval_prompts:
        others += len(held_out)  # these are of the same file
    if lines > others:
        left = f"{len(prompts)} others are left to train on"
        print(f"{cfg.prompts}: of {lines} prompts some stand twice, or are held out: {left}")


def warn_of_prompts_cut_by_rewards(run: vader.Run, texts: list[str]):
    """A line for each reward whose text encoder does not read some prompts to their end."""
    for name, (_, reward) in [*run.terms.items(), *run.judges.items()]:
        if not hasattr(reward, "text_direction"):
            continue
        limit = text_limit(reward.networks[0])
        cut = []
        for text in texts:
            # shorter ones can't have that many tokens: all but two stand for a letter, or more
            if len(text) > limit - 2 and is_cut(reward.text_direction, text):
                cut.append(text)
        if cut:
            print(f"{name} reads {limit} tokens: {len(cut)} prompts are longer, the first {cut[0][:50]!r}...")


def text_limit(network: torch.nn.Module) -> int:
    """How many tokens a CLIP of transformers, or of open_clip, reads of a text."""
    if hasattr(network, "config"):
        return network.config.text_config.max_position_embeddings
    return network.context_length


def is_cut(embed, text: str) -> bool:
    """Does a text without its last letter mean the same to an encoder, as it has not read that far?"""
    shorter = re.sub(r"\w\W*$", "", text)
    return torch.equal(embed(shorter), embed(text))


def warn_of_long_prompts(cfg: Config, source: str, prompts: list[Prompt]):
    model = vader.make_model(cfg)
    if not model.text_pipeline:
        return
    kind = inspect.signature(model.text_pipeline).parameters["tokenizer"].annotation
    tokenizer = rewards.load(kind, source, "--model", "tokenizer")
    limit = model.max_tokens or tokenizer.model_max_length
    require(limit < 1e6, f"--model: {source}/tokenizer: its config has no model_max_length: get it again")
    long = [prompt.text for prompt in prompts if len(tokenizer(prompt.text).input_ids) > limit]
    if long:
        print(f"{len(long)} prompts are cut at {limit} tokens, the first is {long[0][:60]!r}...")
