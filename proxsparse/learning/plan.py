"""What a run will need before it starts: parameters, steps, memory by part.

Weights, gradients, optimizer states and copies are counted from the model's configuration. Activations are not guessed
by a formula: the forward pass runs on fake tensors, which have shapes and no memory, and what autograd keeps is added
up. So the plan is right for every architecture, and takes seconds for any size.
"""

import inspect
import logging
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.layer_steps import recomputed
from proxsparse.learning.objective import Objective
from proxsparse.learning.optim import cost_of
from proxsparse.model.hub_errors import clear_errors, quiet_log
from proxsparse.model.loading import load_config
from proxsparse.model.prunable import decoder_blocks, find_prunable

logger = logging.getLogger(__name__)
UNCOUNTED = "activations are not counted: the forward pass of {} can't be run on tensors without values"
PROCESS_BYTES = 64 * 2**20  # what the libraries allocate while they train, measured on tiny models
# A GPU's context, the workspaces of its libraries, and what the allocator holds in pieces. On an H100 the allocator
# held 0.5 to 1.4 GiB more than the tensors of three runs of a 7B model; the context is not among that.
GPU_BYTES = 1.5 * 2**30

# Dimensions of the models that the recipes name, from their published config.json files: a plan needs no network.
_LLAMA: dict = {"max_position_embeddings": 4096, "dtype": torch.bfloat16}
DIMENSIONS: dict[str, PreTrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(**_LLAMA),
    "meta-llama/Llama-2-13b-hf": LlamaConfig(
        **_LLAMA, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
        dtype=torch.bfloat16,
    ),
    "mistralai/Mistral-7B-v0.1": MistralConfig(dtype=torch.bfloat16),
    "mistralai/Mistral-7B-v0.3": MistralConfig(vocab_size=32768, sliding_window=None, dtype=torch.bfloat16),
    "openlm-research/open_llama_7b_v2": LlamaConfig(dtype=torch.bfloat16),
    "meta-llama/Llama-3.1-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, dtype=torch.bfloat16,
    ),
    "Qwen/Qwen2.5-14B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=131072, dtype=torch.bfloat16,
    ),
}  # fmt: skip


@dataclass
class Plan:
    """What a run needs.

    Attributes:
        parameters, trainable, prunable: numbers of weights.
        steps: optimizer steps.
        parts: name -> bytes on one device, at the moment with the highest sum.
        waiting: bytes of weights that wait in host memory while they don't compute, for each device.
        note: what could not be counted, or nothing.
    """

    parameters: int
    trainable: int
    prunable: int
    steps: int
    parts: dict[str, float] = field(default_factory=dict)
    waiting: float = 0.0
    note: str = ""

    @property
    def total(self) -> float:
        """Bytes on one device at the moment when most is needed."""
        return sum(self.parts.values())

    def per_parameter(self) -> float:
        return self.total / self.parameters


def dimensions(name: str, **options) -> tuple[PreTrainedConfig, str]:
    """Configuration of a model, and a note where it comes from the table above and not from the model."""
    if name in DIMENSIONS:
        return DIMENSIONS[name], f"dimensions of {name} from the built-in table"
    return load_config(name, **options), ""


def plan_learning(
    dimensions: PreTrainedConfig,
    config: ProxSparseConfig,
    *,
    ctx_len: int,
    samples: int,
    batch_size: int,
    dtype: torch.dtype,
    devices: int = 1,
    sharded: bool = False,
    on_cpu: bool = False,
) -> Plan:
    """Memory and steps of ``end-to-end/main.py`` with these settings.

    Args:
        dimensions: configuration of the model.
        config: settings of the run.
        dtype: dtype of the weights.
        devices: number of devices, with one process each.
        sharded: whether the devices share one model (FSDP2), or each has a whole one.
        on_cpu: the device is the CPU, so that what is kept there counts too.

    Raises:
        UsageError, RunError: there is nothing to prune, or no causal language model of these dimensions.
    """
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as learning does
    compute = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else dtype
    sizes = _sizes(dimensions, config, dtype, (batch_size, ctx_len), compute)
    low = dtype
    if sharded and compute != torch.float32:
        dtype = torch.float32  # accelerate keeps trained shards in float32 and computes in the lower precision
    wide, parts_of = dtype.itemsize, devices if sharded else 1
    cost = cost_of(config, dtype, sharded)
    frozen = (sizes.parameters - sizes.trainable) * (low if low == torch.bfloat16 else dtype).itemsize
    # On a CPU all copies are on the device: the others wait.
    waiting = 0 if on_cpu else Objective.copies_on_device(config, True) - Objective.copies_on_device(config, False)
    copies, masks = Objective.copies_on_device(config, on_cpu), Objective.masks_on_device(config, on_cpu)
    gradients = (sizes.largest if config.optim_in_backward else sizes.trainable) * wide / parts_of
    in_pieces = sizes.plain and bool(config.distill) and not on_cpu and not sharded  # as the trainer decides
    parts = {
        "weights": (sizes.trainable * wide + frozen) / parts_of,
        "optimizer states": sizes.trainable * cost.states / parts_of,
        "copies of W0 and of learned weights": sizes.prunable * (wide * copies + masks / 8) / parts_of,
        "gradients or activations": _worst(
            gradients, sizes.block * wide / parts_of, sizes, config, batch_size, in_pieces, sharded
        ),
        "working memory": PROCESS_BYTES + 4 * sizes.largest * cost.copies / parts_of + (0 if on_cpu else GPU_BYTES),
    }
    if sharded:
        # The block at work, the next one, and the gradient of one; what is not in blocks stays gathered.
        parts["gathered weights"] = (3 * sizes.block + sizes.ends) * compute.itemsize
    elif devices > 1:
        parts["buckets for averaging gradients"] = gradients
    steps = -(-samples // (batch_size * devices * config.gradient_accumulation_steps))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps * config.num_train_epochs)
    host = sizes.prunable * wide * waiting / parts_of
    return Plan(sizes.parameters, sizes.trainable, sizes.prunable, steps, parts, host, sizes.note)


@dataclass
class _Sizes:
    """Numbers of weights of a model, and bytes of what its forward pass leaves.

    Attributes:
        largest: entries of the largest trained weight.
        layers: number of layers.
        block: weights of the largest layer.
        ends: embeddings and LM head.
        activations: bytes between forward and backward pass.
        recomputed: bytes of one layer that the backward pass computes again, and of the gradients that pass through it.
        layer: bytes of one layer between its forward and its backward pass, without recomputing.
        states: bytes of the inputs and outputs of all layers.
        logits: bytes.
        plain: logits are what the LM head returns, and nothing else happens to them.
    """

    parameters: int
    trainable: int
    prunable: int
    largest: int
    layers: int
    block: int
    ends: int
    activations: float = 0.0
    recomputed: float = 0.0
    layer: float = 0.0
    states: float = 0.0
    logits: float = 0.0
    plain: bool = False
    note: str = ""


def _sizes(
    dimensions: PreTrainedConfig,
    config: ProxSparseConfig,
    dtype: torch.dtype,
    batch: tuple[int, int],
    compute: torch.dtype,
) -> _Sizes:
    """From a model on fake tensors: see the module's docstring."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
        quiet_log("torch._subclasses.fake_tensor", logging.CRITICAL),  # what fake tensors can't do, the plan says
    ):
        warnings.simplefilter("ignore")
        model = _model(dimensions, dtype)
        if model is not None:
            found = _counts(model, config)
            try:
                checkpointing = bool(config.activation_checkpointing)
                _measure(found, model, batch, compute, checkpointing)
            except Exception as error:  # whatever a model's code does with tensors that have no values
                logger.debug("the forward pass on fake tensors failed", exc_info=error)
                found.note = UNCOUNTED.format(type(model).__name__)
            return found
    with torch.device("meta"):  # has no values either, and asks for none while a model is made
        model = _model(dimensions, dtype)
    assert model is not None
    found = _counts(model, config)
    found.note = UNCOUNTED.format(type(model).__name__)
    return found


def _model(dimensions: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """A model without values; None where making it needs some."""
    with clear_errors(dimensions._name_or_path or type(dimensions).__name__):
        try:
            return AutoModelForCausalLM.from_config(dimensions, dtype=dtype)
        except DataDependentOutputException:
            return None


def _counts(model: PreTrainedModel, config: ProxSparseConfig) -> _Sizes:
    targets = find_prunable(model, config.include, config.exclude, multiple=config.wanted.m)
    names = {t.name for t in targets}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not config.train_only_pruned or name in names)
    parameters = sum(p.numel() for p in model.parameters())
    prunable = sum(t.weight.numel() for t in targets)
    return _Sizes(
        parameters,
        prunable if config.train_only_pruned else parameters,
        prunable,
        largest=max(p.numel() for p in model.parameters() if p.requires_grad),
        layers=len(decoder_blocks(model)),
        block=max(sum(p.numel() for p in b.parameters()) for b in decoder_blocks(model)),
        ends=sum({id(m.weight): m.weight.numel() for m in _ends(model)}.values()),
    )


def _ends(model: PreTrainedModel) -> list:
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def _worst(
    gradients: float,
    of_layer: float,
    sizes: _Sizes,
    config: ProxSparseConfig,
    batch_size: int,
    in_pieces: bool,
    sharded: bool,
) -> float:
    """Bytes of gradients and activations where they are most together.

    Args:
        of_layer: bytes of the gradients of one layer.
        in_pieces: logits never exist as a whole.
    """
    logits = 0.0 if in_pieces else sizes.logits
    if config.bf16 or config.fp16:
        logits *= 2  # accelerate hands the model's outputs on in float32
    activations = sizes.activations + Objective.logits_copies(config, batch_size) * logits
    # A layer-wise step: what the dense model gave every layer, its logits, and the layers at work, each of which keeps
    # its outputs, and what they differ by in float32.
    span = min(config.layer_span, sizes.layers)
    at_once = 1 if recomputed(config, sharded) else span
    kept = span * 3 * sizes.states / (sizes.layers + 1)
    # The backward pass begins with all activations, and ends with all gradients.
    working = max(at_once * sizes.layer + of_layer, sizes.layer + span * of_layer) + kept
    stepping = sizes.states + logits + working if config.layer_rate else 0.0
    if config.gradient_accumulation_steps > 1:
        return gradients + max(activations + logits, stepping)
    # Activations are freed while gradients appear, so the worst moment has the larger of the two: at the end of the
    # backward pass, all gradients and the layer that was computed again.
    return max(gradients + sizes.recomputed, activations + logits, stepping)


def _measure(
    found: _Sizes, model: PreTrainedModel, batch: tuple[int, int], compute: torch.dtype, checkpointing: bool
) -> None:
    """Sets what the forward pass leaves for the backward pass."""
    found.activations, found.logits, found.plain = _saved(model, batch, compute)
    layers = len(decoder_blocks(model))
    found.layer = found.activations / layers
    width = model.config.get_text_config().hidden_size
    found.states = (layers + 1) * math.prod(batch) * width * next(model.parameters()).dtype.itemsize
    if checkpointing:
        model.activation_checkpointing_enable()
        found.recomputed = 2 * found.layer
        found.activations = _saved(model, batch, compute)[0] + found.recomputed


def _saved(model: PreTrainedModel, batch: tuple[int, int], compute: torch.dtype) -> tuple[float, float, bool]:
    """Bytes that autograd keeps, bytes of the logits, and whether these are what the LM head returns and no more.

    Learning can then make the logits in pieces.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage.nbytes(), tensor)  # the tensor stays alive, so that its address is its own
        return tensor

    model.train()
    ids = torch.zeros(batch, dtype=torch.long)
    lower = compute != next(model.parameters()).dtype
    autocast = torch.autocast("cpu", dtype=compute, enabled=lower, cache_enabled=True)
    head = model.get_output_embeddings()
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, arguments, out: made.append(out)) if head is not None else None
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        logits = model(input_ids=ids, use_cache=False).logits
    if hook is not None:
        hook.remove()
    linear = type(head) is nn.Linear and "logits_to_keep" in inspect.signature(model.forward).parameters
    plain = linear and len(made) == 1 and logits is made[0]
    return sum(size for size, _ in seen.values()), logits.untyped_storage().nbytes(), plain
