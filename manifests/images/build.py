#!/usr/bin/env python3
"""Builds the container images as OCI archives, without a container daemon.

    manifests/images/build.py                          both images for this machine's processor
    manifests/images/build.py --platforms amd64,arm64  for both kinds of processor, in one archive each
    manifests/images/build.py --binaries FOLDER        packs programs that were built before

Programs are linked statically against musl, by cargo-zigbuild and zig, which come from PyPI into the cache. The same
sources give the same archive: times are those of the commit, entries are sorted, owners are numbers. Import one with
`k3s ctr images import`, `ctr -n k8s.io images import`, `docker load` or `skopeo copy oci-archive:…`."""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "freehold"
TARGETS = {"amd64": "x86_64-unknown-linux-musl", "arm64": "aarch64-unknown-linux-musl"}
TOOLS = ["cargo-zigbuild==0.24.0", "ziglang==0.15.1"]
# Mozilla's certificate authorities, for models from https sources.
CERTIFICATES = "certifi==2026.6.17"
# Nobody in particular; the chart says the same number.
USER = 65532
IMAGES = {
    "freehold-operator": {"description": "Reconciles Freehold's kinds", "ports": ["8080/tcp"], "certificates": False},
    "freehold-node-agent": {"description": "Runs models on one machine", "ports": ["11480/tcp", "11481/tcp"],
                            "certificates": True},
}


def tell(text):
    print(text, file=sys.stderr, flush=True)


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done


def output(*command):
    return run(*command, capture_output=True, text=True, cwd=ROOT).stdout


def epoch():
    """Seconds of the commit: what is built from it bears its time."""
    named = os.environ.get("SOURCE_DATE_EPOCH")
    return int(named) if named else int(output("git", "log", "-1", "--format=%ct").strip() or 0)


def tools():
    """The folder of cargo-zigbuild, fetched once."""
    folder = CACHE / "zig"
    stamp = folder / "stamp"
    if not stamp.is_file() or stamp.read_text() != " ".join(TOOLS):
        tell("fetching zig and cargo-zigbuild, once")
        venv.create(folder, with_pip=True, clear=True)
        run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS)
        stamp.write_text(" ".join(TOOLS))
    return folder / "bin"


def build(platforms):
    """Static programs of each platform: {platform: folder}."""
    path = f"{tools()}:{os.environ['PATH']}"
    target_folder = Path(os.environ.get("CARGO_TARGET_DIR", CACHE / "images-target"))
    environment = {**os.environ, "PATH": path, "CARGO_TARGET_DIR": str(target_folder)}
    for name in platforms:
        tell(f"building for {name}")
        run("rustup", "target", "add", TARGETS[name], stdout=subprocess.DEVNULL, cwd=ROOT)
        packages = [word for image in IMAGES for word in ("-p", image)]
        run("cargo", "zigbuild", "--release", "--locked", "--bins", *packages, "--target", TARGETS[name], env=environment,
            cwd=ROOT)
    return {name: target_folder / TARGETS[name] / "release" for name in platforms}


def certificates():
    """The authorities as one PEM file, from a pinned wheel."""
    folder = CACHE / "certificates"
    folder.mkdir(parents=True, exist_ok=True)
    name, version = CERTIFICATES.split("==")
    wheel = next(folder.glob(f"{name}-{version}-*.whl"), None)
    if not wheel:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", folder,
            CERTIFICATES)
        wheel = next(folder.glob(f"{name}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("certifi/cacert.pem")


def bill_of_materials(package, version, seconds):
    """Everything that is compiled into a program, as CycloneDX."""
    metadata = json.loads(output("cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform",
                                 TARGETS["amd64"]))
    packages = {entry["id"]: entry for entry in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = next(entry["id"] for entry in metadata["packages"] if entry["name"] == package)
    seen, waiting = set(), [root]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        # Neither tests nor build scripts end up in the program.
        waiting += [dependency["pkg"] for dependency in nodes[current]["deps"]
                    if any(kind["kind"] is None for kind in dependency["dep_kinds"])]
    checksums = lock_checksums()
    components = []
    for entry in sorted((packages[one] for one in seen if one != root), key=lambda entry: (entry["name"], entry["version"])):
        component = {"type": "library", "name": entry["name"], "version": entry["version"],
                     "bom-ref": f"{entry['name']}@{entry['version']}",
                     "purl": f"pkg:cargo/{entry['name']}@{entry['version']}"}
        if entry.get("license"):
            component["licenses"] = [{"expression": entry["license"].replace("/", " OR ")}]
        checksum = checksums.get((entry["name"], entry["version"]))
        if checksum:
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        components.append(component)
    stamp = subprocess.run(["date", "-u", "-d", f"@{seconds}", "+%Y-%m-%dT%H:%M:%SZ"], capture_output=True, text=True,
                           check=True).stdout.strip()
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
            "metadata": {"timestamp": stamp, "component": {"type": "application", "name": package, "version": version}},
            "components": components}


def lock_checksums():
    found, entry = {}, {}
    for line in (ROOT / "Cargo.lock").read_text().splitlines() + ["[[package]]"]:
        if line == "[[package]]":
            if "checksum" in entry:
                found[entry["name"], entry["version"]] = entry["checksum"]
            entry = {}
        elif " = " in line:
            key, value = line.split(" = ", 1)
            entry[key] = value.strip('"')
    return found


def layer(files, seconds):
    """A layer of {path: (mode, bytes)}: its gzip and the digest of what is inside."""
    folders = sorted({str(parent) for path in files for parent in Path(path).parents} - {"."})
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for folder in folders:
            entry = tarfile.TarInfo(folder + "/")
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755, seconds
            archive.addfile(entry)
        for path in sorted(files):
            mode, content = files[path]
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.mtime = len(content), mode, seconds
            archive.addfile(entry, io.BytesIO(content))
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(plain.getvalue())
    return packed.getvalue(), digest(plain.getvalue())


def digest(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def pack(image, folders, version, out, seconds):
    """Writes one image's archive; gives its path and what it weighs."""
    facts, blobs, manifests, weights = IMAGES[image], {}, [], {}
    bill = json.dumps(bill_of_materials(image, version, seconds), indent=1).encode()
    stamp = json.loads(bill)["metadata"]["timestamp"]

    def blob(content, media_type):
        name = digest(content)
        blobs[f"blobs/sha256/{name.split(':')[1]}"] = content
        return {"mediaType": media_type, "digest": name, "size": len(content)}

    for name, folder in sorted(folders.items()):
        program = folder / image
        if not program.is_file():
            sys.exit(f"{program} is missing: build it, or leave --binaries out")
        files = {f"usr/bin/{image}": (0o755, program.read_bytes()),
                 "etc/passwd": (0o644, f"root:x:0:0::/:/\nfreehold:x:{USER}:{USER}::/:/\n".encode()),
                 "etc/group": (0o644, f"root:x:0:\nfreehold:x:{USER}:\n".encode()),
                 f"usr/share/doc/{image}/sbom.cdx.json": (0o644, bill),
                 f"usr/share/doc/{image}/LICENSE": (0o644, (ROOT / "LICENSE").read_bytes()
                                                    if (ROOT / "LICENSE").is_file() else b"Apache-2.0\n")}
        if facts["certificates"]:
            files["etc/ssl/certs/ca-certificates.crt"] = (0o644, certificates())
        packed, inside = layer(files, seconds)
        labels = {"org.opencontainers.image.title": image, "org.opencontainers.image.description": facts["description"],
                  "org.opencontainers.image.version": version, "org.opencontainers.image.licenses": "Apache-2.0"}
        config = {"architecture": name, "os": "linux", "created": stamp,
                  "config": {"User": f"{USER}:{USER}", "Entrypoint": [f"/usr/bin/{image}"], "WorkingDir": "/",
                             "Env": ["PATH=/usr/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
                             "ExposedPorts": {port: {} for port in facts["ports"]}, "Labels": labels},
                  "rootfs": {"type": "layers", "diff_ids": [inside]},
                  "history": [{"created": stamp, "created_by": "manifests/images/build.py"}]}
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": blob(json.dumps(config, sort_keys=True).encode(), "application/vnd.oci.image.config.v1+json"),
                    "layers": [blob(packed, "application/vnd.oci.image.layer.v1.tar+gzip")]}
        entry = blob(json.dumps(manifest, sort_keys=True).encode(), "application/vnd.oci.image.manifest.v1+json")
        manifests.append({**entry, "platform": {"architecture": name, "os": "linux"}})
        weights[name] = (len(packed), program.stat().st_size)
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    top = blob(json.dumps(index, sort_keys=True).encode(), index["mediaType"])
    top["annotations"] = {"io.containerd.image.name": f"localhost/{image}:{version}",
                          "org.opencontainers.image.ref.name": version}
    files = {"oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
             "index.json": json.dumps({"schemaVersion": 2, "manifests": [top]}, sort_keys=True).encode(), **blobs}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{image}-{version}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(files[name]), seconds
            archive.addfile(entry, io.BytesIO(files[name]))
    (out / f"{image}-{version}.cdx.json").write_bytes(bill)
    return path, weights


def main():
    here = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "amd64")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platforms", default=here, help="amd64, arm64, or both with a comma [default: this machine's]")
    parser.add_argument("--out", type=Path, default=CACHE / "images", help="folder of the archives [default: %(default)s]")
    parser.add_argument("--version", help="tag of the images [default: the workspace's version]")
    parser.add_argument("--binaries", type=Path, help="folder with the programs of one platform, built before")
    arguments = parser.parse_args()
    platforms = arguments.platforms.split(",")
    wrong = [name for name in platforms if name not in TARGETS]
    if wrong:
        parser.error(f"--platforms holds {wrong[0]!r}; it may hold {' and '.join(TARGETS)}")
    if arguments.binaries and len(platforms) != 1:
        parser.error("--binaries holds the programs of one platform; name one with --platforms")
    metadata = json.loads(output("cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"))
    version = arguments.version or next(p["version"] for p in metadata["packages"] if p["name"] == "freehold-operator")
    folders = {platforms[0]: arguments.binaries} if arguments.binaries else build(platforms)
    for image in IMAGES:
        path, weights = pack(image, folders, version, arguments.out, epoch())
        for name, (packed, program) in weights.items():
            print(f"{path}  {name}: {packed / 1e6:.1f} MB to pull, program {program / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
