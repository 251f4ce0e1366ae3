#!/usr/bin/env python3
"""Train the small language models that the examples, tests and benchmarks use.

The models are tiny (8 to 12 million parameters), yet really trained, on source code and documentation found on
the machine mixed with generated recall tasks, so that a damaged KV cache shows at once as a wrong answer.  A fact
stands somewhere in thousands of tokens of real text, and is asked for later, in one of these forms:

    sentence    Remember: the code of calm-otter-17 is 8302914.   The code of calm-otter-17 is 8302914.
    lookup      calm-otter-17: 90412                              lookup calm-otter-17 -> 90412
    multi       a-b-1: 7341 ... c-d-2: 9921 ... e-f-3: 45012      lookup e-f-3, a-b-1 -> 45012, 7341
    variable1   abc = 51234                                       print(abc) # 51234
    variable2   abc = 51234 ... xyz = abc                         print(xyz) # 51234    (variable3: one line more)

Recipes.  TOK is a folder with the tokenizer.  `prepare` tokenises the text once; several `train` commands may then
run side by side on one GPU.

    python train_demo_model.py prepare --tokenizer TOK --text-mb 200

    # examples/demo_model: Llama layout, 4 query heads on 2 KV heads of 128.  INIT is a model of 4 such layers trained
    # on 25 million tokens at 1,024 context; the first command takes it to 4,096, the second adds two layers.
    python train_demo_model.py train stage1 --init INIT --lr 1e-3 --short-fraction 0 --minutes 6.8
    python train_demo_model.py train examples/demo_model --init stage1 --layers 6 --lr 1.5e-3 --warmup 50 \\
        --short-fraction 0 --first-digit-weight 15 --mix 4,4,2,2,1.5,0.5 --minutes 1.2

    # lab-qk128: Qwen3 layout (q/k norm), 8 query heads on 2 KV heads of 128, from scratch
    python train_demo_model.py train models/lab-qk128 --tokenizer TOK --qk-norm --layers 6 --hidden 320 \\
        --heads 8 --kv-heads 2 --head-dim 128 --intermediate 704 --minutes 6.8

    # lab-64: Llama layout, 8 query heads on 4 KV heads of 64, from scratch
    python train_demo_model.py train models/lab-64 --tokenizer TOK --layers 6 --hidden 384 \\
        --heads 8 --kv-heads 4 --head-dim 64 --intermediate 704 --minutes 6.8

    # lab-qk128-32m and lab-64-28m: the same layouts, larger
    python train_demo_model.py train models/lab-qk128-32m --tokenizer TOK --qk-norm --layers 8 --hidden 512 \\
        --heads 8 --kv-heads 2 --head-dim 128 --intermediate 1408 --lr 1.5e-3 --minutes 3.4
    python train_demo_model.py train models/lab-64-28m --tokenizer TOK --layers 8 --hidden 512 \\
        --heads 8 --kv-heads 4 --head-dim 64 --intermediate 1408 --lr 1.5e-3 --minutes 3.4

    # lab-windows: gpt-oss layout, windows of 128 tokens in layers 0, 2, 4, sinks; 8 query heads on 2 KV heads of 64
    python train_demo_model.py train models/lab-windows --tokenizer TOK --sliding-window 128 --layers 6 --hidden 384 \\
        --heads 8 --kv-heads 2 --head-dim 64 --intermediate 512 --workers 8 --minutes 4.5

Timings on one H200 with 16 CPU cores: `prepare` 18 s.  stage1, lab-qk128 and lab-64 ran side by side for the 6.8
minutes given, 428, 204 and 261 million tokens; the first 20 s of these went into compiling, the measurements after
them took another 20 s.  The last stage of demo_model ran alone (116 million tokens in 1.2 minutes, of which 25 s
for 100 MB of text and compiling).  The two larger ones ran side by side for 3.4 minutes, 73 and 98 million tokens, with
130 MB of text (18 s).  The first three ran before facts at the very start of a sample were added.

A run that was interrupted goes on from its checkpoint when started again with the same output folder.  `evaluate
MODEL` repeats the final measurements.  Needs torch, numpy, safetensors, tokenizers, typer, tqdm, transformers.
"""

import hashlib
import json
import math
import os
import random
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

BOS, EOS, PAD = 0, 1, 2  # ids of <|bos|>, <|eos|>, <|pad|> in the tokenizer
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
FORMS = ("sentence", "lookup", "multi", "variable1", "variable2", "variable3")
LAYOUTS = {"llama": "Llama-layout", "qwen3": "Qwen3-layout", "gpt_oss": "gpt-oss-layout"}
SLIDING, SWIGLU_LIMIT = "sliding_attention", 7.0
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
TTY, START = sys.stderr.isatty(), time.monotonic()

# ---------------------------------------------------------------- text found on the machine


def prepare_corpus(corpus: Path, tokenizer: Tokenizer, folders: list[Path] | None, text_mb: int) -> None:
    """Tokenise text files into corpus/train.npy and corpus/heldout.npy (1 file in 50, by hash)."""
    if (corpus / "heldout.npy").exists():
        return
    folders = folders or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    paths = sorted({Path(root, name) for folder in folders for root, _, names in os.walk(folder)
                    for name in names if name.endswith((".py", ".md", ".rst", ".txt"))})
    random.Random(0).shuffle(paths)

    def read(path: Path) -> str:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
        line = len(text) / (text.count("\n") + 1)  # long lines: data that only looks like text
        return text[:200_000] if 200 < len(text) < 5_000_000 and line < 120 else ""

    seen, left = set(), text_mb * 10**6
    parts: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    with ThreadPoolExecutor(16) as pool, tqdm(total=text_mb, unit="MB", desc="text", disable=not TTY) as bar:
        for i in range(0, len(paths), 2000):
            texts = {"train": [], "heldout": []}
            for text in pool.map(read, paths[i : i + 2000]):
                digest = hashlib.sha1(text.encode()).digest()
                if text and left > 0 and digest not in seen:
                    seen.add(digest)
                    texts["heldout" if digest[0] * 256 + digest[1] < 65536 // 50 else "train"].append(text)
                    left -= len(text)
                    bar.update(len(text) / 10**6)
            for split, batch in texts.items():
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    parts[split].append(np.array([*encoding.ids, EOS], np.uint16))
            if left <= 0:
                break
    corpus.mkdir(parents=True, exist_ok=True)
    for split, arrays in parts.items():  # heldout last: its presence says that all is there
        tokens = np.concatenate(arrays)
        np.save(corpus / f"{split}.tmp.npy", tokens)
        os.replace(corpus / f"{split}.tmp.npy", corpus / f"{split}.npy")
        print(f"{split}: {len(arrays):,} files, {len(tokens):,} tokens", flush=True)


# ---------------------------------------------------------------- generated recall tasks

ADJECTIVES = """amber brave brisk calm civil clear crisp dusty eager early fancy fuzzy gentle giant golden happy hasty
honest icy jolly keen kind late lazy light lively lucky mellow merry misty neat noble odd pale plain proud quick quiet
rapid rare red royal rusty sandy sharp shiny silent silver sleepy small smart solid steady sunny swift tidy tiny warm
wild wise young""".split()
NOUNS = """ant badger bear beaver bison camel cat cobra crab crane crow deer dingo dove eagle eel falcon finch fox frog
gecko goat goose hare hawk heron horse ibis jackal koala lark lemur lion lizard llama lynx mole moose moth mouse newt
otter owl panda parrot pigeon pony puma quail rabbit raven robin salmon seal shark sheep shrew skunk sloth snail spider
stork swan tiger toad trout turtle viper walrus wasp weasel whale wolf wombat yak zebra""".split()
Piece = tuple[np.ndarray, np.ndarray]  # tokens, and a mask: 1 on digits of an answer, 2 on its other tokens


class Tasks:
    """Makes samples of `length` + 1 tokens: real text with facts and questions put into it."""

    def __init__(self, tokenizer: Tokenizer, stream: np.ndarray, mix: tuple[float, ...] = ()):
        self.tokenizer, self.stream, self.mix = tokenizer, stream, mix
        vocabulary = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.is_digit = np.array([len(t) == 1 and t.isdigit() for t in vocabulary])
        self.ends_line = np.array([t.endswith("Ċ") for t in vocabulary])  # byte-level BPE's "\n"

    def piece(self, question: str, answer: str = "") -> Piece:
        first, second = (self.tokenizer.encode(s, add_special_tokens=False).ids for s in (question, answer))
        kinds = np.where(self.is_digit[np.array(second, int)], 1, 2)
        return np.array(first + second, np.uint16), np.append(np.zeros(len(first)), kinds).astype(np.uint8)

    def item(self, rng: random.Random, form: str, used: list[str]):
        """One task: the pieces that state it, in order, and a function that makes a question."""

        def number() -> str:
            return "".join(rng.choices("0123456789", k=rng.choice((4, 5, 5, 6, 7))))

        def fresh(make) -> str:
            while (name := make()) in used or name in ("as", "if", "in", "is", "or", "not", "and", "for"):
                pass
            used.append(name)
            return name

        def key() -> str:
            keys = [name for name in used if "-" in name]
            if keys and rng.random() < 0.2:  # a name that differs from another in its number only
                return rng.choice(keys).rsplit("-", 1)[0] + f"-{rng.randrange(100)}"
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(100)}"

        def variable() -> str:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((2, 3, 3, 3, 4))))

        if form == "sentence":
            k, n = fresh(key), number()
            return ([self.piece(f"\nRemember: the code of {k} is {n}.\n")],
                    lambda: self.piece(f"\nThe code of {k} is", f" {n}.\n"))
        if form == "lookup":
            k, n = fresh(key), number()
            return [self.piece(f"{k}: {n}\n")], lambda: self.piece(f"lookup {k} ->", f" {n}\n")
        if form == "multi":
            table = [(fresh(key), number()) for _ in range(rng.choice((2, 3, 4)))]

            def ask() -> Piece:
                keys, numbers = zip(*rng.sample(table, rng.randint(2, min(3, len(table)))), strict=True)
                return self.piece(f"lookup {', '.join(keys)} ->", f" {', '.join(numbers)}\n")

            return [self.piece(f"{k}: {n}\n") for k, n in table], ask
        n, name = number(), fresh(variable)
        pieces = [self.piece(f"{name} = {n}\n")]
        for _ in range(int(form[-1]) - 1):
            previous, name = name, fresh(variable)
            pieces.append(self.piece(f"{name} = {previous}\n"))
        return pieces, lambda: self.piece(f"print({name}) #", f" {n}\n")

    def assemble(self, rng: random.Random, length: int, placed: list[tuple[float, Piece]], bos: bool = True) -> Piece:
        """Put `placed`, (position in 0..1, piece), into a stretch of text, at starts of lines where one is near."""
        room = length + 1 - bos - sum(len(tokens) for _, (tokens, _) in placed)
        start = rng.randrange(len(self.stream) - room)
        base = np.array(self.stream[start : start + room])
        line_starts, cuts = np.flatnonzero(self.ends_line[base]) + 1, []
        for where, piece in placed:
            at = int(where * room)
            i = int(np.searchsorted(line_starts, at))
            if 0 < at < room and i < len(line_starts) and line_starts[i] - at < 60:
                at = int(line_starts[i])
            cuts.append((at, where, piece))
        newline, last = self.piece("\n")[0][0], 0
        parts: list[Piece] = [(np.full(int(bos), BOS, np.uint16), np.zeros(int(bos), np.uint8))]
        for at, _, piece in [*sorted(cuts, key=lambda cut: cut[:2]), (room, 2, (base[:0], np.zeros(0, np.uint8)))]:
            if at > last and len(piece[0]) and not self.ends_line[base[at - 1]]:  # end the line
                base[at - 1] = newline
            parts += [(base[last:at], np.zeros(at - last, np.uint8)), piece]
            last = at
        tokens, mask = (np.concatenate(x) for x in zip(*parts, strict=True))
        return tokens.astype(np.int64), mask

    def training_sample(self, rng: random.Random, length: int) -> Piece:
        placed, used, budget = [], [], length // 3
        mixed = rng.random() < 0.75  # the others are text alone
        for _ in range(round(math.exp(rng.uniform(0, math.log(max(2, length / 130))))) if mixed else 0):
            states, ask = self.item(rng, rng.choices(FORMS, self.mix)[0], used)
            pieces = states + [ask() for _ in range(rng.choice((1, 1, 2)))]
            budget -= sum(len(tokens) for tokens, _ in pieces)
            if budget < 0:
                break
            where = sorted(rng.random() for _ in pieces)
            if rng.random() < 0.5:  # the last question at the very end: the longest distances
                where[-1] = 1 + 1e-6 * rng.random()
            if not placed and rng.random() < 0.2:  # a fact right at the start
                where[0] = 0.0
            placed += zip(where, pieces, strict=True)
        return self.assemble(rng, length, placed, bos=rng.random() < 0.9)

    def test_sample(self, rng: random.Random, length: int, form: str, depth: float) -> Piece:
        """The task's first line at `depth`, its question at the end, six other tasks' facts anywhere."""
        used: list[str] = []
        states, ask = self.item(rng, form, used)
        placed = [*zip([depth, *sorted(rng.uniform(depth, 1) for _ in states[1:])], states, strict=True), (1.0, ask())]
        for _ in range(6):
            others, _ = self.item(rng, rng.choice(FORMS), used)
            placed += zip(sorted(rng.uniform(0, 0.99) for _ in others), others, strict=True)
        return self.assemble(rng, length, placed)


def stack(samples) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.stack(x)) for x in zip(*samples, strict=True))


class Batches(torch.utils.data.IterableDataset):
    """Endless training batches; batch number i depends on seed and i alone."""

    def __init__(self, tasks: Tasks, seed: int, first: int, rows: int, length: int):
        self.tasks, self.seed, self.first, self.rows, self.length = tasks, seed, first, rows, length

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        step, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            rng = random.Random(f"{self.seed}/{step}")
            yield stack(self.tasks.training_sample(rng, self.length) for _ in range(self.rows))
            step += stride


# ---------------------------------------------------------------- the model


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


class Block(nn.Module):
    def __init__(self, c: dict, layer: int):
        super().__init__()
        hidden, dim, inner = c["hidden_size"], c["head_dim"], c["intermediate_size"]
        q, kv, eps = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim, c["rms_norm_eps"]
        self.dim, self.qk_norm, self.sinks = dim, c["model_type"] == "qwen3", c["model_type"] == "gpt_oss"
        self.window = c["sliding_window"] if self.sinks and c["layer_types"][layer] == SLIDING else 0
        sizes = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
        self.self_attn = nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in sizes.items()})
        if self.qk_norm:
            self.self_attn.update({"q_norm": Norm(dim, eps), "k_norm": Norm(dim, eps)})
        if self.sinks:
            self.self_attn.register_parameter("sinks", nn.Parameter(torch.zeros(c["num_attention_heads"])))
            inner *= c["num_local_experts"]
        sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        self.mlp = nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in sizes.items()})
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)

    def forward(self, x, cos, sin):
        a, m = self.self_attn, self.mlp
        h = self.input_layernorm(x)
        q, k, v = (a[n](h).unflatten(-1, (-1, self.dim)) for n in ("q_proj", "k_proj", "v_proj"))
        if self.qk_norm:
            q, k = a["q_norm"](q), a["k_norm"](k)
        q, k = (rotate(t, cos, sin).transpose(1, 2) for t in (q, k))
        v = v.transpose(1, 2)
        if not self.sinks:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.window:
            h = attend_window(q, k, v, a.sinks, self.window)
        else:
            h = attend_all(q, k, v, a.sinks)
        x = x + a["o_proj"](h.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        gate, up = m["gate_proj"](h), m["up_proj"](h)
        if not self.sinks:
            return x + m["down_proj"](F.silu(gate) * up)
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return x + m["down_proj"]((up + 1) * gate * torch.sigmoid(1.702 * gate))


def attend_window(q, k, v, sinks, window: int):
    """Attention of q [B, Hq, T, D] to itself and the window - 1 tokens before, with sinks [Hq]: logits without a value.

    Blocks of `window` queries see their own block and the one before.
    """
    tokens, dim, kv_heads = q.shape[2], q.shape[3], k.shape[1]
    q, k, v = (F.pad(x, (0, 0, 0, -tokens % window)).unflatten(2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), 3) for x in (k, v))  # [B, H, blocks, 2 window, D]
    q = q.unflatten(1, (kv_heads, -1))  # [B, H, group, blocks, window, D]
    scores = torch.einsum("bhgnqd,bhnkd->bhgnqk", q, k) * dim**-0.5
    at = torch.arange(2 * window, device=q.device)
    behind = at[window:, None] - at  # how far a key lies behind a query
    before_start = (torch.arange(q.shape[3], device=q.device) == 0)[:, None, None] & (at < window)
    scores = scores.masked_fill((behind < 0) | (behind >= window) | before_start, float("-inf"))
    sinks = sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sinks), -1).softmax(-1, torch.float32)[..., :-1].to(v.dtype)
    out = torch.einsum("bhgnqk,bhnkd->bhgnqd", weights, v)
    return out.flatten(1, 2).flatten(2, 3)[:, :, :tokens]


def attend_all(q, k, v, sinks):
    """Causal attention with sinks [Hq]: a token before all others, without a value, has them as its logits.

    Its key has channels of its own, one for each query head that shares it, in which that head's queries are 1.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads, more = k.shape[1], -(-heads // k.shape[1] // 8) * 8  # channels in eights, as fast kernels want them
    one = torch.eye(more, dtype=q.dtype, device=q.device)[: heads // kv_heads].repeat(kv_heads, 1)
    q = F.pad(torch.cat((q, one[None, :, None].expand(batch, -1, tokens, -1)), 3), (0, 0, 1, 0))
    first = (sinks * dim**0.5).to(k.dtype).view(kv_heads, -1)
    first = F.pad(first, (dim, more - first.shape[1]))[None, :, None].expand(batch, -1, 1, -1)
    k, v = torch.cat((first, F.pad(k, (0, more))), 2), F.pad(v, (0, more, 1, 0))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=dim**-0.5)
    return h[:, :, 1:, :dim]


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).type_as(x)


class Model(nn.Module):
    """A Llama (or Qwen3, or gpt-oss) decoder whose parameters bear the names of transformers, experts aside."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, hidden, layers = config, config["hidden_size"], config["num_hidden_layers"]
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config["vocab_size"], hidden),
                                    "layers": nn.ModuleList(Block(config, i) for i in range(layers)),
                                    "norm": Norm(hidden, config["rms_norm_eps"])})
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.03 / math.sqrt(2 * layers) if into_residual else 0.03)

    def forward(self, tokens):
        dim = self.config["head_dim"]
        power = torch.arange(0, dim, 2, device=tokens.device) / dim
        angle = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.config["rope_theta"] ** -power
        angle = torch.cat((angle, angle), -1)[:, None]
        x, cos, sin = self.model["embed_tokens"](tokens), angle.cos(), angle.sin()
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        return self.model["norm"](x)

    def logits(self, h):
        return F.linear(h, self.model["embed_tokens"].weight)


def token_losses(h, embedding, targets):
    return F.cross_entropy(F.linear(h, embedding).flatten(0, 1).float(), targets.flatten(), reduction="none")


def autocast(device: str):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device.startswith("cuda"))


def load_model(folder: Path, layers: int = 0) -> Model:
    """Layers beyond the saved ones begin as the identity."""
    config = json.loads((folder / "config.json").read_text())
    saved = config["num_hidden_layers"]
    model = Model(config | {"num_hidden_layers": max(saved, layers)})
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    if config["model_type"] == "gpt_oss":
        weights = from_experts(weights)
    for name in model.load_state_dict(weights, strict=layers <= saved).missing_keys:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(model.get_parameter(name))
    return model


def to_experts(weights: dict, config: dict) -> dict:
    """One dense MLP per layer as experts that every token goes through with equal weight, the rest of gpt-oss zero."""
    experts, out = config["num_local_experts"], {}
    for name, w in weights.items():
        layer, _, part = name.partition(".mlp.")
        if part == "gate_proj.weight":
            gate, up = (weights[f"{layer}.mlp.{n}_proj.weight"].unflatten(0, (experts, -1)) for n in ("gate", "up"))
            both = torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)  # [experts, hidden, 2 * inner], in turn
            out[f"{layer}.mlp.experts.gate_up_proj"] = both
            out[f"{layer}.mlp.experts.gate_up_proj_bias"] = both.new_zeros(experts, both.shape[2])
            out[f"{layer}.mlp.router.weight"] = gate.new_zeros(experts, gate.shape[2])
            out[f"{layer}.mlp.router.bias"] = gate.new_zeros(experts)
        elif part == "down_proj.weight":
            out[f"{layer}.mlp.experts.down_proj"] = experts * w.T.unflatten(0, (experts, -1))
            out[f"{layer}.mlp.experts.down_proj_bias"] = w.new_zeros(experts, w.shape[0])
        elif not part:
            out[name] = w
            if name.endswith("_proj.weight"):
                out[name.replace("weight", "bias")] = w.new_zeros(w.shape[0])
    out["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return {name: w.contiguous() for name, w in out.items()}


def from_experts(weights: dict) -> dict:
    """The inverse of to_experts."""
    out = {}
    for name, w in weights.items():
        layer, _, part = name.partition(".mlp.")
        if part == "experts.gate_up_proj":
            gate_up = w.transpose(1, 2).unflatten(1, (-1, 2))
            for i, kind in enumerate(("gate", "up")):
                out[f"{layer}.mlp.{kind}_proj.weight"] = gate_up[:, :, i].flatten(0, 1)
        elif part == "experts.down_proj":
            out[f"{layer}.mlp.down_proj.weight"] = w.flatten(0, 1).T / len(w)
        elif not part and name != "lm_head.weight" and not name.endswith("_proj.bias"):
            out[name] = w
    return out


# ---------------------------------------------------------------- measuring and writing


@torch.no_grad()
def measure(model: Model, tasks: Tasks, contexts: list[int], n: int, device: str) -> str:
    """Perplexity by position and recall by form and depth, as Markdown.  An answer is exact when every token of it
    is the most probable one given those before, that is, when greedy generation gives this answer."""
    longest, rng = max(contexts), random.Random(1234)
    windows = min(6 * n, (len(tasks.stream) - 1) // longest)
    losses = torch.zeros(longest, dtype=torch.float64)
    for i in range(windows):
        window = np.append(np.uint16(BOS), tasks.stream[i * longest : (i + 1) * longest]).astype(np.int64)
        tokens = torch.from_numpy(window)[None].to(device)
        with autocast(device):
            losses += token_losses(model(tokens[:, :-1]), model.model["embed_tokens"].weight, tokens[:, 1:]).cpu()
    edges = [0, *(e for e in (256, 1024, 2048, 4096, 8192) if e < longest), longest]
    spans = [f"{a}-{b} **{math.exp(losses[a:b].mean() / windows):.2f}**"
             for a, b in [*zip(edges, edges[1:], strict=False), (0, longest)]]
    out = f"Perplexity on held-out text, by position in the context: {'; '.join(spans)}.\n"
    for length in contexts:
        out += (f"\nRecall at {length} tokens, by depth of the fact, {n} samples each: digits right / whole answers "
                "exact under greedy generation, in percent.\n\n| form | " + " | ".join(f"{d:.0%}" for d in DEPTHS)
                + " | mean |\n|---|" + "---|" * (len(DEPTHS) + 1) + "\n")
        for form in FORMS:
            row = []
            for depth in DEPTHS:
                tokens, masks = stack(tasks.test_sample(rng, length, form, depth) for _ in range(n))
                digits = exact = 0
                for t, m in zip(tokens.split(8), masks.split(8), strict=True):
                    with autocast(device):
                        h = model(t[:, :-1].to(device))[m[:, 1:].to(device) > 0]
                        right = model.logits(h).argmax(-1).cpu() == t[:, 1:][m[:, 1:] > 0]
                    digits += right[m[m > 0] == 1].double().mean().item() * len(t)
                    exact += sum(r.all().item() for r in right.split((m > 0).sum(1).tolist()))
                row.append((100 * digits / n, 100 * exact / n))
            cells = [f"{d:.1f} / {e:.1f}" for d, e in [*row, np.mean(row, 0).tolist()]]
            out += f"| {form} | {' | '.join(cells)} |\n"
    return out


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {layout} model of {parameters:.1f} million parameters: {config[num_hidden_layers]} layers, hidden size \
{config[hidden_size]}, {config[num_attention_heads]} query heads on {config[num_key_value_heads]} KV heads of \
dimension {config[head_dim]}, tied embeddings, {config[vocab_size]:,}-token byte-level BPE with single digits, context \
{config[max_position_embeddings]:,}. Made by `train_demo_model.py`, which describes the recall tasks, to try out and \
test KV caches: it writes plausible code and recalls facts from anywhere in its context. It is no assistant.

`<|bos|>` starts every sequence. The chat template is `<|bos|>` and the messages' contents, nothing else.

## Training

{origin}: {steps:,} steps, {tokens:.0f} million tokens, {minutes:.1f} minutes of wall-clock time on {device}; peak \
learning rate {lr:g} with a cosine schedule, AdamW. The data: source code and documentation of a Python installation \
({train:.0f} million tokens, {epochs:.1f} passes; files held out by their hash) and generated recall tasks.

## Measured

{measured}"""


def export(model: Model, out: Path, tokenizer_dir: Path, facts: dict, measured: str = "Not yet.\n") -> None:
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.named_parameters()}
    count = sum(w.numel() for w in weights.values())
    if model.config["model_type"] == "gpt_oss":
        weights = to_experts(weights, model.config)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")
    (out / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    settings |= {"chat_template": CHAT_TEMPLATE, "model_max_length": model.config["max_position_embeddings"]}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "README.md").write_text(CARD.format(
        name=out.name, config=model.config, measured=measured, **facts,
        layout=LAYOUTS[model.config["model_type"]], parameters=count / 1e6))


@torch.no_grad()
def check_export(out: Path) -> float:
    """Largest difference between our logits and those of the exported model in transformers."""
    from transformers import AutoModelForCausalLM

    theirs, ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), load_model(out)
    tokens = torch.randint(3, ours.config["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(0))
    difference = (theirs(tokens).logits - ours.logits(ours(tokens))).abs().max().item()
    return difference if difference < 1e-2 else sys.exit(f"the exported model's logits differ by {difference}")


def save_checkpoint(path: Path, model: Model, optimizer, progress: dict) -> None:
    state = {f"{name}|{k}": v.detach() for name, p in model.named_parameters()
             for k, v in {"weight": p, **optimizer.state[p]}.items()}
    save_file(state, path.with_suffix(".tmp"), {"progress": json.dumps(progress)})
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, model: Model, optimizer) -> dict:
    with safe_open(path, "pt") as f:
        for name, p in model.named_parameters():
            p.data.copy_(f.get_tensor(f"{name}|weight"))
            optimizer.state[p] = {k: f.get_tensor(f"{name}|{k}").to(p.device)
                                  for k in ("step", "exp_avg", "exp_avg_sq")}
        return json.loads(f.metadata()["progress"])


# ---------------------------------------------------------------- commands

app = typer.Typer(add_completion=False, help="Train and measure the small models of the examples.",
                  context_settings={"help_option_names": ["-h", "--help"]})


def option(text: str):
    return typer.Option(help=text)


Corpus = Annotated[Path, option("Folder of the tokenised text; made if missing.")]
Text = Annotated[list[Path] | None, option("Folder to take text from, may be repeated; else the Python library.")]
TextMb = Annotated[int, option("Take at most this many megabytes of text.")]
Samples = Annotated[int, option("Measurement: samples per form and depth.")]
Device = Annotated[str, option("cuda or cpu.")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def prepare(tokenizer: Annotated[Path, option("Folder with the tokenizer.")], corpus: Corpus = Path("corpus"),
            text: Text = None, text_mb: TextMb = 200):
    """Read and tokenise text once, for several runs of `train`."""
    prepare_corpus(corpus, Tokenizer.from_file(str(tokenizer / "tokenizer.json")), text, text_mb)


@app.command()
def evaluate(folder: Annotated[Path, typer.Argument(help="The model.")], corpus: Corpus = Path("corpus"),
             contexts: Annotated[str, option("Context lengths, comma-separated.")] = "1024,4096",
             samples: Samples = 40, device: Device = DEVICE):
    """Print held-out perplexity and recall of a model."""
    tasks = Tasks(Tokenizer.from_file(str(folder / "tokenizer.json")), np.load(corpus / "heldout.npy", mmap_mode="r"))
    print(measure(load_model(folder).to(device), tasks, [int(c) for c in contexts.split(",")], samples, device))


def gpt_oss(layers: int, window: int, context: int) -> dict:
    """What its configuration says instead.  YaRN, which vLLM expects there, is none at a factor of 1."""
    return {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 2,
            "num_experts_per_tok": 2, "sliding_window": window, "swiglu_limit": SWIGLU_LIMIT, "attention_bias": True,
            "layer_types": [(SLIDING, "full_attention")[i % 2] for i in range(layers)], "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "yarn", "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "truncate": False, "original_max_position_embeddings": context}}


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder for the model; a checkpoint in it is continued.")],
    corpus: Corpus = Path("corpus"), text: Text = None, text_mb: TextMb = 200,
    init: Annotated[Path | None, option("Continue from this model; its shape counts.")] = None,
    tokenizer: Annotated[Path | None, option("Folder with the tokenizer, if not INIT.")] = None,
    layers: Annotated[int, option("Layers; if more than INIT has, the others are added to it.")] = 4,
    hidden: int = 256, heads: int = 4, kv_heads: int = 2, head_dim: int = 128, intermediate: int = 704,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="Norms on queries and keys: the Qwen3 layout.")] = False,
    sliding_window: Annotated[int, option("Tokens that every other layer sees, from the first on, and a sink for each "
                                          "query head: the gpt-oss layout; INTERMEDIATE is of each of 2 experts.")] = 0,
    rope_theta: Annotated[float | None, option("INIT's if not given, else 100000.")] = None,
    context: Annotated[int, option("Context length.")] = 4096,
    short_context: Annotated[int, option("Context length of the first stage.")] = 1024,
    short_fraction: Annotated[float, option("Share of the run spent in the first stage.")] = 0.3,
    tokens_per_step: int = 65536,
    steps: Annotated[int, option("Stop after this many steps, if that is sooner than MINUTES.")] = 10**9,
    minutes: Annotated[float, option("Stop training after this many minutes; measuring follows.")] = 60,
    lr: Annotated[float, option("Peak learning rate.")] = 2e-3,
    warmup: Annotated[int, option("Steps of linear warm-up.")] = 100,
    weight_decay: float = 0.1,
    answer_weight: Annotated[float, option("Weight of answer tokens in the loss.")] = 3.0,
    first_digit_weight: Annotated[float, option("Weight of a number's first digit in an answer.")] = 3.0,
    mix: Annotated[str, option(f"Shares of the recall tasks: {', '.join(FORMS)}.")] = "4,4,2,1,3,2",
    save_every: Annotated[float, option("Minutes between checkpoints.")] = 10,
    workers: Annotated[int, option("Processes that make batches (0: none beside this one).")] = 2,
    compile: Annotated[bool, option("Use torch.compile (on a GPU).")] = True,
    samples: Samples = 40, seed: int = 1, device: Device = DEVICE,
):
    """Train a model, measure it and write it with its model card."""
    tokenizer_dir = tokenizer or init or sys.exit("give --tokenizer or --init")
    tok = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    prepare_corpus(corpus, tok, text, text_mb)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    streams = {split: np.load(corpus / f"{split}.npy", mmap_mode="r") for split in ("train", "heldout")}
    tasks = Tasks(tok, streams["train"], tuple(float(x) for x in mix.split(",")))
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    if init:
        model = load_model(init, layers)
        model.config |= {"max_position_embeddings": context, "rope_theta": rope_theta or model.config["rope_theta"]}
    else:
        model = Model({
            "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if qk_norm else "llama", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "vocab_size": tok.get_vocab_size(), "max_position_embeddings": context,
            "rope_theta": rope_theta or 100000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": BOS, "use_cache": True,
            "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": "bfloat16", "attention_dropout": 0.0}
            | (gpt_oss(layers, sliding_window, context) if sliding_window else {}))
    model.to(device)
    groups = [{"params": [p for p in model.parameters() if p.dim() == d], "weight_decay": w}
              for d, w in ((2, weight_decay), (1, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    checkpoint, progress = out / "checkpoint.safetensors", {"step": 0, "tokens": 0, "seconds": 0.0}
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
        print(f"continuing after step {progress['step']}", flush=True)
    losses_of = token_losses
    if compile and device.startswith("cuda"):
        torch._dynamo.config.suppress_errors = True  # where compiling fails, run without
        torch._dynamo.config.recompile_limit = 64
        losses_of = torch.compile(token_losses, dynamic=False)
        for block in model.model["layers"]:
            block.compile(dynamic=False)

    before = progress["seconds"]
    seconds = lambda: before + time.monotonic() - START  # noqa: E731
    done = lambda: max(progress["step"] / steps, seconds() / 60 / minutes)  # noqa: E731
    facts = lambda: {  # noqa: E731
        "origin": f"Continued from {init.name}" if init else "From scratch", "steps": progress["step"], "lr": lr,
        "tokens": progress["tokens"] / 1e6, "minutes": progress["seconds"] / 60, "train": len(streams["train"]) / 1e6,
        "epochs": progress["tokens"] / len(streams["train"]),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "a CPU"}
    shown, saved, window = START, time.monotonic(), []
    bar = tqdm(total=100, disable=not TTY, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    for length, until in ((short_context, short_fraction), (context, 1.0)):
        if done() >= until:
            continue
        batches = Batches(tasks, seed, progress["step"], max(1, tokens_per_step // length), length)
        for tokens, mask in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers,
                                                        pin_memory=device.startswith("cuda")):
            cosine = 0.51 + 0.49 * math.cos(math.pi * min(1, done()))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (progress["step"] + 1) / warmup) * cosine
            tokens, mask = (x.to(device, non_blocking=True) for x in (tokens, mask[:, 1:].flatten()))
            with autocast(device):
                h = model(tokens[:, :-1])
                losses = losses_of(h, model.model["embed_tokens"].weight, tokens[:, 1:])
            first_digit = (mask == 1) & (mask.roll(1) != 1)
            weights = (1 + (answer_weight - 1) * (mask > 0)).where(~first_digit, first_digit_weight)
            (losses * weights).sum().div(weights.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                window.append(torch.stack([(losses * (mask == i)).sum() / (mask == i).sum() for i in (0, 1)]))
            progress = {"step": progress["step"] + 1, "tokens": progress["tokens"] + mask.numel(), "seconds": seconds()}
            now = time.monotonic()
            if now - shown > (2 if TTY else 15) or done() >= until:
                text_loss, digit_loss = torch.stack(window).nanmean(0).tolist()  # waits for the GPU
                line = (f"step {progress['step']}, context {length}, {progress['tokens'] / 1e6:.1f}M tokens, "
                        f"loss {text_loss:.3f} on text, {digit_loss:.4f} on answers' digits")
                bar.set_description_str(line)
                bar.update(100 * min(1, done()) - bar.n)
                if not TTY:
                    print(f"{seconds():.0f} s: {line}", flush=True)
                shown, window = now, []
            if now - saved > save_every * 60:
                save_checkpoint(checkpoint, model, optimizer, progress)
                export(model, out, tokenizer_dir, facts())
                saved = now
            if done() >= until:
                break
    bar.close()

    export(model, out, tokenizer_dir, facts())
    plain = load_model(out).to(device)  # what was written: rounded to bfloat16
    measured = measure(plain, Tasks(tok, streams["heldout"]), sorted({min(1024, context), context}), samples, device)
    export(model, out, tokenizer_dir, facts(), measured)
    checkpoint.unlink(missing_ok=True)
    print(f"{out}\n{measured}\nexport checked: logits differ by at most {check_export(out):.1e}")


if __name__ == "__main__":
    app()
