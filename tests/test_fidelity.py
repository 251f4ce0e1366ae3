# SPDX-License-Identifier: Apache-2.0
"""The fidelity lab measures what it says: decode-time numerics, true bytes, reproducible reports."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import independent_codec
import numpy as np
import pytest
import tolerances
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.fidelity import attention, cli, measures, methods, quiz, report, tasks, through_vllm  # noqa: E402
from benchmarks.fidelity.records import Records  # noqa: E402
from vllm_oscar.core.config import MEASURED_LOSS, PRESETS  # noqa: E402
from vllm_oscar.core.format import PageFormat  # noqa: E402
from vllm_oscar.core.reference import attention as reference_attention  # noqa: E402
from vllm_oscar.core.reference import encode_pages  # noqa: E402
from vllm_oscar.core.ring import RingType, from_int8, to_int8  # noqa: E402
from vllm_oscar.core.softmax import Softmax  # noqa: E402

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "demo_model"
IDENTITY = methods.Method("identity", "test", lambda key, value, first: (key, value), lambda dim: 4.0 * dim)


def tiny_model(attn: str, layout: str = "Llama") -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{layout}Config")(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, attn_implementation=attn,
        initializer_range=0.2, **({"sliding_window": None} if layout == "Mistral" else {}),
    )  # fmt: skip
    return getattr(transformers, f"{layout}ForCausalLM")(config).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by being shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab() -> measures.Lab:
    attention.register()
    return measures.Lab("tiny", tiny_model(attention.NAME), None, "cpu")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 600), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["Llama", "Qwen3", "Mistral"])
def test_exact_attention_is_the_model(layout, tokens):
    attention.register()
    lab = measures.Lab(layout, tiny_model(attention.NAME, layout), None, "cpu")
    with torch.no_grad():
        expected = tiny_model("eager", layout).model(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(lab.hidden(tokens, None), expected, atol=2e-4, rtol=2e-4)
    quantized = lab.hidden(tokens, methods.registry()["oscar_paper"])  # the patched attention is what ran
    assert (quantized - expected).norm() > 1e-3 * expected.norm()


def test_a_method_without_loss_has_no_divergence(lab, tokens):
    exact = [lab.hidden(row[None], None)[0] for row in tokens]
    for record in measures.text(lab, IDENTITY, tokens, exact):
        assert abs(record["kl"]) < 1e-6 and record["top1"] == 1.0
        assert record["loss"] == pytest.approx(record["exact_loss"], abs=1e-5)


def test_a_lossy_method_diverges_more_with_fewer_bits(lab, tokens):
    known = methods.registry()
    exact = [lab.hidden(row[None], None)[0] for row in tokens]
    kl = [
        sum(r["kl"] for r in measures.text(lab, known[name], tokens, exact))
        for name in ("bf16", "oscar_large", "oscar_paper")
    ]
    assert kl == sorted(kl) and kl[0] < 0.1 * kl[-1]


@pytest.mark.parametrize("name", PRESETS)
def test_an_independent_codec_loses_as_much(name):
    """On a trained model, with the codec stated in NumPy in the place of the product's."""
    config = PRESETS[name]

    def quantize(key, value, first):
        blocks = zip(key.numpy(), value.numpy(), first.tolist(), strict=True)
        pairs = zip(*(independent_codec.block(k, v, config, f) for k, v, f in blocks), strict=True)
        return tuple(torch.from_numpy(np.stack(found)).float() for found in pairs)

    def recent(x):
        return torch.from_numpy(independent_codec.ring(x.numpy())).float()

    product = methods.registry()[name]
    other = replace(product, quantize=quantize, recent=product.recent and recent)
    lab = measures.Lab.load(str(DEMO_MODEL), tasks.manual(), "cpu")
    documents = lab.tasks.documents(1, 640)
    exact = [lab.hidden(documents, None)[0]]
    kl, stated = (measures.text(lab, method, documents, exact)[0]["kl"] for method in (product, other))
    assert stated == pytest.approx(kl, rel=tolerances.INDEPENDENT_KL)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("position", [0, 127, 128, 255, 390])
@pytest.mark.parametrize("sliding_window", [None, 100, 300])
def test_each_query_sees_what_the_serving_path_reads(name, position, sliding_window):
    """Against the normative attention over pages and ring, one decode step at a time; windows with cap and sinks."""
    torch.manual_seed(position)
    sinks = None if sliding_window is None else torch.randn(4)
    fmt = PageFormat.preset(name, 64)
    query = torch.randn(1, 4, 512, 64)
    key, value = torch.randn(2, 1, 2, 512, 64)
    method = methods.registry()[name]
    old = attention.quantize_history(method, key, value)
    softmax = Softmax(0.125, sliding_window, None if sliding_window is None else 3.0, sinks)
    got = attention.attention(query, key, value, old, method, softmax)[0, :, position]

    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, D]
    own = k[position : position + 1], v[position : position + 1]
    if fmt.config.ring is RingType.INT8:  # whatever is older than the query comes from the ring, pages too
        k, v = (from_int8(*to_int8(x)) for x in (k, v))
    full = position // 128
    first = torch.arange(max(full, 1)) == 0
    pages = encode_pages(
        k[: max(full, 1) * 128].unflatten(0, (-1, 128)), v[: max(full, 1) * 128].unflatten(0, (-1, 128)), fmt, first
    )
    start = max(0, position - fmt.config.window) if fmt.config.window else full * 128
    visible = softmax.first_visible(position)
    start = max(start, visible)
    expected = reference_attention(
        query[0, :, position][None], *own, pages[visible // 128 :], k[start:position], v[start:position], position,
        start, softmax, fmt,
    )[0]  # fmt: skip
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["oscar", "kivi"])
def test_decoding_token_by_token_equals_one_pass(lab, tokens, name):
    method, row = methods.registry()[name], tokens[:1, :262]
    cache = transformers.DynamicCache()
    with torch.no_grad(), attention.quantized(method):
        rows = [lab.model.model(input_ids=row[:, :240], past_key_values=cache, use_cache=True).last_hidden_state]
        for i in range(240, 262):
            step = lab.model.model(input_ids=row[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows.append(step.last_hidden_state)
    torch.testing.assert_close(torch.cat(rows, 1), lab.hidden(row, method), atol=2e-3, rtol=2e-3)


def test_layer_errors_of_the_exact_method_are_zero(lab, tokens):
    found = measures.layers(lab, [IDENTITY, methods.registry()["oscar_paper"]], tokens[0])
    assert [r["layer"] for r in found["identity"]] == [0, 1]
    assert all(r["error"] < 1e-5 and abs(r["kl"]) < 1e-5 for r in found["identity"])
    assert all(r["error"] > 1e-3 and r["kl"] > 1e-5 for r in found["oscar_paper"])


def test_the_parts_of_a_loss_are_told_apart(lab, tokens):
    """Each head, layer and part alone; one layer's head has nothing but its own cost."""
    oscar = methods.registry()["oscar"]
    found = [record for layer in measures.heads(lab, methods.parts(oscar), tokens) for record in layer]
    assert [(r["layer"], r["head"], r["part"]) for r in found] == [(i, 0, p) for i in (0, 1) for p in methods.PARTS]
    assert all(r["kl"] > 0 for r in found)
    free = measures.heads(lab, {"all": IDENTITY}, tokens)
    assert all(abs(r["kl"]) < 1e-6 for layer in free for r in layer)
    # One layer alone is neither all of them nor none.
    whole, one = lab.hidden(tokens, oscar), lab.hidden(tokens, oscar, only=(1, 0))
    assert not torch.equal(whole, one) and not torch.equal(one, lab.hidden(tokens, None))


WINDOWED = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("layout", ["Gemma2", "GptOss"])
def test_models_with_windows(layout, tokens):
    """Exact attention is the model; each kind of layer can be quantized alone, and both together lose most."""

    def model(attn):
        torch.manual_seed(0)
        config = getattr(transformers, f"{layout}Config")(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, attn_implementation=attn,
            initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2, **WINDOWED,
            **({"num_local_experts": 2, "num_experts_per_tok": 2} if layout == "GptOss" else {}),
        )  # fmt: skip
        return getattr(transformers, f"{layout}ForCausalLM")(config).eval()

    attention.register()
    lab = measures.Lab(layout, model(attention.NAME), None, "cpu")
    with torch.no_grad():
        expected = model("eager").model(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(lab.hidden(tokens, None), expected, atol=2e-4, rtol=2e-4)
    both, full, windows, paged = methods.windows()
    errors = measures.layers(lab, [both, full, windows, paged], tokens[0])
    assert [r["error"] > 1e-3 for r in errors[both.name]] == [True, True]
    assert [r["error"] > 1e-3 for r in errors[full.name]] == [False, True]
    assert [r["error"] > 1e-3 for r in errors[windows.name]] == [True, False]
    assert errors[paged.name][0]["error"] > 2 * errors[windows.name][0]["error"]
    assert errors[paged.name][1]["error"] < 1e-3
    hidden = {m.name: lab.hidden(tokens, m) for m in (both, full, windows)}
    assert all((hidden[name] - expected).norm() > 1e-3 * expected.norm() for name in hidden)
    assert not torch.equal(hidden[both.name], hidden[full.name])


def test_a_part_leaves_the_others_exact():
    block = torch.randn(2, 2, 128, 1, 64, generator=torch.Generator().manual_seed(2))
    first = torch.tensor([True, False])
    parts = methods.parts(methods.registry()["oscar"])
    changed = {
        name: [(coded - exact).abs().amax((2, 3)) > 1e-6 for coded, exact in zip(part.quantize(*block, first), block)]
        for name, part in parts.items()
    }
    sink = torch.zeros(2, 128, dtype=torch.bool)
    sink[0, 0] = True
    for name, (key, value) in changed.items():
        assert torch.equal(key, {"keys": ~sink, "first token": sink}.get(name, sink & ~sink)), name
        assert torch.equal(value, {"values": ~sink, "first token": sink}.get(name, sink & ~sink)), name
    assert parts["window"].recent is not None and all(parts[n].recent is None for n in parts if n != "window")


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_bytes_are_those_of_the_page_format(dim):
    known = methods.registry()
    for name in PRESETS:
        assert known[name].bytes_per_token(dim) == PageFormat.preset(name, dim).bytes_per_token
        assert known[name].bits(dim) == PageFormat.preset(name, dim).bits_per_element
    assert known["bf16"].bits(dim) == 16 and known["fp8"].bits(dim) == 8
    assert all(m.bytes_per_token(dim) > dim / 2 for m in known.values())


def test_turboquant_is_vllms():
    config = pytest.importorskip("vllm.model_executor.layers.quantization.turboquant.config")
    known = methods.registry()
    for name in methods.TURBOQUANT_PRESETS:
        assert known[name].bytes_per_token(128) == config.TurboQuantConfig.from_cache_dtype(name, 128).slot_size_aligned
    saved = json.loads(methods._CODEBOOKS.read_text())["centroids"]["64x3"]
    torch.testing.assert_close(methods.turboquant_centroids(64, 3), torch.tensor(saved))


_KERNELS = '''
import sys, torch, triton, triton.language as tl, vllm.triton_utils as utils
utils.triton, utils.tl, utils.HAS_TRITON = triton, tl, True
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store
from vllm.v1.attention.ops import triton_turboquant_decode as decode
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
from benchmarks.fidelity.methods import turboquant_centroids, turboquant_replay, TURBOQUANT_PRESETS
from vllm_oscar.core.hadamard import hadamard
torch.manual_seed(0)
tokens, heads, dim = 2, 2, 64
for name, (kb, vb) in TURBOQUANT_PRESETS.items():
    c = TurboQuantConfig.from_cache_dtype(name, dim)
    key, value = torch.randn(2, tokens, heads, dim)
    cache = torch.zeros(1, 16, heads, c.slot_size_aligned, dtype=torch.uint8)
    book = turboquant_centroids(dim, c.mse_bits)
    triton_turboquant_store(key, value, cache, torch.arange(tokens, dtype=torch.int32), hadamard(dim),
                            (book[1:] + book[:-1]) / 2, c.mse_bits, c.key_packed_size, c.value_quant_bits)
    k, v = torch.zeros(2, 1, heads, tokens, dim, dtype=torch.half)
    decode._tq_full_dequant_kv[(tokens, heads)](
        cache, torch.zeros(1, 1, dtype=torch.int32), book, k, v, *k.stride()[:3], *v.stride()[:3],
        *cache.stride()[:3], 1, HEAD_DIM=dim, BLOCK_SIZE=16, NUM_KV_HEADS=heads, MSE_BYTES=dim * kb // 8,
        KPS=c.key_packed_size, VQB=vb, VAL_DATA_BYTES=dim * vb // 8, MSE_BITS=c.key_mse_bits, KEY_FP8=0,
        BLOCK_D=dim, NORM_CORRECTION=1)
    key_back, value_back = turboquant_replay(key, value, kb, vb)
    torch.testing.assert_close(k[0].transpose(0, 1).float() @ hadamard(dim).T, key_back, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(v[0].transpose(0, 1).float(), value_back, atol=1e-3, rtol=1e-3)
print("equal")
'''


def test_turboquant_replay_equals_vllms_kernels():
    pytest.importorskip("triton")
    pytest.importorskip("vllm")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _KERNELS], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]


@pytest.fixture(scope="module")
def recall_tasks() -> tasks.Tasks:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    return tasks.Tasks(tokenizer, ["def f(x):\n    return x + 1  # one more\n" * 3000])


@pytest.mark.parametrize("task", tasks.FORMS)
def test_recall_documents_hold_facts_and_questions(recall_tasks, task):
    tokens, questions = recall_tasks.recall(3, 1024, task)
    again, _ = recall_tasks.recall(3, 1024, task)
    assert len(tokens) == 1024 and tokens.equal(again)
    assert sorted(q.depth for q in questions) == list(tasks.DEPTHS)
    decode = recall_tasks.tokenizer.decode
    for question in questions:
        answer = decode(tokens[question.begin : question.end])
        facts = decode(tokens[: question.begin])
        assert all(number in facts for number in answer.replace(",", " ").split()) and answer.strip()[-1].isdigit()


def test_a_model_that_knows_the_answer_scores(recall_tasks):
    tokens, questions = recall_tasks.recall(0, 512, "needle")
    certain = torch.nn.functional.one_hot(tokens, 8192).float().roll(-1, 0)  # row i predicts token i + 1
    knows = measures.right_answers(lambda rows: rows, certain, tokens, questions)
    assert knows == {f"{q.depth:g}": 1 for q in questions}
    wrong = questions[2]
    certain[wrong.end - 2] = certain[wrong.end - 2].roll(1)  # the last token of one answer
    knows = measures.right_answers(lambda rows: rows, certain, tokens, questions)
    assert knows == {f"{q.depth:g}": int(q is not wrong) for q in questions}


def fake_records(folder: Path) -> Records:
    records, known = Records(folder), methods.registry()
    for i, name in enumerate(("oscar_paper", "oscar", "kivi", "oscar:no window")):
        text = [{"kl": 0.01 * (i + 1), "loss": 1.01, "exact_loss": 1.0, "top1": 0.9}] * 2
        records.add(Records.new("m", known[name], 128, "text", {"documents": 2, "length": 512, "from": 256}), text)
        layer = [[{"layer": n, "error": 0.1, "kl": 0.01} for n in range(2)]]
        records.add(Records.new("m", known[name], 128, "layers", {}), layer)
        answers = [{f"{d:g}": 1 for d in tasks.DEPTHS}]
        settings = {"task": "needle", "length": 1024, "seeds": 1}
        records.add(Records.new("m", known[name], 128, "recall", settings), answers)
        served = settings | {"served": True}
        through = Records.new("m", known[name] if i else None, 128, "recall through vLLM", served)
        records.add(through | ({} if i else {"method": "auto"}), [{**answers[0], "0": int(i < 3)}, answers[0]])
    return records


def test_the_loss_that_plan_shows_is_the_recorded_one():
    """Of the real language model, at every length of the committed records."""
    divergence = {}
    for line in (ROOT / "benchmarks/results/fidelity/records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["measure"] == "text" and record["method"] in PRESETS and record["model"] == "smollm2-135m":
            mean = statistics.mean(document["kl"] for document in record["values"])
            divergence.setdefault(record["settings"]["length"], {})[record["method"]] = mean
    assert set(divergence) == {2048, 8192}
    assert set(MEASURED_LOSS) == set(PRESETS)
    for preset in PRESETS:
        ratios = [found[preset] / found["oscar_paper"] for found in divergence.values()]
        assert (round(min(ratios), 2), round(max(ratios), 2)) == MEASURED_LOSS[preset]


def test_the_report_regenerates_from_the_records(tmp_path):
    written = report.write(fake_records(tmp_path), tmp_path)
    assert {p.name for p in written} == {"table.md", "pareto.png", "layers.png", "recall.png"}
    table = (tmp_path / "table.md").read_text()
    assert "| oscar | 90 | 2.81 | 5.69x |" in table and "100.0" in table
    assert "| oscar:no window | needle | 1024 | as served | 10 | 90.00 ± 10.00 | -10.00 ± 10.00 |" in table
    report.write(Records(tmp_path), tmp_path)
    assert (tmp_path / "table.md").read_text() == table


def test_documents_of_different_length_have_tables_of_their_own(tmp_path):
    """Each with the ratio to the paper on the same documents."""
    records, known = fake_records(tmp_path), methods.registry()
    for name, kl in (("oscar_paper", 0.2), ("oscar", 0.01)):
        settings = {"documents": 2, "length": 8192, "from": 256, "text": "manual"}
        record = Records.new("m", known[name], 128, "text", settings)
        records.add(record, [{"kl": kl, "loss": 1.01, "exact_loss": 1.0, "top1": 0.9}] * 2)
    short, long = report.markdown(records).split("2 documents of 8192 tokens, head_dim 128. Text: manual.")
    assert "2 documents of 512 tokens, head_dim 128.\n" in short
    assert "| 2.00 |" in short and "| 0.05 |" in long
    assert {p.name for p in report.write(records, tmp_path)} >= {"table.md", "pareto.png"}


def test_the_manual_is_prose_of_every_python():
    texts = tasks.read_texts([tasks.MANUAL])
    assert texts == tasks.read_texts([tasks.MANUAL])
    assert sum(map(len, texts)) > 400_000
    assert any(text.startswith("Calls\n*****\n\nA call calls a callable object") for text in texts)


@pytest.mark.parametrize("folders, kept", [((), {}), ((tasks.MANUAL,), {"text": "manual"})])
def test_records_tell_another_text_apart(folders, kept):
    name = cli.named(list(folders))
    assert cli.Plan(text=name).settings(length=5) == {"length": 5} | kept
    assert through_vllm.chosen(through_vllm.Plan(2, 5, 1, 32, name), "length") == {"length": 5} | kept


def test_records_resume_and_survive_an_interruption(tmp_path):
    count = len(fake_records(tmp_path).all)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"model": "m", "meth')
    records = Records(tmp_path)
    assert len(records.all) == count
    known = Records.new("m", methods.registry()["oscar"], 128, "text", {"documents": 2, "length": 512, "from": 256})
    assert known in records
    assert known | {"definition": "another"} not in records


# ---- the harness --------------------------------------------------------------------
def test_needles_lie_at_their_depth():
    import random

    from benchmarks.harness import suites

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "def f(x):\n    return x + 1  # one more\n" * 2000
    for depth in suites.NEEDLE_DEPTHS:
        row = suites.needle_document(text, tokenizer, 512, depth, random.Random(0))
        assert abs(len(tokenizer(row["input"]).input_ids) - 512) < 24
        (code,) = row["outputs"]
        assert row["input"].index(code) / len(row["input"]) == pytest.approx(depth, abs=0.2)
        assert suites.found_all(row, [f" {code}."]) == {"found": 1.0}
        assert suites.found_all(row, ["none"]) == {"found": 0.0}


def test_suites_read_the_users_files(tmp_path):
    from benchmarks.harness import suites

    def write(name: str, row: dict) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row) + "\n")

    write("test.jsonl", {"question": "1+1?", "answer": "#### 2"})
    write("qasper_e.jsonl", {"input": "who?", "context": "a cat", "answers": ["cat"], "all_classes": None})
    write("vt/validation.jsonl", {"input": "x = 1, print x", "outputs": ["1"]})
    (gsm8k,) = suites.gsm8k(tmp_path)[0]["task"]
    assert gsm8k["task"] == "gsm8k" and gsm8k["num_fewshot"] == 0
    (qasper,) = suites.longbench_e(tmp_path)[0]["task"]
    assert qasper["task"] == "longbench_qasper_e"
    (vt,) = suites.ruler(tmp_path)
    assert vt["task"] == "ruler_vt" and vt["process_results"]({"outputs": ["1", "2"]}, ["is 1"]) == {"found": 0.5}
    pytest.importorskip("datasets")
    assert qasper["custom_dataset"]()["test"][0]["question"] == "who?"


def test_harness_table_has_a_column_per_dtype():
    from benchmarks.harness.cli import markdown

    table = markdown("ruler", {d: {"vt": {"found,none": 0.5, "found_stderr,none": 0.1}} for d in ("auto", "oscar")})
    assert "| task | metric | auto | oscar |" in table
    assert table.count("0.5000 ± 0.1000") == 2 and "stderr" not in table


def test_lm_eval_takes_the_suites(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes longer than the rest
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from benchmarks.harness import suites

    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    (tmp_path / "vt").mkdir()
    (tmp_path / "vt" / "validation.jsonl").write_text(json.dumps({"input": "print x", "outputs": ["lol"]}) + "\n")
    tasks_ = suites.gsm8k(tmp_path) + suites.ruler(tmp_path)
    results = lm_eval.simple_evaluate(model="dummy", tasks=tasks_, log_samples=False, bootstrap_iters=0)["results"]
    assert results["gsm8k"]["exact_match,strict-match"] == 0.0  # the dummy always says "lol"
    assert results["ruler_vt"]["found,none"] == 1.0


# ---- the quiz -----------------------------------------------------------------------
@pytest.mark.parametrize("answers", quiz.ANSWERS)
def test_a_quiz_asks_for_words_that_its_examples_do_not_have(answers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    made, again, other = (quiz.make(tokenizer, seed, answers, 512, 50) for seed in (0, 0, 1))
    assert made == again and made.items != other.items
    assert len(made.examples) == 512 and made.examples[0] == tokenizer.bos_token_id
    right = {word: quiz.ANSWERS[answers][kind] for kind, words in quiz.KINDS.items() for word in words.split()}
    shown = dict(line.split(": ") for line in tokenizer.decode(made.examples[1:]).split("\n") if line)
    assert len(shown) > 20 and all(right[word] == answer for word, answer in shown.items())
    for question, answer in made.items:
        word = tokenizer.decode(question).rstrip(":")
        assert right[word] == tokenizer.decode(answer).strip() and word not in shown
    assert len({tuple(question) for question, _ in made.items}) == 50
    with pytest.raises(ValueError, match="at most"):
        quiz.make(tokenizer, 0, answers, 512, 100)


def test_a_paired_difference_counts_only_what_changed():
    reference = [1] * 60 + [0] * 40
    assert quiz.difference(reference, reference) == (0.0, 0.0, 0, 0)
    own = [0] * 8 + [1] * 52 + [1] * 2 + [0] * 38  # eight lost, two won
    points, error, lost, won = quiz.difference(own, reference)
    assert (points, lost, won) == (-6.0, 8, 2)
    each = [100 * (o - r) for o, r in zip(own, reference, strict=True)]
    assert error == pytest.approx(statistics.pstdev(each) / 10)  # of the mean of 100 differences


def test_what_was_generated_is_reported_beside_auto(tmp_path):
    records, known = Records(tmp_path), methods.registry()
    settings = {"quizzes": 2, "items": 2, "examples": 512, "chunk": 128, "answers": "kinds"}
    texts = {"texts": 2, "prompt": 512, "generated": 9, "chunk": 128, "text": "manual"}
    for name, answers, prefix in (("auto", [[1, 1], [1, 0]], 1.0), ("oscar", [[1, 0], [1, 0]], 0.25)):
        for measure, s, values in (
            ("quiz", settings, answers), ("greedy", texts, [{"prefix": prefix, "same": prefix}] * 2),
        ):  # fmt: skip
            made = Records.new("m", known.get(name), 64, f"{measure} through vLLM", s)
            records.add(made | {"method": name}, values)
    table = report.markdown(records)
    assert "| auto | 75.0 ± 25.0 | 0.0 ± 0.0 | 0 | 0 |" in table
    assert "| oscar | 50.0 ± 28.9 | -25.0 ± 21.7 | 1 | 0 |" in table
    assert "Prefilled in chunks of 128. Text: manual.\n" in table and "| oscar | 25 ± 0 |" in table
    assert "4 questions, 2 after each of 2 sets" in table
