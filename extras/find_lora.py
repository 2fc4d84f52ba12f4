"""Where the file of --lora or --base_lora is: in a folder, in a run's, or on the hub."""

import itertools
import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rewards import BadInput, asking_hub, fetch, list_hub, require

NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'


def find_lora(source: str, flag: str) -> Path:
    """The file of a LoRA: a file, in a folder, or on the hub (owner/name, or owner/name/file).

    From the hub it is downloaded, with what tells of it. Raises BadInput.
    """
    if Path(source).is_file():
        return Path(source)
    if (Path(source) / "lora" / "adapter_config.json").is_file():  # a run's folder
        source = f"{source}/lora"
    if Path(source).is_dir():
        place, name, names = source, "", os.listdir(source)
    else:
        place, name = split_hub_id(source, flag)
        with asking_hub(place, flag):
            names = list_hub(place)
    if not name:
        name = pick_file(source, names, flag)
    for beside in ("adapter_config.json", "vader.json"):
        other = str(Path(name).with_name(beside))
        if other in names:
            fetch(place, other, flag)  # to lie beside the first, in the cache
    return fetch(place, name, flag)


def split_loras(source: str) -> list[str]:
    """The LoRAs of --base_lora: one, also where its path has a comma, or "high,low" for two networks."""
    if Path(source).exists():
        return [source]
    parts = []
    for part in source.split(","):
        parts.append(os.path.expanduser(part.strip()))
    return parts


def is_same_path(first: str | None, second: str | None) -> bool:
    """Do both name the same files or folders, which are there?"""
    if not (isinstance(first, str) and isinstance(second, str)):
        return False
    for one, other in itertools.zip_longest(split_loras(first), split_loras(second), fillvalue=""):
        if not (one and other and os.path.exists(one) and os.path.exists(other)):
            return False
        if not os.path.samefile(one, other):
            return False
    return True


def is_peft(file: Path) -> bool:
    """Is this PEFT's file, with its config beside it?"""
    return file.name == NAMES[0] and file.with_name("adapter_config.json").is_file()


def split_hub_id(source: str, flag: str) -> tuple[str, str]:
    """Split "owner/name/folder/file" into "owner/name" and "folder/file". Raises BadInput."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise BadInput(f"{flag} {source}: no such file or folder, and no hub id") from None
    return repository, file


def pick_file(source: str, names: list[str], flag: str) -> str:
    """Which of a folder's files is the LoRA: one named as PEFT or diffusers do, else the only one."""
    files = [name for name in names if name.endswith(".safetensors")]
    advice = "give a run's lora folder, or a LoRA's file"
    require(files, f"{flag} {source}: there is no .safetensors file: {advice}")
    for name in NAMES:
        if name in files:
            return name
    require(len(files) == 1, f"{flag} {source} has several files: give one, as {source}/{files[0]}")
    return files[0]
