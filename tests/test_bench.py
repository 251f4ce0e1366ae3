# SPDX-License-Identifier: Apache-2.0
"""``vllm-oscar bench``: its commands are vLLM's, it goes on where it stopped, and it reports what was measured.

One slow test serves the demo model.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_oscar.tools.bench import cli, records, scrape, shapes
from vllm_oscar.tools.bench.report import losses, medians, write_report
from vllm_oscar.tools.bench.sweep import Settings, Sweep
from vllm_oscar.tools.bench.workloads import TURNS, WORKLOADS
from vllm_oscar.tools.cli import app

REPO = Path(__file__).resolve().parent.parent
MODEL = str(REPO / "examples" / "demo_model")
runner = CliRunner()


def bench(*arguments: object):
    return runner.invoke(app, ["bench", "run", *map(str, arguments)], env={"COLUMNS": "300"})


def a_sweep(folder: Path, dtypes: str = "auto,oscar", workloads: str = "8k-1k,multi-turn", **other) -> Sweep:
    settings = Settings(MODEL, "", 1 << 26, "1/32", 2, other.pop("ranks", 1), ["--enforce-eager"], "a device")
    return Sweep(settings, dtypes.split(","), cli.choose(workloads, "1/32", "1,4"), folder, **other)


# ---- workloads and shapes ----------------------------------------------------------
def test_lengths_scale_in_multiples_of_sixteen():
    workload = WORKLOADS["32k-1k"].scaled(Fraction(1, 32))
    assert (workload.input, workload.output, workload.shared, workload.longest) == (1024, 32, 0, 1056)
    tiny = WORKLOADS["shared-prefix"].scaled(Fraction(1, 1000))
    assert (tiny.shared, tiny.input, tiny.output) == (16, 16, 16)


def test_a_workload_may_say_how_many_requests_are_in_flight():
    chosen = cli.choose("8k-1k:1:64,1k-2k,32k-1k:16", "1", "4,8")
    assert [(workload.name, users) for workload, users in chosen] == [
        ("8k-1k", [1, 64]), ("1k-2k", [4, 8]), ("32k-1k", [16])
    ]  # fmt: skip
    assert cli.choose("128k-1k", "1", "")[0][1] == list(WORKLOADS["128k-1k"].concurrency)


def test_a_turn_repeats_the_turn_before_it_and_no_other_conversation(tmp_path):
    workload = WORKLOADS["multi-turn"].scaled(Fraction(1, 16))
    workload.write_trace(3, tmp_path)
    entries = [json.loads(line) for line in workload.trace_path(3, tmp_path).read_text().splitlines()]
    assert len(entries) == workload.prompts(3, rounds=2) == 3 * TURNS
    assert max(entry["input_length"] + entry["output_length"] for entry in entries) == workload.longest
    for conversation in range(3):
        turns = entries[conversation::3]
        for before, after in zip(turns, turns[1:]):
            assert after["input_length"] == before["input_length"] + workload.shared
            assert after["hash_ids"][: len(before["hash_ids"])] == before["hash_ids"]
    first = [set(entry["hash_ids"]) for entry in entries[:3]]
    assert not first[0] & first[1] and not first[1] & first[2]


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_shape_is_a_model_with_a_tokenizer_that_gives_tokens_back(name, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    shapes.write_model(name, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == shapes.SHAPES[name]["num_hidden_layers"]
    assert config.head_dim == shapes.SHAPES[name]["head_dim"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [2, 17, config.vocab_size - 1, 300]
    assert len(tokenizer) == config.vocab_size
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert len(text) <= len(ids) * max(map(len, tokenizer.get_vocab()))  # or vLLM refuses a long prompt unread


# ---- commands -----------------------------------------------------------------------
def parsed(command: list[str]):
    """The arguments that the installed vLLM reads from a command; it exits if it does not know one."""
    from vllm.benchmarks import serve, throughput
    from vllm.benchmarks.sweep.serve import SweepServeArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    kinds = {
        ("vllm", "bench", "sweep", "serve"): SweepServeArgs.add_cli_args,
        ("vllm", "bench", "serve"): serve.add_cli_args,
        ("vllm", "bench", "throughput"): throughput.add_cli_args,
        ("vllm", "serve"): make_arg_parser,
    }
    words, add = next((words, add) for words, add in kinds.items() if tuple(command[: len(words)]) == words)
    parser = FlexibleArgumentParser()
    add(parser)
    return parser.parse_args(command[len(words) :])


def test_the_commands_of_a_dry_run_are_ones_that_vllm_reads(tmp_path):
    import vllm_oscar.engine.plugin

    vllm_oscar.engine.plugin.register()  # as vLLM does, so that it knows our dtypes
    result = bench(MODEL, "--dry-run", "--kv-cache-dtype", "auto,oscar", "--scale", "1/32", "--kv-memory", "64MiB",
                   "--offline", "8k-1k:8,1k-2k", "--out", tmp_path, "--port", 8123, "-tp", 2,
                   "--", "--enforce-eager")  # fmt: skip
    assert result.exit_code == 0, result.output
    commands = [shlex.split(line) for line in result.output.splitlines() if line and not line.startswith("#")]
    points = sum(len(workload.concurrency) for workload in WORKLOADS.values())
    batches = 1 + len(WORKLOADS["1k-2k"].concurrency)
    assert len(commands) == 2 * (1 + points + 1 + batches) + 1  # a server, its points, its sweep, batches; plot_pareto
    seen = set()
    for command in commands[:-1]:
        arguments = parsed(command)
        if command[1] == "serve":
            assert (arguments.host, arguments.port, arguments.enforce_eager) == ("127.0.0.1", 8123, True)
            assert arguments.max_model_len == 4096 + 32 + 128 and arguments.tensor_parallel_size == 2
            assert arguments.kv_cache_memory_bytes == 64 << 20
            seen.add(arguments.kv_cache_dtype)
        elif command[2] == "serve":
            assert arguments.base_url == "http://127.0.0.1:8123" and arguments.ignore_eos
            assert Path(arguments.dataset_path or MODEL).exists()
            seen.add((arguments.dataset_name, arguments.max_concurrency))
    assert {"auto", "oscar", ("random", 256), ("prefix_repetition", 256), ("timed_trace", 64)} <= seen


def test_the_sweep_runs_the_single_commands(tmp_path, capsys):
    from vllm.benchmarks.sweep.serve import SweepServeArgs, run_main

    sweep = a_sweep(tmp_path)
    sweep.write()
    run_main(SweepServeArgs.from_cli_args(parsed([*sweep.sweep_command("oscar"), "--dry-run"])))
    printed = [line.split(" command: ", 1) for line in capsys.readouterr().out.splitlines() if " command: " in line]
    ran = [(kind, shlex.join(eval(words)[1:])) for kind, words in printed]
    server, *measurements = (shlex.join(command[1:]) for command in sweep.single_commands("oscar"))
    assert [text for kind, text in ran if kind == "Server"] == [server]
    found = [text for kind, text in ran if kind == "Benchmark"][1:]  # without the warm-up
    assert len(found) == len(measurements) == 4
    for text, measurement in zip(found, measurements):
        assert text.startswith(measurement + " --percentile-metrics")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--workload", "9k"], "there is no workload '9k'; choose --workload from 8k-1k, 1k-2k"),
        (["--workload", ","], "no workload is chosen"),
        (["--offline", "shared-prefix"], "leave shared-prefix out of --offline"),
        (["--scale", "2"], "--scale is a factor above 0 and up to 1, such as 1/32, not '2'"),
        (["--concurrency", "0,4"], "requests in flight are numbers of at least 1, such as 1,16,64, and not '0,4'"),
        (["--workload", "8k-1k:x"], "requests in flight are numbers of at least 1, such as 1,16,64, and not '8k-1k:x'"),
        (["--kv-memory", "many"], "cannot read 'many' as a size"),
        (["--kv-cache-dtype", ""], "no dtype is chosen"),
        (["--shape"], "there is no shape"),
        (["--kv-memory", "1MiB"], "auto cannot hold one request of 128k-1k (132,096 tokens) in 1,048,576 bytes"),
    ],
)
def test_bad_input_is_one_sentence(arguments, expected, tmp_path):
    result = bench(MODEL, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1 and expected in " ".join(result.output.split())
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = bench(MODEL, "--scale", "1/32", "--out", tmp_path, "--port", port)
    assert result.exit_code == 1 and f"port {port} of 127.0.0.1 cannot be used" in result.output


# ---- what vLLM's tools leave behind ----------------------------------------------------
METRICS = """\
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.7e+09
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",kv_cache_size_tokens="4096"} 1.0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 3.0
vllm:num_preemptions_total{engine="1"} 4.0
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0"} 100.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0"} 25.0
# TYPE vllm:external_prefix_cache_hits counter
vllm:external_prefix_cache_hits_total{engine="0"} 9.0
"""


def test_counters_are_summed_over_engines():
    expected = {"preemptions": 7, "prefix_queries": 100, "prefix_hits": 25, "server": 1.7e9, "kv_tokens": 4096}
    assert scrape.counters(METRICS) == expected
    assert scrape.counters(METRICS.replace('"4096"', '"None"'))["kv_tokens"] is None


def write_result(sweep: Sweep, dtype: str, name: str, server: float, time: float, counted: tuple, run: int = 0) -> None:
    """A measurement as the sweep and ``scrape`` leave it."""
    folder = sweep.folder / dtype / f"BENCH--{name}"
    folder.mkdir(parents=True, exist_ok=True)
    users = int(name.rsplit("-c", 1)[1])
    speed = users * (20.0 if dtype == "oscar" else 10.0)
    result = {
        "_benchmark_name": name, "run_number": run, "max_concurrency": users, "completed": 8, "failed": 0,
        "duration": 2.0, "total_input_tokens": 800, "total_output_tokens": 80, "output_throughput": speed,
        "p50_ttft_ms": 1.0, "p99_ttft_ms": 2.0, "p50_tpot_ms": 3.0, "p99_tpot_ms": 4.0,
    }  # fmt: skip
    (folder / f"run={run}.json").write_text(json.dumps(result))
    counts = dict(zip(("preemptions", "prefix_queries", "prefix_hits"), counted))
    stamp = {"server": server, "time": time, "kv_tokens": 5000, "vllm": "0.32.0", "commit": "abc", "date": "2026-01-02"}
    (folder / f"run={run}.counters.json").write_text(json.dumps(counts | stamp))


def test_a_measurement_has_what_was_counted_during_it(tmp_path):
    sweep = a_sweep(tmp_path, ranks=2)
    write_result(sweep, "oscar", "8k-1k-c1", server=1.0, time=10.0, counted=(2, 100, 50))
    write_result(sweep, "oscar", "8k-1k-c4", server=1.0, time=11.0, counted=(5, 300, 100))
    write_result(sweep, "oscar", "multi-turn-c1", server=2.0, time=12.0, counted=(1, 10, 1))  # a server started anew
    points = records.collect(sweep)
    assert [(p["workload"], p["concurrency"], p["preemptions"], p["prefix_hit_percent"]) for p in points] == [
        ("8k-1k", 1, 2, 50.0), ("8k-1k", 4, 3, 25.0), ("multi-turn", 1, 1, 10.0),
    ]  # fmt: skip
    assert (points[1]["per_user"], points[1]["per_device"]) == (20.0, 40.0)
    assert points[0]["commit"] == "abc" and points[0]["kv_tokens"] == 5000


def test_what_was_cut_off_does_not_count(tmp_path):
    sweep = a_sweep(tmp_path)
    write_result(sweep, "auto", "8k-1k-c1", 1.0, 10.0, (0, 0, 0))
    (tmp_path / "auto" / "BENCH--8k-1k-c1" / "run=0.counters.json").unlink()
    write_result(sweep, "auto", "8k-1k-c16", 1.0, 10.0, (0, 0, 0))  # measured, but not asked for now
    assert records.collect(sweep) == []
    assert "8k-1k-c1" in records.missing(sweep, "auto")


def test_what_is_recorded_is_not_measured_again(tmp_path, monkeypatch):
    ran = []

    def fake_run(command, log):
        ran.append(command)
        yield from ()

    monkeypatch.setattr("vllm_oscar.tools.bench.sweep.run", fake_run)
    sweep = a_sweep(tmp_path)
    sweep.write()
    for name in ("8k-1k-c1", "8k-1k-c4", "multi-turn-c1", "multi-turn-c4"):
        write_result(sweep, "auto", name, 1.0, 10.0, (0, 0, 0))
    write_result(sweep, "oscar", "8k-1k-c1", 1.0, 10.0, (0, 0, 0))
    (tmp_path / "oscar" / "BENCH--warm-up").mkdir()
    assert cli._measure(sweep) == []
    assert [command[command.index("--experiment-name") + 1] for command in ran] == ["oscar"]
    assert ran[0][-1] == "--resume"
    assert not (tmp_path / "oscar" / "BENCH--warm-up").exists()  # the new server is to be warmed up, too


def test_a_batch_without_a_server_is_recorded_and_not_run_again(tmp_path, monkeypatch):
    ran = []

    def fake_run(command, log):
        ran.append(command)
        result = Path(command[command.index("--output-json") + 1])
        result.write_text(json.dumps({"elapsed_time": 4.0, "num_requests": 8}))
        yield from ()

    monkeypatch.setattr("vllm_oscar.tools.bench.sweep.run", fake_run)
    sweep = a_sweep(tmp_path, workloads="", batches=cli.choose("1k-2k:8", "1/32", ""))
    sweep.write()
    assert cli._measure(sweep) == cli._measure(sweep) == []
    assert [command[:3] for command in ran] == [["vllm", "bench", "throughput"]] * 2
    (auto, oscar) = records.collect_offline(sweep)
    assert (auto["dtype"], auto["requests"], auto["output_tokens_per_s"]) == ("auto", 8, 8 * 64 / 4)
    assert oscar["dtype"] == "oscar" and oscar["date"]
    text = write_report(records.write_record(sweep, "vllm-oscar bench run")).read_text()
    assert "| `1k-2k` | 8 | 128 | 128 |" in text and "Most output" not in text


def test_a_failed_dtype_does_not_keep_others_from_being_measured(tmp_path, monkeypatch):
    def fake_run(command, log):
        if "auto" in command:
            raise RuntimeError("the server died")
        yield "end", ""

    monkeypatch.setattr("vllm_oscar.tools.bench.sweep.run", fake_run)
    assert cli._measure(a_sweep(tmp_path)) == ["auto: the server died"]


def test_a_failed_request_is_told_and_its_point_measured_again(tmp_path, monkeypatch):
    sweep = a_sweep(tmp_path, dtypes="oscar", workloads="8k-1k")
    for name in ("8k-1k-c1", "8k-1k-c4"):
        write_result(sweep, "oscar", name, 1.0, 10.0, (0, 0, 0))
    path = tmp_path / "oscar" / "BENCH--8k-1k-c4" / "run=0.json"

    def fake_run(command, log):
        yield "end", ""

    monkeypatch.setattr("vllm_oscar.tools.bench.sweep.run", fake_run)
    assert cli._measure(sweep) == [] and path.exists()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": 3}))
    assert records.missing(sweep, "oscar") == ["8k-1k-c4"]

    def again(command, log):
        assert not path.parent.exists()  # or the sweep would skip it
        write_result(sweep, "oscar", "8k-1k-c4", 1.0, 10.0, (0, 0, 0))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": 1}))
        yield "end", ""

    monkeypatch.setattr("vllm_oscar.tools.bench.sweep.run", again)
    (sentence,) = cli._measure(sweep)
    assert sentence.startswith("oscar: 1 requests of 8k-1k-c4 failed, see")


def test_a_signal_for_the_process_group_leaves_the_sweep_time_to_end_its_server(tmp_path):
    sweep_script = tmp_path / "sweep"  # ends its server when it is interrupted, as vLLM's does
    sweep_script.write_text(
        "import pathlib, time\n"
        "try:\n    print('[END BENCHMARK]', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('ended').touch()\n"
    )
    program = (
        "import pathlib, signal, sys\nfrom vllm_oscar.tools.bench import sweep\n"
        "sweep.executable = lambda command: [sys.executable, 'sweep']\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "for event in sweep.run([], pathlib.Path('log')):\n    print(event, flush=True)\n"
    )
    process = subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$0\" -c \"$1\"", sys.executable, program],  # as a shell's background job
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "('end', '')\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "ended").exists()


def test_other_settings_are_refused_in_a_folder_with_measurements(tmp_path):
    sweep = a_sweep(tmp_path)
    sweep.write()
    a_sweep(tmp_path, ranks=2).write()  # nothing measured yet
    write_result(sweep, "auto", "8k-1k-c1", 1.0, 10.0, (0, 0, 0))
    with pytest.raises(ValueError, match="holds measurements with tensor_parallel 2, not 1; choose another folder"):
        sweep.write()


def test_the_output_of_a_command_becomes_events_and_its_failure_a_sentence(tmp_path, monkeypatch):
    from vllm_oscar.tools.bench import sweep

    script = tmp_path / "fake"
    script.write_text(
        "echo \"Benchmark overrides: {'_benchmark_name': '8k-1k-c4', 'num_prompts': 8}\"\n"
        "printf ' 25%%| | 2/8 [00:01<00:03]\\r 50%%| | 4/8 [00:02<00:02]\\n'\n"
        "echo '[END BENCHMARK]'\necho 'ValueError: no memory'\nexit $1\n"
    )
    monkeypatch.setattr(sweep, "executable", lambda command: ["sh", str(script), *command])
    expected = [("point", "8k-1k-c4"), ("requests", "2/8"), ("requests", "4/8"), ("end", "")]
    assert list(sweep.run(["0"], tmp_path / "log")) == expected
    with pytest.raises(RuntimeError, match="ValueError: no memory"):
        list(sweep.run(["3"], tmp_path / "log"))
    assert "no memory" in (tmp_path / "log").read_text()


# ---- the report ---------------------------------------------------------------------
def test_the_report_says_where_oscar_loses(tmp_path):
    sweep = a_sweep(tmp_path)
    for dtype in ("auto", "oscar"):
        for index, name in enumerate(("8k-1k-c1", "8k-1k-c4", "multi-turn-c1", "multi-turn-c4")):
            write_result(sweep, dtype, name, 1.0, index, (index, 100, 10))
    path = records.write_record(sweep, "vllm-oscar bench run demo")
    text = write_report(path).read_text()
    assert "Nowhere, by more than 3%, among 4 points measured beside `auto`" in text
    assert "| `8k-1k` | 40 | 80 (2.00x) |" in text
    assert "`vllm-oscar bench run demo`" in text and "vllm 0.32.0" in text and "commit abc" in text
    assert all(shlex.join(command) in text for command in sweep.single_commands("oscar"))
    for name in ("8k-1k", "multi-turn"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    record = json.loads(path.read_text())
    point = next(p for p in record["points"] if (p["dtype"], p["workload"], p["concurrency"]) == ("oscar", "8k-1k", 4))
    point |= {"ttft_p50": 1.5, "output_tokens_per_s": 39.5}  # behind by half, and within the tolerance
    record["points"] = [p for p in record["points"] if (p["dtype"], p["workload"]) != ("auto", "multi-turn")]
    path.write_text(json.dumps(record))
    text = write_report(path).read_text()
    assert "At 1 of 2 points" in text
    assert "| `8k-1k` | 4 | `auto` | TTFT p50 | 1.5 | 1 | 1.50x |" in text
    assert "| 4 | `auto` | not measured |" in text
    found = losses(medians(record["points"]), "oscar", ["auto"])
    assert [(loss["what"], loss["ratio"]) for loss in found] == [("TTFT p50", 1.5)]
    four = ("auto", "8k-1k", 4)
    record["points"] = [p for p in record["points"] if (p["dtype"], p["workload"], p["concurrency"]) != four]
    path.write_text(json.dumps(record))
    assert "| `8k-1k` | 10 | 20 (2.00x) |" in write_report(path).read_text()  # what one lacks is not compared


def test_runs_are_reported_by_their_median():
    point = {"dtype": "auto", "workload": "w", "concurrency": 1, "completed": 4}
    points = [point | {"ttft_p50": value} for value in (9.0, 1.0, 2.0)]
    assert medians(points)["auto", "w", 1]["ttft_p50"] == 2.0
    nothing = [point | {"completed": 0, "ttft_p50": 0.0}]
    assert medians(points + 4 * nothing)["auto", "w", 1]["ttft_p50"] == 2.0 and medians(nothing) == {}


def test_a_report_without_a_record_is_refused(tmp_path):
    result = runner.invoke(app, ["bench", "report", str(tmp_path)])
    assert result.exit_code == 1 and "make it with vllm-oscar bench run" in " ".join(result.output.split())


# ---- for real ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(2400)  # two servers and twelve measurements, beside another test
def test_the_demo_model_is_measured_and_then_not_again(tmp_path):
    arguments = [MODEL, "--workload", "8k-1k,shared-prefix,multi-turn", "--concurrency", "1,4", "--scale", "1/32",
                 "--kv-memory", "8MiB", "--kv-cache-dtype", "auto,oscar", "--out", tmp_path, "--port", 8765,
                 "--", "--enforce-eager"]  # fmt: skip
    first = bench(*arguments)
    assert first.exit_code == 0, first.output
    points = json.loads((tmp_path / "bench.json").read_text())["points"]
    assert len(points) == 2 * 3 * 2
    for point in points:
        requests = 24 if (point["workload"], point["concurrency"]) == ("multi-turn", 4) else point["completed"]
        assert point["completed"] == requests and point["failed"] == 0
        assert point["output_tokens_per_s"] > 0 and point["kv_tokens"] > 1000 and point["vllm"]
    hits = {(p["dtype"], p["workload"]): p["prefix_hit_percent"] for p in points if p["concurrency"] == 1}
    for dtype in ("auto", "oscar"):
        assert hits[dtype, "8k-1k"] == 0 and hits[dtype, "shared-prefix"] > 50 and hits[dtype, "multi-turn"] > 30
    assert "## Where `oscar` loses" in (tmp_path / "report.md").read_text()
    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run=*.json")}
    again = bench(*arguments)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run=*.json")} == results
