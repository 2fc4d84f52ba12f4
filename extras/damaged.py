"""What libraries raise when a file is damaged, or is not what its name says, as one line."""

import contextlib
import pickle
import struct
import zipfile

import jinja2
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from rewards import BadInput

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
