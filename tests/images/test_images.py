"""The images of manifests/images: valid, the same twice, run by nobody, with a full bill of materials.

    python3 tests/images/test_images.py

What the archives hold stands in for the programs, whose compiling takes a quarter of an hour. That compiling is
reproducible is tested on a small program, built twice in different folders with the flags of the images: see Programs.
With containerd in the cache (`tests/cluster/parts.py CACHE containers`, which tests/run calls for root) and as root, a
real containerd imports and unpacks the archives."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "manifests" / "images"))
import build  # noqa: E402
import oci  # noqa: E402
import sbom  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "freehold"
CONTAINERD = CACHE / "cluster" / "node" / "usr" / "bin"
ABOUT = {"version": "1.2.3", "revision": "0" * 40, "created": 1_700_000_000, "certificates": b"certificates"}


def made(name, architectures=("amd64",)):
    bill = json.dumps({"bomFormat": "CycloneDX"}).encode()
    return [build.image(name, each, b"program for " + each.encode(), bill, ABOUT) for each in architectures]


class Archives(unittest.TestCase):
    def test_equal_input_gives_equal_bytes(self):
        once = oci.archive("localhost/freehold-operator:1", made("operator", ("amd64", "arm64")))
        image = made("operator", ("amd64", "arm64"))
        for each in image:
            each.files = dict(reversed(each.files.items()))
        self.assertEqual(once, oci.archive("localhost/freehold-operator:1", image))

    def test_another_program_gives_another_digest(self):
        image = made("operator")
        image[0].files["usr/bin/freehold-operator"].data += b"!"
        self.assertNotEqual(oci.archive("x:1", image), oci.archive("x:1", made("operator")))

    def test_both_images_run_as_nobody_and_hold_what_they_need(self):
        for name in build.IMAGES:
            with self.subTest(name):
                reference, images = oci.read(oci.archive(f"localhost/freehold-{name}:1", made(name)))
                self.assertEqual(reference, f"localhost/freehold-{name}:1")
                config, files = images["amd64"]
                self.assertEqual(config["config"]["User"], "65532:65532")
                entrypoint = config["config"]["Entrypoint"][0].lstrip("/")
                self.assertEqual((files[entrypoint].data, files[entrypoint].mode), (b"program for amd64", 0o755))
                self.assertIn("usr/share/doc/freehold/sbom.cdx.json", files)
                self.assertEqual(files["tmp"].mode, 0o1777)
                # Nobody may change what runs.
                ours = {path for path, file in files.items() if file.owner or file.mode & 0o022}
                self.assertEqual(ours, {"tmp", *build.IMAGES[name]["folders"]})
        self.assertEqual(files["etc/ssl/certs/ca-certificates.crt"].data, b"certificates")

    def test_both_architectures_lie_in_one_archive(self):
        _, images = oci.read(oci.archive("localhost/x:1", made("node-agent", ("amd64", "arm64"))))
        programs = {each: files["usr/bin/freehold-node-agent"].data for each, (_, files) in images.items()}
        self.assertEqual(programs, {"amd64": b"program for amd64", "arm64": b"program for arm64"})

    def test_a_flipped_byte_is_seen(self):
        data = bytearray(oci.archive("localhost/x:1", made("operator")))
        # Within the config, so that tar itself still reads.
        data[data.index(b'"architecture":"amd64"') + 20] ^= 1
        with self.assertRaisesRegex(oci.Broken, "not what its descriptor says"):
            oci.read(bytes(data))

    def test_a_program_with_a_loader_is_not_static(self):
        here = build.parse([]).platforms[0]
        self.assertFalse(build.is_static(Path(sys.executable).resolve().read_bytes(), here))
        self.assertFalse(build.is_static(b"#!/bin/sh\n" + bytes(64), here))

    def test_a_static_program_is_one_for_its_own_processor_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder) / "nothing.rs", Path(folder) / "nothing"
            source.write_text("fn main() {}")
            here = build.parse([]).platforms[0]
            command = ["rustc", "--target", build.TARGETS[here], "-o", program, source]
            if subprocess.run(command, capture_output=True).returncode:
                self.skipTest(f"rustup target add {build.TARGETS[here]}")
            other = ({"amd64", "arm64"} - {here}).pop()
            data = program.read_bytes()
            self.assertEqual((build.is_static(data, here), build.is_static(data, other)), (True, False))

    def test_wrong_arguments_are_told_what_would_be_right(self):
        for words, answer in [(["--platforms", "riscv"], "it may hold amd64 and arm64"),
                              (["--platforms", "amd64,arm64", "--binaries", "x"], "name one with --platforms")]:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), self.assertRaises(SystemExit):
                build.parse(words)
            self.assertIn(answer, said.getvalue())


# Bears its file's name in the message of a panic, as every program that checks an index does.
PROGRAM = """fn main() {
    let words: Vec<String> = std::env::args().collect();
    println!("{} {}", words[7], file!());
}
"""


class Programs(unittest.TestCase):
    """Two builds of one small program in two folders, by rustc alone. No test builds the whole programs twice, which zig
    links."""

    def built(self, flags):
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "main.rs").write_text(PROGRAM)
            program = Path(root) / "program"
            command = ["rustc", "-Copt-level=3", "-Cstrip=symbols", *flags(Path(root)), "-o", program,
                       Path(root) / "main.rs"]
            subprocess.run(command, check=True)
            return program.read_bytes(), root

    def test_the_same_source_gives_the_same_program_in_any_folder(self):
        (one, here), (other, there) = (self.built(build.flags) for _ in range(2))
        self.assertNotEqual(here, there)
        self.assertEqual(one, other)
        self.assertNotIn(here.encode(), one)
        self.assertIn(b"/freehold/main.rs", one)

    def test_without_the_flags_the_folder_would_show(self):
        (one, here), (other, _) = (self.built(lambda _: []) for _ in range(2))
        self.assertIn(here.encode(), one)
        self.assertNotEqual(one, other)


class Bill(unittest.TestCase):
    def test_all_that_is_linked_is_named(self):
        for program in ("freehold-operator", "freehold-node-agent"):
            with self.subTest(program):
                target = build.TARGETS["arm64"]
                bill = sbom.bill(build.ROOT, program, target)
                named = {(part["name"], part["version"]) for part in bill["components"]}
                command = ["cargo", "tree", "--locked", "-p", program, "--target", target, "-e", "normal,no-proc-macro",
                           "--prefix", "none", "--format", "{p}"]
                said = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=True).stdout
                linked = {(words[0], words[1].lstrip("v")) for line in said.splitlines() if (words := line.split())}
                linked = {part for part in linked if part[0] != program}
                self.assertGreater(len(linked), 100)
                self.assertEqual(linked - named, set())

    def test_the_same_sources_give_the_same_bill(self):
        target = build.TARGETS["amd64"]
        one, other = (sbom.bill(build.ROOT, "freehold-operator", target) for _ in range(2))
        self.assertEqual(json.dumps(one), json.dumps(other))
        self.assertRegex(one["serialNumber"], "^urn:uuid:[0-9a-f-]{36}$")

    def test_what_comes_from_a_registry_has_its_sum(self):
        bill = sbom.bill(build.ROOT, "freehold-operator", build.TARGETS["amd64"])
        without = {part["name"] for part in bill["components"] if not part.get("hashes")}
        self.assertTrue(all(name.startswith("freehold-") for name in without), without)
        references = {part["bom-ref"] for part in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
        self.assertEqual(references, {entry["ref"] for entry in bill["dependencies"]})


@contextlib.contextmanager
def containerd():
    """A containerd of its own; gives a function that runs ctr against it."""
    with tempfile.TemporaryDirectory() as folder:
        socket, log = Path(folder) / "containerd.sock", Path(folder) / "log"
        configuration = Path(folder) / "config.toml"
        configuration.write_text(f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
                                 'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
                                 f'[grpc]\naddress = "{socket}"\n')

        def ctr(*arguments):
            command = [CONTAINERD / "ctr", "--address", socket, *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise AssertionError(f"ctr {' '.join(map(str, arguments))}: {done.stderr}")
            return done.stdout

        with open(log, "w") as words:
            program = subprocess.Popen([CONTAINERD / "containerd", "--config", configuration], stderr=words)
        try:
            until = time.monotonic() + 30
            while True:
                try:
                    ctr("version")
                    break
                except AssertionError:
                    if time.monotonic() > until or program.poll() is not None:
                        raise AssertionError(f"containerd did not start:\n{log.read_text()}") from None
                    time.sleep(0.1)
            yield ctr
        finally:
            program.terminate()
            program.wait()


@unittest.skipUnless(os.geteuid() == 0 and (CONTAINERD / "containerd").exists(), "needs root, and its programs")
class Containerd(unittest.TestCase):
    def test_containerd_imports_and_unpacks_every_image(self):
        with containerd() as ctr, tempfile.TemporaryDirectory() as folder:
            for name in build.IMAGES:
                for architectures in (("amd64",), ("amd64", "arm64")):
                    with self.subTest(name=name, architectures=architectures):
                        reference = f"localhost/freehold-{name}:{len(architectures)}"
                        file, place = Path(folder) / "image.tar", Path(folder) / f"{name}-{len(architectures)}"
                        file.write_bytes(oci.archive(reference, made(name, architectures)))
                        ctr("images", "import", "--platform", "linux/amd64", "--snapshotter", "native", file)
                        self.assertIn(reference, ctr("images", "list", "--quiet").split())
                        place.mkdir()
                        ctr("images", "mount", "--platform", "linux/amd64", "--snapshotter", "native", reference, place)
                        try:
                            program = place / f"usr/bin/freehold-{name}"
                            self.assertEqual(program.read_bytes(), b"program for amd64")
                            self.assertEqual(program.stat().st_mode & 0o777, 0o755)
                        finally:
                            ctr("images", "unmount", place)


if __name__ == "__main__":
    unittest.main(verbosity=2)
