"""From a mask to a deployed model, on the real SmolLM2-135M: every model of the chain passes the check."""

import pytest
from deployed import Chain

pytest.importorskip("peft", reason="an extra: pip install 'proxsparse[lora]'")
pytest.importorskip("compressed_tensors", reason="an extra: pip install 'proxsparse[quantize]'")


@pytest.mark.slow
@pytest.mark.timeout(900)  # ten models of half a gigabyte are written and read
def test_every_model_from_the_mask_to_int8_stays_24(tmp_path):
    made = [title for title, *_ in Chain(tmp_path / "run", samples=1, ctx_len=32, max_windows=1).checked()]
    assert made == [
        "dense", "mask alone", "recovered, full", "recovered, norms", "recovered, layer", "fine-tuned, KeepMask",
        "LoRA, merged", "recovered, full, int8", "recovered, full, int4", "recovered, full, compact",
    ]  # fmt: skip
