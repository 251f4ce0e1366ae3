# SPDX-License-Identifier: Apache-2.0
"""lm-eval's vLLM model, which knows how much of its context every score reads from quantized pages."""

from __future__ import annotations

import logging
from statistics import mean

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM

from benchmarks.history import history

from .suites import NoLossSeen

WARN_BELOW = 0.5
logger = logging.getLogger(__name__)


class WatchedVLLM(VLLM):
    """Refuses tasks whose scores cannot show a loss, and warns of those that show little of it.

    ``window``: of the presets compared, the widest; None: no preset is compared, nothing is checked.
    ``shares``: per task, the tokens read from pages over all tokens before the scored ones.
    """

    def __init__(self, *args, window: int | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.window = window
        self.shares: dict[str, float] = {}

    @property
    def chunk(self) -> int:
        return self.model.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False):
        self._watch(requests, self._continuation)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
        self._watch(requests, self._whole)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False):
        self._watch(requests, self._generated)
        return super().generate_until(requests, disable_tqdm)

    # Each: how many queries a request scores, the position of the last of them, and the chunk it is in.
    def _continuation(self, context: str, continuation: str) -> tuple[int, int, int]:
        whole, before = self._length(context + continuation), self._length(context)
        return max(1, whole - before), whole - 2, self.chunk

    def _whole(self, text: str) -> tuple[int, int, int]:
        return self._length(text), self._length(text) - 2, self.chunk

    def _generated(self, context: str, options: dict) -> tuple[int, int, int]:
        return 1, self._length(context), 1  # the first token that is generated; all others read more

    def _length(self, text: str) -> int:
        return min(len(self.tok_encode(text)), self.max_length) if text else 0

    def _watch(self, requests: list[Instance], scored) -> None:
        if self.window is None:
            return
        found: dict[str, list[tuple[int, int]]] = {}
        for request in requests:
            count, last, chunk = scored(*request.args)
            position = torch.arange(max(0, last + 1 - count), max(0, last) + 1)
            read = history(position, chunk, self.window)
            found.setdefault(request.task_name or "", []).append((int(read.sum()), int(position.sum())))
        for task, pairs in found.items():
            self._judge(task, mean(read for read, _ in pairs), mean(before for _, before in pairs), scored)

    def _judge(self, task: str, read: float, before: float, scored) -> None:
        share = self.shares[task] = read / before if before else 0.0
        if not read and scored != self._generated:
            raise NoLossSeen(
                f"{task}: every score is that of an unquantized cache, since no prompt is longer than a chunk of "
                f"{self.chunk} tokens and the window of {self.window}, which are read in 8 or 16 bit; use longer "
                "prompts (more shots), a smaller --chunk, or a task that generates"
            )
        if share < WARN_BELOW:
            logger.warning(
                f"{task}: only {share:.0%} of the tokens before a score are read from quantized pages, the others "
                f"lie in its chunk or in the window of {self.window}; the loss of longer prompts will be higher"
            )
