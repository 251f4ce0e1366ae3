# SPDX-License-Identifier: Apache-2.0
"""What can be guarded without a GPU: layouts, registers, spills, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from vllm_oscar.core.config import PRESETS, NormScope, ParamType
from vllm_oscar.core.format import PageFormat, pack_codes
from vllm_oscar.core.ring import RingType

ROOT = Path(__file__).parents[1]
INCLUDE = f"-I{ROOT / 'csrc' / 'include'}"
HEAD_DIMS = (64, 128, 256)
ARCHS = ("80", "90a", "100", "120")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


# ---- layout ----------------------------------------------------------------------
PRINT_LAYOUT = """
#include <cstdio>
#include "oscar/presets.cuh"
template <class L> void print(const char* name) {
  const int numbers[] = {L::kHeadDim, L::kKeyCodes, L::kKeyHigh, L::kValueCodes, L::kValueHigh, L::kKeyParams,
                         L::kValueScale, L::kValueZero, L::kNorms, L::kPageBytes, L::kFirstKey, L::kFirstValue,
                         L::kRingTokens, L::kRingScales};
  std::printf("%s", name);
  for (int number : numbers) std::printf(" %d", number);
  std::printf("\\n");
}
template <int D> void all() {
  using P = oscar::Presets<D>;
  print<typename P::Default>("oscar"); print<typename P::Small>("oscar_small");
  print<typename P::Large>("oscar_large"); print<typename P::FourBit>("oscar_4bit");
  print<typename P::Paper>("oscar_paper");
}
int main() { all<64>(); all<128>(); all<256>(); }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_layout_constants_match_the_format(tmp_path):
    source = tmp_path / "layout.cpp"
    source.write_text(PRINT_LAYOUT)
    subprocess.run(["g++", "-std=c++17", INCLUDE, str(source), "-o", str(tmp_path / "layout")], check=True)
    lines = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(PRESETS) * len(HEAD_DIMS)
    for line in lines:
        name, *numbers = line.split()
        dim, *found = map(int, numbers)
        fmt = PageFormat.preset(name, dim)
        names = ("k_codes", "k_high", "v_codes", "v_high", "k_params", "v_scale", "v_zero", "norms")
        expected = [fmt.sections[section].offset for section in names]
        expected += [fmt.page_bytes, fmt.first_key.offset, fmt.first_value.offset]
        tokens, itemsize = fmt.ring_tokens_per_page(2), 1 if fmt.config.ring is RingType.INT8 else 2
        expected += [tokens, tokens * 2 * dim * itemsize]
        assert found == expected, (name, dim)


def test_presets_cover_what_the_kernels_fold_away():
    for config in PRESETS.values():
        assert config.norm is not NormScope.NONE
        assert config.key_param in (ParamType.E4M3, ParamType.FP16)


# ---- fragments: fragments.cuh in PyTorch ---------------------------------------------
def rotate_right(words: torch.Tensor, by: int) -> torch.Tensor:
    return ((words >> by) | (words << (32 - by))) & 0xFFFFFFFF


def subnormals(register: torch.Tensor) -> torch.Tensor:
    """A register as the two fp16 numbers that the tensor core sees, in units of 2**-24."""
    halves = torch.stack([register & 0xFFFF, register >> 16], -1).to(torch.int16).view(torch.float16)
    return halves.double() * 2**24


def fragment(low: torch.Tensor, high: torch.Tensor | None, bits: int, r: int) -> torch.Tensor:
    """``[words, 4, 2]``: values of registers a0..a3, as CodeWord::fragment makes them."""
    if bits == 2:
        word = low >> 8 if r else low
        registers = [word & (0x00030003 << 2 * slot) for slot in range(4)]
    else:
        even = (low & 0x33333333) | (high & 0xCCCCCCCC)
        odd = (low & 0xCCCCCCCC) | (high & 0x33333333)
        even, odd = (even >> 8, rotate_right(odd, 8)) if r else (even, odd)
        mask = 0x00070007 if bits == 3 else 0x000F000F
        registers = [even & mask, odd & (mask << 2), even & (mask << 4), odd & (mask << 6)]
    return subnormals(torch.stack(registers, 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_fragments_hold_the_codes(operand, bits, head_dim):
    codes = torch.randint(0, 2**bits, (1, 128, head_dim), generator=torch.Generator().manual_seed(bits))
    low, high = (plane[0].view(torch.int32).long() & 0xFFFFFFFF for plane in pack_codes(codes, bits, operand))
    tiles, chunks = head_dim // 16, head_dim // 64
    low = low.view(4, chunks, 32, 4)  # block, chunk, lane, tile % 4: load_words()
    if bits > 2:
        high = high.view(-1, chunks, 32, 4)
    lane = torch.arange(32)
    g, t = lane >> 2, lane & 3
    for block in range(4):
        for tile in range(tiles):
            word = low[block, tile // 4, :, tile % 4]
            upper = None
            if bits == 3:
                upper = rotate_right(high[block // 2, tile // 4, :, tile % 4], block & 1)
            elif bits == 4:
                upper = high[block, tile // 4, :, tile % 4]
            for r in range(2):
                values = fragment(word, upper, bits, r)
                for j1 in range(2):
                    for j0 in range(2):
                        for half in range(2):
                            row, k = 8 * j0 + g, 8 * j1 + 2 * t + half  # of the A operand
                            if operand == "key":
                                expected = codes[0, 32 * block + 16 * r + row, 16 * tile + k]
                            else:
                                expected = codes[0, 32 * block + 16 * r + k, 16 * tile + row]
                            # rows 8..15 come out four times, k 8..15 sixteen times too large
                            assert torch.equal(values[:, 2 * j1 + j0, half], expected.double() * 4**j0 * 16**j1)


# ---- compiled code ---------------------------------------------------------------------
def compile_cubin(source: str, arch: str, output: Path, *defines: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of every kernel."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", target, INCLUDE, *defines]
    done = subprocess.run(
        [*command, str(ROOT / "csrc" / "cuda" / source), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    kernels = {}
    for name, rest in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.S):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", rest)))
        kernels[name] = int(re.search(r"Used (\d+) registers", rest)[1]), spills
    return kernels


def sources() -> list:
    """Of attention everyday tests compile the default preset alone, for Hopper."""
    slow, cases = pytest.mark.slow, [pytest.param("attention_128.cu", "90a", "-DOSCAR_DEFAULT_PRESET_ONLY")]
    for arch in ARCHS:
        for name in ("attention_64.cu", "attention_128.cu", "attention_256.cu", "store.cu"):
            everyday = (arch, name) == ("120", "store.cu")
            cases.append(pytest.param(name, arch, "", marks=() if everyday else slow))
    return cases


@needs_nvcc
@pytest.mark.parametrize("source, arch, define", sources())
def test_no_spills_and_registers_within_budget(source, arch, define, tmp_path):
    kernels = compile_cubin(source, arch, tmp_path / "out.cubin", *define.split())
    tiles = {name: int(found[1]) for name in kernels if (found := re.search(r"decode_kernel.*Li(\d)ELb\dEEEv", name))}
    assert sum("decode" in name for name in kernels) == len(tiles) and (tiles or source == "store.cu") and kernels
    # With sixteen query rows (two tiles) or 256 channels the compiler for sm_120 finds no place for up to a dozen
    # values; with sixteen rows that for sm_100 for one, in a few kernels, which write and read it once, and for two
    # where rings are written.
    for name, (registers, spilled) in kernels.items():
        allowed = 0
        if arch == "120" and (source in ("attention_256.cu", "store.cu") or tiles.get(name) == 2):
            allowed = 128
        elif arch == "100" and "write_ring" in name:
            allowed = 16
        elif arch == "100" and source == "attention_128.cu" and tiles.get(name) == 2:
            allowed = 8
        assert spilled <= allowed, f"{name} spills {spilled} bytes"
        if source == "store.cu":
            # Three blocks a multiprocessor, for which it has memory at head size 128; for sm_100, which nobody has
            # measured, the compiler takes a few more for one layout, which makes two.
            assert registers <= (96 if arch == "100" else 85), name
        elif name not in tiles:
            assert registers <= (72 if arch == "100" else 64), name
        elif source == "attention_128.cu" and tiles[name] == 1 and arch in ("80", "90a"):
            assert registers <= 168, name  # twelve warps a block


def cuobjdump() -> str | None:
    bundled = list(Path(sys.prefix).glob("lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump"))
    return shutil.which("cuobjdump") or (str(bundled[0]) if bundled else None)


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_inner_loop_of_the_default_preset(tmp_path):
    """64 tokens of 128 channels: what decides whether the kernel waits for memory."""
    source = tmp_path / "one.cu"
    source.write_text(
        '#include "oscar/decode.cuh"\n#include "oscar/presets.cuh"\n'
        "template __global__ void oscar::decode_kernel<oscar::Presets<128>::Default, 1, true>("
        "const __grid_constant__ oscar::DecodeParams);\n"
    )
    cubin = tmp_path / "one.cubin"
    target = "-gencode=arch=compute_90a,code=sm_90a"
    subprocess.run(["nvcc", "-O3", "-std=c++17", "-cubin", target, INCLUDE, str(source), "-o", str(cubin)], check=True)
    command = [cuobjdump(), "--dump-sass", str(cubin)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    jumps = [(at, int(to[1], 16)) for at, i in code if (to := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", i))]
    loops = [[(at, i) for at, i in code if to <= at <= end] for end, to in jumps if to < end]
    body = min((body for body in loops if sum("HMMA" in i for _, i in body) >= 64), key=len)
    end = body[-1][0]
    # Jumped over, unless the page is the sequence's first or the last in use, or a maximum has grown.
    rare = {at for begin, to in jumps if begin < to <= end for at, _ in body if begin < at < to}

    def count(instructions) -> Counter:
        return Counter(re.sub(r"^@!?U?P\w+ ", "", i).split()[0].split(".")[0] for i in instructions)

    loop = [i for at, i in body if at not in rare]
    counts, rarely = count(loop), count(i for at, i in body if at in rare)
    assert not any(op in counts for op in ("I2F", "LDL", "STL", "LDG", "PRMT"))
    assert not any(op in rarely for op in ("LDL", "STL"))
    assert counts["HMMA"] == 68  # 32 scores, 32 values, 4 zeros and sums
    assert rarely["HMMA"] == 16  # the first token: 8 for its key, 8 for its value
    assert sum("LDS.128" in i for i in loop) >= 12
    elements = 64 * 128 * 2 / 32  # keys and values per lane
    assert len(loop) / elements < 1.35
    assert sum(counts[op] for op in ("LOP3", "SHF", "FMNMX", "F2FP", "FSEL", "ISETP")) / elements < 0.8
    bulk = [i for _, i in code if "UBLKCP" in i]
    assert bulk, "pages must arrive by bulk copies"
    assert not any("BRA.U.ANY" in i for _, i in body), "one lane issues copies, without a loop over lanes"
