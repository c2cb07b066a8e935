"""Random 16-bit numbers inside a kernel, eight from each Philox call.

Philox4x32 is a bijection of a 128-bit counter under a 64-bit key (Salmon et al., SC'11), so a number is a function of
where it stands and of the key, and any kernel that knows both makes it again: nothing is stored. Seven rounds are the
fewest that pass BigCrush (the same paper, table 2); ten would cost a third more in kernels that are close to bound by
integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_u16(seed, c0, c1, c2):
    """int32 numbers in [0, 65536), one for each of 8 columns per counter: `c0 (..., G)` gives `(..., 8 G)`.

    `seed` is a 64-bit scalar; `c1` and `c2` are int32 and broadcast against `c0`. Column 8 g + k is word k // 2 of the
    call at c0[g], low half first.
    """
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c0 * 0, 7)
    # join puts its operands in the last, fastest dimension: (w0, w1), (w2, w3) in this order needs the pairs crossed.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, c0.shape[:-1] + [c0.shape[-1] * 8]).to(tl.int32)
