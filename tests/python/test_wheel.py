"""The wheel in a clean environment: it must need nothing but torch. Builds the package, so it runs with SPOT_SLOW=1 only."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

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
    """sdist, and a wheel of the sdist. SPOT_WHEEL_BUILD names a build folder to use again; in build/ ccache helps it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    if "SPOT_WHEEL_BUILD" in os.environ:
        command[4:4] = ["--sdist", "--wheel", f"-Cbuild-dir={os.environ['SPOT_WHEEL_BUILD']}"]
    # By the name that the CMake build uses, ccache knows what it has compiled already.
    run(*command, env=os.environ | {"CXX": shutil.which("c++")})
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


def test_the_wheel_holds_the_licences_of_others(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("spotattention/licenses/"): archive.read(name) for name in archive.namelist()}
    for name in ("libpcre2-dev", "libzstd-dev", "libfmt-dev", "libboost1.81-dev", "wonderwords"):
        assert len(held[name]) > 500, name
    if "xgrammar" in held:
        assert b"Redistribution" in held["picojson"]


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


def test_the_engine_and_attached_models_run(python, tmp_path, tiny_qwen3):
    script = f"""
import torch, transformers, spotattention as s
text = "The sun rose over the hills and the river. " * 60
engine = s.Engine({str(tiny_qwen3)!r}, "spot", ["spot:k=512"], cache_tokens=2048)
((answer,),) = engine.generate([text], max_new_tokens=6, stop_ids=[])
model = transformers.AutoModelForCausalLM.from_pretrained({str(tiny_qwen3)!r}, dtype=torch.float32)
s.attach(model, "spot", "spot:k=512")
ids = torch.tensor([engine.encode(text)])
out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(answer.tokens == out[0, ids.shape[1]:].tolist(), model.spot.attended_share < 1)
"""
    assert run(python, "-c", script, cwd=tmp_path).splitlines()[-1] == "True True"


def test_another_torch_is_named_when_importing(python, tmp_path):
    script = "import torch; torch.__version__ = '2.99.0'; import warnings; warnings.simplefilter('always'); import spotattention"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "was built for torch" in line]
    assert done.returncode == 0 and len(lines) == 1
    assert f"was built for torch {torch.__version__}, but torch 2.99.0 is installed" in lines[0]


def test_only_torch_and_the_system_are_linked(python):
    package = run(python, "-c", "import spotattention; print(spotattention.__path__[0])").strip()
    for name in ("bin/spot", "lib/libspot_ops.so", "lib/libspot_engine.so"):
        needed = [
            line.split("[")[1].rstrip("]")
            for line in run("readelf", "-d", f"{package}/{name}").splitlines()
            if "NEEDED" in line
        ]
        system = (
            "libtorch",
            "libc10",
            "libc.so",
            "libm.so",
            "libstdc++",
            "libgcc_s",
            "ld-linux",
            "libcudart",
            "libspot_ops",
        )
        assert all(n.startswith(system) for n in needed), needed
        assert "ORIGIN/../../torch/lib" in run("readelf", "-d", f"{package}/{name}")
