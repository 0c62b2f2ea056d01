"""One process of sharded runs on the CPU: end-to-end/main.py's command under torchrun, once for each list of flags.

    torchrun --nproc_per_node 2 sharded_worker.py '[["--model", ...], ...]'

accelerate enables FSDP on accelerators only; here it is told that it has one. All else is what users run.
"""

import hashlib
import json
import os
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

plain_init = AcceleratorState.__init__


def init(self, *args, **kwargs):
    if "ACCELERATE_USE_FSDP" in os.environ and not AcceleratorState._shared_state and PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plain_init(self, *args, **kwargs)


AcceleratorState.__init__ = init

from proxsparse import trainer  # noqa: E402
from proxsparse.commands import learn  # noqa: E402

plain_measure = trainer.ProxSparseTrainer._measure_original


plain_mask = trainer.ProxSparseTrainer.mask


def measure(self):
    plain_measure(self)
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    assert (type(self.targets[0].weight).__name__ == "DTensor") == sharded  # or the test would compare ordinary runs


def mask(self):
    digest = hashlib.sha256(b"".join(t.stored.float().numpy().tobytes() for t in self.targets)).hexdigest()
    sys.stdout.write(f"WEIGHTS {os.environ['RANK']} {digest}\n")
    sys.stdout.flush()
    return plain_mask(self)


trainer.ProxSparseTrainer._measure_original = measure
trainer.ProxSparseTrainer.mask = mask
for flags in json.loads(sys.argv[1]):
    code = learn.main(flags)
    if os.environ["RANK"] == "0":
        sys.stdout.write(f"EXIT {code}\n")
        sys.stdout.flush()
