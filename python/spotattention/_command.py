"""The console command `spot`: the program of the wheel, with torch's libraries in reach wherever torch is installed."""

import importlib.util
import os
import pathlib
import sys


def main() -> None:
    program = pathlib.Path(__file__).parent / "bin" / "spot"
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit("error: spot needs torch, which is not installed; pip install torch")
    libraries = [str(pathlib.Path(torch.origin).parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    try:
        os.execv(program, [str(program), *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"error: {program} could not be run: {error}")
