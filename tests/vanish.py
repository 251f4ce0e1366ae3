# SPDX-License-Identifier: Apache-2.0
"""Take one symbol after the other away from vLLM and see who still works.

Run as a program: imports vLLM once, then forks a process for each symbol of
``vllm_oscar/engine/symbols.py``, in which the symbol is gone while the plugin registers, as
if vLLM had renamed it, and back afterwards, as vLLM itself uses the new name. Prints a line
of JSON for each: ``symbol``, ``auto`` and ``oscar`` (what a configuration with that dtype
came to), ``log`` (of the registration), and with ``--engine`` the tokens that an ``auto``
engine then generates.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import logging
import os

from vllm_oscar.engine import symbols
from vllm_oscar.engine.symbols import Symbol


def _owner(symbol: Symbol):
    """The module or class that has the symbol's last part."""
    *path, _ = symbol.name.split(".")
    in_module = symbol.module != symbols.PLATFORM
    found = importlib.import_module(f"vllm.{symbol.module}") if in_module else symbols._platform()
    for part in path:
        found = getattr(found, part)
    return found


def _function(symbol: Symbol):
    found = getattr(_owner(symbol), symbol.name.split(".")[-1])
    return inspect.unwrap(getattr(found, "__func__", found))


def _take_member(stack: contextlib.ExitStack, owner, name: str) -> None:
    """Remove an attribute, enum member or field from a module or class and its bases."""
    if not isinstance(owner, type):
        values = owner.__dict__
        lazy = values.get("__getattr__")
        if name in values:
            stack.callback(values.__setitem__, name, values.pop(name))
        if lazy:

            def without(asked: str):
                if asked == name:
                    raise AttributeError(asked)
                return lazy(asked)

            stack.callback(values.__setitem__, "__getattr__", lazy)
            values["__getattr__"] = without
        return
    for base in owner.__mro__:
        if name in base.__dict__:
            stack.callback(type.__setattr__, base, name, base.__dict__[name])
            type.__delattr__(base, name)
        for table in ("__dataclass_fields__", "__annotations__", "_member_map_"):
            if name in base.__dict__.get(table, ()):
                stack.callback(base.__dict__[table].__setitem__, name, base.__dict__[table].pop(name))
        if name in base.__dict__.get("_fields", ()):
            stack.callback(setattr, base, "_fields", base._fields)
            base._fields = tuple(field for field in base._fields if field != name)


@contextlib.contextmanager
def without(symbol: Symbol, part: str | None = None):
    """vLLM without ``symbol``, or without one of its parameters, fields or attributes."""
    with contextlib.ExitStack() as stack:
        if part is None:
            _take_member(stack, _owner(symbol), symbol.name.split(".")[-1])
        elif part in symbol.sets:
            function = _function(symbol)
            code = function.__code__
            stack.callback(setattr, function, "__code__", code)
            function.__code__ = code.replace(co_names=tuple("_gone" if n == part else n for n in code.co_names))
        elif inspect.isclass(found := getattr(_owner(symbol), symbol.name.split(".")[-1])):
            _take_member(stack, found, part)
        else:
            function = _function(symbol)
            signature = inspect.signature(function)
            renamed = [p.replace(name="_gone") if p.name == part else p for p in signature.parameters.values()]
            function.__signature__ = signature.replace(parameters=renamed)
            stack.callback(delattr, function, "__signature__")
        yield


def _outcome(model: str, dtype: str) -> str:
    """``"served"``, or how it is refused: through the command line, as a user would."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    try:
        arguments = parser.parse_args(["--model", model, "--skip-tokenizer-init", "--kv-cache-dtype", dtype])
        EngineArgs.from_cli_args(arguments).create_engine_config()
    except argparse.ArgumentError as error:
        return f"command line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def _generate(model: str) -> list[int]:
    """What an ``auto`` engine makes of a short prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 26, dtype="float32")
    greedy = SamplingParams(temperature=0, max_tokens=4)
    return list(llm.generate({"prompt_token_ids": [0, 5, 6, 7]}, greedy, use_tqdm=False)[0].outputs[0].token_ids)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


def examine(symbol: Symbol | None, model: str, engine: bool) -> dict:
    from vllm_oscar.engine import plugin

    log = _Log()
    plugin.logger.addHandler(log)
    with without(symbol) if symbol else contextlib.nullcontext():
        plugin.register()
    result = {"symbol": symbol and [symbol.module, symbol.name], "log": log.lines}
    result |= {dtype: _outcome(model, dtype) for dtype in ("auto", "oscar")}
    return result | ({"tokens": _generate(model)} if engine else {})


def in_a_fork(answers, function, *arguments) -> None:
    """Run in a copy of this process and print the answer; vLLM here stays as it is."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        print(json.dumps(function(*arguments)), file=answers, flush=True)
    finally:
        os._exit(0)


def removable() -> list[Symbol]:
    """What the plugin needs of this vLLM and can vanish; every class has an ``__init__``."""
    needed = symbols.needed(lambda symbol: symbols.problem(symbol) is None)
    return [symbol for symbol in needed if not symbol.name.endswith(".__init__")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", action="store_true", help="also run an engine for each")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of symbols (default: all)")
    arguments = parser.parse_args()
    # vLLM writes to standard output, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    assert symbols.missing() is None, symbols.missing()
    assert _outcome(arguments.model, "auto") == "served"  # and all is imported
    assert _outcome(arguments.model, "oscar").startswith("command line: "), "the plugin is loaded already"
    chosen = [symbol for symbol in removable() if symbol.name in (arguments.only or [symbol.name])]
    for symbol in chosen if arguments.only else (None, *chosen):
        in_a_fork(answers, examine, symbol, arguments.model, arguments.engine)


if __name__ == "__main__":
    main()
