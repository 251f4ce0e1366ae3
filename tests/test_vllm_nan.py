# SPDX-License-Identifier: Apache-2.0
"""A request whose keys and values are NaN never changes the answer to another."""

from __future__ import annotations

import math

import pytest
from test_vllm_int2 import kernels
from test_vllm_lossless import difference

BAD_TOKEN = 8000


CASES = [
    # The kernels that serve decide; the reference is slow.
    pytest.param(preset, kind, marks=pytest.mark.slow if kind == "reference" else ())
    for kind in kernels()
    for preset in ("oscar", "oscar_paper")
]


@pytest.mark.parametrize("preset, kind", CASES)
def test_nan_stays_in_its_request(engine_host, text, preset, kind):
    """In the same steps, with a shared prefix, and for those who get its blocks afterwards."""
    engine_host.start(
        preset, env={"VLLM_OSCAR_KERNELS": kind}, max_model_len=1024, num_gpu_blocks_override=70,
        max_num_batched_tokens=300,
    )  # fmt: skip
    shared = text(400, at=3000)
    assert BAD_TOKEN not in shared
    bad = shared[:200] + [BAD_TOKEN] + shared[200:]  # NaN from position 200 on
    others = [shared, text(250, at=100), shared[:150] + text(130, at=6000)[1:]]
    later = [text(500, at=9000 + 500 * i) for i in range(4)]  # more pages than were ever free

    def rounds() -> list:
        engine_host.poison(0)
        first = engine_host.run([bad, *others], max_tokens=20)
        return [first, engine_host.run(later, max_tokens=20)]

    clean = rounds()
    engine_host.make_nan(BAD_TOKEN)
    broken = rounds()
    assert any(math.isnan(x) for row in broken[0][0]["outputs"][0]["logprobs"] for x in row.values())
    assert difference(clean[0][1:], broken[0][1:]) < 1e-5
    assert difference(clean[1], broken[1]) < 1e-5
