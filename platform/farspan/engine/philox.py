"""Random numbers of many rows at once, each a function of its own key and counter. N rows.

A counter-based generator has no state: whoever knows seed, request, choice and position knows the number.
Source: Philox4x64-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10
# So many are made sooner one by one than by numpy, whose calls cost what little they do.
_FEW = 16


def uniforms(keys: Sequence[tuple[int, int, int, int]]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, request, choice, position); each is taken modulo 2**64."""
    return np.array([_uniform(*key) for key in keys]) if len(keys) <= _FEW else uniforms_of(words_of(keys))


def _uniform(seed: int, request: int, choice: int, position: int) -> float:
    key_0, key_1 = seed % 2**64, request % 2**64
    # As in `uniforms_of`.
    a, b, c, d = 1, 0, choice % 2**64, position % 2**64
    for _ in range(_ROUNDS):
        wide_a, wide_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = wide_c >> 64 ^ b ^ key_0, wide_c % 2**64
        c, d = wide_a >> 64 ^ d ^ key_1, wide_a % 2**64
        key_0, key_1 = (key_0 + _WEYL[0]) % 2**64, (key_1 + _WEYL[1]) % 2**64
    return (a >> 11) * 2.0**-53


def words_of(keys: Sequence[tuple[int, int, int, int]]) -> Words:
    """[N, 4] words of keys, each part modulo 2**64; the last is the position."""
    # Typed from Python integers: a list that holds a number of 2**63 or more would go through float64.
    return np.array([[part % 2**64 for part in key] for key in keys], dtype=np.uint64).reshape(-1, 4)


def uniforms_of(words_N4: Words) -> npt.NDArray[np.float64]:
    """`uniforms` of keys that are words already."""
    counter = np.zeros_like(words_N4)
    # numpy's generator counts up before it draws; equal to it in every bit.
    counter[:, 0] = 1
    counter[:, 2:] = words_N4[:, 2:]
    first = philox_4x64(words_N4[:, :2], counter)[:, 0]
    return (first >> np.uint64(11)).astype(np.float64) * 2.0**-53


def philox_4x64(key_N2: Words, counter_N4: Words) -> Words:
    """[N, 4] random words. All arithmetic is modulo 2**64."""
    key_0, key_1 = key_N2[:, 0].copy(), key_N2[:, 1].copy()
    a, b, c, d = (counter_N4[:, i] for i in range(4))
    for index in range(_ROUNDS):
        if index:
            key_0, key_1 = key_0 + np.uint64(_WEYL[0]), key_1 + np.uint64(_WEYL[1])
        high_a, low_a = _wide_product(a, np.uint64(_MULTIPLIERS[0]))
        high_c, low_c = _wide_product(c, np.uint64(_MULTIPLIERS[1]))
        a, b, c, d = high_c ^ b ^ key_0, low_c, high_a ^ d ^ key_1, low_a
    return np.stack([a, b, c, d], axis=1)


def _wide_product(x: Words, factor: np.uint64) -> tuple[Words, Words]:
    """(high, low) 64 bits of x * factor, by 32-bit halves."""
    x_low, x_high = x & _LOW, x >> _HALF
    f_low, f_high = factor & _LOW, factor >> _HALF
    low_low, high_low = x_low * f_low, x_high * f_low
    middle = (low_low >> _HALF) + (high_low & _LOW) + x_low * f_high
    return x_high * f_high + (high_low >> _HALF) + (middle >> _HALF), x * factor
