"""What a run holds while it lasts, and gives back: its folder, and the settings of the caller's process."""

import contextlib
import errno
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

import vader
from extras import hub, lora_files, page, tracker
from rewards import BadInput

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold_run(cfg):
    """Around a run with a full config. The processes of torchrun meet, each with a GPU of its own, the first
    locks --out; --push_to_hub comes at the end.

    Afterwards random state, precision and warnings are the caller's again. Raises BadInput where another
    process has the folder.
    """
    folder, gpus = contextlib.nullcontext(), []
    if vader.ranks()[0] == 0:
        folder = hold_folder(Path(cfg.out))
    if cfg.device.startswith("cuda"):
        gpus = range(torch.cuda.device_count())
    with folder, meeting(cfg), torch.random.fork_rng(gpus), warnings.catch_warnings(), keep_precision():
        failed = True
        try:
            yield
            page.tell(cfg)
            lora_files.tell_of_comfyui(Path(cfg.out))
            if cfg.push_to_hub and vader.ranks()[0] == 0:
                hub.push(cfg, vader.read_metrics(Path(cfg.out)))
            failed = False
        finally:
            tracker.finish(failed)


@contextlib.contextmanager
def hold_folder(out: Path):
    """Make a folder, and lock it. If nothing is written in it, it goes away again."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_empty, made)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it takes another kind of lock
                stack.enter_context(FileLock(out / ".lock", timeout=0))
        except Timeout:
            raise BadInput(f"--out {out} is in use by another process: give another") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            print(f"{out} is on a disk without locks: let no other process write there")
        yield


def remove_empty(folders: list[Path]):
    """Remove these folders, the inner one first, as far as they hold nothing but a lock."""
    for folder in folders:
        for path in folder.iterdir():
            if path.name != ".lock":
                return
            path.unlink()
        folder.rmdir()


@contextlib.contextmanager
def meeting(cfg):
    """Within the block torchrun's processes can speak to each other, where there are several."""
    if vader.ranks()[1] == 1:
        yield
        return
    # long, as one may make a video more than the others
    dist.init_process_group(timeout=timedelta(days=1))
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def keep_precision():
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
