# SPDX-License-Identifier: Apache-2.0
"""What is measured. Every function returns plain records of numbers, one per document or layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_oscar.core.config import PAGE_TOKENS
from vllm_oscar.core.hadamard import rotate

from . import attention
from .methods import Method
from .tasks import Tasks

TAIL = 2 * PAGE_TOKENS
"""Next-token measures start here: before it, no token that is quantized lies behind a window of 256."""

_ROWS = 512  # positions whose logits are held at once


@dataclass
class Lab:
    """A model with the patched attention, its tokenizer and its tasks. Computes in float32."""

    name: str
    model: torch.nn.Module
    tasks: Tasks
    device: str

    @classmethod
    def load(cls, path: str, texts: list[str], device: str) -> Lab:
        attention.register()
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention.NAME
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(Path(path).name, model.eval().to(device), Tasks(tokenizer, texts), device)

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def batch(self) -> int:
        """Documents per forward pass."""
        return 1 if self.device == "cpu" else 8

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def hidden(
        self, tokens: torch.Tensor, method: Method | None, only: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Last hidden states of ``[B, T]`` tokens, caches in ``method``, or ``only`` that of a layer and head."""
        with attention.quantized(method, only):
            return self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float().log_softmax(-1)


@torch.no_grad()
def text(lab: Lab, method: Method, documents: torch.Tensor, exact: list[torch.Tensor]) -> list[dict]:
    """Next-token divergence and loss, per document, beyond the tail.

    ``exact``: last hidden states of each document under exact attention.
    """
    hidden = (row for part in documents.split(lab.batch) for row in lab.hidden(part, method))
    return [
        compare(lab.log_probs, tokens.to(lab.device), reference.to(lab.device), row)
        for tokens, reference, row in zip(documents, exact, hidden, strict=True)
    ]


def compare(log_probs, tokens: torch.Tensor, exact: torch.Tensor, hidden: torch.Tensor) -> dict:
    """Means over the positions beyond the tail, from the hidden states ``[T, hidden]`` of two runs.

    ``kl``: divergence of the next-token distribution from the exact one; ``loss``: of the
    true next token; ``top1``: how often both runs find the same token most probable.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for begin in range(TAIL, len(tokens) - 1, _ROWS):
        rows = slice(begin, min(begin + _ROWS, len(tokens) - 1))
        p, q = log_probs(exact[rows]), log_probs(hidden[rows])
        label = tokens[rows.start + 1 : rows.stop + 1, None]
        losses = -q.gather(1, label).sum(), -p.gather(1, label).sum()
        sums += torch.stack([(p.exp() * (p - q)).sum(), *losses, (p.argmax(1) == q.argmax(1)).sum()]).cpu()
    kl, loss, exact_loss, top1 = (sums / (len(tokens) - 1 - TAIL)).tolist()
    return {"kl": kl, "loss": loss, "exact_loss": exact_loss, "top1": top1}


@torch.no_grad()
def recall(lab: Lab, method: Method | None, task: str, length: int, seeds: int) -> list[dict[str, int]]:
    """Answers in recall documents under teacher forcing: per document, depth to right (1) or wrong (0)."""
    documents = [lab.tasks.recall(seed, length, task) for seed in range(seeds)]
    tokens = torch.stack([tokens for tokens, _ in documents])
    hidden = (row for part in tokens.split(lab.batch) for row in lab.hidden(part, method))
    return [
        right_answers(lab.log_probs, row, tokens, questions)
        for (tokens, questions), row in zip(documents, hidden, strict=True)
    ]


def right_answers(log_probs, hidden: torch.Tensor, tokens: torch.Tensor, questions: list) -> dict[str, int]:
    """Depth of each question of a document to 1 if greedy generation would give its answer, else 0.

    ``hidden``: last hidden states ``[T, hidden]`` of the document ``tokens`` ``[T]``.
    """
    found = {}
    for q in questions:
        best = log_probs(hidden[q.begin - 1 : q.end - 1]).argmax(1).cpu()
        found[f"{q.depth:g}"] = int(torch.equal(best, tokens[q.begin : q.end]))
    return found


@torch.no_grad()
def layers(lab: Lab, methods: list[Method], tokens: torch.Tensor, stride: int = 4) -> dict[str, list[dict]]:
    """Error of each layer's attention on one document, every layer fed exactly.

    Per method and layer: ``error``, the relative L2 error of the attention output, and
    ``kl``, the divergence of the attention distribution (mean over queries and heads).
    Queries are those of every ``stride``-th block, and of the last.
    """
    records: dict[str, list[dict]] = {method.name: [] for method in methods}

    def probe(layer, query, key, value, softmax):
        length = key.shape[2]
        blocks = list(attention.row_blocks(TAIL, length))
        chosen = sorted({*range(0, len(blocks), stride), len(blocks) - 1})
        for measured in methods:
            method = attention.in_layer(measured, softmax)
            old = attention.quantize_history(method, key, value) if method else (None, None)
            ring = attention.recent(method, key), attention.recent(method, value)
            error = power = divergence = rows = 0.0
            for a, b in (blocks[i] for i in chosen):
                part = query[:, :, a:b]
                out, p = attention.attention_rows(part, key, value, key, value, None, None, None, softmax, a)
                approx, q = attention.attention_rows(part, key, value, *ring, *old, method, softmax, a)
                error += (approx - out).square().sum().item()
                power += out.square().sum().item()
                tiny = torch.finfo(torch.float32).tiny
                divergence += (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum().item()
                rows += p.shape[:-1].numel()
            records[measured.name].append({"layer": layer, "error": (error / power) ** 0.5, "kl": divergence / rows})

    with attention.probed(probe):
        lab.model.model(input_ids=tokens[None].to(lab.device), use_cache=False)
    return records


@torch.no_grad()
def heads(lab: Lab, parts: dict[str, Method], documents: torch.Tensor):
    """What each part of a format costs in each layer and KV head, everything else being exact.

    Yields one list of records a layer: ``layer``, ``head``, ``part`` and ``kl``, the next-token
    divergence, mean over documents.
    """
    exact = [row for part in documents.split(lab.batch) for row in lab.hidden(part, None)]
    config = lab.model.config
    for layer in range(config.num_hidden_layers):
        found = []
        for head in range(config.num_key_value_heads):
            for name, method in parts.items():
                hidden = (row for part in documents.split(lab.batch) for row in lab.hidden(part, method, (layer, head)))
                kls = [
                    compare(lab.log_probs, tokens.to(lab.device), reference, row)["kl"]
                    for tokens, reference, row in zip(documents, exact, hidden, strict=True)
                ]
                found.append({"layer": layer, "head": head, "part": name, "kl": sum(kls) / len(kls)})
        yield found


@torch.no_grad()
def generate(lab: Lab, method: Method | None, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy continuation, ``[B, count]`` tokens, decoding from a cache of ``method``."""
    from transformers import DynamicCache

    tokens, cache, out = prompts.to(lab.device), DynamicCache(), []
    with attention.quantized(method):
        for _ in range(count):
            hidden = lab.model.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
            tokens = lab.model.lm_head(hidden[:, -1:]).argmax(-1)
            out.append(tokens)
    return torch.cat(out, 1).cpu()


def agreement(tokens: torch.Tensor, reference: torch.Tensor) -> list[dict]:
    """Per generated text: the fraction of tokens before the first difference, and of equal tokens."""
    same = (tokens == reference).double()
    return [{"prefix": a.cumprod(0).mean().item(), "same": a.mean().item()} for a in same]


@torch.no_grad()
def norms(lab: Lab, tokens: torch.Tensor) -> list[dict]:
    """Key statistics of one document per layer, for the token-norm-imbalance plots.

    ``token``: L2 norm of every token's key (a rotation does not change it, scaling makes
    it one), of the head whose norms vary most. ``channels``: per stage the mean range of a 32-token group per channel,
    sorted, over the root mean square of that stage: what the 2-bit quantizer must span.
    """
    records = []

    def probe(layer, query, key, value, softmax):
        norm = key[0].norm(dim=-1)  # [H, T]
        imbalance = norm.amax(1) / norm.median(1).values
        head = int((imbalance - 1).abs().maximum((norm.amin(1) / norm.median(1).values - 1).abs()).argmax())
        raw = key[0, head].float()
        rotated = rotate(raw)
        unit = rotated.norm(dim=-1, keepdim=True)
        stages = {
            "raw": raw,
            "scaled only": raw / unit,
            "rotated": rotated,
            "rotated and scaled": rotated / unit,
        }
        channels = {}
        for name, x in stages.items():
            groups = x[: len(x) // 32 * 32].unflatten(0, (-1, 32))
            spread = (groups.amax(1) - groups.amin(1)).mean(0) / x.square().mean().sqrt()
            channels[name] = [round(v, 4) for v in spread.sort(descending=True).values.tolist()]
        records.append(
            {
                "layer": layer,
                "head": head,
                "token": [round(v, 3) for v in norm[head].tolist()],
                "max_over_median": [round(v, 3) for v in imbalance.tolist()],
                "min_over_median": [round(v, 3) for v in (norm.amin(1) / norm.median(1).values).tolist()],
                "channels": channels,
            }
        )

    with attention.probed(probe):
        lab.model.model(input_ids=tokens[None].to(lab.device), use_cache=False)
    return records
