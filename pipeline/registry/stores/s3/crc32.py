"""The CRC-32 of a whole from those of its parts.

S3 wants the checksum of the whole object at the end of a multipart upload (`FULL_OBJECT`), while
its parts are hashed by as many threads. A CRC is the remainder of a polynomial over GF(2), so
appending n bytes multiplies it by x^(8n) (Williams, "A painless guide to CRC error detection
algorithms", 1993). CRC64NVME would need a package of native code that nothing else here does.
"""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320  # of CRC-32 (ISO 3309), bits reversed: x^0 is the highest bit
_ONE, _X = 1 << 31, 1 << 30


def combined(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two byte strings, one after the other.

    Args:
        first: CRC-32 of the first.
        second: CRC-32 of the second.
        second_bytes: Length of the second.
    """
    return _product(_power(8 * second_bytes), first) ^ second


def _product(left: int, right: int) -> int:
    """Product of two polynomials, modulo that of the CRC."""
    result = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            result ^= right
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return result


@functools.lru_cache(maxsize=64)  # all parts of a file but the last have one length
def _power(exponent: int) -> int:
    """x^exponent, modulo the polynomial of the CRC."""
    result, square = _ONE, _X
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result
