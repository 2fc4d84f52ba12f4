"""Networks without weights or content, and what is alive of them: memory and operations of a real update."""

import contextlib
import gc
import sys
import weakref
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402 (needs the line above)
from extras.base_lora import quantize  # noqa: E402


def attention(query, key, value, *_, **__) -> int:
    """Operations of an attention, of its inputs' shapes: the products q k' and, with its softmax, v."""
    batch, heads, places, width = query
    return 2 * batch * heads * places * key[2] * (width + value[3])


def attention_backward(gradient, query, key, value, *_, **__) -> int:
    """As `attention`: the product q k' again, then the gradients of q, k, v and the softmax."""
    batch, heads, places, width = query
    return 2 * batch * heads * places * key[2] * (3 * width + 2 * value[3])


def count_attention():
    """Let torch count what attention becomes on a CPU, which not every torch knows by itself."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for operator, formula in ((forward, attention), (backward, attention_backward)):
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


count_attention()


def remember(saved):
    first, dtype = saved
    return first if dtype is None else torch.empty(first, dtype=dtype)


class Product(torch.autograd.Function):
    """x W', where W is there in full only while it is multiplied, here and in the backward pass."""

    @staticmethod
    def forward(ctx, x, out: int):
        ctx.width = x.shape[-1]
        return x @ x.new_empty(out, ctx.width).T

    @staticmethod
    def backward(ctx, g):
        return g @ g.new_empty(g.shape[-1], ctx.width), None


class FourBit(torch.nn.Linear):
    """A linear layer without content as bitsandbytes' Linear4bit keeps it, which takes no fake weights.

    Of a weight of n numbers: n / 2 bytes, a scale for 64 numbers in a byte, one in 4 bytes for 256 of these.
    """

    def __init__(self, layer: torch.nn.Linear):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        count = layer.weight.numel()
        size = count // 2 + count // 64 + 4 * (count // (64 * 256))
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        y = Product.apply(x, self.out_features)
        return y if self.bias is None else y + self.bias


def quantise_without_weights(network, kind: str):
    """As diffusers does while it loads; what it keeps in float32 for its precision, it does not quantise."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or []
    if kind == "int8":
        return quantize(network, "int8", torch.bfloat16)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not set(name.split(".")) & set(kept):
            network.set_submodule(name, FourBit(layer))


def size_of(tensor) -> int:
    """Bytes, of a quantised one those of its parts."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in parts)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made inside, their peak, operations, and launches.

    A launch is a call that writes a tensor: of a kernel, on a GPU.

    Under FakeTensorMode only draws, whole numbers, and what is computed from these alone have content, since
    masks and indices decide what comes next.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        self.operations = self.launches = self.moved = 0

    def forget(self, tensor):
        """As `offload.to_host`: (size, dtype) of what waits on the host, which is moved there and back."""
        if tensor.is_leaf or not tensor.requires_grad:
            return tensor, None
        self.moved += 2 * tensor.nbytes
        return tensor.shape, tensor.dtype

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        whole = isinstance(kwargs.get("dtype"), torch.dtype) and not kwargs["dtype"].is_floating_point
        content = whole or "generator" in kwargs or func.__name__.startswith(("arange", "randperm"))
        away = torch.device(kwargs.get("device") or "cpu").type != "cpu"  # may be a GPU that is not there
        if away or any(isinstance(tensor, FakeTensor) for tensor in given) or not (given or content):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        read = {
            tensor.untyped_storage()._cdata for tensor in given if not is_traceable_wrapper_subclass(tensor)
        }
        writes = func._schema.is_mutable
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(tensor):  # of int8
                storage = tensor.untyped_storage()
                writes = writes or storage._cdata not in read  # else it is a view
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.launches += writes
        self.peak = max(self.peak, self.now)
        return result


def exchange(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
    """`Module.to` for weights without content, which can't be exchanged in place."""
    given = [*args, *kwargs.values()]
    dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
    device = next((value for value in given if isinstance(value, (str, torch.device))), None)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in ((name, old) for name, old in table.items() if old is not None):
                wanted = dtype if dtype and old.is_floating_point() else old.dtype
                if (torch.device(device or old.device).type, wanted) != (old.device.type, old.dtype):
                    new, kept = (
                        old.detach().to(device or old.device, wanted),
                        isinstance(old, torch.nn.Parameter),
                    )
                    table[name] = torch.nn.Parameter(new, old.requires_grad) if kept else new
    return module


@contextlib.contextmanager
def without_weights(memory: LiveStorages | None = None, device="cpu"):
    """Inside, what loads weights makes networks from their config files instead, and any tokenizer will do.

    Replaced: what reads weights, and `frozen`, which checkpoints on a GPU only. memory: counts, no content.
    device: where the networks are made.
    """
    fetch, frozen, words = rewards.fetch, rewards.frozen, {"<pad>": 0, "</s>": 1, "?": 2}
    side = {"longest_edge": 512}  # SmolVLM2's chat about videos, with the words of tiny/
    chat = transformers.SmolVLMProcessor.from_pretrained(ROOT / "tiny" / "rewards" / "ask")
    chat.video_processor, chat.image_seq_len = (
        transformers.SmolVLMVideoProcessor(size=side, max_image_size=side),
        64,
    )

    def network(cls, folder, subfolder=None, dtype=None, torch_dtype=None, quantization_config=None, **_):
        before, peak = torch.get_default_dtype(), memory.peak if memory else 0
        torch.set_default_dtype(dtype or torch_dtype or torch.float32)
        kind = quantization_config and ("nf4" if "nf4" in str(quantization_config) else "int8")
        try:
            with torch.device("cpu" if kind else device):
                if issubclass(cls, diffusers.ModelMixin):
                    made = cls.from_config(cls.load_config(folder, subfolder=subfolder)).eval()
                    if kind and not memory:
                        quantize(made, kind, dtype, device)
                    elif kind:
                        largest = max(p.nbytes for p in made.parameters())
                        quantise_without_weights(made, kind)
                        gc.collect()
                        memory.peak = max(peak, memory.now + largest)  # the library reads one after the other
                    return made
                config = cls.config_class.from_pretrained(folder, subfolder=subfolder or "")
                made = cls._from_config(config, dtype=torch.get_default_dtype())
            made.tie_weights()
            if memory:  # the library makes tied weights once
                gc.collect()
                memory.peak = max(peak, memory.now)
            return made.eval()
        finally:
            torch.set_default_dtype(before)

    def load(kind, source, flag, subfolder="", dtype=None, device=None, more=(), options=()):
        if kind is transformers.AutoProcessor:
            return chat
        if kind is transformers.AutoModelForImageTextToText:
            kind = transformers.SmolVLMForConditionalGeneration
        made = kind.from_pretrained(source, subfolder=subfolder, dtype=dtype, **dict(options))
        return made if device is None else as_on_a_gpu(made, device, dtype)

    def image_features(self, pixel_values, pixel_attention_mask=None, **_):
        """As the library's where no frame is padding, which it reads off their content."""
        self.config.image_token_id = chat.image_token_id
        found = self.vision_model(pixel_values=pixel_values.flatten(0, 1).to(self.dtype), return_dict=True)
        found.pooler_output = [self.connector(found.last_hidden_state).flatten(0, 1)]
        return found

    def tokenizer(cls, folder, subfolder="", **_):
        file = (Path(folder) / subfolder).parent / "text_encoder" / "config.json"
        config = rewards.read_json(file) if file.exists() else {"model_type": "clip"}
        longest = config.get("max_position_embeddings", 77 if "clip" in config["model_type"] else 512)
        special = dict(pad_token="<pad>", eos_token="</s>", unk_token="?", model_max_length=longest)
        special["tokenizer_object"] = Tokenizer(WordLevel(words, unk_token="?"))
        return transformers.PreTrainedTokenizerFast(**special)

    def found(source, name, flag):
        return fetch(source, name, flag) if name.endswith(".json") else Path(source) / name

    def item(self, real=torch.Tensor.item):
        return 1.0 if isinstance(self, FakeTensor) else real(self)

    def numpy(self, *args, real=torch.Tensor.numpy):
        dtype = str(self.dtype).removeprefix("torch.")
        return np.zeros(tuple(self.shape), dtype) if isinstance(self, FakeTensor) else real(self, *args)

    def as_on_a_gpu(network, device, dtype):
        if memory:
            with mock.patch.object(torch.nn.Module, "to", lambda part, *_: part):
                frozen(network, "cuda", dtype)
        return frozen(network, device, dtype)

    without_content = [(torch.Tensor, "item", item), (torch.Tensor, "numpy", numpy)]
    without_content += [(torch.nn.Module, "to", exchange)]
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (diffusers.ModelMixin, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedModel, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedModel, "init_weights", lambda self: None),
            (transformers.PreTrainedTokenizerBase, "from_pretrained", classmethod(tokenizer)),
            *(without_content if memory else []),
            (rewards, "load", load),
            (rewards, "load_state", lambda network, *_, **__: network),
            (rewards, "fetch", found),
            (rewards, "frozen", as_on_a_gpu),
            (transformers.SmolVLMModel, "get_image_features", image_features),
            (sys.modules[transformers.SmolVLMModel.__module__], "torch_compilable_check", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield
