#!/usr/bin/env python3
"""Writes requirements.lock: every package of requirements.txt and constraints.txt with the SHA-256 of the files that pip takes
for them, for Python 3.11 on x86-64 and 64-bit ARM. torch is not among them: it comes as another file from each of its indices.

usage: scripts/lock_requirements.py        (with the network; after a change of either file)
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
HEAD = """\
# By scripts/lock_requirements.py, for Python 3.11 on x86-64 and 64-bit ARM; scripts/setup.sh installs it with
# --require-hashes. Do not edit: change requirements.txt or constraints.txt and run that again.
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(machine: str, folder: str) -> list:
    """What pip would install on that machine: (name, version, SHA-256)."""
    report = Path(folder) / f"{machine}.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report]
    command += ["--target", folder, "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
    for glibc in range(36, 16, -1):  # Debian 12's is 2.36
        command += ["--platform", f"manylinux_2_{glibc}_{machine}"]
    command += [
        "--platform",
        f"manylinux2014_{machine}",
        "--platform",
        f"linux_{machine}",
        "-r",
        ROOT / "requirements.txt",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    found = []
    for entry in json.loads(report.read_text())["install"]:
        sha256 = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        found.append((normal(entry["metadata"]["name"]), entry["metadata"]["version"], sha256))
    return found


def main() -> None:
    packages = {}
    with tempfile.TemporaryDirectory() as folder:
        for machine in MACHINES:
            for name, version, sha256 in resolve(machine, folder):
                packages.setdefault((name, version), set()).add(sha256)
    names = [name for name, _ in packages]
    if twice := {name for name in names if names.count(name) > 1}:
        sys.exit(f"error: {', '.join(sorted(twice))}: another version for another machine; pin one in constraints.txt")
    lines = [HEAD]
    for (name, version), hashes in sorted(packages.items()):
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{sha256}" for sha256 in sorted(hashes))]) + "\n"
        )
    (ROOT / "requirements.lock").write_text("".join(lines))
    print(f"requirements.lock: {len(packages)} packages")


if __name__ == "__main__":
    main()
