"""What the tests ask of a running server."""

import pytest
from served import CHAT_TEMPLATE, ROOT, Server


@pytest.fixture(scope="session")
def chat_template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(CHAT_TEMPLATE)
    return file


@pytest.fixture(scope="session")
def start(build_folder, tiny_qwen3):
    """Starts servers of tiny-qwen3; all are stopped at the end."""
    servers = []

    def make(*options, **settings):
        servers.append(Server(build_folder, tiny_qwen3, *options, **settings))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()


@pytest.fixture(scope="session")
def server(start, chat_template):
    """One for all tests that leave it as it was."""
    running = start(
        "--selector", "spot", "--attention", "dense", "--chat-template", chat_template, "--reasoning", "on",
        "--tool-calls", "on", "--cache-format", "f32", "--cache-gib", "0.25", "--max-tokens", "4096", "--observe-every", "4",
        "--max-body-mib", "1", "--max-sequences", "8", "--max-queue", "8", "--max-step-tokens", "256",
    )  # fmt: skip
    yield running
    assert running.process.poll() is None, "the server ended"
    running.wait_until_idle()


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def book():
    """Text for prompts of any length."""
    return (ROOT / "docs" / "method.md").read_text() + (ROOT / "docs" / "distillation.md").read_text()
