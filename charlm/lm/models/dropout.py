"""Random numbers that are a function of seed, step, sample and place, and dropout from them.

torch draws dropout from one generator per process. The numbers of a sample then depend on the samples before it, and so
on the number of processes that share a batch. Here each number is a hash of where it is used:

    z = hash(seed, step) + a sample + b layer + c position + d head + e (unit div 4)        modulo 2⁶⁴
    z = mix(mix(z)),  z ^= z >> 32          mix(z) = (z ^ (z >> 32)) m

One z gives the numbers of four units, 16 bits each. The multipliers a … e are odd and random, so two places of a run
practically never have the same z. The mixing function is a variant of MurmurHash3's finalizer with the multiplier of
degski (2018). Its arithmetic is exact in int64, so that every device gives the same numbers. Counter-based random
numbers: Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _int64(value: int) -> int:
    """`value` modulo 2⁶⁴ as a signed integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


MULTIPLIER = _int64(0xD6E8FEB86659FD93)
SAMPLE, LAYER, POSITION, HEAD, UNITS = map(
    _int64,
    (0x8CB92BA72F3D8DD7, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x9FB21C651E98DF25, 0x9E3779B97F4A7C15),
)
LOW_HALF = (1 << 32) - 1


def sample_keys(seed: int, step: int, samples: range, device: torch.device | str = "cpu") -> Tensor:
    """The keys of the `samples` of the global batch of a step: (len(samples),) int64."""
    mask = (1 << 64) - 1
    base = seed & mask
    for number in (0, step):
        base = base + number * UNITS & mask
        for _ in range(2):
            base = (base ^ base >> 32) * (MULTIPLIER & mask) & mask
        base ^= base >> 32
    return torch.arange(samples.start, samples.stop, device=device).mul_(SAMPLE).add_(_int64(base))


def in_layer(keys: Tensor, layer: int) -> Tensor:
    """The keys of layer number `layer`, of the shape of `keys`."""
    return keys + _int64(layer * LAYER)


def random_bits(keys: Tensor, count: int) -> Tensor:
    """`count` numbers of 64 random bits per key: (…) int64 → (…, count) int64."""
    z = keys[..., None] + torch.arange(count, device=keys.device).mul_(UNITS)
    # The arithmetic shift repeats the sign, so that z and ~z have equal results: that costs one of the 64 bits. In the
    # last line it would make the highest bit constant.
    for _ in range(2):
        z.bitwise_xor_(z >> 32).mul_(MULTIPLIER)
    return z.bitwise_xor_((z >> 32).bitwise_and_(LOW_HALF))


def keyed_dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Sets each element of `x` to 0 with probability `p`, and divides the others by the probability of keeping them.

    Args:
        x: (…, n) any floating dtype.
        p: A probability, 0 < p < 1, which is rounded to a multiple of 2⁻¹⁶.
        keys: (…) int64, the key of each row of n elements.
    """
    n = x.shape[-1]
    kept = min(max(round((1 - p) * 65536), 1), 65535)  # of the 65,536 values of 16 bits
    bits = random_bits(keys, -(-n // 4)).view(torch.int16)[..., :n]
    return x * (bits < kept - 32768).to(x.dtype).mul_(65536 / kept)


class Dropout(nn.Module):
    """Dropout that is a function of the keys of its samples; without keys it is torch's.

    Args:
        p: The probability that a unit is set to 0, 0 ≤ p < 1.
        layer: The number of this layer in its model; layers of different numbers have independent dropout.
    """

    def __init__(self, p: float, layer: int = 0) -> None:
        super().__init__()
        self.p = p
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x (…, n), keys (…) int64 or None → (…, n)."""
        if not self.training or self.p == 0:
            return x
        if keys is None:
            return nn.functional.dropout(x, self.p)
        return keyed_dropout(x, self.p, in_layer(keys, self.layer))

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
