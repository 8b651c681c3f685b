"""jinja2 as transformers sets it up for chat templates, and our interpreter on the same requests."""

import copy
import json
import random
import signal
import subprocess
import sys
import zipfile

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

WORDS = [
    "Hello", " world", "\n", "\n\n", "  ", "\t", "it's {{ 1 }} and {% x %}", "日本語", "\u00a0", "\x1c", "<|im_end|>",
    "é", "ß", "😀", "<think>", "</think>", "<tool_call>", '"quoted"', "\\", "'", "a&b<c>", "", "0",
]  # fmt: skip


SECONDS = 10  # for one rendering: Python goes on for hours about (-7) ** 9007199254740993, which is refused here


def theirs(template, variables):
    """Text, or None where compiling or rendering raises or does not end; with the error."""

    def over(signal_number, frame):
        raise TimeoutError(f"no end in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        return _compile_jinja_template(template).render(**copy.deepcopy(variables)), None
    except Exception as e:
        return None, f"{type(e).__name__}: {e}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ours(build_folder, folder, requests):
    """The answers of one run of template_tool: {"text": ...} or {"error": ...} each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in").write_text("".join(json.dumps(request) + "\n" for request in requests))
    program = build_folder / "src" / "text" / "template_tool"
    result = subprocess.run([program, folder / "in", folder / "out"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in (folder / "out").read_text().split("\n")[:-1]]


def trl_templates(folder):
    """The 72 templates that trl 1.16.0 publishes, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), "trl==1.16.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("trl-*.whl"))
    if done.returncode != 0 or not wheels:
        pytest.skip(f"trl 1.16.0 could not be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".jinja")]
        return {name.rsplit("/", 1)[1]: wheel.read(name).decode() for name in names}


def random_text(rng, most=6):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def random_json(rng, depth=0):
    kind = rng.randrange(6 if depth > 2 else 8)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, 1, -7, 123456789012, 1.5, -0.25, 1e-7, 1e17, 3.0])
    if kind < 6:
        return random_text(rng, 3)
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {random_text(rng, 2) + str(i): random_json(rng, depth + 1) for i in range(rng.randint(0, 3))}


def random_schema(rng, depth=0):
    schema = {"type": rng.choice(["string", "integer", "number", "boolean", "array", "object", ["string", "null"]])}
    if rng.random() < 0.7:
        schema["description"] = random_text(rng)
    if rng.random() < 0.2:
        schema["enum"] = [random_text(rng, 2) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.1:
        schema["default"] = random_json(rng, 2)
    if schema["type"] == "array" and rng.random() < 0.8 and depth < 3:
        schema["items"] = random_schema(rng, depth + 1)
    if schema["type"] == "object" and depth < 3:
        schema["properties"] = {f"p{i}": random_schema(rng, depth + 1) for i in range(rng.randint(0, 3))}
        if rng.random() < 0.6:
            schema["required"] = rng.sample(list(schema["properties"]), rng.randint(0, len(schema["properties"])))
    return schema


def random_tool(rng, number):
    function = {"name": f"tool_{number}", "description": random_text(rng)}
    if rng.random() < 0.9:
        parameters = {f"arg{i}": random_schema(rng) for i in range(rng.randint(0, 3))}
        function["parameters"] = {"type": "object", "properties": parameters, "required": list(parameters)[:1]}
    if rng.random() < 0.2:
        function["return"] = random_schema(rng)
    return {"type": "function", "function": function} if rng.random() < 0.9 else function


def random_content(rng):
    chance = rng.random()
    if chance < 0.05:
        return None
    if chance < 0.15:
        return [{"type": "text", "text": random_text(rng)} for _ in range(rng.randint(0, 3))]
    return random_text(rng)


def random_message(rng, role):
    message = {"role": role, "content": random_content(rng)}
    if role == "assistant":
        if rng.random() < 0.3:
            message[rng.choice(["reasoning_content", "thinking", "reasoning"])] = random_text(rng)
        if rng.random() < 0.3:
            calls = []
            for i in range(rng.randint(0, 2)):
                arguments = {f"arg{j}": random_json(rng) for j in range(rng.randint(0, 3))}
                if rng.random() < 0.25:
                    arguments = json.dumps(arguments)
                function = {"name": f"tool_{i}", "arguments": arguments}
                call = {"type": "function", "function": function} if rng.random() < 0.9 else function
                if rng.random() < 0.4:
                    call["id"] = f"call_{i}"
                calls.append(call)
            message["tool_calls"] = calls
            if rng.random() < 0.3:
                del message["content"]
    if role == "tool":
        if rng.random() < 0.5:
            message["name"] = "tool_0"
        if rng.random() < 0.5:
            message["tool_call_id"] = "call_0"
    return message


def random_variables(rng):
    """What a chat template is given: well-ordered conversations most of the time."""
    roles = ["system"] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        roles += ["user", "assistant"]
        if rng.random() < 0.3:
            roles += ["tool"] * rng.randint(1, 2) + ["assistant"]
    if rng.random() < 0.5:
        roles.append("user")
    if rng.random() < 0.15:
        roles = [rng.choice(["system", "user", "assistant", "tool", "developer", "critic"]) for _ in roles]
    variables = {
        "messages": [random_message(rng, role) for role in roles],
        "tools": [random_tool(rng, i) for i in range(rng.randint(0, 3))] if rng.random() < 0.5 else None,
        "documents": [{"title": random_text(rng), "text": random_text(rng)}] if rng.random() < 0.1 else None,
        "add_generation_prompt": rng.random() < 0.6,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    if rng.random() < 0.4:
        variables["enable_thinking"] = rng.random() < 0.5
    for name in ("preserve_thinking", "builtin_tools", "reasoning_effort", "date_string", "clear_thinking"):
        if rng.random() < 0.08:
            variables[name] = rng.choice([True, False, ["browser", "python"], "high", "low", "26 Jul 2024"])
    return variables


def reseeded(seed, number):
    return random.Random(f"{seed}-{number}")
