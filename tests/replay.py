# SPDX-License-Identifier: Apache-2.0
"""An independent computation of INT2 OScaR numerics in a plain transformers model.

The model runs chunk by chunk, as vLLM's scheduler cut the request. Its attention keeps
exact keys and values of its own, sends every full block through the reference codec and
reads: blocks before ``ring_start`` from the codec, later tokens as the ring has them, those
of the chunk exactly. Sliding windows, soft-caps and sinks are what the model passes on. There are no
pages, tables, rings or batches, so nothing of vLLM's plumbing is repeated here.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.reference import decode_pages, encode_pages
from vllm_oscar.core.ring import RingType

BLOCK = 128


def _int8(x: torch.Tensor) -> torch.Tensor:
    """One fp16 scale per token and head, so that the largest element is 127."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return (x / scale.clamp(min=1e-30)).round().clamp(-127, 127) * scale


class Replay:
    """Replays requests with the numerics of one preset."""

    def __init__(self, model_path, preset: str) -> None:
        torch.set_num_threads(1)  # tiny matrices
        ALL_ATTENTION_FUNCTIONS["oscar_replay"] = self._attention
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation="oscar_replay"
        ).eval()
        self.fmt = PageFormat.preset(preset, self.model.config.head_dim)
        self.add_noise(0.0, 0)

    def add_noise(self, relative: float, seed: int) -> None:
        """From now on pages and ring get keys and values with this relative noise."""
        self.noise, self.generator = relative, torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def request(self, tokens: list[int], chunks: list[list[int]], donor: list[dict] | None = None):
        """Run ``tokens`` in ``chunks`` of ``[context, length]``.

        ``donor`` is the state of the request that computed the blocks of a prefix hit.
        Returns the logprobs ``[context + length of the last chunk, vocabulary]`` (rows of
        a prefix hit are NaN) and this request's state.
        """
        self.hit = chunks[0][0]
        shape = (self.hit, self.model.config.num_key_value_heads, self.model.config.head_dim)
        self.layers = [
            {
                "key": torch.full(shape, torch.nan),  # of the hit tokens only the codec's version is known
                "value": torch.full(shape, torch.nan),
                "coded_key": donor[i]["coded_key"][: self.hit] if self.hit else torch.empty(shape),
                "coded_value": donor[i]["coded_value"][: self.hit] if self.hit else torch.empty(shape),
            }
            for i in range(self.model.config.num_hidden_layers)
        ]
        rows = [torch.full((self.hit, self.model.config.vocab_size), torch.nan)]
        for self.context, length in chunks:
            positions = torch.arange(self.context, self.context + length)
            ids = torch.tensor(tokens)[positions]
            logits = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits
            rows.append(logits[0].log_softmax(-1))
        return torch.cat(rows), self.layers

    def with_pages(self, donor: list[dict], pages: list[dict[str, str]]) -> tuple[list[dict], float]:
        """A donor's state whose ``pages`` are an engine's (see ``engine_pages``), and by how much they differ at most.

        That is the norm of a page's difference by the page's, of keys and of values.
        """
        donor, worst = [dict(state) for state in donor], 0.0
        for state, held in zip(donor, pages, strict=True):
            for name in ("coded_key", "coded_value"):
                state[name] = state[name].clone()
            for number, data in held.items():
                page = torch.frombuffer(bytearray.fromhex(data), dtype=torch.uint8)
                page = page.view(1, -1, self.fmt.page_bytes)
                begin = int(number) * BLOCK
                block = slice(begin, begin + BLOCK)
                decoded = decode_pages(page, self.fmt, torch.tensor([begin == 0]))
                for name, found in zip(("coded_key", "coded_value"), decoded):
                    known = state[name][block]
                    worst = max(worst, float((found[0] - known).norm() / known.norm()))
                    state[name][block] = found[0]
        return donor, worst

    def _ring_start(self) -> int:
        """First position that is read from the ring: the window; else the open block."""
        if self.fmt.config.window:
            return max(self.hit, self.context - self.fmt.config.window, 0)
        return self.context - self.context % BLOCK

    def _attention(
        self, module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **kwargs
    ):
        state, start = self.layers[module.layer_idx], self._ring_start()
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [tokens, heads, dim]
        assert state["key"].shape[0] == self.context
        state["key"] = torch.cat([state["key"], key])
        state["value"] = torch.cat([state["value"], value])
        keys = torch.cat([state["coded_key"][:start], state["key"][start:]])
        values = torch.cat([state["coded_value"][:start], state["value"][start:]])
        assert keys.shape[0] == state["key"].shape[0]
        out = torch.empty_like(query[0])
        hidden = torch.ones(query.shape[2], keys.shape[0], dtype=torch.bool).triu(self.context + 1)
        if sliding_window is not None:  # a token sees that many, itself included
            hidden |= torch.ones_like(hidden).tril(self.context - sliding_window)
        for head in range(query.shape[1]):
            source = head * key.shape[1] // query.shape[1]
            logits = query[0, head] @ keys[:, source].T * scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            logits = logits.masked_fill(hidden, -torch.inf)
            if s_aux is None:
                weights = logits.softmax(-1)
            else:  # one more weight, without a value
                sink = s_aux[head].expand(len(logits), 1)
                weights = torch.cat([logits, sink], -1).softmax(-1)[:, :-1]
            out[head] = weights @ values[:, source]
        for name in ("key", "value"):
            new = state[name][self.context :]
            new *= 1 + self.noise * torch.randn(new.shape, generator=self.generator)
        self._encode_full_blocks(state)
        if self.fmt.config.ring is RingType.INT8:  # what later steps see of this one's tokens
            for name in ("key", "value"):
                state[name][self.context :] = _int8(state[name][self.context :])
        return out.transpose(0, 1)[None], None

    def _encode_full_blocks(self, state: dict) -> None:
        for begin in range(len(state["coded_key"]), len(state["key"]) - BLOCK + 1, BLOCK):
            block = slice(begin, begin + BLOCK)
            first = torch.tensor([begin == 0])
            page = encode_pages(state["key"][None, block], state["value"][None, block], self.fmt, first)
            key, value = decode_pages(page, self.fmt, first)
            state["coded_key"] = torch.cat([state["coded_key"], key[0]])
            state["coded_value"] = torch.cat([state["coded_value"], value[0]])
