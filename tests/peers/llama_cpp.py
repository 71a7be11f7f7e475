"""Fetches llama.cpp from the Python package registry and builds it for this machine, once.

The sdist of llama-cpp-python carries llama.cpp's whole source; its tools are built native (every instruction
that this CPU has, OpenMP, the repacked weight kernels), without TLS and web page, which no figure needs.

    python3 tests/peers/llama_cpp.py              prints the folder of the tools
    python3 tests/peers/llama_cpp.py avx512_vnni  the same, built for processors that have that and nothing newer

A wrapper that every build on a shared machine shall go through can be named in FREEHOLD_HEAVY."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch  # noqa: E402

TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity", "llama-completion",
         "llama-server")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_ALL_WARNINGS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # A page out of a model hub, of which the server needs nothing.
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
# Instead of native: what a processor has whose best is this, in ggml's own options.
AVX2 = dict.fromkeys(("GGML_SSE42", "GGML_AVX", "GGML_F16C", "GGML_AVX2", "GGML_FMA", "GGML_BMI2"), "ON")
KINDS = {
    "avx2": AVX2,
    "avx512_vnni": {**AVX2, **dict.fromkeys(("GGML_AVX512", "GGML_AVX512_VBMI", "GGML_AVX512_VNNI"), "ON")},
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "freehold"
FOLDER = CACHE / "peers" / "llama.cpp" / fetch.LLAMA_CPP


def folder(kind=None):
    """Where the tools lie: of the native build, or of one of `KINDS`."""
    return FOLDER / (f"bin-{kind}" if kind else "bin")


def tool(name, kind=None):
    """Where a tool of llama.cpp lies."""
    return folder(kind) / name


def options(kind):
    """What cmake is told. In full, for a tree remembers what it was told for another kind; a native build looks at none of
    these."""
    if not kind:
        return OPTIONS
    if kind not in KINDS:
        sys.exit(f"{kind} is none of the kinds that llama.cpp is built for here: {', '.join(KINDS)}, or none for this processor")
    none = {name: "OFF" for options in KINDS.values() for name in options}
    return {**OPTIONS, "GGML_NATIVE": "OFF", **none, **KINDS[kind]}


def need(program, package):
    found = shutil.which(program)
    if not found:
        sys.exit(f"{program} is not there; install it, for example with: python3 -m pip install {package}")
    return found


def fetch_source():
    """The source tree, taken out of the sdist after its digest was found right."""
    source = FOLDER / "source"
    if not source.is_dir():
        fetch.llama_cpp(source, lambda path: True)
    return source


def build(source, kind):
    cmake, ninja = need("cmake", "cmake"), need("ninja", "ninja")
    tree = FOLDER / "build"
    heavy = os.environ.get("FREEHOLD_HEAVY", "").split()
    configure = [cmake, "-S", source, "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                 *(f"-D{name}={value}" for name, value in options(kind).items())]
    subprocess.run(configure, check=True, stdout=sys.stderr)
    keep_tile_shapes(tree / "build.ninja")
    subprocess.run([*heavy, cmake, "--build", tree, "--parallel", str(os.cpu_count()), "--target", *TOOLS], check=True,
                   stdout=sys.stderr)
    staged = FOLDER / "bin.new"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for name in TOOLS:
        shutil.copy2(tree / "bin" / name, staged / name)
    # The tree stays: another kind is built out of most of its objects.
    staged.rename(folder(kind))


def keep_tile_shapes(rules):
    """Where the processor has AMX, GCC before 13 leaves out all but the first eight bytes of what `_tile_loadconfig`
    reads (its header names no more), and llama.cpp's first prompt ends with SIGILL. The one file that has it is compiled
    without the passes that do so."""
    lines, inside = [], False
    for line in rules.read_text().splitlines():
        if line.startswith("build "):
            inside = "/amx/mmq.cpp.o:" in line
        elif inside and line.startswith("  FLAGS = "):
            line += " -fno-tree-dse -fno-dse"
        lines.append(line)
    rules.write_text("\n".join(lines) + "\n")


def provide(kind=None):
    """The folder of the tools; built if it is not there."""
    if not folder(kind).is_dir():
        build(fetch_source(), kind)
    return folder(kind)


def version():
    """What the peer is called in tables."""
    ggml = (FOLDER / "source" / "ggml" / "CMakeLists.txt").read_text()
    llama = (FOLDER / "source" / "CMakeLists.txt").read_text()

    def number(text, prefix):
        lines = dict(line.strip().removeprefix("set(").rstrip(")").split(None, 1) for line in text.splitlines()
                     if line.startswith(f"set({prefix}_VERSION_") and "BASE" not in line and "$" not in line)
        return ".".join(lines[f"{prefix}_VERSION_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))

    return f"llama.cpp {number(llama, 'LLAMA')}, ggml {number(ggml, 'GGML')} (llama-cpp-python {fetch.LLAMA_CPP})"


if __name__ == "__main__":
    print(provide(*sys.argv[1:2]))
    print(version())
