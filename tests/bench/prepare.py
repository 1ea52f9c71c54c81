"""How fast `prepare` is beside the bare tokenizer, and beside TRL where it is installed.

    python -m tests.bench.prepare ROWS.jsonl --tokenizer MODEL [--copies 4] [--block-size 1024] [--workers 2]

Rows are `question` + `answer` or `prompt` + `completion`; copies are numbered, so that no row stands twice. Each figure
is the median of a few runs in turn. lorakit's is the whole command's wall clock, less that of `prepare --help`, with a
cache of its own; the others count what they do inside one process that has imported everything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def make_rows(source: Path, copies: int, folder: Path) -> dict[str, Path]:
    """The same rows as prompt + completion and as messages."""
    pairs, chats = [], []
    for copy in range(copies):
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt = row.get("question", row.get("prompt")) + (f" ({copy})" if copy else "")
            completion = row.get("answer", row.get("completion"))
            pairs.append({"prompt": prompt, "completion": completion})
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            chats.append({"messages": turns})
    paths = {}
    for name, rows in (("pairs", pairs), ("chats", chats)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def seconds(body: Callable[[], object]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def lorakit(*arguments: object, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    environment = {**os.environ, "LORAKIT_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if "--json" in arguments else {}


def prepare(rows: Path, options: argparse.Namespace, folder: Path, *more: object) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole command less those of `--help`, and what it printed."""
    output = folder / f"out-{time.monotonic_ns()}"
    arguments = ("prepare", rows, "--tokenizer", options.tokenizer, "--block-size", options.block_size, "--json")
    result: dict[str, Any] = {}
    whole = seconds(
        lambda: result.update(
            lorakit(*arguments, "--output", output, "--num-workers", options.workers, *more, cache=folder / "cache")
        )
    )
    start = seconds(lambda: lorakit("prepare", "--help", cache=folder / "cache"))
    return whole - start, result


def bare(texts: Sequence[str], tokenizer: str) -> dict[str, Callable[[], object]]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    return {
        "encode_batch": lambda: backend.encode_batch(list(texts), add_special_tokens=False),
        "encode_batch_fast": lambda: backend.encode_batch_fast(list(texts), add_special_tokens=False),
    }


TRL = """
import json, sys, time, tempfile
path, model, block_size, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
import datasets, torch, transformers
from trl import SFTConfig, SFTTrainer
datasets.disable_progress_bars()
datasets.disable_caching()
rows = datasets.Dataset.from_list([json.loads(line) for line in open(path)])
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                                  num_key_value_heads=1, vocab_size=len(tokenizer))
with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(output_dir=folder, max_length=block_size, packing=True, use_cpu=True, bf16=False,
                          dataset_num_proc=workers, report_to=[])
    tiny = transformers.LlamaForCausalLM(config)
    started = time.perf_counter()
    trainer = SFTTrainer(tiny, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    ids = trainer.train_dataset["input_ids"]
    tokens = sum(len(block) for block in ids)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "fill": tokens / (len(ids) * block_size)}))
"""


def trl(rows: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """TRL's own preparation of the same rows, or None where TRL isn't installed."""
    command = [sys.executable, "-c", TRL, str(rows), options.tokenizer, str(options.block_size), str(options.workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"  TRL: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rendered_texts(rows: Path, tokenizer: str) -> list[str]:
    from lorakit.core.records import Renderer, detect_format, parse_row
    from lorakit.core.tokenization import Codec, load_spec

    codec = Codec(load_spec(Path(tokenizer)))
    lines = rows.read_bytes().splitlines()
    row_format = detect_format(json.loads(lines[0]), "")
    renderer = Renderer(row_format, {}, codec.template, codec.spec.end_tokens, "completion")
    return [renderer.render(parse_row(line, "")).text for line in lines]


def parts(rows: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part of the work, alone, in one process."""
    from lorakit.core.blocks import ShardMaker
    from lorakit.core.packing import Packer
    from lorakit.core.records import Renderer, detect_format, parse_row
    from lorakit.core.tokenization import Codec, load_spec

    codec = Codec(load_spec(Path(options.tokenizer)))
    lines = rows.read_bytes().splitlines()
    renderer = Renderer(
        detect_format(json.loads(lines[0]), ""), {}, codec.template, codec.spec.end_tokens, "completion"
    )
    found: dict[str, Any] = {}
    timed = {"read": seconds(lambda: found.update(rows=[parse_row(line, "") for line in lines]))}
    timed["render"] = seconds(lambda: found.update(texts=[renderer.render(row) for row in found["rows"]]))
    timed["tokenize"] = seconds(lambda: found.update(documents=list(codec.encode(found["texts"]))))
    packer, shards = Packer(options.block_size, "best-fit"), ShardMaker("blocks", options.block_size, 0)
    blocks: list[Any] = []

    def pack() -> None:
        for document in found["documents"]:
            blocks.extend(packer.add(document))
        blocks.extend(packer.rest())

    timed["pack"] = seconds(pack)
    timed["write"] = seconds(lambda: [list(shards.add(block)) for block in blocks] + list(shards.rest()))
    return timed


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.prepare")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, rows in make_rows(options.rows, options.copies, folder).items():
            cold, result = prepare(rows, options, folder)
            tokens = result["tokens"]
            ways: dict[str, list[float]] = {"lorakit": [], "encode_batch": [], "encode_batch_fast": []}
            texts = rendered_texts(rows, options.tokenizer)
            for _ in range(options.runs):
                ways["lorakit"].append(prepare(rows, options, folder)[0])
                for way, body in bare(texts, options.tokenizer).items():
                    ways[way].append(seconds(body))
            medians = {way: statistics.median(found) for way, found in ways.items()}
            say(f"{kind}: {result['rows']:,} rows, {tokens:,} tokens, fill {result['fill']:.4f}")
            for way, median in medians.items():
                ratio = medians["encode_batch"] / median
                say(f"  {way:<18} {tokens / median / 1e6:6.2f} M tokens/s   {ratio:5.2f} of encode_batch")
            say(f"  {'first of all':<18} {tokens / cold / 1e6:6.2f} M tokens/s   with a tokenizer never seen before")
            if theirs := trl(rows, options):
                speed = theirs["tokens"] / theirs["seconds"]
                ratio = tokens / medians["lorakit"] / speed
                say(f"  {'TRL':<18} {speed / 1e6:6.2f} M tokens/s   fill {theirs['fill']:.4f}; lorakit is {ratio:.2f}×")
            shares = ", ".join(f"{part} {taken:.2f} s" for part, taken in parts(rows, options).items())
            say(f"  where it goes, in one process: {shares}")


if __name__ == "__main__":
    main()
