# SPDX-License-Identifier: Apache-2.0
"""The demo's parts that need no server: what it asks, shows and returns."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_oscar.tools.recall import FACTS

openai = pytest.importorskip("openai")
typer = pytest.importorskip("typer")


@pytest.fixture
def demo(monkeypatch):
    path = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "console", Console(width=200, record=True))
    return module


class Client:
    """Stands in for the openai client: streams ``replies`` word by word, recalls what ``facts`` says."""

    def __init__(self, replies: list[str] | None = None, facts: dict[str, str] | None = None) -> None:
        self.replies, self.facts, self.asked = iter(replies or []), facts or {}, []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._complete)

    def _chat(self, messages, stream, temperature, **options):
        assert stream and temperature == 0
        self.asked.append([dict(message) for message in messages])
        for word in next(self.replies).split(" "):
            delta = SimpleNamespace(content=f"{word} ")
            yield SimpleNamespace(choices=[SimpleNamespace(delta=delta)], usage=None)
        yield SimpleNamespace(choices=[], usage=SimpleNamespace(prompt_tokens=1234))

    def _complete(self, prompt, **options):
        name = prompt.rpartition("The code of ")[2].removesuffix(" is")
        assert prompt.count(f"the code of {name} is {FACTS[name]}.") == 1
        usage = SimpleNamespace(prompt_tokens=len(prompt) // 4)
        return SimpleNamespace(choices=[SimpleNamespace(text=f" {self.facts[name]}.")], usage=usage)


def test_a_chat_sends_all_turns_and_shows_each(demo):
    turns = [turn for turns in demo.CONVERSATIONS for turn in turns]
    replies = [f"[bold]reply[/bold] number {index}" for index in range(len(turns))]
    client = Client(replies)
    demo.converse(client)
    shown = demo.console.export_text()
    index = 0
    for conversation in demo.CONVERSATIONS:
        for number, turn in enumerate(conversation):
            sent = client.asked[index]
            assert [message["role"] for message in sent] == ["user", "assistant"] * number + ["user"]
            assert all(f"number {index - number + i} " in sent[2 * i + 1]["content"] for i in range(number))
            assert turn.rpartition("\n")[2] in sent[-1]["content"] and turn.rpartition("\n")[2] in shown
            assert replies[index] in shown  # as it came: what looks like markup is text
            index += 1
    assert "1,234 tokens" in shown


def test_one_conversation_is_about_a_text_that_fills_pages(demo):
    client = Client(["yes"] * 99)
    demo.converse(client)
    passage = demo.PASSAGE.read_text().strip()
    (first,) = (sent for sent in client.asked if len(sent) == 1 and passage in sent[0]["content"])
    assert "{passage}" not in first[0]["content"] and len(first[0]["content"].split()) > 900
    assert passage[:40] not in demo.console.export_text()


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("has_chat_model", [True, False])
def test_the_exit_code_is_that_of_the_recall(demo, monkeypatch, tmp_path, wrong, has_chat_model):
    facts = FACTS | ({"brave-lamp-42": "1"} if wrong else {})
    served = []

    @contextmanager
    def server(model, dtype, log, *options):
        served.append((model, dtype))
        yield "url"

    monkeypatch.setattr(demo, "server", server)
    monkeypatch.setattr(demo, "connect", lambda url: Client(["fine"] * 99, facts))
    monkeypatch.setattr(demo, "show_capacity", lambda url, model, dtype: None)
    monkeypatch.chdir(tmp_path)
    chat_model = tmp_path / "chat"
    if has_chat_model:
        chat_model.mkdir()
        (chat_model / "config.json").write_text("{}")
    app = typer.Typer()
    app.command()(demo.main)
    done = CliRunner().invoke(app, ["--chat-model", str(chat_model), "--kv-cache-dtype", "oscar_small"])
    assert done.exit_code == wrong, done.output
    expected = [chat_model, demo.DEMO_MODEL] if has_chat_model else [demo.DEMO_MODEL]
    assert served == [(model, "oscar_small") for model in expected]
    shown = demo.console.export_text()
    assert f"{4 - wrong} of 4 facts recalled" in shown
    assert (f"There is no language model in {chat_model}, so" in " ".join(shown.split())) is not has_chat_model
