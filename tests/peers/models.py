"""Makes the model files that both engines run, in the cache's `models` folder; what is there stays.

The published files come through `tests/fetch.py`; their other formats are made with llama-quantize. The file
in the shape of a 1B llama has random weights: it says how fast such a model runs, and nothing else."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
from llama_cpp import CACHE, tool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch  # noqa: E402

MODELS = CACHE / "models"
SMOLLM2_Q4_1 = MODELS / fetch.SMOLLM2[0]
SMOLLM2_Q4_0 = MODELS / "SmolLM2-135M-Instruct.Q4_0.gguf"
SMOLLM2_Q8_0 = MODELS / "SmolLM2-135M-Instruct.Q8_0.gguf"
GEMMA3_Q4_K_M = MODELS / fetch.GEMMA3[0]
WIDE_SMOLLM2 = MODELS / "SmolLM2-135M-wide.F32.gguf"
SHAPE_1B_Q4_K_M = MODELS / "llama-1b-shape-random.Q4_K_M.gguf"
# Reads and writes weights; the standard library is too slow for a billion of them.
WRITER_PACKAGES = ("gguf==0.19.0", "numpy==2.4.6")


def put(make, target):
    """Calls `make` with a path beside the target, so that a broken run leaves nothing half done there."""
    if target.exists():
        return
    staged = target.with_name(target.name + ".new")
    try:
        make(staged)
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def quantize(source, target, kind, *options):
    print(f"making {target.name.removesuffix('.new')}", file=sys.stderr, flush=True)
    heavy = os.environ.get("FREEHOLD_HEAVY", "").split()
    done = subprocess.run([*heavy, tool("llama-quantize"), *options, source, target, kind], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        sys.exit(f"llama-quantize failed:\n{done.stderr}")


@functools.cache
def writer():
    """A Python that has the packages which write GGUF."""
    python = CACHE / "peers" / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WRITER_PACKAGES],
                   check=True)
    return python


def wide_smollm2():
    """SmolLM2 in a shape that K-quants fit: the same answers from more channels."""
    script = Path(__file__).with_name("wide_smollm2.py")
    put(lambda path: subprocess.run([writer(), script, SMOLLM2_Q8_0, path], check=True), WIDE_SMOLLM2)
    return WIDE_SMOLLM2


def weight_types(path):
    """What types the weights of a file have, and their shares."""
    script = Path(__file__).with_name("weight_types.py")
    return subprocess.run([writer(), script, path], check=True, capture_output=True, text=True).stdout.strip()


def shape_1b(target):
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        floats = Path(folder) / "f16.gguf"
        script = Path(__file__).with_name("random_llama.py")
        subprocess.run([writer(), script, SMOLLM2_Q4_1, floats], check=True)
        quantize(floats, target, "Q4_K_M")


def provide():
    """Every file, by what it is called in tables."""
    llama_cpp.provide()
    MODELS.mkdir(parents=True, exist_ok=True)
    fetch.model(CACHE, *fetch.SMOLLM2)
    fetch.model(CACHE, *fetch.GEMMA3)
    put(lambda path: quantize(SMOLLM2_Q4_1, path, "Q4_0", "--allow-requantize"), SMOLLM2_Q4_0)
    put(lambda path: quantize(SMOLLM2_Q4_1, path, "Q8_0", "--allow-requantize"), SMOLLM2_Q8_0)
    put(shape_1b, SHAPE_1B_Q4_K_M)
    return {
        "SmolLM2-135M Q4_1": SMOLLM2_Q4_1,
        "SmolLM2-135M Q4_0": SMOLLM2_Q4_0,
        "SmolLM2-135M Q8_0": SMOLLM2_Q8_0,
        "Gemma 3 270M Q4_K_M": GEMMA3_Q4_K_M,
        "1B shape Q4_K_M": SHAPE_1B_Q4_K_M,
    }


if __name__ == "__main__":
    for name, path in provide().items():
        print(f"{name}\t{path.stat().st_size}\t{path}")
