"""Two promises beside llama-server: streams keep their pace while a long prompt is read, and a prompt that was read once
costs little the second time.

    python3 tests/peers/fairness.py [--rounds 3] [--prompt-words 1300] [--streams 1]

Pace: tokens a second of the streams while a prompt of about 4 thousand tokens is read, as a share of their pace before and after;
of the stream that fares worst too.
Again: time to the first token of the same prompt of about 2 thousand tokens, as a share of the first time; and of one that goes on
with another word."""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import models
import run
from llama_cpp import tool

CONTEXT, SLOTS = 8192, 4
# More than a fast machine writes while it reads the prompt.
STREAM_TOKENS = 2300
WORDS = ("river", "stone", "lamp", "winter", "copper", "garden", "letter", "bridge", "orange", "harbour", "silver", "road")


def freehold_command(folder, path, threads, port):
    manifests = Path(folder) / "manifests"
    manifests.mkdir()
    (manifests / "bench.yaml").write_text(json.dumps({
        "apiVersion": "freehold.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "bench", "namespace": "default"},
        "spec": {"model": {"path": str(path)},
                 "engine": {"contextLength": CONTEXT, "concurrency": SLOTS, "threads": threads}}}))
    return [run.FREEHOLD, "up", "--data-dir", f"{folder}/data", "--manifests", manifests, "--listen", f"127.0.0.1:{port}",
            "--api-listen", "127.0.0.1:0", "--node-name", "bench"]


def peer_command(_folder, path, threads, port):
    return [tool("llama-server"), "-m", path, "-t", str(threads), "-tb", str(threads), "-np", str(SLOTS), "-c",
            str(SLOTS * CONTEXT), "--host", "127.0.0.1", "--port", str(port), "--no-webui", "-fa", "on", "--alias", "bench"]


def prompt(words, seed):
    """Text that is no other seed's."""
    state, text = seed * 2654435761 % 2**32, []
    for _ in range(words):
        state = (1103515245 * state + 12345) % 2**31
        text.append(f"{WORDS[state // 65536 % len(WORDS)]}{state // 1024 % 10}")
    return " ".join(text)


def stream(base_url, text, tokens):
    """The times at which pieces of a completion come."""
    body = {"model": "bench", "prompt": text, "max_tokens": tokens, "stream": True, "temperature": 1.0, "seed": 5,
            "logit_bias": {"0": -100, "2": -100}}
    request = urllib.request.Request(f"{base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    times = []
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
    return times


def first_token(base_url, text):
    begun = time.monotonic()
    return stream(base_url, text, 1)[0] - begun


def paces(times, begun, ended):
    """Of a stream: pieces a second while a prompt is read, and in the second before and the one after (its own pace falls as its text
    grows); seconds of its longest pause meanwhile."""
    if not times or times[0] > begun - 1 or times[-1] < ended + 1:
        sys.exit("a stream began after the prompt, or ended before it was read: its pace beside it cannot be told")
    alone = [moment for moment in times if begun - 1 <= moment < begun or ended <= moment < ended + 1]
    during = [moment for moment in times if begun <= moment < ended]
    longest = max(after - before for before, after in zip(times, times[1:]) if after >= begun and before < ended)
    return len(during) / (ended - begun), len(alone) / 2, longest


def measure(command, path, threads, words, streams, seed):
    port = run.free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        with run.Served(command(folder, path, threads, port), f"http://127.0.0.1:{port}/v1", "bench", log) as server:
            server.wait(log)
            found = [[] for _ in range(streams)]

            def read(number):
                beginning = "Once upon a time" + number * " and again"
                found[number].extend(stream(server.base_url, beginning, STREAM_TOKENS))

            readers = [threading.Thread(target=read, args=[number]) for number in range(streams)]
            for reader in readers:
                reader.start()
            time.sleep(2)
            begun = time.monotonic()
            reading = first_token(server.base_url, prompt(words, seed))
            ended = begun + reading
            for reader in readers:
                reader.join()
            told = [paces(times, begun, ended) for times in found]
            text = prompt(words // 2, seed + 1000)
            once, again, further = (first_token(server.base_url, asked) for asked in (text, text, f"{text} onward"))
    beside, alone = sum(pace for pace, *_ in told), sum(pace for _, pace, _ in told)
    return {"pace alone, pieces/s": alone, "pace while a prompt is read, share": beside / max(alone, 1),
            "the worst stream's share": min(pace / max(own, 1) for pace, own, _ in told),
            "longest pause of a stream, ms": max(longest for *_, longest in told) * 1000,
            "reading the long prompt, ms": reading * 1000,
            "half of it, first time, ms": once * 1000, "the same again, share": again / once,
            "the same and another word, share": further / once}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-words", type=int, default=1300)
    parser.add_argument("--streams", type=int, default=1, help=f"at most {SLOTS - 1}")
    arguments = parser.parse_args()
    if not 1 <= arguments.streams < SLOTS:
        parser.error(f"--streams: {arguments.streams}; from 1 to {SLOTS - 1}, for the prompt needs a slot too")
    path = models.provide()["SmolLM2-135M Q4_1"]
    samples = {"Freehold": [], "llama-server": []}
    for number in range(arguments.rounds):
        for who, command in (("Freehold", freehold_command), ("llama-server", peer_command)):
            samples[who].append(measure(command, path, arguments.threads, arguments.prompt_words, arguments.streams, number + 1))
    print("| figure | Freehold | llama-server |\n|---|--:|--:|")
    for figure in samples["Freehold"][0]:
        ours, theirs = (statistics.median(sample[figure] for sample in samples[who]) for who in samples)
        print(f"| {figure} | {ours:.3g} | {theirs:.3g} |")


if __name__ == "__main__":
    main()
