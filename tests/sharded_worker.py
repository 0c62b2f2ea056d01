"""One process of runs in several processes on the CPU: end-to-end/main.py's command, once for each list of flags.

    torchrun --nproc_per_node 2 sharded_worker.py '[["--model", ...], ...]'

accelerate enables FSDP on accelerators only; here it is told that it has one. All else is what users run.
"""

import hashlib
import json
import os
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

from proxsparse.commands import learn
from proxsparse.learning import trainer
from proxsparse.learning.trainer import ProxSparseTrainer

SHARDED = "ACCELERATE_USE_FSDP" in os.environ


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def allow_fsdp_on_the_cpu():
    plain = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        if SHARDED and not AcceleratorState._shared_state and PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plain(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def watch_the_trainer():
    """Make sure that weights are sharded, or the test would compare ordinary runs; and say what each process holds."""
    measure_original, mask = ProxSparseTrainer._measure_original, ProxSparseTrainer.mask
    stored_norms = trainer.stored_norms

    def measure_and_check(self):
        measure_original(self)
        assert (type(self.targets[0].weight).__name__ == "DTensor") == SHARDED
        # Shards keep no whole gradients while several batches make a step.
        assert self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False) == SHARDED

    def mask_and_say(self):
        weights = b"".join(t.stored.float().numpy().tobytes() for t in self.targets)
        say(f"WEIGHTS {os.environ['RANK']} {hashlib.sha256(weights).hexdigest()}")
        return mask(self)

    def norms_of_an_own(*args, **kwargs):
        """Replicas on unequal devices measure unequal norms."""
        return {name: norm.roll(int(os.environ["RANK"]), -1) for name, norm in stored_norms(*args, **kwargs).items()}

    ProxSparseTrainer._measure_original, ProxSparseTrainer.mask = measure_and_check, mask_and_say
    trainer.stored_norms = norms_of_an_own


if __name__ == "__main__":
    allow_fsdp_on_the_cpu()
    watch_the_trainer()
    for flags in json.loads(sys.argv[1]):
        code = learn.main(flags)
        if os.environ["RANK"] == "0":
            say(f"EXIT {code}")
