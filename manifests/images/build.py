#!/usr/bin/env python3
"""Builds the container images as OCI archives, without a container daemon.

    manifests/images/build.py                          both images for this machine's processor
    manifests/images/build.py --platforms amd64,arm64  for both kinds of processor, in one archive each
    manifests/images/build.py --binaries FOLDER        packs programs that were built before
    manifests/images/build.py --binaries target/debug --libraries
                                                       the same for dynamic programs, for tests

Programs are static (musl), linked by cargo-zigbuild and zig, which come from PyPI into the cache. Beside each archive
lies a bill of materials for each processor, which the image holds too. Import an archive with `k3s ctr images import`,
`ctr -n k8s.io images import`, `docker load` or `skopeo copy oci-archive:…`. Needs Rust and Python 3.11 or newer."""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

import oci
import sbom

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().with_name("requirements.txt")
# Whom the agent trusts when it fetches a model: Mozilla's list, MPL-2.0.
CERTIFICATES = ("certifi==2026.6.17", "2227dcbaafe0d2f59279d1762ddddc37783ed4354594f194ffc31d20f41fc3db")
TARGETS = {"amd64": "x86_64-unknown-linux-musl", "arm64": "aarch64-unknown-linux-musl"}
# `nonroot` of the distroless images, and what the chart's pods run as.
NOBODY = 65532
IMAGES = {
    "operator": {"title": "Freehold operator", "ports": [8080], "certificates": False, "folders": []},
    "node-agent": {"title": "Freehold node agent", "ports": [11480, 11481], "certificates": True,
                   "folders": ["var/lib/freehold"]},
}


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


def tools(cache):
    """The folder with cargo-zigbuild and a python that has zig."""
    place, stamp = cache / "tools", cache / "tools.stamp"
    pins = TOOLS.read_text()
    if not (stamp.exists() and stamp.read_text() == pins):
        print("fetching zig and cargo-zigbuild", flush=True)
        venv.create(place, with_pip=True, clear=True)
        run(place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes",
            "--no-deps", "--only-binary=:all:", "-r", TOOLS)
        stamp.write_text(pins)
    return place / "bin"


def certificates(cache):
    """Mozilla's certificates, as one file."""
    package, wanted = CERTIFICATES
    kept = cache / f"{package}.pem"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            pin = Path(folder) / "requirements.txt"
            pin.write_text(f"{package} --hash=sha256:{wanted}\n")
            run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes",
                "--no-deps", "--only-binary=:all:", "--dest", folder, "-r", pin)
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                kept.write_bytes(archive.read("certifi/cacert.pem"))
    return kept.read_bytes()


def said(*command):
    return run(*command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def flags(root):
    """Paths of this machine belong in no program: messages of panics would carry them."""
    homes = {os.environ.get("CARGO_HOME", str(Path.home() / ".cargo")): "/cargo", str(root): "/freehold",
             said("rustc", "--print", "sysroot"): "/rust"}
    return [f"--remap-path-prefix={here}={there}" for here, there in homes.items()]


def compile_all(images, architectures, cache):
    """Builds the programs. Returns the path of each by (image, architecture)."""
    environment = dict(os.environ, PATH=f"{tools(cache)}{os.pathsep}{os.environ['PATH']}")
    environment["CARGO_ENCODED_RUSTFLAGS"] = "\x1f".join(flags(ROOT))
    packages = [f"freehold-{image}" for image in images]
    chosen = [word for package in packages for word in ("--package", package, "--bin", package)]
    for architecture in architectures:
        run("rustup", "target", "add", TARGETS[architecture], stdout=subprocess.DEVNULL, cwd=ROOT)
        run("cargo", "zigbuild", "--release", "--locked", "--target", TARGETS[architecture], *chosen,
            cwd=ROOT, env=environment)
    folder = Path(json.loads(said("cargo", "metadata", "--no-deps", "--format-version", "1"))["target_directory"])
    return {(image, architecture): folder / TARGETS[architecture] / "release" / f"freehold-{image}"
            for image in images for architecture in architectures}


def is_static(program, architecture):
    """Whether this is an ELF program for this processor that asks for no dynamic loader, by a PT_INTERP segment."""
    offset = int.from_bytes(program[32:40], "little")
    size, count = (int.from_bytes(program[at : at + 2], "little") for at in (54, 56))
    kinds = [int.from_bytes(program[offset + n * size : offset + n * size + 4], "little") for n in range(count)]
    machine = {62: "amd64", 183: "arm64"}.get(int.from_bytes(program[18:20], "little"))
    return program[:4] == b"\x7fELF" and machine == architecture and 3 not in kinds


def with_libraries(path, folder):
    """A dynamic program without its symbols, and the libraries of this machine that it asks for, by their places."""
    stripped = folder / path.name
    run("strip", "-o", stripped, path)
    wanted = [word for line in said("ldd", path).splitlines() for word in line.split() if word.startswith("/")]
    return stripped, {each.lstrip("/"): oci.File(Path(each).read_bytes(), 0o755) for each in wanted}


def image(name, architecture, program, bill, about, libraries=None):
    """An image with one program and what it needs to run as nobody."""
    facts = IMAGES[name]
    files = {
        f"usr/bin/freehold-{name}": oci.File(program, 0o755),
        "etc/passwd": oci.File(f"root:x:0:0:root:/:/\nnonroot:x:{NOBODY}:{NOBODY}:nonroot:/:/\n".encode()),
        "etc/group": oci.File(f"root:x:0:\nnonroot:x:{NOBODY}:\n".encode()),
        "usr/share/doc/freehold/LICENSE": oci.File((ROOT / "LICENSE").read_bytes()),
        "usr/share/doc/freehold/sbom.cdx.json": oci.File(bill),
        "tmp": oci.File(mode=0o1777),
        **(libraries or {}),
    }
    if facts["certificates"]:
        files["etc/ssl/certs/ca-certificates.crt"] = oci.File(about["certificates"])
    for folder in facts["folders"]:
        files[folder] = oci.File(mode=0o755, owner=NOBODY)
    labels = {"title": facts["title"], "version": about["version"], "licenses": "Apache-2.0",
              "revision": about["revision"], "created": oci.when(about["created"])}
    return oci.Image(
        architecture=architecture,
        files=files,
        entrypoint=[f"/usr/bin/freehold-{name}"],
        user=NOBODY,
        created=about["created"],
        environment={"PATH": "/usr/bin"},
        labels={f"org.opencontainers.image.{key}": value for key, value in labels.items()},
        ports=facts["ports"],
    )


def about(cache):
    """Version, commit and time, which is the commit's unless SOURCE_DATE_EPOCH says another."""
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    return {
        "version": workspace["package"]["version"],
        "revision": said("git", "rev-parse", "HEAD"),
        "created": int(os.environ.get("SOURCE_DATE_EPOCH") or said("git", "log", "-1", "--format=%ct")),
        "certificates": certificates(cache),
    }


def megabytes(size):
    return f"{size / 1e6:.1f} MB"


def main(arguments):
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "freehold" / "images"
    cache.mkdir(parents=True, exist_ok=True)
    out = arguments.out or cache
    out.mkdir(parents=True, exist_ok=True)
    platforms, images, facts = arguments.platforms, list(IMAGES), about(cache)
    if arguments.binaries:
        programs = {(name, each): arguments.binaries / f"freehold-{name}" for name in images for each in platforms}
    else:
        programs = compile_all(images, platforms, cache)
    version = arguments.version or facts["version"]
    scratch = tempfile.TemporaryDirectory()
    for name in images:
        made = []
        for architecture in platforms:
            path = programs[name, architecture]
            if not path.is_file():
                sys.exit(f"{path} is missing: build it, or leave --binaries out")
            libraries = {}
            if arguments.libraries:
                path, libraries = with_libraries(path, Path(scratch.name))
            program = path.read_bytes()
            if not libraries and not is_static(program, architecture):
                sys.exit(f"{path} is no static program for {architecture}: the image has no dynamic loader. "
                         f"Build it with --target {TARGETS[architecture]}, or leave --binaries out")
            bill = json.dumps(sbom.bill(ROOT, f"freehold-{name}", TARGETS[architecture]), indent=1).encode()
            (out / f"freehold-{name}-{version}.{architecture}.cdx.json").write_bytes(bill)
            made.append(image(name, architecture, program, bill, facts, libraries))
            print(f"freehold-{name} {architecture}: program {megabytes(len(program))}")
        reference, file = f"localhost/freehold-{name}:{version}", out / f"freehold-{name}-{version}.tar"
        data = oci.archive(reference, made)
        oci.read(data)
        file.write_bytes(data)
        print(f"{reference}: {file}, {megabytes(len(data))}, sha256 {hashlib.sha256(data).hexdigest()}")


def parse(words):
    here = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "amd64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platforms", default=here, help="amd64, arm64, or both with a comma [this machine's]")
    parser.add_argument("--out", type=Path, help="folder of the archives [the cache]")
    parser.add_argument("--version", help="tag of the images [the workspace's version]")
    parser.add_argument("--binaries", type=Path, help="folder with the programs of one platform, built before")
    parser.add_argument("--libraries", action="store_true",
                        help="take along the libraries of this machine that the programs in --binaries ask for: for tests "
                             "of programs built without musl")
    arguments = parser.parse_args(words)
    arguments.platforms = arguments.platforms.split(",")
    for name in arguments.platforms:
        if name not in TARGETS:
            parser.error(f"--platforms holds {name!r}; it may hold {' and '.join(TARGETS)}")
    if arguments.libraries and not arguments.binaries:
        parser.error("--libraries goes with --binaries: what is built here is static")
    if arguments.binaries and len(arguments.platforms) != 1:
        parser.error("--binaries holds the programs of one platform; name one with --platforms")
    return arguments


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
