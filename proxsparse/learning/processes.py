"""How processes share a model, and what that excludes; asked of the trainer, which knows once it is made."""

from typing import Any

from proxsparse.learning.refusals import Refusal


def _plugin(trainer: Any) -> Any:
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None


REFUSALS = (
    Refusal(
        lambda t: t.is_deepspeed_enabled,
        "Learning under DeepSpeed is not supported: ZeRO keeps weights in flat pieces that cut through blocks "
        "of four. Use FSDP2, as script/accelerate/fsdp2.yaml sets it up.",
    ),
    Refusal(
        lambda t: _plugin(t) and getattr(_plugin(t), "fsdp_version", 1) != 2,
        "FSDP1 flattens weights, so that rows are cut through; set fsdp_version: 2, as in "
        "script/accelerate/fsdp2.yaml.",
    ),
    Refusal(
        lambda t: t.is_fsdp_enabled and t.args.keep_base == "checkpoint",
        "`keep_base=checkpoint` reads whole weights; under FSDP use device or cpu.",
    ),
    Refusal(
        lambda t: t.args.optim_in_backward and (t.args.world_size > 1 or t.is_fsdp_enabled),
        "`optim_in_backward` steps before gradients of several processes are averaged; use one process, and no FSDP.",
    ),
    Refusal(
        lambda t: t.is_fsdp_enabled and t.args.permute != "none",
        "`permute=auto` needs the whole model in every process, which FSDP does not have: use `permute=none`.",
    ),
    Refusal(
        lambda t: _plugin(t) and t.args.project_lambda2 and not _plugin(t).reshard_after_forward,
        "`project_lambda2=1` needs the shards while the loss is computed: set fsdp_reshard_after_forward: true.",
    ),
)
