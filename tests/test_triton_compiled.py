"""The Triton kernels compile for today's GPUs, without one: no spilled registers, wide loads and stores."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton"),
    pytest.mark.slow,  # half a minute
]
READING = ("_survey", "_squares", "_size")  # these store a byte per block, or sums


def test_every_kernel_compiles_for_every_gpu_without_spills_and_with_wide_accesses(tmp_path, capsys):
    # In a process of its own: here kernels are made for Triton's interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "triton_ahead.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"sm_80", "sm_89", "sm_90", "gfx942"} == {variant["gpu"] for variant in found}
    for variant in found:
        assert variant["spilled"] == 0, variant
        assert variant["registers"] <= 255, variant
        assert variant["wide"]["ld"] > 0, variant
        assert variant["wide"]["st"] > 0 or variant["kernel"] in READING, variant
