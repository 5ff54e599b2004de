"""Make the small real models of the tests, a Llama of 1.4 M parameters and three fine-tunes, from CPython's own text.

    python tests/models/train.py            # about half an hour on one core; nothing is downloaded
    python tests/models/train.py --table    # only measure the models that are there

text -> tokenizer -> base (a mix of the three domains) -> code, docs, c (the base, tuned on one domain) -> perplexities.
The domains are `code` (the standard library without its docstrings), `docs` (its docstrings, the language reference,
IDLE's help and news) and `c` (the headers of the C API).
"""

import argparse
import ast
import inspect
import json
import math
import random
import re
import sysconfig
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
DOMAINS = ("code", "docs", "c")
MIX = (0.5, 0.3, 0.2)  # the share of each domain in the training of the base
WINDOW, BATCH = 256, 16
HELD_OUT_BYTES = 44_000  # a held-out text takes whole documents until it has as many

Documents = dict[str, str]  # path -> text

# Tables and tests, not source text; _sysconfigdata also names folders of the machine it was built on.
SKIP_PY = re.compile(
    r"site-packages|__pycache__|^config-|(^|/)tests?/|idle_test|^encodings/|^pydoc_data/|_sysconfigdata|^stringprep"
)
SKIP_H = re.compile(r"pyconfig|pycore_runtime_init|pycore_global_strings|opcode|typeslots")


# ---- text ----


def read_tree(root: Path, suffix: str, skip: re.Pattern[str]) -> Documents:
    """Read every UTF-8 file below `root`, in the order of their paths."""
    texts = {}
    for path in sorted(root.rglob(f"*{suffix}")):
        name = path.relative_to(root).as_posix()
        if not skip.search(name):
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return texts


def split_docstrings(source: str) -> tuple[str, str]:
    """Return the source without its docstrings, and the docstrings: prose only, one paragraph each."""
    lines, prose = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is None:
                continue
            if len(doc) > 60 and ">>>" not in doc:
                prose.append(re.sub(r"\n\s*\n", "\n", inspect.cleandoc(doc)))
            if len(node.body) > 1 or isinstance(node, ast.Module):  # a body of nothing but a docstring keeps it
                first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                lines[first:last] = [None] * (last - first)
    return "\n".join(line for line in lines if line is not None), "\n\n".join(prose)


def collect() -> dict[str, Documents]:
    """Gather the documents of each domain from the running Python."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    code, docs = {}, {}
    for name, source in read_tree(stdlib, ".py", SKIP_PY).items():
        code[name], docs[name] = split_docstrings(source)
    topics = ast.parse((stdlib / "pydoc_data/topics.py").read_text(encoding="utf-8")).body[-1].value
    docs |= {f"topics/{name}": text for name, text in sorted(ast.literal_eval(topics).items())}
    for path in sorted((stdlib / "idlelib").glob("NEWS*.txt")):
        docs[path.name] = path.read_text(encoding="utf-8", errors="ignore")
    html = (stdlib / "idlelib/help.html").read_text(encoding="utf-8")
    docs["help.html"] = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "", html, flags=re.S)
    headers = read_tree(Path(sysconfig.get_path("include")), ".h", SKIP_H)
    return {"code": code, "docs": docs, "c": headers}


def hold_out(domains: dict[str, Documents]) -> dict[str, dict[str, str]]:
    """Split every domain by document into test, val and train: split -> domain -> text (NUL between train's documents).

    A path that one domain holds out is held out of all of them, and a long paragraph is kept once over all splits, test
    first, so no document that is measured was seen in training under another name (single lines do recur).
    """
    held: dict[str, dict[str, list[str]]] = {"test": {}, "val": {}}
    taken: set[str] = set()
    for domain, documents in domains.items():
        fit = [n for n, t in documents.items() if 2_000 < len(t) < 14_000 and "copyright" not in t.lower()]
        fit = [n for n in sorted(fit, key=lambda n: zlib.crc32(n.encode())) if n not in taken]
        for split in held.values():
            size, split[domain] = 0, []
            while size < HELD_OUT_BYTES:
                split[domain].append(name := fit.pop(0))
                size += len(documents[name].encode())
            taken.update(split[domain])
    rest = {domain: [n for n in documents if n not in taken] for domain, documents in domains.items()}

    seen: set[str] = set()

    def clean(text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n(?=\S)", text.expandtabs(8).strip()):
            lower = paragraph.lower()
            licence = "copyright" in lower and re.search("reserved|permission|licen[sc]e", lower)
            if not licence and paragraph not in seen:
                kept.append(paragraph)
            if len(paragraph) > 60:
                seen.add(paragraph)
        return "\n\n".join(kept) + "\n"

    def joined(names: dict[str, list[str]], separator: str) -> dict[str, str]:
        return {d: separator.join(clean(domains[d][n]) for n in names[d]) for d in DOMAINS}

    return {"test": joined(held["test"], "\n"), "val": joined(held["val"], "\n"), "train": joined(rest, "\0")}


# ---- tokenizer ----


def train_tokenizer(texts: dict[str, str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1,024 tokens on equal parts of the domains; `<s>` opens every text, as in Llama."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    part = min(len(text) for text in texts.values())
    parts = [shuffled(text)[:part] for text in texts.values()]
    bpe.train_from_iterator((document for text in parts for document in text.split("\0")), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    )


def shuffled(text: str) -> str:
    documents = text.split("\0")
    random.Random(0).shuffle(documents)
    return "\0".join(documents)


def stream(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Encode NUL-separated documents, each from `<s>` to `</s>`, into one run of tokens [T]."""
    ids = tokenizer([document for document in text.split("\0") if document.strip()])["input_ids"]  # each opens with <s>
    return torch.tensor([token for document in ids for token in (*document, tokenizer.eos_token_id)])


# ---- models ----


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def train(
    model: LlamaForCausalLM, streams: list[Tensor], mix: tuple[float, ...], *, steps: int, rate: float, seed: int
) -> None:
    """Train in place on random windows, with float32 weights and bfloat16 products."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm = max(1, steps // 20)
    model.train()
    start, losses = time.time(), []
    for step in range(steps):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warm) * cosine
        rows = []
        for domain in torch.multinomial(torch.tensor(mix), BATCH, replacement=True, generator=draw):
            tokens = streams[domain]
            at = int(torch.randint(len(tokens) - WINDOW, (1,), generator=draw))
            rows.append(tokens[at : at + WINDOW + 1])
        x = torch.stack(rows)  # [batch, window + 1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x[:, :-1], use_cache=False).logits  # [batch, window, vocab]
        loss = cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"  step {step + 1:5}/{steps}  loss {mean:.3f}  {time.time() - start:6.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder as the Hub has it: bfloat16 in three shards, index, configs, tokenizer."""
    model.eval().to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder, max_shard_size="1200KB")
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"  # one line: indented, it is four times as large
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8")
    path = folder / "tokenizer_config.json"  # the class by its older name, which every version of transformers knows
    facts = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    facts.pop("backend", None)
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, windows: int) -> float:
    """exp of the mean loss over the first non-overlapping windows of 256 tokens, without `<s>`, in float32."""
    x = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:windows]  # [windows, 256]
    logits = torch.cat([model(input_ids=rows).logits.float() for rows in x.split(BATCH)])  # [windows, 256, vocab]
    return math.exp(cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()))


def print_table(out: Path, windows: int) -> None:
    print("| model | " + " | ".join(f"{domain}.test" for domain in DOMAINS) + " |\n|---" + "|---:" * len(DOMAINS) + "|")
    for name in ("base", *DOMAINS):
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        row = []
        for domain in DOMAINS:
            text = (out / "text" / f"{domain}.test.txt").read_text("utf-8")
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            row.append(perplexity(model, tokens, windows))
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for text/, base/, code/, docs/ and c/")
    parser.add_argument("--base-steps", type=int, default=1400)
    parser.add_argument("--tune-steps", type=int, default=500)
    parser.add_argument("--base-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--tune-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--windows", type=int, default=48, help="windows of 256 tokens that a perplexity reads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", action="store_true", help="write the held-out texts and stop")
    parser.add_argument("--table", action="store_true", help="only measure the models that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        return print_table(args.out, args.windows)

    texts = hold_out(collect())
    (args.out / "text").mkdir(parents=True, exist_ok=True)
    for split in ("val", "test"):
        for domain in DOMAINS:
            (args.out / "text" / f"{domain}.{split}.txt").write_text(texts[split][domain], encoding="utf-8")
    for split, by_domain in texts.items():
        print(split, {domain: len(text.encode()) for domain, text in by_domain.items()}, flush=True)
    if args.text:
        return None

    tokenizer = train_tokenizer(texts["train"])
    streams = [stream(tokenizer, texts["train"][domain]) for domain in DOMAINS]
    print("tokens", {domain: len(tokens) for domain, tokens in zip(DOMAINS, streams, strict=True)}, flush=True)

    print("base", flush=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    train(model, streams, MIX, steps=args.base_steps, rate=args.base_rate, seed=1)
    save(model, tokenizer, args.out / "base")
    for i, domain in enumerate(DOMAINS):
        print(domain, flush=True)
        # From the rounded base, so that a task vector is the difference of two files.
        model = LlamaForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
        train(model, streams[i : i + 1], (1.0,), steps=args.tune_steps, rate=args.tune_rate, seed=2 + i)
        save(model, tokenizer, args.out / domain)
    print_table(args.out, args.windows)


if __name__ == "__main__":
    main()
