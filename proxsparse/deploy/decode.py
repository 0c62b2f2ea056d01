"""Product of a few tokens with a compact N:M weight on the CPU: reads the kept values and their places, nothing else.

Decoding one token reads every weight once, and memory limits it, so fewer bytes take less time. PANEL rows lie next to
each other, so that SIMD instructions work on several of them: each row picks the inputs of its own kept values. On
processors with AVX2 one shuffle does that. Others take a plain loop (``decode_loops`` has both). Sums are float32.

Inputs are taken in groups: 8, or 16 where M is 16. The places within a group have 4 bits, two to a byte. In 2:4
weights the places within a block have 2 bits, four to a byte.

Shapes: O = out_features, I = in_features, P = panels of PANEL rows, G = groups (rounded up), V = kept values per group
(rounded up to an even number), C = bytes of places per group, T = tokens.
"""

import numpy as np
import torch
from torch import Tensor

from proxsparse.deploy import decode_loops
from proxsparse.deploy.decode_loops import EIGHT, LANES, PAIRED, PANEL, SIXTEEN
from proxsparse.model.compact import as_numpy, check_pattern
from proxsparse.operator.kernels.threads import match_torch
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

AT_ONCE = 2**20  # inputs of several tokens, 4 MB: they stay in the cache while the rows pass by


class Panels:
    """A compact weight in the layout of the kernel.

    Args:
        values: (O, I N / M) float32, bfloat16, or int8 codes.
        positions: (O, I N / M) uint8 in 0..M-1, of each value within its block.
        scales: (O,) float32, of int8 codes: a weight is its code times the scale of its row.
        pattern: N:M.

    Raises:
        UsageError: the pattern has no compact form.
    """

    def __init__(self, values: Tensor, positions: Tensor, scales: Tensor | None = None, pattern: Pattern = TWO_OF_FOUR):
        check_pattern(pattern)
        self.pattern = pattern
        self.shape = values.shape[0], values.shape[1] // pattern.n * pattern.m
        self.layout = PAIRED if pattern == TWO_OF_FOUR else EIGHT if pattern.m <= LANES else SIXTEEN
        self.values, self.codes = _pack(as_numpy(values), positions.numpy(), pattern, self.layout)
        self.scales = None if scales is None else scales.numpy()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def multiply(self, inputs: Tensor) -> Tensor:
        """(T, I) float32 -> (T, O) float32."""
        missing = self.codes.shape[1] * _group(self.pattern) - self.shape[1]
        padded = torch.nn.functional.pad(inputs, (0, missing)) if missing else inputs.contiguous()
        out = np.empty((len(inputs), len(self.codes) * PANEL), np.float32)
        product = decode_loops.multiply if decode_loops.has_shuffles() else decode_loops.multiply_plain
        match_torch()
        step = max(1, AT_ONCE // padded.shape[1])
        for first in range(0, len(inputs), step):
            some = slice(first, first + step)
            product(self.codes, self.values, padded[some].numpy(), self.layout, out[some])
        found = out[:, : self.shape[0]]
        return torch.from_numpy(found if self.scales is None else found * self.scales)

    def expand(self, first: int, out: Tensor) -> None:
        """Write dense rows into out (rows, I) float32; ``first`` is the number of the first one."""
        scales = np.ones(self.shape[0], np.float32) if self.scales is None else self.scales
        match_torch()
        decode_loops.expand(
            self.codes, self.values, scales, self.layout, self.pattern.n, self.pattern.m, first, out.numpy()
        )


def _group(pattern: Pattern) -> int:
    return max(LANES, pattern.m)


def _pack(values: np.ndarray, positions: np.ndarray, pattern: Pattern, layout: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept values (P, G, V, PANEL), and their places (P, G, C, PANEL) uint8; what is beyond the weight is zero."""
    rows, kept = values.shape
    of_group = _group(pattern) // pattern.m * pattern.n
    panels, groups, even = -(-rows // PANEL), -(-kept // of_group), of_group + of_group % 2
    block = np.arange(groups * of_group) % of_group // pattern.n  # of each value, within its group
    places = np.zeros((panels * PANEL, groups * of_group), np.uint8)
    places[:rows, :kept] = positions
    if layout != PAIRED:
        places += (block * pattern.m).astype(np.uint8)
    padded = np.zeros(places.shape, values.dtype)
    padded[:rows, :kept] = values

    def laid(of_rows: np.ndarray) -> np.ndarray:
        found = np.zeros((panels, groups, even, PANEL), of_rows.dtype)
        found[:, :, :of_group] = of_rows.reshape(panels, PANEL, groups, of_group).transpose(0, 2, 3, 1)
        return found

    bits = 2 if layout == PAIRED else 4
    places = laid(places)
    codes = places[:, :, 0 :: 8 // bits].copy()
    for number in range(1, 8 // bits):
        codes |= places[:, :, number :: 8 // bits] << (bits * number)
    return laid(padded), codes
