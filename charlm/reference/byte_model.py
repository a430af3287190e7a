"""The model of csrc/ngrams/byte_model.cpp in plain Python: the same integers, some hundred times slower.

The formulas and their sources stand there: hashed contexts of 0 to 6 and 8 bytes, a probability and a count for each
bit, mixed as logits with learned weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

ORDERS = (0, 1, 2, 3, 4, 5, 6, 8)
LIMIT = 16 * 256 - 1  # the largest logit, in 1/256
TOTAL = 2**24 - 16  # the sum of the weights of a nibble
MASK = 2**64 - 1
MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def _squash_and_stretch() -> tuple[dict[int, int], list[int]]:
    """1 / (1 + e^-x) in 1/65536 for each logit x in 1/256, and its inverse for probabilities in 1/4096."""
    squash, power = {}, 2**32
    for x in range(LIMIT + 1):
        squash[x] = min(2**48 // (2**32 + power), 65535)
        squash[-x] = 65536 - squash[x]
        power = power * 4278222805 >> 32  # e^(-1/256) in 2^-32
    stretch, x = [], -LIMIT
    for p in range(4096):
        while x < LIMIT and squash[x] < 16 * p + 8:
            x += 1
        stretch.append(max(-2047, min(x, 2047)))
    return squash, stretch


SQUASH, STRETCH = _squash_and_stretch()


class ByteModel:
    """The distribution of the next nibble of a file, in integers; a table of 2^table_bits buckets."""

    def __init__(self, table_bits: int) -> None:
        self.table = defaultdict(lambda: [0] * 16)  # a check, then probability << 4 | count of each node
        self.mask = (1 << table_bits) - 1
        self.history = bytes(8)
        self.byte = 0  # 0, or 16 + the first nibble of the byte
        self.maps = {(i, count): [1024 * q + 512 for q in range(64)] for i in range(len(ORDERS)) for count in range(16)}
        self.weights = defaultdict(lambda: [0] * (2 * len(ORDERS) + 1))  # by node, and by longest known context
        for match in range(len(ORDERS) + 1):
            self.weights.update({(match, depth): [15000] * (2 * len(ORDERS) + 1) for depth in range(8)})
        self._find_buckets()

    def weigh(self) -> list[int]:
        """The weight of each value of the next nibble; their sum is TOTAL, and a weight may be 0."""
        ranges = [0, TOTAL]
        self.nodes = [None]
        for node in range(1, 16):
            self.nodes.append(self._predict(node))
            ones = ranges[node] * self.nodes[node][-1] >> 16
            ranges += [ranges[node] - ones, ones]
        return ranges[16:]

    def learn(self, nibble: int) -> None:
        """Learns the next nibble; `weigh` has been called before."""
        for shift in (3, 2, 1, 0):
            self._learn((16 + nibble) >> (shift + 1), nibble >> shift & 1)
        if self.byte:
            self.history = self.history[1:] + bytes([(self.byte - 16) << 4 | nibble])
        self.byte = 0 if self.byte else 16 + nibble
        self._find_buckets()

    def encode(self, data: np.ndarray, nibbles: np.ndarray, weights: np.ndarray) -> None:
        """The nibbles of `data`, (n,) uint8, into (2n,) int32, and the weights before each into (2n, 16) float32."""
        nibbles[0::2], nibbles[1::2] = data >> 4, data & 15
        for i, nibble in enumerate(nibbles.tolist()):
            weights[i] = self.weigh()
            self.learn(nibble)

    def decode(self, size: int, weights: np.ndarray, next_nibble: Callable[[], np.ndarray]) -> bytes:
        """The next `size` bytes; `weights`, (1, 16) float32, is filled before each call of `next_nibble`."""
        nibbles = []
        for _ in range(2 * size):
            weights[0] = self.weigh()
            nibbles.append(int(next_nibble()[0]))
            self.learn(nibbles[-1])
        return bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))

    def _predict(self, node: int) -> tuple[list[int], list[tuple[list[int], int]], list[list[int]], int]:
        """The inputs, their entries in `maps`, the two sets of weights, and the probability of a 1 in 1/65536."""
        match, inputs, mapped = 0, [], []
        for i, bucket in enumerate(self.buckets):
            count, p = bucket[node] & 15, bucket[node] >> 4
            match = i + 1 if count else match
            mapped.append((self.maps[i, count], p >> 6))
            inputs.append(STRETCH[p] if count else 0)
            inputs.append(STRETCH[mapped[i][0][p >> 6] >> 4] if count or i == 0 else 0)
        inputs.append(256)
        depth = (4 if self.byte else 0) + node.bit_length() - 1
        sets = [self.weights[self.byte * 16 + node], self.weights[match, depth]]
        logit = sum(x * (a + b) for x, a, b in zip(inputs, *sets, strict=True)) >> 16
        return inputs, mapped, sets, SQUASH[max(-LIMIT, min(logit, LIMIT))]

    def _learn(self, node: int, bit: int) -> None:
        inputs, mapped, sets, p = self.nodes[node]
        for i, x in enumerate(inputs):
            step = (x * ((bit << 16) - p) + 2**16) >> 17
            for weights in sets:
                weights[i] = max(-(2**20), min(weights[i] + step, 2**20))
        for bucket, (row, at) in zip(self.buckets, mapped, strict=True):
            count, p = bucket[node] & 15, bucket[node] >> 4
            p += (bit * 4095 - p) * (131072 // (2 * count + 3)) >> 16
            bucket[node] = p << 4 | min(count + 1, 8)
            row[at] += (bit * 65535 - row[at]) >> 6

    def _find_buckets(self) -> None:
        self.buckets = []
        for order in ORDERS:
            known = int.from_bytes(self.history[8 - order :], "big") << (64 - 8 * order) if order else 0
            value = (known * MIX_1 + (order << 8 | self.byte) * MIX_2) & MASK
            value = (value ^ value >> 32) * MIX_2 & MASK
            value ^= value >> 32
            check, index = value >> 48 | 1, value & self.mask
            first, second = self.table[index], self.table[index ^ 1]
            bucket = first if first[0] == check else second
            if bucket[0] != check:
                bucket = first if first[1] & 15 <= second[1] & 15 else second
                bucket[:] = [check] + [2048 << 4] * 15
            self.buckets.append(bucket)
