# SPDX-License-Identifier: Apache-2.0
"""Models that see and hear: as with ``auto``, hits over image tokens included, and their text side alone."""

from __future__ import annotations

import random

import pytest
from multimodal_models import ID
from test_vllm_lossless import LOSSLESS, assert_same

IMAGES = [[84, 112, 1], [280, 336, 2], [112, 56, 3], [112, 56, 4]]
QWEN = [ID["<|vision_start|>"], ID["<|image_pad|>"], ID["<|vision_end|>"]]
LLAVA = [ID["<|image_pad|>"]]
CASES = {"qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "llava": LLAVA}
NONE = {"image": 0, "video": 0}


def words(count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(5, 8000) for _ in range(count)]


def prompts(image: list[int]) -> list[dict]:
    """Text before and after images, images at page edges and alone; the last three differ in one image or the end."""
    shape = [(5, 20, [0]), (100, 10, [1]), (126, 130, [0, 2]), (1, 300, [1, 0]), (250, 260, [2]), (250, 270, [2])]
    shape.append((250, 270, [3]))
    found = []
    for number, (before, after, images) in enumerate(shape):
        ids = words(before, min(number, 4))
        for _ in images:
            ids += image + words(3, 50)
        found.append({"ids": ids + words(after, 20 + min(number, 4)), "images": [IMAGES[i] for i in images]})
    return found


@pytest.fixture(scope="module")
def host(engine_host):
    engine_host.call("multimodal_models", "install")
    return engine_host


@pytest.fixture(scope="module")
def model(host, tmp_path_factory):
    """``model(name)``: a folder with that model, written once."""
    written = {}

    def folder(name: str) -> str:
        if name not in written:
            written[name] = str(tmp_path_factory.mktemp(name))
            host.call("multimodal_models", name, written[name])
        return written[name]

    return folder


def as_auto(host, asked: list[dict], options: dict, like: int, other: int) -> tuple[list[dict], list[dict]]:
    """Two rounds of the lossless codec in chunks with hits, each equal to ``auto``; ``like`` and ``other`` are
    prompts that differ in what is seen or heard alone, and so are answered differently."""
    host.start("auto", enable_prefix_caching=False, **options)
    auto = host.run(asked)
    assert auto[like]["outputs"][0]["logprobs"] != auto[other]["outputs"][0]["logprobs"]
    host.start("oscar", env=LOSSLESS, enable_prefix_caching=True, max_num_batched_tokens=512, **options)
    first, again = host.run(asked), host.run(asked)
    assert_same(auto, first)
    assert_same(auto, again)
    return first, again


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "qwen2_5_vl")]
)
def test_images(host, model, name):
    """Chunks end inside images, and in the second round hits do."""
    options = {"model": model(name), "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 29}
    options["limit_mm_per_prompt"] = {"image": 3} | ({} if name == "llava" else {"video": 0})
    first, again = as_auto(host, prompts(CASES[name]), options, 5, 6)
    # The sixth prompt finds the fifth's image and text, the seventh not its image.
    assert [result["cached"] for result in first[4:]] == [0, 512, 128]
    assert [result["cached"] for result in again[4:]] == [512, 512, 512] and again[3]["cached"] >= 256


@pytest.mark.slow
def test_the_text_side_alone(host, model):
    options = {"model": model("qwen2_5_vl"), "max_model_len": 1024, "limit_mm_per_prompt": NONE}
    asked = [words(n, n) for n in (1, 127, 128, 129, 300)]
    host.start("auto", enable_prefix_caching=False, **options)
    auto = host.run(asked)
    host.start("oscar", env=LOSSLESS, enable_prefix_caching=True, **options)
    for _ in range(2):
        found = host.run(asked)
        assert_same(auto, found)
    assert [result["cached"] for result in found] == [0, 0, 0, 128, 256]


@pytest.mark.slow
def test_sounds(host, model):
    """An omni model's thinker, with sounds and images."""
    sound = [ID["<|audio_start|>"], ID["<|audio_pad|>"], ID["<|audio_end|>"]]
    asked = [
        {"ids": words(20, 1) + sound + words(100, 2), "sounds": [[64000, 1]]},
        {"ids": words(100, 1) + sound + words(100, 3), "sounds": [[48000, 2]]},
        {"ids": words(30, 1) + QWEN + sound + words(10, 3), "sounds": [[128000, 2]], "images": [IMAGES[1]]},
        {"ids": words(20, 1) + sound + words(100, 2), "sounds": [[64000, 5]]},
    ]
    limits = {"image": 1, "video": 0, "audio": 1}
    options = {"model": model("qwen2_5_omni"), "max_model_len": 2048, "limit_mm_per_prompt": limits}
    _, again = as_auto(host, asked, options, 0, 3)
    assert [result["cached"] for result in again] == [128, 256, 256, 128]
