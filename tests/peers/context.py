"""Decoding with a long context beside llama.cpp: tokens/s of one sequence that has read much already.

    python3 tests/peers/context.py                    SmolLM2-135M Q4_1 with 512, 2048 and 7936 tokens before it
    python3 tests/peers/context.py --rounds 5 --depths 4096

Both in turn; llama.cpp with and without flash attention, of which the faster counts."""

import argparse
import json
import statistics

import models
import run
from llama_cpp import tool

DECODE = 48


def freehold(path, threads, depth):
    said, _, _ = run.finish([run.FREEHOLD, "bench", path, "--json", "--rounds", "1", "--threads", str(threads), "--prompt-tokens",
                             "16", "--depth", str(depth), "--decode-tokens", str(DECODE), "--sequences", "1"])
    return json.loads(said)["engine"]["decode"][0]["tokens_per_second"]["median"]


def llama_cpp(path, threads, depth, attention):
    said, _, _ = run.finish([tool("llama-bench"), "-m", path, "-t", str(threads), "-r", "1", "-p", "0", "-n", str(DECODE), "-d",
                             str(depth), *run.ATTENTION[attention], "-o", "jsonl"])
    return run.json_lines(said)[0]["avg_ts"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 2048, 7936])
    parser.add_argument("--model", default="SmolLM2-135M Q4_1")
    arguments = parser.parse_args()
    path = models.provide()[arguments.model]
    print(f"{arguments.model}, medians of {arguments.rounds} interleaved rounds\n")
    print("| tokens before | Freehold, tokens/s | llama.cpp, tokens/s | ratio |\n|--:|--:|--:|--:|", flush=True)
    for depth in arguments.depths:
        ours, theirs = [], {name: [] for name in run.ATTENTION}
        for _ in range(arguments.rounds):
            ours.append(freehold(path, arguments.threads, depth))
            for name, found in theirs.items():
                found.append(llama_cpp(path, arguments.threads, depth, name))
        mine, other = statistics.median(ours), max(map(statistics.median, theirs.values()))
        print(f"| {depth} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
