"""What a process needs to run vLLM's CPU build with the plug-in from the source tree."""

import os
import pathlib

import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
CPU_BUILD = pathlib.Path(__file__).with_name("cpu_build")


def make_site(folder: pathlib.Path) -> pathlib.Path:
    """Makes a folder for PYTHONPATH in which the source tree is an installed distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distribution = folder / "spotattention-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: spotattention\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (distribution / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def environment(site: pathlib.Path, build_folder: pathlib.Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (site, CPU_BUILD, ROOT / "python"))),
        "SPOT_OPS_LIBRARY": os.environ.get("SPOT_OPS_LIBRARY", str(build_folder / "libspot_ops.so")),
        "VLLM_TARGET_DEVICE": "cpu",  # what a CPU build knows of itself; scripts/setup_vllm_033.sh has none
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # ask.py calls a function in each worker
        "HF_HUB_OFFLINE": "1",
        **more,
    }
