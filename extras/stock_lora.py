"""LoRA files of all formats that a model's stock pipeline reads: checked, and fused, by its own loader."""

import math
from pathlib import Path

import diffusers
import peft
import torch

from extras.lora import check_matrices, check_training, quiet
from rewards import as_bad_input, require

ADAPTER = "base"  # the name that PEFT's layers know it by


def fuse(where: str, source, model):
    """Fuse a LoRA into the model's denoiser, as stock's load_lora_weights and fuse_lora do.

    source: what `check` has returned of its file.
    """
    family = type(model)
    pipe = build_pipeline(family, model.denoiser)
    load(where, source, pipe)
    with quiet():
        pipe.fuse_lora(components=[family.folder])
        pipe.unload_lora_weights()  # the layers stay as they were fused
    model.denoiser.eval().requires_grad_(False)


def check(where: str, file: Path, tensors: dict, family, denoiser) -> tuple[Path | dict, list[str]]:
    """What stock is to load of a LoRA's file, the file itself or tensors; and lines on what is left out.

    tensors: the file's, of any shapes. family: a model's class. denoiser: its denoiser, without weights.
    Raises BadInput for a LoRA that stock can't load into it, or loads otherwise than the file says.
    """
    converted, *alphas, metadata = convert(where, file, family)
    matrices = rename(converted, family)
    source = file
    has_alphas = any(key.endswith(".alpha") for key in matrices)  # which stock would refuse
    if has_alphas and not metadata:
        source = multiply_alphas(where, tensors)
        converted, *alphas, metadata = convert(where, source, family)
        matrices = rename(converted, family)
    place = f"{where}: there is no LoRA of the {family.folder} in it"
    require(matrices, f"{place}, in PEFT's format or one of {family.lora_pipeline.__name__}")
    if metadata:
        check_training(where, rename(metadata, family))
    kept = find_kept(where, tensors, family)
    lines = describe_left_out(where, tensors.keys() - kept)
    pipe = build_pipeline(family, denoiser)
    load(where, source, pipe)
    with quiet():
        expected = peft.get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    check_matrices(where, matrices, expected)
    check_layers(where, denoiser, rename_alphas(alphas, family))
    return source, lines


def build_pipeline(family, denoiser):
    """The stock pipeline around this denoiser; all its other parts are None."""
    pipe = family("", "cpu", torch.float32).stock(family.lora_pipeline)
    setattr(pipe, family.folder, denoiser)
    pipe.load_lora_into_text_encoder = lambda *args, **kwargs: None  # there is no text encoder
    return pipe


def load(where: str, source: Path | dict, pipe):
    """Stock's load_lora_weights. Raises BadInput."""
    what, kwargs = as_stock_takes(source)
    with quiet(), as_bad_input(f"{where} was made for another model, or is damaged"):
        pipe.load_lora_weights(what, adapter_name=ADAPTER, **kwargs)


def as_stock_takes(source: Path | dict) -> tuple:
    """A file as its folder and a keyword argument with its name; a dictionary of tensors as itself."""
    if isinstance(source, Path):
        return str(source.parent), {"weight_name": source.name}
    return source, {}


# ---- What is taken from a file -----------------------------------------------------------------------------
def convert(where: str, source: Path | dict, family) -> tuple:
    """Stock's lora_state_dict -> tensors by diffusers' names, alphas where it has them, metadata or None.

    Raises BadInput.
    """
    what, kwargs = as_stock_takes(source)
    with quiet(), as_bad_input(f"{where} is in a format that diffusers has no code for"):
        return family.lora_pipeline.lora_state_dict(what, return_lora_metadata=True, **kwargs)


def multiply_alphas(where: str, tensors: dict) -> dict:
    """The tensors without alphas: each layer's second matrix is multiplied by its alpha / rank.

    Raises BadInput for differences of biases beside alphas.
    """
    multiplied = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        layer, _, which = key.partition(".lora_")  # A.weight, B.weight, down.weight, up.weight
        alpha = tensors.get(f"{layer}.alpha")
        if alpha is not None and which.startswith(("B.", "up.")):
            require(tensor.dim() > 1, f"{where}: there is no code for alphas beside {key}")
            rank = tensor.shape[1]
            tensor = tensor * (alpha / rank)
        multiplied[key] = tensor
    return multiplied


def find_kept(where: str, tensors: dict, family) -> set[str]:
    """The keys of a file that reach the denoiser through stock's converter, and those of alphas.

    The converter renames, scales and drops. It is given a row of another width in each key's place.
    """
    rows, key_of_width, kept = {}, {}, set()
    for width, (key, tensor) in enumerate(tensors.items(), start=1000):
        if key.endswith(".alpha"):
            rows[key] = tensor
            kept.add(key)
        else:
            rows[key] = torch.empty(1, width, device="meta")
            key_of_width[width] = key
    converted, *_ = convert(where, rows, family)
    for key, row in rename(converted, family).items():
        if not key.endswith(".alpha"):
            kept.add(key_of_width.get(row.shape[-1]))
    return kept


def rename(converted: dict, family) -> dict:
    """What is the denoiser's of what a pipeline has converted, by the names of PEFT's layers."""
    prefix = f"{family.folder}."
    ours = {}
    for key, value in converted.items():
        if key.startswith(prefix):
            ours[key.removeprefix(prefix)] = value
    return diffusers.utils.convert_unet_state_dict_to_peft(ours)


def describe_left_out(where: str, keys: set[str]) -> list[str]:
    """Lines on these keys, which stock leaves out. Raises BadInput unless they are such as it always does."""
    texts, differences = [], []
    for key in sorted(keys):
        if key.startswith(("lora_te", "text_encoder")):
            texts.append(key)
        elif key.endswith((".diff", ".diff_b")):
            differences.append(key)
        else:
            require(False, f"{where} was made for another model, or is damaged: nothing takes {key}")
    lines = []
    if texts:
        lines.append(f"{where}: left out: {len(texts)} tensors of a text encoder, as {texts[0]}")
    if differences:
        lines.append(
            f"{where}: left out, as by diffusers: {len(differences)} differences, as {differences[0]}"
        )
    return lines


def rename_alphas(alphas: list, family) -> dict[str, float]:
    """{layer: alpha}, of what lora_state_dict has between matrices and metadata: nothing, None or a dict."""
    found = {}
    for given in alphas:
        for key, alpha in rename(given or {}, family).items():
            layer = key.removesuffix(".alpha").split(".lora_A")[0]
            found[layer] = alpha
    return found


def check_layers(where: str, denoiser, alphas: dict[str, float]):
    """Raises BadInput unless every layer of a loaded LoRA has its alpha, and a bias where the LoRA has one.

    diffusers reads the alphas of attention layers under a name that fits no layer, so that they get the
    commonest alpha of the file; a layer without an alpha beside others with one gets that too.
    """
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        used = layer.lora_alpha[ADAPTER]
        require(math.isfinite(layer.scaling[ADAPTER]), f"{where} is damaged: {name} is scaled by {used}")
        if alphas:
            alpha = alphas.get(name, layer.r[ADAPTER])
            problem = f"its layers have several alphas, and diffusers would take {used:g} for {name}"
            require(used == alpha, f"{where}: {problem}, not {alpha:g}")
        if layer.lora_bias[ADAPTER]:
            problem = f"it has a difference of a bias for {name}, which has none"
            require(layer.get_base_layer().bias is not None, f"{where}: {problem}")
