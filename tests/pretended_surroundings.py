"""What libraries ask about a GPU, answered for the pretended one; and operators that only GPUs have."""

import functools
import types

import torch
from pretended import Card, launch_interpreted
from pretended_tensors import Generator, OnCard
from torch import Tensor


class Nothing:
    """A stream, an event, a guard: whatever is asked of it does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0.0 if name == "elapsed_time" else None


class Event(Nothing):
    def synchronize(self):
        OnCard.card.wait("event")

    def elapsed_time(self, other):
        return OnCard.card.milliseconds.pop(0) if getattr(OnCard.card, "milliseconds", None) else 1.0


def patch(patches, card: Card) -> None:
    """Have torch and the libraries find the card."""
    forget()
    properties = types.SimpleNamespace(
        total_memory=card.memory, major=9 if card.native_bf16 else 7, minor=0, name="pretended", gcnArchName="",
        multi_processor_count=8, warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    )  # fmt: skip

    def wait(*device):
        card.wait("synchronize")

    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "_lazy_init": None, "init": None, "is_initialized": True, "_is_in_bad_fork": False, "is_available": True,
        "_is_compiled": True, "device_count": 1, "current_device": 0, "set_device": None, "empty_cache": None,
        "get_device_capability": (properties.major, 0), "get_device_name": "pretended", "ipc_collect": None,
        "get_device_properties": properties, "get_arch_list": ["sm_90"], "mem_get_info": (card.memory, card.memory),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "reset_peak_memory_stats": None, "memory_stats": {}, "manual_seed": None, "manual_seed_all": None,
        "seed": None, "seed_all": None, "get_rng_state": state, "set_rng_state": None, "get_rng_state_all": [state],
        "set_rng_state_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                patches.setattr(module, name, functools.partial(_answer, answer))
    patches.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or card.native_bf16
    )
    patches.setattr(torch.cuda, "synchronize", wait)
    for name in ("device", "stream", "Stream"):
        patches.setattr(torch.cuda, name, Nothing)
    patches.setattr(torch.cuda, "Event", Event)
    for name in ("current_stream", "default_stream"):
        patches.setattr(torch.cuda, name, lambda device=None: Nothing())
    accelerator = {"is_available": True, "device_count": 1, "current_accelerator": torch.device("cuda"),
                   "current_device_index": 0, "set_device_index": None}  # fmt: skip
    for name, answer in accelerator.items():
        patches.setattr(torch.accelerator, name, functools.partial(_answer, answer))
    patches.setattr(torch.accelerator, "current_stream", lambda device=None: Nothing())
    patches.setattr(torch.accelerator, "synchronize", wait)
    patches.setattr(torch, "Generator", Generator)
    _patch_dispatch(patches)


def _patch_dispatch(patches) -> None:
    """Parameters that move are made anew, of the other class; kernels are interpreted."""
    patches.setattr(
        torch, "_has_compatible_shallow_copy_type", lambda old, new: isinstance(old, OnCard) == isinstance(new, OnCard)
    )
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patches.setattr(interpreter.GridExecutor, "__call__", launch_interpreted(interpreter.GridExecutor.__call__))


def _answer(answer, *args, **kwargs):
    return answer.clone() if isinstance(answer, Tensor) else answer


def forget() -> None:
    """Have libraries ask again which devices there are."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers.utils import import_utils

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    for name in dir(import_utils):
        if name.startswith("is_torch") and hasattr(getattr(import_utils, name), "cache_clear"):
            getattr(import_utils, name).cache_clear()


def _histc(values: Tensor, *args, **kwargs) -> Tensor:
    if values.dtype.is_floating_point:
        return torch.histc(values, *args, **kwargs)
    return torch.histc(values.float(), *args, **kwargs).to(values.dtype)  # CUDA counts integers too


# cuSPARSELt's format: 9 of 16 bytes, in an order of its own. Here the dense weight is remembered.
_DENSE: dict[int, tuple[Tensor, Tensor]] = {}


def _compress(dense: Tensor) -> Tensor:
    packed = dense.new_zeros(dense.numel() * 9 // 16)
    _DENSE[packed.untyped_storage().data_ptr()] = packed, dense.clone()
    return packed


def _multiply(packed: Tensor, other: Tensor, bias=None, alpha=None, out_dtype=None, transpose_result=False, *_, **__):
    assert all(size % 8 == 0 for size in other.shape[:2]), "cuSPARSELt takes multiples of 8 only"
    out = _DENSE[packed.untyped_storage().data_ptr()][1] @ other
    out = out if bias is None else out + bias[:, None]
    return out.t().contiguous() if transpose_result else out


def _multiply_padded(dense, packed, bias, out_features, min_rows, min_cols, fused, algorithm, transposed=False):
    """torch's own operator around the one above, of newer versions; it pads what cuSPARSELt does not take."""
    other = dense.t() if transposed else dense
    out = _DENSE[packed.untyped_storage().data_ptr()][1] @ other
    out = out if bias is None else out + bias[:, None]
    return out.t().contiguous() if fused else out


def _wide_sum(added: Tensor, first: Tensor, second: Tensor, out_dtype=None, *, out=None, **_) -> Tensor:
    """Products of a 16-bit type that are summed in float32."""
    value = torch.addmm(added.float(), first.float(), second.float())
    return value if out is None else out.copy_(value)


def _wide_product(first: Tensor, second: Tensor, out_dtype=None, *, out=None) -> Tensor:
    value = first.float() @ second.float()
    return value if out is None else out.copy_(value)


EMULATED = {
    "aten.addmm.dtype": _wide_sum,
    "aten.addmm.dtype_out": _wide_sum,
    "aten.mm.dtype": _wide_product,
    "aten.mm.dtype_out": _wide_product,
    "aten.histc.default": _histc,
    "aten._cslt_compress.default": _compress,
    "aten._cslt_sparse_mm.default": _multiply,
    "semi_structured.cusparselt_mm.default": _multiply_padded,
}
