# SPDX-License-Identifier: Apache-2.0
"""Train the small model family: members `code` and `prose`, and the `draft` distilled from both.

The members share a tokenizer and disagree about text, which is what an ensemble needs; the draft
learns the members' even mixture, which is what it drafts for. Everything runs on a CPU.

The corpus is text with a clear licence only: the Python standard library of the interpreter that
runs this script, and the Debian packages python3.11-doc, bible-kjv, bible-kjv-text, jargon-text
and r-cran-janeaustenr. Unpack them anywhere (`dpkg-deb -x PACKAGE.deb DIR`), then:

    python train_family.py prepare --corpus DIR --work WORK
    python train_family.py code --work WORK --out OUT &
    python train_family.py prose --work WORK --out OUT & wait
    python train_family.py draft --work WORK --out OUT
    python train_family.py measure --work WORK --out OUT

`prepare` writes tokens and tokenizer to WORK; each member becomes a folder OUT/MEMBER;
`measure` writes WORK/measures.md.
To add a member, add one entry to MEMBERS.
"""

import argparse
import copy
import gzip
import json
import logging
import math
import random
import re
import resource
import shutil
import struct
import subprocess
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from specens.training.examples import HELD_OUT_MODULES, read_code

log = logging.getLogger("family")

DOMAINS = ("code", "docs", "prose")
VOCAB_SIZE = 4096
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": PADDING,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
}
WINDOW_TOKENS, WINDOWS_PER_STEP = 384, 6
MUON_RATE, ADAMW_RATE, WARMUP_STEPS = 0.02, 3e-3, 30


@dataclass(frozen=True)
class Member:
    """One model: its shape, the share of each domain it reads, and its budget in tokens."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    shares: tuple[float, float, float]  # of DOMAINS
    tokens: int
    distilled_tokens: int = 0
    teachers: tuple[str, ...] = ()


MEMBERS = {
    "code": Member(192, 6, 3, 512, (0.6, 0.2, 0.2), 5_000_000),
    "prose": Member(192, 6, 3, 512, (0.2, 0.2, 0.6), 5_000_000),
    "draft": Member(128, 2, 2, 344, (0.4, 0.2, 0.4), 2_300_000, 1_300_000, ("code", "prose")),
}
# Who drafts for whom in `measure`; the mixture is half `code`, half `prose`.
PAIRS = [(draft, "mixture") for draft in MEMBERS] + [("draft", "code"), ("code", "prose")]


def read_docs(corpus: Path) -> Iterator[tuple[str, str]]:
    """Name and text of Python's documentation pages, then of the Jargon File's entries."""
    pages = corpus / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(pages.rglob("*.rst.txt")):
        yield path.name.removesuffix(".rst.txt"), path.read_text(errors="replace")
    packed = (corpus / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()
    jargon = gzip.decompress(packed).decode()
    for entry in re.split(r"\n(?=   :[^\n]+:)", jargon)[1:]:
        yield "jargon", unwrap(entry)


def read_prose(corpus: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the King James Bible's chapters, then of Jane Austen's."""
    command = [f"{corpus}/usr/bin/bible", "-f", "-p", f"{corpus}/usr/lib", "gen1:1-rev22:21"]
    bible = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    verses = (line.partition(" ") for line in bible.splitlines() if line)
    for chapter, lines in groupby(verses, lambda verse: verse[0].partition(":")[0]):
        yield chapter, "\n".join(text for _, _, text in lines)
    novels = corpus / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    for novel in read_r_strings(novels.read_bytes()):
        for chapter in re.split(r"\n(?=chapter [0-9ivxl]+)", novel, flags=re.IGNORECASE)[1:]:
            yield "austen", unwrap(chapter)


def read_r_strings(database: bytes) -> Iterator[str]:
    """Decode the character vectors of an R lazy-load database, lines joined."""
    while database:
        # Each block: length, then a zlib stream with R's serialization header of 23 bytes.
        stream = zlib.decompressobj()
        block = stream.decompress(database[4:])
        database = stream.unused_data
        kind, count = struct.unpack_from(">II", block, 23)
        if kind != 16:  # STRSXP
            continue
        offset, lines = 31, []
        for _ in range(count):
            size = struct.unpack_from(">I", block, offset + 4)[0]
            lines.append(block[offset + 8 : offset + 8 + size].decode(errors="replace"))
            offset += 8 + size
        yield "\n".join(lines)


def unwrap(text: str) -> str:
    """Join the lines of each paragraph: where a line was broken is noise."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def is_held_out(domain: str, name: str, text: str) -> bool:
    """Code and pages are held out by module, prose and jargon by one chapter in 32."""
    if domain == "prose" or name == "jargon":
        return zlib.crc32(text.encode()) % 32 == 0
    return HELD_OUT_MODULES.fullmatch(name) is not None


def prepare(corpus: Path, work: Path) -> None:
    """Read the corpus, train the tokenizer and write every domain's tokens, eos before each."""
    splits: dict[tuple[str, bool], list[str]] = {}
    readers = {"code": read_code(), "docs": read_docs(corpus), "prose": read_prose(corpus)}
    for domain, documents in readers.items():
        for name, text in documents:
            if text.strip():
                key = domain, is_held_out(domain, name, text)
                splits.setdefault(key, []).append(text.strip() + "\n")
    for texts in splits.values():
        random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer([text for domain in DOMAINS for text in splits[domain, False]])
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(f"{work}/tokenizer.json")
    (work / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2))
    for (domain, held_out), texts in splits.items():
        rows = (encoding.ids for encoding in tokenizer.encode_batch(texts))
        tokens = np.array([token for row in rows for token in (0, *row)], dtype=np.uint16)
        path = tokens_path(work, domain, held_out)
        np.save(path, tokens)
        size = sum(len(text.encode()) for text in texts)
        log.info("%s: %d documents, %d bytes, %d tokens", path.stem, len(texts), size, len(tokens))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with single digits; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_path(work: Path, domain: str, held_out: bool) -> Path:
    """Where the tokens of one split of one domain lie."""
    return work / f"{domain}-{'held-out' if held_out else 'train'}.npy"


def build_model(member: Member) -> LlamaForCausalLM:
    """Initialise a Llama with heads of 64 and tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=member.hidden,
        intermediate_size=member.feed_forward,
        num_hidden_layers=member.layers,
        num_attention_heads=member.heads,
        num_key_value_heads=member.heads,
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def load_model(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """Load a member from its folder, ready to predict."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def save_model(model: LlamaForCausalLM, work: Path, folder: Path) -> None:
    """Write bfloat16 weights, configuration and tokenizer."""
    # A copy, because the weights in training stay float32.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / name, folder)


def draw_batches(member: Member, work: Path, seed: int) -> Iterator[Tensor]:
    """Random windows, each from a domain drawn by the member's shares."""
    generator = np.random.default_rng(seed)
    tokens = [np.load(tokens_path(work, domain, False)) for domain in DOMAINS]
    while True:
        windows = []
        for domain in generator.choice(len(DOMAINS), WINDOWS_PER_STEP, p=member.shares):
            start = generator.integers(0, len(tokens[domain]) - WINDOW_TOKENS)
            windows.append(tokens[domain][start : start + WINDOW_TOKENS + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(windows))


def predict(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Float32 logits of every token of the windows but the first, one row each."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(windows[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1).float()


def train(name: str, work: Path, out: Path, scale: float, seed: int) -> None:
    """Train one member on text, then, if it has teachers, on the even mixture of their laws."""
    member = MEMBERS[name]
    torch.manual_seed(seed)
    model = build_model(member)
    teachers = [load_model(out / teacher, torch.bfloat16) for teacher in member.teachers]

    def text_loss(windows: Tensor) -> Tensor:
        return functional.cross_entropy(predict(model, windows), windows[:, 1:].flatten())

    def distil_loss(windows: Tensor) -> Tensor:
        with torch.no_grad():
            rows = [predict(teacher, windows).softmax(-1) for teacher in teachers]
            mixture = torch.stack(rows).mean(0)
        student = predict(model, windows).log_softmax(-1)
        return functional.kl_div(student, mixture, reduction="batchmean")

    started = time.perf_counter()
    batches = draw_batches(member, work, seed)
    save = partial(save_model, model, work, out / name)
    # A phase that another follows keeps its rate, and the last one lets it fall.
    hold = 1.0 if teachers else 0.5
    facts = {"text": optimise(model, text_loss, batches, scale * member.tokens, hold, save)}
    if teachers:
        tokens = scale * member.distilled_tokens
        facts["distil"] = optimise(model, distil_loss, batches, tokens, 0.0, save)
    facts["wall_s"] = time.perf_counter() - started
    facts["cpu_s"] = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    facts["parameters"] = model.num_parameters()
    (work / f"{name}.json").write_text(json.dumps(facts))


def optimise(
    model: LlamaForCausalLM,
    loss_of: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    tokens: float,
    hold: float,
    save: Callable[[], None],
) -> float:
    """Minimise a loss over a budget of tokens and return its running mean, in nats per token.

    The learning rate warms up, holds for a fraction of the budget and falls to zero. Muon turns
    the layers' matrices; AdamW the embedding and the norms, whose gradients are clipped.
    """
    compiled = torch.compile(loss_of, dynamic=False)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim == 1 or "embed" in name]
    optimisers = [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = int(tokens) // (WINDOW_TOKENS * WINDOWS_PER_STEP)
    mean = math.log(VOCAB_SIZE)
    for step in range(steps):
        left = 1 - step / steps
        scale = min(1, (step + 1) / WARMUP_STEPS, left / max(1 - hold, left))
        for optimiser, rate in zip(optimisers, (MUON_RATE, ADAMW_RATE), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        loss = compiled(next(batches))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        mean += 0.03 * (loss.item() - mean)
        if step % 100 == 0:
            log.info("step %d of %d: loss %.3f", step, steps, mean)
        if step % 400 == 200:
            save()
    save()
    return mean


@torch.inference_mode()
def measure(work: Path, out: Path, windows_per_domain: int = 96) -> None:
    """Tabulate bits per byte of each member, and how well pairs agree, on held-out text."""
    tokenizer = Tokenizer.from_file(f"{work}/tokenizer.json")
    family = {name: load_model(out / name, torch.float32) for name in MEMBERS}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for domain in DOMAINS:
        tokens = torch.from_numpy(np.load(tokens_path(work, domain, True)).astype(np.int64))
        starts = torch.linspace(0, len(tokens) - WINDOW_TOKENS - 1, windows_per_domain).long()
        for start in starts.tolist():
            window = tokens[start : start + WINDOW_TOKENS + 1]
            size = len(tokenizer.decode(window[1:].tolist(), skip_special_tokens=False).encode())
            laws = {}
            for name, model in family.items():
                laws[name] = law = model(window[None, :-1]).logits[0].softmax(-1)
                nats = -law.gather(1, window[1:, None]).log().sum().item()
                sums[f"{name}, bits per byte", domain] += nats / math.log(2) / size
            laws["mixture"] = (laws["code"] + laws["prose"]) / 2
            for draft, target in PAIRS:
                kept = torch.minimum(laws[draft], laws[target]).sum(-1).mean()
                agreed = (laws[draft].argmax(-1) == laws[target].argmax(-1)).float().mean()
                sums[f"{draft} → {target}, acceptance", domain] += kept.item()
                sums[f"{draft} → {target}, same top token", domain] += agreed.item()
    rows = dict.fromkeys(row for row, _ in sums)
    cells = {row: [sums[row, domain] / windows_per_domain for domain in DOMAINS] for row in rows}
    table = [f"| {row} | {' | '.join(f'{cell:.3f}' for cell in cells[row])} |" for row in cells]
    (work / "measures.md").write_text("\n".join(table))


def main() -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=("prepare", *MEMBERS, "measure"))
    parser.add_argument("--corpus", type=Path, default=Path("/"), help="unpacked packages")
    parser.add_argument("--work", type=Path, required=True, help="tokens and training facts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the family")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the token budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.task == "prepare":
        prepare(arguments.corpus, arguments.work)
    elif arguments.task == "measure":
        measure(arguments.work, arguments.out)
    else:
        train(arguments.task, arguments.work, arguments.out, arguments.scale, arguments.seed)


if __name__ == "__main__":
    main()
