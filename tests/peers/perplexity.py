"""Perplexity of one text under Freehold and under llama.cpp, for each kind of weights.

    python3 tests/peers/perplexity.py            every file; those that are missing are made by llama-quantize
    python3 tests/peers/perplexity.py --only Q8  files whose name holds this text

The text is English documentation that every Python brings with it (pydoc's topics), about 20 thousand tokens."""

import argparse
import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import models
from llama_cpp import CACHE, tool

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "target"))
FREEHOLD = Path(os.environ.get("FREEHOLD_BIN", TARGET / "release" / "freehold"))
CHARACTERS, WINDOW = 92_000, 512
KINDS = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0", "F16")


def text():
    path = CACHE / "peers" / "perplexity.txt"
    topics = pydoc_data.topics.topics
    words = "\n\n".join(" ".join(topics[name].split()) for name in sorted(topics))
    path.write_text(words[:CHARACTERS])
    return path


def files():
    found = {name: path for name, path in models.provide().items() if "random" not in str(path)}
    source = next(path for name, path in found.items() if "Q8_0" in name)
    for kind in KINDS:
        path = source.with_name(source.name.replace("Q8_0", kind))
        if not path.is_file():
            print(f"making {path.name}", file=sys.stderr, flush=True)
            subprocess.run([tool("llama-quantize"), "--allow-requantize", source, path, kind], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if path not in found.values():
            found[f"SmolLM2-135M {kind}"] = path
    return found


def ours(path, words):
    said = subprocess.run([FREEHOLD, "bench", path, "--json", "--perplexity", words, "--window", str(WINDOW)], check=True,
                          capture_output=True, text=True).stdout
    return json.loads(said)


def theirs(path, words):
    done = subprocess.run([tool("llama-perplexity"), "-m", path, "-f", words, "-c", str(WINDOW), "-b", str(WINDOW)],
                          check=True, capture_output=True, text=True)
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "Final estimate: PPL" in line)
    return float(line.split("PPL =")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name holds this text")
    arguments = parser.parse_args()
    words = text()
    print("| file | tokens | Freehold | llama.cpp | difference |\n|---|--:|--:|--:|--:|")
    for name, path in files().items():
        if arguments.only not in name:
            continue
        our, their = ours(path, words), theirs(path, words)
        change = (our["perplexity"] / their - 1) * 100
        print(f"| {name} | {our['counted_tokens']} | {our['perplexity']:.4f} | {their:.4f} | {change:+.3f} % |", flush=True)


if __name__ == "__main__":
    main()
