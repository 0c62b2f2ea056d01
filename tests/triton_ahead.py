"""Compile the Triton kernels for GPUs that are not here. Prints one line of JSON per kernel, variant and GPU.

    TRITON_INTERPRET=0 python tests/triton_ahead.py

The signatures are those that launches make: bfloat16 as int16, sizes and pointers divisible by 16.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from proxsparse.operator.kernels import triton as operator
from proxsparse.operator.kernels import triton_adafactor as adafactor
from proxsparse.operator.kernels import triton_products as products

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
GPUS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = {"bfloat16": "*i16", "float32": "*fp32", "float16": "*fp16"}
OTHERS = {"scale": "*fp32", "counts": "*i32", "codes": "*u8", "moved": "*i32", "penalties": "*fp32", "lam": "fp32"}
OTHERS |= {"rows": "*fp32", "columns": "*fp32", "by_row": "*fp64", "by_column": "*fp64", "sums": "*fp64"}
OTHERS |= {"rate": "*fp32", "keep": "fp32", "epsilon": "fp32"}
NOT_SPECIALISED = ("counts", "seed", "origin", "group", "lam", "keep", "epsilon")


def variants() -> Iterator[tuple[object, str, dict]]:
    """(kernel, dtype of its weights, constants)"""
    yield operator._prox, "bfloat16", {"SCALED": True, "BFLOAT16": True, "STOCHASTIC": True, "TILE": operator.TILE}
    yield operator._prox, "float32", {"SCALED": False, "BFLOAT16": False, "STOCHASTIC": False, "TILE": operator.TILE}
    yield operator._prox, "float16", {"SCALED": True, "BFLOAT16": False, "STOCHASTIC": False, "TILE": operator.TILE}
    for kernel in (products._product, products._survey):
        for dtype in ("bfloat16", "float32"):
            yield kernel, dtype, {"SCALED": True, "BFLOAT16": dtype == "bfloat16", "TILE": products.TILE}
    sizes = {"R": adafactor.ROWS, "C": adafactor.COLUMNS}
    yield adafactor._squares, "bfloat16", {"BFLOAT16": True} | sizes
    yield adafactor._size, "bfloat16", {"BFLOAT16": True} | sizes
    for dtype in ("bfloat16", "float32"):
        low = dtype == "bfloat16"
        yield adafactor._apply, dtype, {"BFLOAT16": low, "STOCHASTIC": low} | sizes


def built(kernel, dtype: str, constants: dict, gpu: GPUTarget):
    names = list(kernel.arg_names)
    weights = dict.fromkeys(("weights", "out", "base", "learned", "gradient"), POINTERS[dtype])
    types = {n: "constexpr" if n in constants else (OTHERS | weights).get(n, "i32") for n in names}
    divisible = [n for n in names if n not in constants and n not in NOT_SPECIALISED]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    home = next(module for module in (operator, products, adafactor) if kernel in vars(module).values())
    exact = (adafactor._squares, adafactor._size, adafactor._apply)
    options = {"num_warps": home.WARPS, "enable_fp_fusion": kernel not in exact}
    return compile(
        ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes), target=gpu, options=options
    )


def of_nvidia(assembly) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said.stdout + said.stderr)
    accesses = re.findall(r"\b(?:ld|st)\.global[.\w:]*", assembly["ptx"])
    wide = {kind: sum(".v4" in a for a in accesses if a.startswith(kind)) for kind in ("ld", "st")}
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[4]), "wide": wide}


def of_amd(assembly) -> dict:
    text = assembly["amdgcn"]
    number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
    # 8 bytes are wide for 64 lanes that access memory together.
    wide = {kind: len(re.findall(rf"(?:global|buffer)_{word}_dwordx[24]", text)) for kind, word in
            (("ld", "load"), ("st", "store"))}  # fmt: skip
    return {"registers": number["vgpr_count"], "spilled": number["vgpr_spill_count"], "wide": wide}


def main() -> int:
    for kernel, dtype, constants in variants():
        for name, gpu in GPUS.items():
            assembly = built(kernel, dtype, constants, gpu).asm
            found = of_nvidia(assembly) if gpu.backend == "cuda" else of_amd(assembly)
            variant = {"kernel": kernel.fn.__name__, "dtype": dtype, "gpu": name}
            sys.stdout.write(json.dumps(variant | found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
