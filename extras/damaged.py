"""What libraries raise when a file is damaged, as one line; and values in configs that can't be."""

import contextlib
import inspect
import itertools
import pickle
import struct
import zipfile
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import jinja2
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from rewards import BadInput, require

DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
DAMAGED += (RuntimeError, EOFError, SyntaxError, ImportError, struct.error, pickle.UnpicklingError)
DAMAGED += (zipfile.BadZipFile, SafetensorError, Image.DecompressionBombError, StrictDataclassError)
DAMAGED += (jinja2.TemplateError,)


class Reading(contextlib.AbstractContextManager):
    """Raises BadInput, one line that begins with `problem`, for what is raised inside it."""

    def __init__(self, problem: str):
        self.problem = problem

    def __exit__(self, kind, error, trace):
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return
        if isinstance(error, DAMAGED) or kind is Exception:  # which tokenizers raise
            reason = " ".join(f"{kind.__name__}: {error}".split())
            raise BadInput(f"{self.problem} ({reason[:150]})") from None


# ---- Values in configs -------------------------------------------------------------------------------------
def check_config(where: str, kind: type, config: dict):
    """Raises BadInput, beginning with `where`, unless each value of a config is such as its class takes.

    kind: a network's or a scheduler's class of diffusers, or a config's of transformers.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        default = parameter.default
        value = config.get(name, default)
        if value == default or (name.endswith("_id") and type(value) is int):  # of a token: any
            continue
        right = fits(value, parameter.annotation)
        right = right or (type(value) is type(default) and type(value) is not list)
        if default is None and not fits([0.5], parameter.annotation):
            right = right or numbers_in(value) in (value, [value])
        right = right and value != [] and plausible(name, value, default, parameter.annotation)
        require(right, f"{where} is damaged: it has {str(value)[:40]!r} for {name}, as against {default!r}")


def fits(value, hint) -> bool:
    """Is a value from json of this type? Lists stand for tuples. Of a type that is only named: is it any?"""
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, kind) for kind in kinds)
    if get_origin(hint) is Literal:
        return type(value) is type(kinds[0])
    if get_origin(hint) in (tuple, list):
        return type(value) is list and all(fits(part, kinds[0]) for part in value)
    if hint in (tuple, list):
        return type(value) is list
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, str):
        return value is not None
    return hint in (int, bool, str, NoneType) and type(value) is hint


def numbers_in(value) -> list:
    if type(value) in (list, tuple):
        return list(itertools.chain(*map(numbers_in, value)))
    return [value] if type(value) in (int, float) else []


def plausible(name: str, value, default, hint) -> bool:
    """Is each number of a value finite, of the order of the default's, and above 0 where that is?"""
    usual = numbers_in(default)
    fractions = fits(0.5, hint) or fits([0.5], hint)
    least, most = -1e5, 1e5
    if usual and min(usual) >= 0:
        least = min(usual) / 1e8
    if usual:
        most = 1e4 * max(usual) or most
    if not usual and fits(1, hint) and not fractions:
        least = 1  # a size
    if "dropout" in name or name.startswith("sigma"):
        least = 0
    for number in numbers_in(value):
        if not least <= number <= most:  # as NaN
            return False
    return True
