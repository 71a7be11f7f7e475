"""Runs Freehold and llama.cpp in turn on the same files with the same threads, and writes the table.

    just bench-peers                     everything, five rounds, written into docs/benchmarks.md
    python3 tests/peers/run.py --help    for less than that

A round measures one and then the other; the next round turns the order round. llama.cpp runs with those of
its settings that are fastest here for each figure (the best of three tries of each, in turn, before a file's rounds). Figures taken while
something else loads the machine are printed and never written."""

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import llama_cpp
import models
from llama_cpp import CACHE, tool

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "target"))
FREEHOLD = Path(os.environ.get("FREEHOLD_BIN", TARGET / "release" / "freehold"))
PAGE = ROOT / "docs" / "benchmarks.md"
# What an instruction set gave stands between its own markers: ratios are another matter on each.
BEGIN, END = "<!-- peers:begin {kind} -->", "<!-- peers:end {kind} -->"
INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2")
# What both can be held to that have better: Freehold's name for it, and what the processor must have for the peer's.
HELD = {"avx512_vnni": ("avx-512-vnni", {"avx512_vnni", "avx512vbmi"}), "avx2": ("avx2", {"avx2", "fma", "f16c", "bmi2"})}
RAW = CACHE / "peers" / "latest.json"

PREFILL, DECODE, SHORT_PROMPT, SEQUENCES = 512, 128, 16, (8, 16)
CHATS, ANSWER_TOKENS, CHAT_CONTEXT = (1, 8, 32), 64, 512
# Ratios to llama.cpp that the project wants: prefill, decode of 1, 8 and 16 sequences.
FIGURES = ("prefill 512", "decode 128", "decode, 8 sequences", "decode, 16 sequences")
WANTED = {
    "SmolLM2-135M Q4_1": (3.5, 1.7, 2.8, 3.0),
    "SmolLM2-135M Q4_0": (1.3, 1.0, 1.5, 1.7),
    "SmolLM2-135M Q8_0": (1.7, 1.1, 2.0, 2.2),
    "Gemma 3 270M Q4_K_M": (1.5, 1.3, 2.0, 2.2),
    "1B shape Q4_K_M": (1.5, 1.0, 1.6, 1.7),
}
# Of llama-batched-bench; llama-bench knows the first two only.
ATTENTION = {"fa on": ["-fa", "on"], "fa off": ["-fa", "off"]}
SETTINGS = {**ATTENTION, "fa on, unified KV": ["-fa", "on", "-kvu"]}
# Of each setting, to find the best.
TRIES = 3
# More processes that want to run than this, and the machine is not ours alone.
QUIET_LOAD = 0.5
READY_SECONDS = 180


def finish(command):
    """Runs to the end: its output, its errors and its peak of resident memory in bytes."""
    # A model of random weights writes anything.
    readable = {"encoding": "utf-8", "errors": "replace"}
    with tempfile.TemporaryFile("w+", **readable) as out, tempfile.TemporaryFile("w+", **readable) as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        said, complained = out.read(), errors.read()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}:\n{complained[-3000:]}")
    return said, complained, usage.ru_maxrss * 1024


def clock_ms(line):
    """When a line of llama.cpp's log was written: minutes, seconds, thousandths, millionths since it began."""
    minutes, seconds, thousandths, millionths = map(int, line.split()[0].split("."))
    return (minutes * 60 + seconds) * 1000 + thousandths + millionths / 1000


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class Peer:
    """llama.cpp on one file; native, or built for a kind of processor."""

    def __init__(self, path, threads, kind):
        self.path, self.threads, self.kind = path, str(threads), kind
        self.best = {}

    def bench(self, attention, prompt, decode):
        said, _, _ = finish([tool("llama-bench", self.kind), "-m", self.path, "-t", self.threads, "-r", "1", "-p", str(prompt), "-n",
                             str(decode), *ATTENTION[attention], "-o", "jsonl"])
        return json_lines(said)[0]["avg_ts"]

    def batched(self, setting, sequences):
        cells = (SHORT_PROMPT + DECODE) * max(sequences)
        said, _, peak = finish([tool("llama-batched-bench", self.kind), "-m", self.path, "-t", self.threads, "-tb", self.threads,
                                "-c", str(-(-cells // 256) * 256), "-b", "2048", "-ub", "512", "-npp", str(SHORT_PROMPT),
                                "-ntg", str(DECODE), "-npl", ",".join(map(str, sequences)), *SETTINGS[setting],
                                "--output-format", "jsonl"])
        return {line["pl"]: line["speed_tg"] for line in json_lines(said)}, peak

    def load_ms(self):
        """From where it begins to load the model until all stands ready to compute. What it prints as its load time is
        something else: the first evaluation."""
        _, complained, _ = finish([tool("llama-completion", self.kind), "-m", self.path, "-t", self.threads, "-c", "1024", "-no-cnv",
                                   "-p", "The", "-n", "1", "--no-warmup", "-fit", "off"])
        begin, end = (next(line for line in complained.splitlines() if what in line)
                      for what in ("load the model", "threadpool init"))
        return clock_ms(end) - clock_ms(begin)

    def calibrate(self):
        """Finds the fastest of its settings for each figure: a machine has slow minutes, so each is tried more than once, in turn."""
        pace = {figure: {} for figure in FIGURES}

        def found(figure, name, tokens_per_second):
            pace[figure][name] = max(pace[figure].get(name, 0), tokens_per_second)

        for _ in range(TRIES):
            for name in ATTENTION:
                found(FIGURES[0], name, self.bench(name, PREFILL, 0))
                found(FIGURES[1], name, self.bench(name, 0, DECODE))
            for name in SETTINGS:
                paces, _ = self.batched(name, SEQUENCES)
                for figure, sequences in zip(FIGURES[2:], SEQUENCES):
                    found(figure, name, paces[sequences])
        self.best = {figure: max(paces, key=paces.get) for figure, paces in pace.items()}

    def measure(self):
        found = {FIGURES[0]: self.bench(self.best[FIGURES[0]], PREFILL, 0),
                 FIGURES[1]: self.bench(self.best[FIGURES[1]], 0, DECODE)}
        peaks = []
        for setting in sorted({self.best[figure] for figure in FIGURES[2:]}):
            chosen = [count for figure, count in zip(FIGURES[2:], SEQUENCES) if self.best[figure] == setting]
            paces, peak = self.batched(setting, chosen)
            peaks.append(peak)
            found.update({figure: paces[count] for figure, count in zip(FIGURES[2:], SEQUENCES) if count in paces})
        self.load_ms()
        return {**found, "load ms": self.load_ms(), "peak MiB": max(peaks) / 2**20}


def bench(path, threads, prompt, decode, sequences, *more):
    """What `freehold bench` says of one file, and its peak of resident memory."""
    said, _, peak = finish([FREEHOLD, "bench", path, "--json", "--rounds", "1", "--threads", str(threads), "--prompt-tokens",
                            str(prompt), "--decode-tokens", str(decode), "--sequences", ",".join(map(str, sequences)),
                            *more])
    return json.loads(said)["engine"], peak


def held(kind, precision):
    """What `freehold bench` is told beyond the ordinary."""
    return [*(["--instructions", HELD[kind][0]] if kind else []), *(["--precision", precision] if precision != "standard" else [])]


def freehold(path, threads, options):
    """Freehold's engine on one file."""
    engine, peak = bench(path, threads, PREFILL, DECODE, (1, *SEQUENCES), *options)
    paces = [engine["prefill"], *engine["decode"]]
    found = {figure: pace["tokens_per_second"]["median"] for figure, pace in zip(FIGURES, paces)}
    return {**found, "load ms": load_ms(path, threads, options), "peak MiB": peak / 2**20}


def load_ms(path, threads, options):
    """Of two loads in processes of their own, one right after the other, the second, as with llama.cpp: a machine may
    give freed memory back to its host, and the first process after a rest waits until it has it again."""
    for _ in range(2):
        engine, _ = bench(path, threads, 16, 4, (1,), *options)
    return engine["load_ms"]["median"]


def bandwidth(path, threads):
    """Bytes a second that this machine reads from memory, as `freehold bench` finds it."""
    engine, _ = bench(path, threads, 16, 4, (1,), "--bandwidth")
    return engine["memory_bytes_per_second"]


def engines(files, rounds, threads, kind, precision):
    """For each file: the samples of both, and llama.cpp's best settings."""
    results = {}
    for name, path in files.items():
        peer = Peer(path, threads, kind)
        tell(f"{name}: llama.cpp's best settings")
        peer.calibrate()
        samples = {"freehold": [], "llama.cpp": []}
        for number in range(rounds):
            order = [("freehold", lambda: freehold(path, threads, held(kind, precision))), ("llama.cpp", peer.measure)]
            for who, measure in order if number % 2 == 0 else reversed(order):
                tell(f"{name}: round {number + 1} of {rounds}, {who}")
                samples[who].append(measure())
        results[name] = {"samples": samples, "settings": peer.best, "bytes": path.stat().st_size,
                         "bandwidth": bandwidth(path, threads)}
    return results


class Served:
    """A server on this file, stopped at the end."""

    def __init__(self, command, base_url, model, log):
        self.base_url, self.model = base_url, model
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait(self, log):
        """Until it answers a chat."""
        body = json.dumps({"model": self.model, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]})
        deadline, last = time.monotonic() + READY_SECONDS, "nothing"
        while time.monotonic() < deadline and self.process.poll() is None:
            request = urllib.request.Request(f"{self.base_url}/chat/completions", body.encode(),
                                             {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60):
                    return self
            except (urllib.error.URLError, OSError) as failure:
                last = failure
                time.sleep(0.2)
        log.seek(0)
        sys.exit(f"{self.base_url} does not answer: {last}\n{log.read()[-3000:].decode(errors='replace')}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def chat(server):
    said, _, _ = finish([FREEHOLD, "bench", server.model, "--http", server.base_url, "--json", "--rounds", "2", "--chats",
                         ",".join(map(str, CHATS)), "--answer-tokens", str(ANSWER_TOKENS)])
    return json.loads(said)["http"]["chats"]


def chat_freehold(path, threads):
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        manifests = Path(folder) / "manifests"
        manifests.mkdir()
        # JSON is YAML too.
        (manifests / "bench.yaml").write_text(json.dumps({
            "apiVersion": "freehold.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {"model": {"path": str(path)},
                     "engine": {"contextLength": CHAT_CONTEXT, "concurrency": max(CHATS), "threads": threads}}}))
        command = [FREEHOLD, "up", "--data-dir", f"{folder}/data", "--manifests", manifests, "--listen",
                   f"127.0.0.1:{port}", "--api-listen", "127.0.0.1:0", "--node-name", "bench"]
        with Served(command, f"http://127.0.0.1:{port}/v1", "bench", log) as server:
            return chat(server.wait(log))


def chat_peer(path, threads):
    port = free_port()
    with tempfile.TemporaryFile() as log:
        command = [tool("llama-server"), "-m", path, "-t", str(threads), "-tb", str(threads), "-np", str(max(CHATS)), "-c",
                   str(max(CHATS) * CHAT_CONTEXT), "--host", "127.0.0.1", "--port", str(port), "--no-webui",
                   "-fa", "on", "--alias", "bench"]
        with Served(command, f"http://127.0.0.1:{port}/v1", "bench", log) as server:
            return chat(server.wait(log))


def chats(name, path, rounds, threads):
    samples = {"freehold": [], "llama-server": []}
    for number in range(rounds):
        order = [("freehold", chat_freehold), ("llama-server", chat_peer)]
        for who, measure in order if number % 2 == 0 else reversed(order):
            tell(f"chats with {name}: round {number + 1} of {rounds}, {who}")
            samples[who].append(measure(path, threads))
    return {"model": name, "samples": samples}


def tell(text):
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def middle(samples, key):
    return statistics.median(sample[key] for sample in samples)


def engine_table(results):
    rows = ["| model file | figure | Freehold | llama.cpp | ratio | wanted | llama.cpp's settings |", "|---|---|--:|--:|--:|--:|---|"]
    for name, result in results.items():
        ours, theirs = result["samples"]["freehold"], result["samples"]["llama.cpp"]
        for figure, wanted in zip(FIGURES, WANTED[name]):
            our, their = middle(ours, figure), middle(theirs, figure)
            rows.append(f"| {name} | {figure} | {our:.1f} | {their:.1f} | {our / their:.2f} | {wanted} | {result['settings'][figure]} |")
        for figure, wanted in (("load ms", "at most 1.5"), ("peak MiB", "")):
            our, their = middle(ours, figure), middle(theirs, figure)
            rows.append(f"| {name} | {figure} | {our:.0f} | {their:.0f} | {our / their:.2f} | {wanted} | |")
    return rows


def chat_table(result):
    rows = ["| chats at once | figure | Freehold | llama-server | ratio | wanted |", "|--:|---|--:|--:|--:|---|"]
    figures = (("tokens/s", "tokens_per_second", "1.5 at 8 and above"), ("first token p50, ms", "first_token_p50_ms", ""),
               ("first token p95, ms", "first_token_p95_ms", "below 1"))
    for index, count in enumerate(CHATS):
        ours = [sample[index] for sample in result["samples"]["freehold"]]
        theirs = [sample[index] for sample in result["samples"]["llama-server"]]
        for title, key, wanted in figures:
            our, their = middle(ours, key), middle(theirs, key)
            rows.append(f"| {count} | {title} | {our:.1f} | {their:.1f} | {our / their:.2f} | {wanted} |")
    return rows


def bandwidth_lines(results):
    best = max(result["bandwidth"] for result in results.values())
    shares = (f"{name} {middle(result['samples']['freehold'], FIGURES[1]) * result['bytes'] / best * 100:.0f} %"
              for name, result in results.items())
    return [f"Memory is read with {best / 1e9:.1f} GB/s; of that, decoding one sequence uses (file size times tokens/s): "
            + ", ".join(shares) + "."]


def flags():
    text = Path("/proc/cpuinfo").read_text()
    return next((line.split() for line in text.splitlines() if line.startswith("flags")), [])


def instructions():
    """The best that both engines have kernels for on this machine."""
    return next((kind for kind in INSTRUCTIONS if kind in flags()), platform.machine())


def machine():
    text = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
    kinds = [kind for kind in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8") if kind in flags()]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{cpu} ({', '.join(kinds)}), {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def commit():
    found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def page(results, spoken, rounds, threads, kind, precision):
    built = f"both held to {kind}: llama.cpp built for that and nothing newer" if kind else "built native"
    lines = [f"{datetime.date.today()}, {machine()}; {threads} threads each; Freehold at commit {commit()}, release build; "
             f"{llama_cpp.version()}, {built}. Medians of {rounds} interleaved rounds; tokens/s where no unit stands.", ""]
    options = "".join(f" {option}" for option in held(kind, precision))
    if results:
        lines += engine_table(results) + ["", (
            f"Prompts are random tokens. Freehold: `freehold bench FILE --rounds 1 --threads {threads}{options}`, greedy sampling included; "
            f"batches decode after prompts of {SHORT_PROMPT} tokens. llama.cpp: `llama-bench -p {PREFILL} -n {DECODE} -r 1` (no "
            f"sampling, decode from an empty context), `llama-batched-bench -npp {SHORT_PROMPT} -ntg {DECODE} -npl 8,16`, "
            "its load time is what its log says lies between the beginning and readiness (`llama-completion -fit off`); peak MiB is the largest resident memory of the process that "
            "decoded the batches. The file in a 1B shape has random weights."), "", *bandwidth_lines(results)]
    if spoken:
        lines += ["", f"{spoken['model']} through HTTP, answers of at most {ANSWER_TOKENS} tokens, one client "
                  f"(`freehold bench bench --http URL --rounds 2`) for both, {max(CHATS)} slots of {CHAT_CONTEXT} tokens each.", ""]
        lines += chat_table(spoken)
    return "\n".join(lines)


def place(kind):
    """The page's lines round the table."""
    here = f"{kind} on {instructions()}" if kind else instructions()
    begin, end = (marker.format(kind=here) for marker in (BEGIN, END))
    if begin not in PAGE.read_text():
        sys.exit(f"{PAGE.relative_to(ROOT)} has no place for {here}: put the lines {begin} and {end} there")
    return begin, end


def write(text, kind):
    begin, end = place(kind)
    before, rest = PAGE.read_text().split(begin, 1)
    _, after = rest.split(end, 1)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    tell(f"wrote {PAGE.relative_to(ROOT)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--instructions", choices=HELD, help="hold both to these, though the processor has better: how they stand "
                        "on one that has not; engines alone")
    parser.add_argument("--precision", choices=("standard", "high"), default="standard",
                        help="Freehold's; with high: engines alone, prints, writes nothing")
    parser.add_argument("--only", default="", help="files whose name holds this text")
    parser.add_argument("--skip-engines", action="store_true", help="measure the chats alone")
    parser.add_argument("--skip-chats", action="store_true", help="measure the engines alone")
    parser.add_argument("--chat-model", default="SmolLM2-135M Q4_1", choices=[name for name in WANTED if "Gemma" not in name])
    parser.add_argument("--busy", action="store_true", help="measure although the machine is not quiet; prints, writes nothing")
    return parser.parse_args()


def main():
    asked = arguments()
    if not FREEHOLD.exists():
        sys.exit(f"{FREEHOLD} is not there: cargo build --release --bin freehold")
    missing = HELD[asked.instructions][1] - set(flags()) if asked.instructions else set()
    if missing:
        sys.exit(f"this processor has no {', '.join(sorted(missing))}")
    engines_alone = asked.skip_chats or asked.instructions is not None or asked.precision != "standard"
    written = not (asked.busy or asked.only or asked.skip_engines or asked.precision != "standard"
                   or (asked.skip_chats and not asked.instructions))
    if written:
        place(asked.instructions)
    files = models.provide()
    llama_cpp.provide(asked.instructions)
    load = os.getloadavg()[0]
    if load > QUIET_LOAD and not asked.busy:
        sys.exit(f"the machine is not quiet (load {load:.2f}, allowed {QUIET_LOAD}): end what else runs and wait a minute, "
                 "or give --busy to see figures that are not written")
    chosen = {} if asked.skip_engines else {name: path for name, path in files.items() if asked.only in name}
    results = engines(chosen, asked.rounds, asked.threads, asked.instructions, asked.precision)
    spoken = None if engines_alone else chats(asked.chat_model, files[asked.chat_model], asked.rounds, asked.threads)
    RAW.write_text(json.dumps({"held to": asked.instructions, "engines": results, "chats": spoken}, indent=1))
    tell(f"every sample is in {RAW}")
    text = page(results, spoken, asked.rounds, asked.threads, asked.instructions, asked.precision)
    print(text)
    if written:
        write(text, asked.instructions)
    else:
        tell(f"{PAGE.relative_to(ROOT)} was left as it is: it takes a whole run on a quiet machine")


if __name__ == "__main__":
    main()
