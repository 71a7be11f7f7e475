"""What a program is made of, as CycloneDX 1.6, from cargo's own metadata and Cargo.lock.

    python3 manifests/images/sbom.py freehold-operator x86_64-unknown-linux-musl"""

import json
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path


def metadata(root, target):
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    return json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)


def linked(graph, start):
    """Ids of the packages that are linked into `start`, and what each needs: no macros, build or test tools.

    Features are those of the whole workspace, so the list may name a little too much and never too little."""
    nodes = {node["id"]: node for node in graph["resolve"]["nodes"]}
    macros = {package["id"] for package in graph["packages"]
              if any("proc-macro" in target["kind"] for target in package["targets"])}
    needs, waiting = {}, [start]
    while waiting:
        package = waiting.pop()
        if package in needs:
            continue
        every = nodes[package]["deps"]
        normal = {need["pkg"] for need in every if any(kind["kind"] is None for kind in need["dep_kinds"])}
        needs[package] = sorted(normal - macros)
        waiting += needs[package]
    return needs


def bill(root, program, target):
    """The bill of materials of a program of this workspace, built for this target."""
    root = Path(root)
    graph = metadata(root, target)
    packages = {package["id"]: package for package in graph["packages"]}
    start = next(package["id"] for package in packages.values() if package["name"] == program)
    needs = linked(graph, start)
    lock = tomllib.loads((root / "Cargo.lock").read_text())
    sums = {(package["name"], package["version"]): package.get("checksum") for package in lock["package"]}

    def reference(identity):
        package = packages[identity]
        return f"pkg:cargo/{package['name']}@{package['version']}"

    def component(identity, kind="library"):
        package = packages[identity]
        described = {"type": kind, "bom-ref": reference(identity), "name": package["name"],
                     "version": package["version"], "purl": reference(identity)}
        if package.get("license"):
            # Old packages write "MIT/Apache-2.0", which is no SPDX expression.
            described["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
        if sums.get((package["name"], package["version"])):
            described["hashes"] = [{"alg": "SHA-256", "content": sums[package["name"], package["version"]]}]
        if package.get("repository"):
            described["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
        return described

    others = sorted((identity for identity in needs if identity != start), key=reference)
    result = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": component(start, "application"),
            "properties": [{"name": "freehold:target", "value": target}],
        },
        "components": [component(identity) for identity in others],
        "dependencies": [
            {"ref": reference(identity), "dependsOn": sorted({reference(need) for need in needs[identity]})}
            for identity in sorted(needs, key=reference)
        ],
    }
    # A number that is the same for the same content, where others draw one by chance.
    content = json.dumps(result, sort_keys=True)
    result["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, content).urn
    return result


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(json.dumps(bill(Path(__file__).resolve().parents[2], *sys.argv[1:]), indent=1))
