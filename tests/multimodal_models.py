# SPDX-License-Identifier: Apache-2.0
"""Tiny multimodal models with random weights and the real processors, written by transformers; fixed seeds.

torchvision does not import beside torch's CPU build. Without it transformers has slower image processors of the same
results, and no video processors; :func:`install` puts a class in their place that processes no videos, and lets vLLM
import plain functions from modules that name torchvision.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock, patch

from vllm_engine import MODEL

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|vision_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
)  # fmt: skip
ID = {name: 8192 + index for index, name in enumerate(SPECIAL)}  # behind the demo model's tokens
TOKEN_NAMES = {  # as the processor of Qwen2.5-Omni asks its tokenizer
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
TEXT = {
    "vocab_size": 8256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
NORMALIZED = {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.26, 0.27]}


class NoVideos:
    """In the place of a video processor."""

    patch_size, temporal_patch_size, merge_size = 14, 2, 2
    min_pixels, max_pixels, fps, min_frames, max_frames = 3136, 200704, 2, 4, 8
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    @classmethod
    def register(cls, *args, **kwargs) -> None:
        pass

    def to_dict(self) -> dict:
        return {}


# From these vLLM imports functions that need no torchvision.
NAMES_TORCHVISION = (
    "qwen2_vl.image_processing_qwen2_vl",
    "qwen2_vl.video_processing_qwen2_vl",
    "qwen3_vl.video_processing_qwen3_vl",
    "pixtral.image_processing_pixtral",
)


def install() -> None:
    """From now on processors of this process have :class:`NoVideos`. Idempotent."""
    import transformers
    from transformers import processing_utils
    from vllm.model_executor.models import registry

    assert not transformers.utils.is_torchvision_available()  # remembered
    parts = ("", ".io", ".transforms", ".transforms.v2", ".transforms.v2.functional")
    with patch.dict(sys.modules, {f"torchvision{part}": MagicMock() for part in parts}):
        found = [importlib.import_module(f"transformers.models.{name}") for name in NAMES_TORCHVISION]
    sys.modules.update({module.__name__: module for module in found})
    registry._run_in_subprocess = lambda function: function()  # where nothing is installed

    module = types.ModuleType("transformers.models.auto.video_processing_auto")
    module.AutoVideoProcessor, module.VIDEO_PROCESSOR_MAPPING_NAMES = NoVideos, {}
    module.video_processor_class_from_name = lambda name: NoVideos
    sys.modules[module.__name__] = module
    transformers.AutoVideoProcessor = transformers.Qwen2VLVideoProcessor = NoVideos
    transformers.Qwen3VLVideoProcessor = NoVideos
    mixin = processing_utils.ProcessorMixin
    NoVideos.valid_kwargs = processing_utils.VideosKwargs
    check = mixin.check_argument_for_proper_class
    if check.__name__ != "allow":

        def allow(self, name, value):
            return NoVideos if isinstance(value, NoVideos) else check(self, name, value)

        mixin.check_argument_for_proper_class = allow
        mixin.__repr__ = lambda self: type(self).__name__


def _save(folder: Path, model, processor: dict) -> None:
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ("visual" in name or "vision" in name or "audio" in name):
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.float().save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODEL)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(ID.values())
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": TOKEN_NAMES}))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _qwen_images(processor: str, patch: int) -> dict:
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": processor, "min_pixels": 3136,
        "max_pixels": 200704, "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, **NORMALIZED,
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255,
    }  # fmt: skip


QWEN_TOKENS = {
    "image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"],
}  # fmt: skip
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "in_channels": 3,
}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12]}


def qwen2_5_vl(folder: str) -> None:
    import torch
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": MROPE, "rope_theta": 10000.0},
        vision_config=QWEN_VISION,
        **QWEN_TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    _save(
        Path(folder), transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_images("Qwen2_5_VLProcessor", 14)
    )


def qwen3_vl(folder: str) -> None:
    import torch
    import transformers

    config = transformers.Qwen3VLConfig(
        text_config=TEXT
        | {"head_dim": 64, "rope_scaling": MROPE | {"mrope_interleaved": True, "mrope_section": [12, 10, 10]}},
        vision_config={
            "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_TOKENS,
    )  # fmt: skip
    torch.manual_seed(1)
    _save(Path(folder), transformers.Qwen3VLForConditionalGeneration(config), _qwen_images("Qwen3VLProcessor", 16))


def llava(folder: str) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        },
        image_token_index=ID["<|image_pad|>"],
        image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(2)
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "patch_size": 14,
        "vision_feature_select_strategy": "default", "image_token": "<|image_pad|>", "num_additional_image_tokens": 1,
        "crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56}, **NORMALIZED,
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    }  # fmt: skip
    _save(Path(folder), transformers.LlavaForConditionalGeneration(config), processor)
    (Path(folder) / "processor_config.json").write_text(json.dumps(processor))
    weights = load_file(Path(folder) / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in weights}  # as in checkpoints
    save_file({names[n]: w for n, w in weights.items()}, Path(folder) / "model.safetensors", {"format": "pt"})


def qwen2_5_omni(folder: str) -> None:
    """The thinker, which hears and sees; the rest of the model speaks, which vLLM does not serve."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=TEXT | {"rope_scaling": MROPE, "rope_theta": 10000.0},
        vision_config=QWEN_VISION | {"embed_dim": 64},
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "d_model": 64,
            "output_dim": 256,
            "n_window": 50,
            "max_source_positions": 1500,
        },
        image_token_index=ID["<|image_pad|>"],
        video_token_index=ID["<|video_pad|>"],
        audio_token_index=ID["<|audio_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        audio_start_token_id=ID["<|audio_start|>"],
        audio_end_token_id=ID["<|audio_end|>"],
        pad_token_id=2,
    )
    torch.manual_seed(3)
    sounds = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 300,
        "n_fft": 400,
        "nb_max_frames": 30000,
        "n_samples": 4800000,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    _save(Path(folder), thinker, _qwen_images("Qwen2_5OmniProcessor", 14) | sounds)
    weights, file = Path(folder) / "model.safetensors", Path(folder) / "config.json"
    save_file({f"thinker.{n}": w for n, w in load_file(weights).items()}, weights, {"format": "pt"})
    whole = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "model_type": "qwen2_5_omni", "dtype": "float32"}
    whole |= {"thinker_config": json.loads(file.read_text()), "enable_audio_output": False}
    file.write_text(json.dumps(whole))
