# SPDX-License-Identifier: Apache-2.0
"""Copies between cache and host for vLLM's CPU build, which has none.

Everything else of vLLM's offloading is real. Copies are as late as they may be on a GPU: a
job that nobody waits for is copied when the step is over and vLLM asks what has finished.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.simple_kv_offload import worker as simple


class LateCopies(OffloadingWorker):
    """For the ``OffloadingConnector``; one block a chunk."""

    loads = True
    """Whether the host can be read."""

    def __init__(self, caches, chunks: int) -> None:
        self.groups = caches.group_data_refs
        self.device = [cache.tensor.view(torch.int8) for cache in caches.tensors]
        self.host = [torch.zeros(chunks, cache.page_size_bytes, dtype=torch.int8) for cache in caches.tensors]
        self.jobs: dict[int, tuple] = {}

    def submit_store(self, job_id, src_spec, dst_spec) -> bool:
        self.jobs[job_id] = True, src_spec, dst_spec
        return True

    def submit_load(self, job_id, src_spec, dst_spec) -> bool:
        self.jobs[job_id] = False, dst_spec, src_spec
        return self.loads

    def _copy(self, store: bool, blocks, chunks) -> None:
        assert len(blocks.block_ids) == len(chunks.block_ids)
        pairs = zip(blocks.block_ids.tolist(), chunks.block_ids.tolist())
        for refs, size in zip(self.groups, blocks.group_sizes):
            for _ in range(size):
                block, chunk = next(pairs)
                for ref in refs:
                    device, host = self.device[ref.tensor_idx][block], self.host[ref.tensor_idx][chunk]
                    target, source = (host, device) if store else (device, host)
                    target[: ref.page_size_bytes] = source[: ref.page_size_bytes]

    def wait(self, job_ids) -> None:
        for job in sorted(job_ids & self.jobs.keys()):
            if self.jobs[job] is not None:
                self._copy(*self.jobs[job])
                self.jobs[job] = None

    def get_finished(self) -> list[TransferResult]:
        self.wait(set(self.jobs))
        done = [TransferResult(job_id=job, success=True) for job in self.jobs]
        self.jobs.clear()
        return done


class _Event:
    """Copies when it is asked whether the copy is done."""

    def __init__(self, copy=lambda: None) -> None:
        self.copy = copy

    def record(self, stream) -> None:
        pass

    def query(self) -> bool:
        self.copy()
        return True

    synchronize = query


class _SimpleCopies:
    """For the ``SimpleCPUOffloadConnector``."""

    def init(self, device: dict, host: dict, *streams) -> None:
        self.device, self.host = device, host

    def launch_copy(self, source, target, is_store, event_idx, events_list, wait_event=None) -> None:
        froms, tos = (self.device, self.host) if is_store else (self.host, self.device)

        def copy() -> None:
            for name in froms:
                tos[name][target] = froms[name][source]

        events_list.append((event_idx, _Event(copy)))

    def shutdown(self) -> None:
        pass


class _Torch:
    """``torch`` as a module sees it, with streams that do nothing."""

    Event = _Event
    cuda = SimpleNamespace(Stream=type("Stream", (), {"__init__": lambda self, priority: None}), current_stream=int)
    cuda.Stream.priority_range = staticmethod(lambda: (0, 0))

    def __getattr__(self, name: str):
        return getattr(torch, name)


def install() -> None:
    """From now on engines of this process can offload. Idempotent."""

    def get_worker(self, kv_caches):
        if not self._worker:
            assert self.blocks_per_chunk == 1
            self._worker = LateCopies(kv_caches, self.num_chunks)
        return self._worker

    CPUOffloadingSpec.get_worker = get_worker
    simple.DmaCopyBackend, simple.torch = _SimpleCopies, _Torch()


def let_loads_fail(fail: bool) -> None:
    """Whether from now on nothing can be read from the host."""
    LateCopies.loads = not fail
