"""Writes and checks OCI image archives: no daemon, no registry, and the same bytes for the same input.

Equal input means equal archives: names are sorted, times are the one given, owners are numbers, and the gzip
header holds no time. The deflate stream itself may differ between zlib versions."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field

PREFIX = "application/vnd.oci.image"


@dataclass
class File:
    """A file or, without data, a folder of an image."""

    data: bytes | None = None
    mode: int = 0o644
    owner: int = 0


@dataclass
class Image:
    """One image for one architecture."""

    architecture: str
    files: dict[str, File]
    entrypoint: list[str]
    user: int
    created: int
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    working_dir: str = "/"


def encode(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def described(kind, data, **more):
    return {"mediaType": f"{PREFIX}.{kind}", "digest": digest(data), "size": len(data), **more}


def when(seconds):
    """RFC 3339, in UTC."""
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def tar(files, time):
    """A tar of these files, folders above them included, all in order."""
    everything = dict(files)
    for path in files:
        parts = path.split("/")[:-1]
        for end in range(1, len(parts) + 1):
            everything.setdefault("/".join(parts[:end]), File(mode=0o755))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(everything):
            file = everything[path]
            member = tarfile.TarInfo(path)
            member.mode, member.mtime, member.uid, member.gid = file.mode, time, file.owner, file.owner
            if file.data is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = len(file.data)
                archive.addfile(member, io.BytesIO(file.data))
    return out.getvalue()


def blobs_of(image):
    """The layer, config and manifest of an image, the manifest last."""
    plain = tar(image.files, image.created)
    layer = gzip.compress(plain, compresslevel=9, mtime=0)
    config = encode({
        "architecture": image.architecture,
        "os": "linux",
        "created": when(image.created),
        "config": {
            "Entrypoint": image.entrypoint,
            "Env": [f"{name}={value}" for name, value in sorted(image.environment.items())],
            "ExposedPorts": {f"{port}/tcp": {} for port in image.ports},
            "Labels": image.labels,
            "User": f"{image.user}:{image.user}",
            "WorkingDir": image.working_dir,
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(plain)]},
        "history": [{"created": when(image.created), "created_by": "manifests/images/build.py"}],
    })
    manifest = encode({
        "schemaVersion": 2,
        "mediaType": f"{PREFIX}.manifest.v1+json",
        "config": described("config.v1+json", config),
        "layers": [described("layer.v1.tar+gzip", layer)],
        "annotations": image.labels,
    })
    return [layer, config, manifest]


def archive(name, images):
    """An OCI archive that holds `name` for each of these architectures."""
    created = max(image.created for image in images)
    blobs, manifests = [], []
    for image in images:
        made = blobs_of(image)
        blobs += made
        platform = {"architecture": image.architecture, "os": "linux"}
        manifests.append(described("manifest.v1+json", made[-1], platform=platform))
    annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    if len(images) == 1:
        entry = manifests[0] | {"annotations": annotations}
    else:
        index = encode({"schemaVersion": 2, "mediaType": f"{PREFIX}.index.v1+json", "manifests": manifests})
        blobs.append(index)
        entry = described("index.v1+json", index, annotations=annotations)
    files = {f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": File(blob) for blob in blobs}
    files["oci-layout"] = File(encode({"imageLayoutVersion": "1.0.0"}))
    files["index.json"] = File(encode(
        {"schemaVersion": 2, "mediaType": f"{PREFIX}.index.v1+json", "manifests": [entry]}))
    return tar(files, created)


class Broken(Exception):
    """What of an archive is not as the OCI image layout wants it."""


def read(data):
    """Reads an archive back. Returns its name and, for each architecture, the config and the layers' files.

    Every digest and size is checked on the way, and that nothing lies in the archive unreferenced."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened if member.isfile()}
    if json.loads(members.get("oci-layout", b"{}")).get("imageLayoutVersion") != "1.0.0":
        raise Broken("oci-layout does not say imageLayoutVersion 1.0.0")
    seen = set()

    def blob(descriptor):
        name = "blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")
        if name not in members:
            raise Broken(f"{name} is named and not there")
        if digest(members[name]) != descriptor["digest"] or len(members[name]) != descriptor["size"]:
            raise Broken(f"{name} is not what its descriptor says")
        seen.add(name)
        return members[name]

    index = json.loads(members["index.json"])
    if len(index["manifests"]) != 1:
        raise Broken(f"index.json holds {len(index['manifests'])} images")
    top = index["manifests"][0]
    name = top["annotations"]["io.containerd.image.name"]
    found = [top] if top["mediaType"].endswith("manifest.v1+json") else json.loads(blob(top))["manifests"]
    images = {}
    for descriptor in found:
        manifest = json.loads(blob(descriptor))
        config = json.loads(blob(manifest["config"]))
        files = {}
        for position, layer in enumerate(manifest["layers"]):
            plain = gzip.decompress(blob(layer))
            if digest(plain) != config["rootfs"]["diff_ids"][position]:
                raise Broken(f"layer {position} is not what the config's diff_ids say")
            with tarfile.open(fileobj=io.BytesIO(plain)) as opened:
                for member in opened:
                    files[member.name] = File(opened.extractfile(member).read() if member.isfile() else None,
                                              member.mode, member.uid)
        images[config["architecture"]] = (config, files)
    unused = set(members) - seen - {"oci-layout", "index.json"}
    if unused:
        raise Broken(f"nothing names {', '.join(sorted(unused))}")
    return name, images
