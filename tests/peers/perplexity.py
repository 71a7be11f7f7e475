"""Perplexity of one text under Freehold and under llama.cpp, for each kind of weights.

    python3 tests/peers/perplexity.py            every file; those that are missing are made by llama-quantize
    python3 tests/peers/perplexity.py --only Q8  files whose name holds this text
    python3 tests/peers/perplexity.py --exact    Freehold in 32-bit floats, and llama.cpp on 32-bit floats of the same file:
                                                 what is left is no rounding of weights or activations

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
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
# Of the model with 768 channels. Of 576 llama-quantize makes other types than these.
WIDE_KINDS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "F32")


def text():
    path = CACHE / "peers" / "perplexity.txt"
    topics = pydoc_data.topics.topics
    words = "\n\n".join(" ".join(topics[name].split()) for name in sorted(topics))
    path.write_text(words[:CHARACTERS])
    return path


def files():
    found = {name: path for name, path in models.provide().items() if "random" not in str(path)}
    for name, source, kinds in (("SmolLM2-135M", models.SMOLLM2_Q8_0, KINDS),
                                ("SmolLM2-135M wide", models.wide_smollm2(), WIDE_KINDS)):
        for kind in kinds:
            path = source.with_name(f"{source.name.split('.')[0]}.{kind}.gguf")
            models.put(lambda staged: models.quantize(source, staged, kind, "--allow-requantize"), path)
            if path not in found.values():
                found[f"{name} {kind}"] = path
    return found


def floats(path):
    """The weights of a file as 32-bit floats."""
    target = path.with_name(path.stem + ".as-F32.gguf")
    models.put(lambda staged: models.quantize(path, staged, "F32", "--allow-requantize"), target)
    return target


def ours(path, words, exact):
    said = subprocess.run([FREEHOLD, "bench", path, "--json", "--perplexity", words, "--window", str(WINDOW),
                           *(["--exact"] if exact else [])], check=True, capture_output=True, text=True).stdout
    return json.loads(said)


def theirs(path, words, exact):
    cache = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"] if exact else []
    done = subprocess.run([tool("llama-perplexity"), "-m", floats(path) if exact else path, "-f", words,
                           "-c", str(WINDOW), "-b", str(WINDOW), *cache], check=True, capture_output=True, text=True)
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "Final estimate: PPL" in line)
    return float(line.split("PPL =")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name holds this text")
    parser.add_argument("--exact", action="store_true", help="without any rounding on both sides")
    arguments = parser.parse_args()
    words = text()
    print("| file | its weights | tokens | Freehold | llama.cpp | difference |\n|---|---|--:|--:|--:|--:|")
    for name, path in files().items():
        if arguments.only not in name:
            continue
        types = models.weight_types(path)
        our, their = (side(path, words, arguments.exact) for side in (ours, theirs))
        change = (our["perplexity"] / their - 1) * 100
        print(f"| {name} | {types} | {our['counted_tokens']} | {our['perplexity']:.4f} | {their:.4f} | {change:+.3f} % |", flush=True)


if __name__ == "__main__":
    main()
