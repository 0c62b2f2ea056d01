"""One process of a loop with a kept mask on weights that FSDP2 shards, on the CPU.

    torchrun --nproc_per_node 2 kept_worker.py CHECKPOINT MASK RESULT

The first process writes the trained weights. They are those of one process that sees the same batches.
"""

import os
import sys

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

import proxsparse
from proxsparse.mask import apply_mask


def train(model, mask, steps=4):
    """A loop with gradient accumulation, momentum and weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    proxsparse.keep_mask(model, mask, optimizer)
    for step in range(steps):
        for half in range(2):
            ids = torch.arange(1, 25).view(1, -1) + 10 * step + half
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    checkpoint, mask_file, result = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    model, mask = proxsparse.load_model(checkpoint), proxsparse.load_mask(mask_file)
    apply_mask(model, mask)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, mask)
    whole = {name: p.detach().full_tensor().contiguous() for name, p in model.named_parameters()}
    if os.environ["RANK"] == "0":
        save_file(whole, result)
    torch.distributed.destroy_process_group()
