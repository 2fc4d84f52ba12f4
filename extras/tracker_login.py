"""Which run of --tracker a training is, and whether it can begin: is there a login?"""

import contextlib
import importlib
import inspect
import json
import os
import secrets
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

import vader
from extras.hub import one_line
from rewards import BadInput, as_bad_input, require

PROJECT = "vader"  # what W&B and Trackio file the runs under
ADVICE = "--tracker wandb: run `wandb login`, or set WANDB_MODE=offline"


# ---- Which run it is ---------------------------------------------------------------------------------------
def run_name(cfg) -> str:
    return Path(cfg.out).resolve().name


def run_id(cfg) -> str:
    """The run's id: with --resume that of tracker.json, where there is one, otherwise a new one."""
    old = read_id(cfg)
    if old:
        return old
    new = secrets.token_hex(4)
    vader.write_atomic(Path(cfg.out) / "tracker.json", json.dumps({"id": new}))
    return new


def read_id(cfg) -> str | None:
    """The id that --resume goes on with. Raises BadInput."""
    path = Path(cfg.out) / "tracker.json"
    if not (cfg.resume and path.exists()):
        return None
    problem = f"{path} is damaged: delete it, and the tracker begins another run"
    with as_bad_input(problem):
        old = json.loads(path.read_text(encoding="utf-8"))["id"]
        require(old.isalnum(), problem)
    return old


# ---- Before anything loads ---------------------------------------------------------------------------------
def check_tracker(cfg):
    """Can cfg.tracker, none or installed, begin a run? Raises BadInput, and never asks for a password."""
    if cfg.mode != "train" or cfg.tracker == "none":
        return
    library = {"tensorboard": "torch.utils.tensorboard"}.get(cfg.tracker, cfg.tracker)
    try:
        importlib.import_module(library)
    except ImportError as error:
        advice = f"pip install --force-reinstall {cfg.tracker}"
        raise BadInput(
            f"--tracker {cfg.tracker} is installed in part: {advice} ({one_line(error)})"
        ) from None
    if cfg.tracker == "wandb":
        check_wandb()
    elif cfg.tracker == "trackio":
        check_trackio()
    read_id(cfg)


def check_wandb():
    """Is there a login that the server takes? Nothing is sent with WANDB_MODE=offline, or disabled."""
    wandb = importlib.import_module("wandb")
    # The folder wandb/ that it leaves where it ran can be imported as well, and is empty.
    require(hasattr(wandb, "login"), "--tracker wandb is not installed: pip install wandb")
    can_check = "prompt" in inspect.signature(wandb.login).parameters
    require(can_check, f"--tracker wandb: {wandb.__version__} is too old: pip install -U wandb")
    with asking(wandb):
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        if wandb.run and not wandb.run.offline:  # a run of one's own, with the same login
            return
        require(wandb.login(prompt=False), ADVICE)


@contextlib.contextmanager
def asking(wandb):
    """Inside, what wandb raises is one line: BadInput. ValueError: a variable WANDB_... that can't be."""
    try:
        yield
    except (wandb.Error, ValueError) as error:
        raise BadInput(f"{ADVICE} ({one_line(error)})") from None


def check_trackio():
    """On this machine it needs nothing; a Space needs a login, a server a token."""
    space, server = os.environ.get("TRACKIO_SPACE_ID"), os.environ.get("TRACKIO_SERVER_URL")
    if space:
        problem = f"--tracker trackio, to the Space {space}: run `hf auth login`, or unset TRACKIO_SPACE_ID"
        require(get_token(), problem)
        try:
            HfApi().whoami()
        except (HTTPError, OSError) as error:
            raise BadInput(f"{problem} ({one_line(error)})") from None
    elif server:
        has_token = "write_token=" in server or os.environ.get("TRACKIO_WRITE_TOKEN")
        usable = server.startswith(("http://", "https://")) and has_token
        require(usable, "--tracker trackio: TRACKIO_SERVER_URL must be http(s), with TRACKIO_WRITE_TOKEN")
