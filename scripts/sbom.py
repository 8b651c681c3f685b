#!/usr/bin/env python3
"""What a build is linked with, by name, version and licence: CycloneDX 1.5 on standard output, or a table with --table.

usage: scripts/sbom.py [--table]
"""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

# name, Debian package that says the version (or a Python one), licence, how it is used
PARTS = [
    ("libtorch", "python:torch", "BSD-3-Clause", "linked; brings oneDNN (Apache-2.0), MKL (ISSL), gloo, fbgemm, sleef and others"),
    ("fmt", "libfmt-dev", "MIT", "headers"),
    ("nlohmann-json", "nlohmann-json3-dev", "MIT", "headers"),
    ("CLI11", "libcli11-dev", "BSD-3-Clause", "headers"),
    ("PCRE2", "libpcre2-8-0", "BSD-3-Clause", "linked"),
    ("utf8proc", "libutf8proc-dev", "MIT", "linked"),
    ("zlib", "zlib1g", "Zlib", "linked"),
    ("zstd", "libzstd1", "BSD-3-Clause OR GPL-2.0-only", "linked, under the BSD licence"),
    ("xxHash", "libxxhash-dev", "BSD-2-Clause", "headers"),
    ("Boost (Asio, Beast)", "libboost1.81-dev", "BSL-1.0", "headers"),
    ("libstdc++", "libstdc++6", "GPL-3.0-or-later WITH GCC-exception-3.1", "linked"),
    ("libgomp", "libgomp1", "GPL-3.0-or-later WITH GCC-exception-3.1", "linked by libtorch"),
    ("wonderwords", "python:wonderwords", "MIT", "its word lists are built in, for RULER's prompts"),
    ("xgrammar", "lock:cmake/xgrammar.lock", "Apache-2.0", "linked, where its sources are; brings picojson (BSD-2-Clause) and dlpack's header (Apache-2.0)"),
    ("GoogleTest", "libgtest-dev", "BSD-3-Clause", "tests alone"),
]  # fmt: skip


def version(package: str) -> str:
    if package.startswith("lock:"):
        lock = (pathlib.Path(__file__).parent.parent / package.removeprefix("lock:")).read_text()
        return re.search(r"==(\S+)", lock)[1]
    if package.startswith("python:"):
        try:
            return importlib.metadata.version(package.removeprefix("python:"))
        except importlib.metadata.PackageNotFoundError:
            return "absent"
    done = subprocess.run(["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else "absent"


def main() -> None:
    parts = [(name, version(package), licence, use) for name, package, licence, use in PARTS]
    if sys.argv[1:] == ["--table"]:
        print("| part | version | licence | use |\n|---|---|---|---|")
        for part in parts:
            print("| " + " | ".join(part) + " |")
        return
    components = [
        {"type": "library", "name": name, "version": number, "licenses": [{"expression": licence}], "description": use}
        for name, number, licence, use in parts
        if number != "absent"
    ]
    subject = {"type": "application", "name": "spotattention", "licenses": [{"expression": "Apache-2.0"}]}
    document = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    print(json.dumps(document | {"metadata": {"component": subject}}, indent=1))


if __name__ == "__main__":
    main()
