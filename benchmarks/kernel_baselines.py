# SPDX-License-Identifier: Apache-2.0
"""What the decode kernel is compared with, on caches of the same shape: vLLM's own kernels, FlashInfer, xformers.

Each function returns the launches to be timed, on disjoint caches, and the bytes that one of them reads.
FlashInfer compiles its kernel at first use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Launches = tuple[list[Callable[[], object]], int]


def _sets(nbytes: int, rotated_bytes: float) -> int:
    """Caches to rotate among, so that no launch finds its data in L2."""
    return min(8, max(1, -(-int(rotated_bytes) // nbytes)))


def _step(batch: int, context: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One query token per request, and the lengths of the sequences."""
    query = torch.randn(batch, heads, dim, dtype=torch.bfloat16, device="cuda")
    return query, torch.full((batch,), context, dtype=torch.int32, device="cuda")


def flash_attention_3(
    batch: int, context: int, heads: int, group: int, dim: int, rotated_bytes: float, splits: int,
    sliding_window: int | None = None, fp8: bool = False,
) -> Launches:  # fmt: skip
    """FlashAttention-3 on blocks of 128 tokens in bf16, or in fp8 with one scale; ``splits`` 0 lets it choose.

    As vLLM calls it; what it takes to make the query fp8 is not in it.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    page = 128
    per_sequence = -(-context // page)
    nbytes = batch * min(context, sliding_window or context) * heads * dim * (2 if fp8 else 4)
    window_size = [sliding_window - 1, 0] if sliding_window else None
    sets = _sets(nbytes, rotated_bytes)
    cache = torch.empty(2, sets * batch * per_sequence, page, heads, dim, dtype=torch.bfloat16, device="cuda").normal_()
    table = torch.randperm(cache.shape[1], device="cuda").int().view(sets, batch, per_sequence)
    query, lens = _step(batch, context, heads * group, dim)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    out, scales = torch.empty_like(query), {}
    if fp8:
        query, cache = query.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)
        scales = {f"{x}_descale": torch.ones(batch, heads, device="cuda") for x in "qkv"}

    def launch(i: int) -> Callable[[], object]:
        return lambda: flash_attn_varlen_func(
            query, cache[0], cache[1], 1, starts, context, seqused_k=lens, block_table=table[i], causal=True,
            out=out, fa_version=3, num_splits=splits, window_size=window_size, **scales,
        )  # fmt: skip

    return [launch(i) for i in range(sets)], nbytes


def _require_right(name: str, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse a baseline whose ``out [B, Hq, D]`` is wrong for ``query`` and ``key``, ``value [B, n, H, D]``."""
    key, value = (x.float().repeat_interleave(query.shape[1] // x.shape[2], 2) for x in (key, value))
    weights = torch.einsum("bhd,bnhd->bhn", query.float(), key).mul(query.shape[2] ** -0.5).softmax(-1)
    expected = torch.einsum("bhn,bnhd->bhd", weights, value)
    error = ((out.float() - expected).norm() / expected.norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"{name}: error {error:.1e}: not timed")


def flashinfer(batch: int, context: int, heads: int, group: int, dim: int, rotated_bytes: float, page: int) -> Launches:
    """FlashInfer's decode with tensor cores on bf16 blocks of ``page`` tokens."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    def make(batch: int, context: int, sets: int):
        per_sequence = -(-context // page)
        count = sets * batch * per_sequence
        cache = torch.empty(2, count, page, heads, dim, dtype=torch.bfloat16, device="cuda").normal_()
        table = torch.randperm(count, device="cuda").int().view(sets, batch, per_sequence)
        query, _ = _step(batch, context, heads * group, dim)
        starts = torch.arange(batch + 1, dtype=torch.int32) * per_sequence
        last = torch.full((batch,), (context - 1) % page + 1, dtype=torch.int32)
        out = torch.empty_like(query)

        def launch(i: int) -> Callable[[], object]:
            workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(
                starts, table[i].flatten(), last, heads * group, heads, dim, page,
                q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            )  # fmt: skip
            return lambda: wrapper.run(query, (cache[0], cache[1]), out=out)

        return [launch(i) for i in range(sets)], cache, table, query, out

    launches, cache, table, query, out = make(2, 1000, 1)
    launches[0]()
    _require_right("FlashInfer", out, query, *(cache[:, table[0].long()].flatten(2, 3)[:, :, :1000]))
    nbytes = batch * context * heads * dim * 4
    return make(batch, context, _sets(nbytes, rotated_bytes))[0], nbytes


def xformers_int4(batch: int, context: int, heads: int, group: int, dim: int, rotated_bytes: float) -> Launches:
    """xformers' ``triton_splitk`` with int4 keys and values, one scale and shift per row, not paged."""
    from xformers.ops.fmha import Inputs, triton_splitk

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of fp16 scale, shift and codes as int32, and what they stand for."""
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale, shift = ((high - low) / 15).half(), low.half()
        codes = ((x - shift) / scale).round().clamp(0, 15)
        packed = codes.byte()[..., ::2] | codes.byte()[..., 1::2] << 4
        rows = torch.cat([scale.view(torch.uint8), shift.view(torch.uint8), packed], -1)
        return rows.view(torch.int32), codes * scale + shift

    some = torch.randn(2, 4096, heads, dim, device="cuda")
    rows, exact = quantize(some)

    def launch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        spread = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (key, value))
        inputs = Inputs(query.view(len(query), 1, heads, group, dim), *spread)
        return lambda: triton_splitk.FwOp.apply(inputs, needs_gradient=False)[0]

    query, _ = _step(1, context, heads * group, dim)
    _require_right("xformers", launch(query, *rows[:, None])()[:, 0].flatten(1, 2), query, *exact[:, None])
    nbytes = batch * context * heads * rows.shape[-1] * 8
    sets = _sets(nbytes, rotated_bytes)
    cache = torch.empty(2, sets, batch, context, *rows.shape[2:], dtype=torch.int32, device="cuda")
    for part in cache.flatten(0, 2):
        part.copy_(rows[0, torch.randint(4096, (context,), device="cuda")])
    query, _ = _step(batch, context, heads * group, dim)
    return [launch(query, cache[0, i], cache[1, i]) for i in range(sets)], nbytes


def turboquant(
    batch: int, context: int, heads: int, group: int, dim: int, rotated_bytes: float, bits: int = 3
) -> Launches:
    """vLLM's Triton decode kernel of ``turboquant_3bit_nc`` on blocks of 16 tokens, vLLM's default."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    from vllm_oscar.core.hadamard import hadamard

    page, splits = 16, 32
    packed_key = dim * bits // 8 + 2
    slot = packed_key + dim * bits // 8 + 4
    per_sequence = -(-context // page)
    nbytes = batch * context * heads * slot
    sets = _sets(nbytes, rotated_bytes)
    rotation = hadamard(dim).float().cuda()
    centroids = get_centroids(dim, bits).cuda()

    some = 64  # different blocks, over and over
    stored = torch.zeros(some, page, heads, slot, dtype=torch.uint8, device="cuda")
    key, value = torch.randn(2, some * page, heads, dim, dtype=torch.bfloat16, device="cuda")
    triton_turboquant_store(
        key, value, stored, torch.arange(some * page, dtype=torch.int32, device="cuda"), rotation,
        (centroids[1:] + centroids[:-1]) / 2, mse_bits=bits, key_packed_size=packed_key, value_quant_bits=bits,
    )  # fmt: skip
    cache = torch.empty(sets * batch * per_sequence, page, heads, slot, dtype=torch.uint8, device="cuda")
    for part in cache.split(1 << 15):
        part.copy_(stored[torch.randint(some, (len(part),), device="cuda")])
    table = torch.randperm(len(cache), device="cuda").int().view(sets, batch, per_sequence)
    query, lens = _step(batch, context, heads * group, dim)
    partial = torch.empty(batch, heads * group, splits, dim + 1, device="cuda")
    log_sums, out = torch.empty(batch, heads * group, device="cuda"), torch.empty_like(query)

    def launch(i: int) -> Callable[[], object]:
        return lambda: triton_turboquant_decode_attention(
            query, cache, table[i], lens, rotation, centroids, dim**-0.5, bits, packed_key, bits,
            norm_correction=True, PiT=rotation, mid_o_buf=partial, output_buf=out, lse_buf=log_sums,
            max_num_kv_splits=splits,
        )  # fmt: skip

    if not launch(0)().isfinite().all():
        raise RuntimeError("TurboQuant's output is not finite: not timed")
    return [launch(i) for i in range(sets)], nbytes
