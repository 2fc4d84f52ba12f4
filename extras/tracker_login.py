"""Is --tracker logged in? What W&B or Trackio would ask for, or would fail at late, is known at the start."""

import contextlib
import importlib
import inspect
import os

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

from extras.hub import one_line
from rewards import BadInput, require

ADVICE = "--tracker wandb: run `wandb login`, or set WANDB_MODE=offline"


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
