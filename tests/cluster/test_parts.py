"""What the scripts do on systems other than Linux, where none of the parts run, and with files that are not the pinned ones."""

import os
import platform
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
import parts


class Elsewhere(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache, self.programs = Path(folder.name) / "cache", Path(folder.name) / "bin"
        self.programs.mkdir()
        for change in (mock.patch.object(platform, "system", return_value="Darwin"),
                       mock.patch.dict(os.environ, PATH=str(self.programs))):
            change.start()
            self.addCleanup(change.stop)

    def test_helm_is_the_machines_own(self):
        helm = self.programs / "helm"
        helm.write_text("#!/bin/sh\n")
        helm.chmod(0o755)
        parts.main(self.cache, ["helm"])
        self.assertEqual((self.cache / "helm").resolve(), helm.resolve())
        # And again, when another one was installed meanwhile.
        parts.main(self.cache, ["helm"])

    def test_without_helm_it_is_told_what_to_do(self):
        with self.assertRaisesRegex(SystemExit, "install helm"):
            parts.main(self.cache, ["helm"])

    def test_what_runs_on_linux_alone_is_told_so(self):
        with self.assertRaisesRegex(SystemExit, "^api, node: .*tests/on-cluster"):
            parts.main(self.cache, ["node", "helm", "api"])


class Pins(unittest.TestCase):
    def test_pip_is_told_to_refuse_what_is_not_pinned(self):
        """pip is given every sum of the version, and the order to refuse any other file."""
        asked = []
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(fetch.subprocess, "run") as run:
            run.side_effect = lambda command, check: asked.append((command, (Path(folder) / "requirements.txt").read_text()))
            with self.assertRaises(StopIteration):
                fetch.download(fetch.KUBECTL, fetch.KUBECTL_WHEELS, folder)
        (command, pins), = asked
        self.assertIn("--require-hashes", command)
        self.assertEqual(pins.split(), [fetch.KUBECTL, *(f"--hash=sha256:{digest}" for digest in fetch.KUBECTL_WHEELS)])

    def test_kubectl_is_fetched_again_when_its_pins_changed(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(fetch, "download") as download:
            cache = Path(folder)
            (cache / "bin").mkdir()
            (cache / "bin" / "kubectl").write_text("of another version")
            download.side_effect = SystemExit("asked for")
            with self.assertRaisesRegex(SystemExit, "asked for"):
                fetch.kubectl(cache)
            (cache / "bin" / "kubectl.stamp").write_text(" ".join([fetch.KUBECTL, *fetch.KUBECTL_WHEELS]))
            fetch.kubectl(cache)


if __name__ == "__main__":
    unittest.main()
