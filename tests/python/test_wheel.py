"""The wheel in a clean environment: it must need nothing but torch. Builds the package, so it runs with SPOT_SLOW=1 only."""

import os
import pathlib
import subprocess
import sys
import venv

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPOT_SLOW"), reason="builds the package; set SPOT_SLOW=1"),
    pytest.mark.timeout(7200),
]


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """sdist, and a wheel of the sdist. SPOT_WHEEL_BUILD names a build folder to use again."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    if "SPOT_WHEEL_BUILD" in os.environ:
        command[4:4] = ["--sdist", "--wheel", f"-Cbuild-dir={os.environ['SPOT_WHEEL_BUILD']}"]
    run(*command)
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """An environment that has the wheel, and this one's torch by way of a path file."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    site = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (site / "torch.pth").write_text(f"{pathlib.Path(torch.__file__).parents[1]}\n")
    return python


def test_the_sdist_holds_no_weights(built):
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < 3_000_000


def test_operators_run(python, tmp_path):
    script = (
        "import torch, spotattention as s; print(s.built_for_torch);"
        "r = s.ops.select_blocks(torch.randn(2, 1, 90), torch.full((2,), 1440, dtype=torch.int32), 'top_k', budget=640);"
        "print(r.counts.tolist()); print(torch.ops.spot.score_blocks.default._schema)"
    )
    lines = run(python, "-c", script, cwd=tmp_path).splitlines()
    assert lines[0] == torch.__version__
    assert lines[1] == "[[40], [40]]"
    assert lines[2].startswith("spot::score_blocks(Tensor query, Tensor weight")


def test_the_command_runs(python, tmp_path):
    command = python.parent / "spot"
    assert run(command, "--version", cwd=tmp_path).startswith("spot 0.")
    assert "generate" in run(command, "--help", cwd=tmp_path)


def test_only_torch_and_the_system_are_linked(python):
    package = run(python, "-c", "import spotattention; print(spotattention.__path__[0])").strip()
    for name in ("bin/spot", "lib/libspot_ops.so"):
        needed = [
            line.split("[")[1].rstrip("]")
            for line in run("readelf", "-d", f"{package}/{name}").splitlines()
            if "NEEDED" in line
        ]
        system = ("libtorch", "libc10", "libc.so", "libm.so", "libstdc++", "libgcc_s", "ld-linux", "libcudart")
        assert all(n.startswith(system) for n in needed), needed
        assert "ORIGIN/../../torch/lib" in run("readelf", "-d", f"{package}/{name}")
