"""What stands where files are read and written: devices, pipes, links."""

import os
import stat

import pytest


def bench(model, out):
    return ["bench", "--model", model, "--random", "--context", 64, "--steps", 1, "--attention", "dense", "--out", out]


def prompts(model, out):
    task = ["--tasks", "niah_single_1", "--samples", 1, "--lengths", 400]
    return ["eval", "ruler", "--model", model, *task, "--write-prompts", out]


@pytest.mark.parametrize("words", [bench, prompts])
def test_reports_replace_files_alone(spot, place, tmp_path, words):
    pipe, device, folder = tmp_path / "pipe", tmp_path / "null", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    places = [pipe, folder]
    if os.geteuid() == 0:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        places.append(device)
    before = {path: os.lstat(path).st_mode for path in places}
    for path in places:
        done = spot(*words(place / "model", path))
        assert done.returncode in (1, 2) and done.stderr.count("error:") == 1, (path, done)
        assert os.lstat(path).st_mode == before[path], path
    # A link stays, whether its file is there or not yet.
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(name)
        done = spot(*words(place / "model", link))
        assert done.returncode == 0 and link.is_symlink(), done
        assert (tmp_path / name).read_text().startswith("{")
    assert sorted(path.name for path in tmp_path.iterdir() if ".tmp" in path.name) == []


def test_pipes_in_folders_of_runs_are_refused(spot, place, tmp_path, basics):
    for command, name in (("eval ruler", "ruler.jsonl"), ("distill", "metrics.jsonl")):
        out = tmp_path / command.split()[0]
        out.mkdir()
        os.mkfifo(out / name)
        words = list(map(str, basics(place / "model")[command]))
        words[words.index("--out") + 1] = str(out)
        done = spot(*command.split(), *words)
        assert done.returncode == 1 and f"{name}: is not a regular file" in done.stderr, done
        assert (out / name).is_fifo()


NAMES = ["chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
         "tokenizer.json", "model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_links_to_nothing_are_not_nothing(spot, place, tmp_path, name):
    """A hub cache that was fetched in part: another template or other defaults would be taken in silence."""
    for path in (place / "model").iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    done = spot("generate", "--model", tmp_path, "--chat", "--prompt", "Hi", "--max-new-tokens", 1)
    assert done.returncode == 1 and f"{name}: is a link to a file that is not there" in done.stderr, done
