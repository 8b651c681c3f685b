"""Distillations that are interrupted, killed, started twice or run out of disk: the state on disk, and the run that goes on."""

import json
import os
import random
import resource
import signal
import subprocess
import time

import pytest
from program import ENVIRONMENT, PATIENCE, distillation, leftovers, run_of

STEPS = 12


def words(place, out, *more):
    return distillation(place / "model", place / "text.jsonl", out, "--steps", STEPS, "--checkpoint-interval", 2, *more)


@pytest.fixture(scope="module")
def reference(spot, place, tmp_path_factory):
    """The run that nothing disturbs, and its seconds."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    begin = time.monotonic()
    done = spot(*words(place, out))
    assert done.returncode == 0, done.stderr
    return out, time.monotonic() - begin


def lines_of(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_save(spot, place, tmp_path, reference, name):
    out = tmp_path / "out"
    # A shell has its background jobs ignore SIGINT, and what is ignored stays so.
    heed = lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)
    process = spot.start(*words(place, out), preexec_fn=heed)
    wait_for(lambda: lines_of(out) >= 1, process)
    process.send_signal(signal.SIGSTOP)  # a quick machine takes the other steps before the signal is there
    process.send_signal(getattr(signal, name))
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    saved = json.loads(next(out.glob("checkpoint-*/train.json")).read_text())["step"]
    assert saved == lines_of(out) < STEPS and not leftovers(out)
    assert spot(*words(place, out, "--resume")).returncode == 0
    assert run_of(out) == run_of(reference[0])


def test_nohup_is_kept(spot, place, tmp_path, reference):
    out = tmp_path / "out"
    process = spot.start(*words(place, out), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: lines_of(out) >= 1, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and run_of(out) == run_of(reference[0])


def kill_and_resume(spot, place, out, reference, points, dice):
    """Kills a run `points` times, each at a random moment of what a whole run takes, then lets it end."""
    whole = reference[1]
    for _ in range(points):
        process = spot.start(*words(place, out, "--resume"))
        try:
            process.communicate(timeout=dice.uniform(0.1, whole))
            break  # it was faster
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if saved := sorted(out.glob("checkpoint-*")):  # the newest is whole, whenever the kill came
            json.loads((saved[-1] / "train.json").read_text())
            assert (saved[-1] / "optimizer.safetensors").stat().st_size > 1000
    done = spot(*words(place, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert run_of(out) == run_of(reference[0]) and not leftovers(out)


def test_kill_and_resume_gives_the_same_bits(spot, place, tmp_path, reference, seed):
    """SPOT_KILLS=20 for the long form."""
    kill_and_resume(spot, place, tmp_path / "out", reference, int(os.environ.get("SPOT_KILLS", 3)), random.Random(seed))


def test_kill_while_a_checkpoint_is_written(spot, place, tmp_path, reference):
    out = tmp_path / "out"
    process = spot.start(*words(place, out))
    wait_for(lambda: (out / "unfinished-checkpoint").exists() or lines_of(out) >= 4, process)
    process.kill()
    process.communicate()
    assert spot(*words(place, out, "--resume")).returncode == 0
    assert run_of(out) == run_of(reference[0]) and not leftovers(out)


def test_folders_that_are_no_checkpoints_are_left_alone(spot, place, tmp_path, reference):
    """Whatever they are called: neither resumed from nor removed."""
    out = tmp_path / "out"
    process = spot.start(*words(place, out))
    wait_for(lambda: lines_of(out) >= 4, process)
    process.kill()
    process.communicate()
    saved = list(out.glob("checkpoint-*"))
    for checkpoint in saved:  # one that lacks a file is damaged, whichever file that is
        for path in checkpoint.glob("*.*"):
            path.rename(tmp_path / path.name)
            done = spot(*words(place, out, "--resume"))
            assert done.returncode == 1 and path.name in done.stderr, (path, done)
            (tmp_path / path.name).rename(path)
    mine = out / "checkpoint-999999"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    done = spot(*words(place, out, "--resume"))
    assert done.returncode == 0 and (mine / "notes").read_text() == "mine", done
    assert ("holds no checkpoint to resume" in done.stderr) == (not saved), done.stderr
    (mine / "notes").unlink()
    mine.rmdir()
    assert run_of(out) == run_of(reference[0])


def test_two_runs_into_one_folder(spot, place, tmp_path, reference):
    """Whatever the second is asked to do, it ends at once; the lock ends with its holder, killed or not."""
    out = tmp_path / "out"
    first = spot.start_and_stop(out, *words(place, out))
    for more in ([], ["--resume"]):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        second = spot(*words(place, out, *more))
        assert second.returncode == 1 and "error:" in second.stderr, second
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        if more:
            assert str(first.pid) in second.stderr, second.stderr
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0 and run_of(out) == run_of(reference[0]) and not leftovers(out)

    killed = spot.start(*words(place, tmp_path / "killed"))
    wait_for(lambda: lines_of(tmp_path / "killed") >= 3, killed)
    killed.kill()
    killed.communicate()
    assert spot(*words(place, tmp_path / "killed", "--resume")).returncode == 0
    assert run_of(tmp_path / "killed") == run_of(reference[0])


@pytest.mark.parametrize("name", ["eval text", "eval needle", "eval ruler"])
def test_two_evaluations_into_one_folder(spot, place, basics, tmp_path, name):
    run = [*name.split(), *basics(place / "model")[name], "--threads", 1]
    run[run.index("--sequences" if name == "eval text" else "--samples") + 1] = 16  # long enough to be found at it
    first = spot.start_and_stop(tmp_path / "e", *run)
    second = spot(*run)
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=PATIENCE)
    assert second.returncode == 1 and first.returncode == 0, second
    assert json.loads((tmp_path / "e" / "report.json").read_text()) and not leftovers(tmp_path)


def limit_of(place, reference):
    """Room for metrics and the page but not for a checkpoint's weights."""
    largest = max(path.stat().st_size for path in reference[0].glob("checkpoint-*/*.safetensors"))
    return largest // 2


def test_a_full_disk_that_gets_room_again(spot, place, tmp_path, reference):
    """Checkpoints that cannot be written are tried again; the run ends as if nothing had been."""
    out = tmp_path / "out"
    limit = limit_of(place, reference)
    process = spot.start(*words(place, out), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1)))
    wait_for(lambda: lines_of(out) >= 3, process)
    assert not list(out.glob("checkpoint-*"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and run_of(out) == run_of(reference[0]) and not leftovers(out)


def test_a_disk_that_stays_full(spot, place, tmp_path, reference):
    """The last good checkpoint stays, the status says so, and the same command goes on from there."""
    out = tmp_path / "out"
    process = spot.start(*words(place, out))
    wait_for(lambda: list(out.glob("checkpoint-*")), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "error:" in error
    assert len(list(out.glob("checkpoint-*"))) == 1 and not leftovers(out)
    assert (out / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert spot(*words(place, out, "--resume")).returncode == 0
    assert run_of(out) == run_of(reference[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system(spot, place, tmp_path, reference, seed):
    """A tmpfs of every size up to what the run needs: an error or the whole, never a crash or a half-written file."""
    mount = tmp_path / "small"
    mount.mkdir()
    need = sum(path.stat().st_size for path in reference[0].rglob("*") if path.is_file())
    for share in sorted(random.Random(seed).uniform(0.02, 1.2) for _ in range(3)):
        size = f"size={int(share * need)}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], capture_output=True).returncode != 0:
            pytest.skip("mounting is not allowed here")
        try:
            done = subprocess.run(
                [str(spot.path), *words(place, mount / "out")],
                capture_output=True,
                text=True,
                env=ENVIRONMENT,
                timeout=PATIENCE,
            )
            assert done.returncode in (0, 1) and done.stderr.count("error:") == done.returncode, (share, done)
            assert not leftovers(mount), (share, leftovers(mount))
            for path in mount.rglob("*.json"):
                json.loads(path.read_text())
        finally:
            subprocess.run(["umount", mount], check=True)
