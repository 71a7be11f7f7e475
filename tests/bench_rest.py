"""Measures the all-in-one as a user meets it; prints Markdown rows.

Resident memory and API writes a minute at rest (no model), the way from apply to Ready beyond the model's
own load time, time to the first token and tokens/s through the whole path, and a worker's memory beside its
file. Medians of several; needs `./tests/run` to have fetched the model, and a release build."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "freehold"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "target"))
PROGRAM = Path(os.environ.get("FREEHOLD_BIN", TARGET / "release" / "freehold"))
MODEL = CACHE / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
REST_SECONDS = int(os.environ.get("REST_SECONDS", "180"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))


def resident_mib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(entry.name) for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and f"PPid:\t{pid}\n" in (entry / "status").read_text()]


class Up:
    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen([PROGRAM, "up", "--data-dir", folder, "--listen", "127.0.0.1:0",
                                         "--api-listen", "127.0.0.1:0", "--node-name", "bench"],
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in self.process.stdout:
            if line.startswith("OpenAI API"):
                self.base_url = line.split()[-1]
            if line.startswith("Stop with"):
                break

    def kubectl(self, *arguments, text=None):
        environment = {**os.environ, "KUBECONFIG": f"{self.folder}/kubeconfig"}
        done = subprocess.run([CACHE / "bin" / "kubectl", *arguments], env=environment, input=text, text=True,
                              capture_output=True, check=True)
        return done.stdout

    def revision(self):
        path = "/apis/freehold.dev/v1alpha1/modeldeployments"
        return int(json.loads(self.kubectl("get", "--raw", path))["metadata"]["resourceVersion"])

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def manifest(name):
    return json.dumps({"apiVersion": "freehold.dev/v1alpha1", "kind": "ModelDeployment",
                       "metadata": {"name": name, "namespace": "default"},
                       "spec": {"model": {"path": str(MODEL)}, "engine": {"contextLength": 2048, "concurrency": 4}}})


def ask(up, name, tokens):
    body = json.dumps({"model": name, "stream": True, "temperature": 0, "max_tokens": tokens,
                       "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse keeper."}]})
    request = urllib.request.Request(f"{up.base_url}/chat/completions", body.encode(), {"Content-Type": "application/json"})
    begun, times = time.monotonic(), []
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            # The first event only names the role: its content is empty.
            if b'"content":"' in line and b'"content":""' not in line:
                times.append(time.monotonic())
    return times[0] - begun, (len(times) - 1) / (times[-1] - times[0])


def main():
    with tempfile.TemporaryDirectory() as folder:
        up = Up(folder)
        try:
            time.sleep(int(os.environ.get("SETTLE_SECONDS", "20")))
            memory, before, begun = resident_mib(up.process.pid), up.revision(), time.monotonic()
            time.sleep(REST_SECONDS)
            writes = (up.revision() - before) / (time.monotonic() - begun) * 60
            print(f"| resident memory of the all-in-one, no model | {memory:.1f} MiB |")
            print(f"| API writes a minute at rest (over {REST_SECONDS} s) | {writes:.1f} |")
            beyond = []
            for index in range(ROUNDS):
                name, begun = f"m{index}", time.monotonic()
                up.kubectl("apply", "-f", "-", text=manifest(name))
                applied = time.monotonic()
                up.kubectl("wait", f"md/{name}", "--for=condition=Ready", "--timeout=120s")
                ready = time.monotonic() - applied
                node = json.loads(up.kubectl("get", "inferencenodes", "-o", "json"))["items"][0]
                load = next(i["loadMs"] for i in node["status"]["instances"] if f".{name}." in i["name"]) / 1000
                beyond.append(ready - load)
                if index + 1 < ROUNDS:
                    up.kubectl("delete", "md", name)
                    time.sleep(2)
            name = f"m{ROUNDS - 1}"
            print(f"| apply to Ready beyond the model's own load time, kubectl included | {statistics.median(beyond):.2f} s |")
            asked = [ask(up, name, 64) for _ in range(ROUNDS)]
            print(f"| time to the first token | {statistics.median(first for first, _ in asked) * 1000:.0f} ms |")
            print(f"| tokens/s of one stream through the whole path | {statistics.median(pace for _, pace in asked):.1f} |")
            worker = max(resident_mib(child) for child in set(children(up.process.pid)))
            print(f"| resident memory of a worker / its file ({MODEL.stat().st_size / 2**20:.0f} MiB) | "
                  f"{worker:.0f} MiB, {worker / (MODEL.stat().st_size / 2**20):.2f} |")
        finally:
            up.stop()


if __name__ == "__main__":
    sys.exit(main())
