"""What goes wrong on the command line, as one line. What somebody's own code raises keeps its traceback."""

import difflib
import errno
import gc
import io
import os
import re
import socket
import sys
import time

import diffusers
import transformers

import vader
from rewards import BadInput, require

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # not of one's code


def in_one_line(command, argv) -> int:
    """Run command(argv) -> exit code: 0; after a line, 2 for bad input, 1 when it was stopped."""
    for library in (transformers, diffusers):  # their loading bars and reports of unused weights
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that the terminal has no letters for
    try:
        check_processes()
        if vader.ranks()[0]:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        command(argv)
        return 0
    except SystemExit as end:  # of --help
        leave_at_once(end.code)
        raise
    except BadInput as error:
        code = say(f"error: {error}", 2)
        leave_at_once(code)
        return code
    except ModuleNotFoundError as error:
        if error.name not in ("models", "extras"):
            raise
        return say(f"error: {error}: get that folder again", 2)
    except BrokenPipeError:  # `| head` has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it ends
        return say("stopped: nobody reads what is printed: go on with --resume", 1)
    except OSError as error:
        if error.errno not in DISK:
            raise
        return say(f"error: {error}: make room and go on with --resume, or give another --out", 2)
    except (MemoryError, RuntimeError) as error:  # torch has a class for a GPU's memory, none for a CPU's
        if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
            raise
        return say("stopped: out of memory: --offload, or a smaller --height, --width", 1)
    except FloatingPointError as error:
        return say(f"stopped: {error}", 1)
    except KeyboardInterrupt:  # where another script has called it
        return say("stopped: go on with --resume", 1)


def check_processes():
    """Are torchrun's variables numbers, where all are there that `vader.ranks` looks at? Raises BadInput."""
    if not os.environ.keys() >= {"MASTER_ADDR", "RANK", "WORLD_SIZE"}:
        return
    advice = "start several processes by torchrun, one without these variables"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "")
        needed = name in ("RANK", "WORLD_SIZE") or os.environ["WORLD_SIZE"] != "1"
        right = not needed or (value.isdecimal() and int(value) <= 65535)
        require(right, f"{name}={value} in the environment is no such number: {advice}")
    address = os.environ["MASTER_ADDR"]
    rank, world = vader.ranks()
    if world > 1:
        try:
            socket.getaddrinfo(address or "(nothing)", None)
        except OSError:
            raise BadInput(f"MASTER_ADDR={address} in the environment is no address: {advice}") from None
    require(rank < world, f"RANK={rank} in the environment, of WORLD_SIZE={world}: start them by torchrun")
    if rank == 0 and world > 1:
        print(f"the first of {world} processes, by torchrun's variables: it waits until all are there")
    if rank > 0:
        wait_for_first(address, int(os.environ.get("MASTER_PORT", 29500)))


def wait_for_first(address: str, port: int, seconds=600):
    """Wait until the first process listens, as PyTorch would for ever. Raises BadInput when it does not."""
    end = time.monotonic() + seconds
    problem = f"no first process in {seconds} s at MASTER_ADDR={address}, MASTER_PORT={port}: start it first"
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError:
            require(time.monotonic() < end, problem)
            time.sleep(1)


def refuse_arguments(parser, message: str):
    """Raise BadInput for what argparse can't read."""
    problem, _, flags = message.partition("unrecognized arguments: ")
    if flags and not problem:
        flag = flags.split()[0].split("=")[0]
        known = [action.option_strings[0] for action in parser._actions]
        advice = "see --help; a flag takes one value"
        near = difflib.get_close_matches(flag, known, n=1)
        if near and flag.startswith("-"):
            advice = f"did you mean {near[0]!r}?"
        raise BadInput(f"unknown argument {flag!r}: {advice}")
    if "--checkpointing: expected" in message:
        message += ", true or false"
    elif "expected one argument" in message:
        message += ", and one that begins with - is written with =, as in --negative_prompt=-blur"
    raise BadInput(f"{message}: see --help")


def leave_at_once(code: int):
    """Exit, where nothing has begun to load: Python takes a second to take down what was imported."""
    if vader.SCRIPT and not gc.isenabled():  # `vader.load_run` enables it
        sys.stdout.flush()
        os._exit(code)


def say(problem: str, code: int) -> int:
    line = " ".join(problem.split())
    print(f"vader.py: {line}", file=sys.stderr)
    return code
