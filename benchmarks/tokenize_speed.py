"""How fast preference pairs become token tables, and in how much memory, beside `datasets.map` with the same tokenizer.

    python -m benchmarks.tokenize_speed FOLDER                             100,000 and 1,000,000 generated pairs
    python -m benchmarks.tokenize_speed FOLDER --rows 20000 200000 --workers 1
    python -m benchmarks.tokenize_speed FOLDER --tokenizer models/base --pairs data/prepared/train/preference.jsonl

Both render the chat template of the tokenizer's folder and encode prompt and replies apart, in batches. `datasets.map`
checks nothing and keeps nothing; tokenize_data refuses forged special tokens, renders in a process with limits, decodes
every text to compare it, and keeps each shard in case of a kill. Processor seconds are those of all processes;
memory is the peak of their proportional set sizes (a page that n processes share counts 1/n in each).

The last lines compare rows per processor second, between the two sizes, so that loading does not count; and the memory.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "validation", "test")
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
WORDS_OF_PROMPT, WORDS_OF_REPLY = (10, 150), (5, 80)
DISTINCT_PAIRS = 20_000  # repeated to the number asked for
SECONDS_BETWEEN_SAMPLES = 0.2


class Measured(NamedTuple):
    """What a command took, all its processes together."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(command: list[str], folder: Path) -> Measured:
    """Run a command to its end. Raises SystemExit if it fails."""
    import psutil

    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    top, cpu, peak = psutil.Process(process.pid), {}, 0
    while process.poll() is None:
        memory = 0
        for one in [top, *top.children(recursive=True)]:
            try:
                times = one.cpu_times()
                cpu[one.pid] = times.user + times.system
                memory += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, memory)
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(time.monotonic() - begun, sum(cpu.values()), peak)


def generated_pairs(count: int) -> list[str]:
    """Pairs of made-up words, a few of them frequent, as JSON lines."""
    draw = random.Random(0)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "an", "er", "il")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(8000)]
    weights = [1 / place for place in range(1, len(words) + 1)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(least, most))) + "."

    lines = []
    for _ in range(count):
        prompt = [{"role": "user", "content": text(*WORDS_OF_PROMPT)}]
        chosen, rejected = ([{"role": "assistant", "content": text(*WORDS_OF_REPLY)}] for _ in range(2))
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "generated"}))
    return lines


def make_tokenizer(lines: list[str], folder: Path) -> None:
    """Write a byte-level BPE tokenizer with the project's chat template, trained on the pairs."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    specials = ["<|pad|>", "<|end|>", *MARKERS]
    bpe.train_from_iterator(lines[:5000], vocab_size=16_000, special_tokens=specials, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = (ROOT / "stages/chat_templates/chat.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": 16_000, "max_position_embeddings": 100_000}
    (folder / "config.json").write_text(json.dumps(config))


def write_project(folder: Path, workers: int) -> None:
    """Settings with which no row is left out."""
    from stages.lib.settings.declaration import block
    from stages.lib.settings.tokenize_data import Tokenize

    section = block(Tokenize, max_length=8192, max_prompt_length=4096, truncation="drop", on_unusable_row="drop")
    (folder / "params.yaml").write_text(json.dumps({"seed": 17, "tokenize_data": section}))
    runtime = (ROOT / "runtime.yaml").read_text()
    (folder / "runtime.yaml").write_text(f"{runtime}\ntokenize_data: {{workers: {workers}}}\n")
    (folder / "stages").unlink(missing_ok=True)
    (folder / "stages").symlink_to(ROOT / "stages")


def write_rows(folder: Path, lines: list[str], count: int) -> None:
    for split in SPLITS:
        path = folder / f"data/prepared/{split}/preference.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in islice(cycle(lines), count if split == "train" else 1))


def clear(folder: Path) -> None:
    for name in ("data/tokens", "metrics", ".scratch", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


def map_with_datasets(tokenizer: str, workers: int) -> None:
    """The same ids by `datasets.map`, from the file that the stage reads to an Arrow file."""
    import datasets
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        prompts = [
            loaded.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in rows["prompt"]
        ]
        ids = {"prompt_ids": loaded(prompts, add_special_tokens=False)["input_ids"]}
        for name in ("chosen", "rejected"):
            wholes = [
                loaded.apply_chat_template(prompt + reply, tokenize=False)
                for prompt, reply in zip(rows["prompt"], rows[name], strict=True)
            ]
            replies = [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts, strict=True)]
            ids[f"{name}_ids"] = loaded(replies, add_special_tokens=False)["input_ids"]
        return ids

    rows = datasets.load_dataset(
        "json", data_files="data/prepared/train/preference.jsonl", split="train", cache_dir="cache"
    )
    rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write into; what an earlier run left there is replaced")
    parser.add_argument("--rows", type=int, nargs=2, default=(100_000, 1_000_000), metavar="N")
    parser.add_argument("--workers", type=int, default=2, help="processes of each")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, as prepare_base writes it")
    parser.add_argument("--pairs", type=Path, help="prepared rows, repeated to the number asked for")
    parser.add_argument("--map", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = str(options.tokenizer.resolve() if options.tokenizer else "base")
    if options.map:
        map_with_datasets(base, options.workers)
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = options.pairs.read_text().splitlines() if options.pairs else generated_pairs(DISTINCT_PAIRS)
    if not options.tokenizer:
        make_tokenizer(lines, folder / "base")
    write_project(folder, options.workers)
    names = ["--prepared", "data/prepared", "--tokens", "data/tokens", "--metrics", "metrics"]
    ours = [sys.executable, "-m", "stages.tokenize_data", "--kind", "preference", "--tokenizer", base, *names]
    theirs = [sys.executable, str(Path(__file__).resolve()), ".", "--map", "--workers", str(options.workers)]
    theirs += ["--tokenizer", base]
    found: dict[str, list[Measured]] = {"tokenize_data": [], "datasets.map": []}
    print(f"{options.workers} processes")
    print(f"{'':14} {'rows':>9} {'seconds':>8} {'CPU s':>8} {'rows/CPU s':>10} {'peak MB':>8}")
    for count in options.rows:
        write_rows(folder, lines, count)
        for name, command in (("tokenize_data", ours), ("datasets.map", theirs)):
            clear(folder)
            one = measured(command, folder)
            found[name].append(one)
            rate, peak = count / one.cpu_seconds, one.peak_bytes / 1e6
            print(
                f"{name:14} {count:9,} {one.seconds:8.1f} {one.cpu_seconds:8.1f} {rate:10,.0f} {peak:8,.0f}", flush=True
            )
    clear(folder)
    more = options.rows[1] - options.rows[0]
    rates = {name: more / (large.cpu_seconds - small.cpu_seconds) for name, (small, large) in found.items()}
    small, large = found["tokenize_data"]
    print(
        f"rows per CPU second between the two sizes: {rates['tokenize_data']:,.0f} and {rates['datasets.map']:,.0f}, "
        f"ratio {rates['tokenize_data'] / rates['datasets.map']:.2f}\n"
        f"peak memory of tokenize_data at {options.rows[1]:,} rows over that at {options.rows[0]:,}: "
        f"{large.peak_bytes / small.peak_bytes:.2f}"
    )


if __name__ == "__main__":
    main()
