"""Chat prompts equal what the families' own Jinja templates render in `transformers`."""

import json
import random
import subprocess

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PLAIN_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOOL_TURN = r"""
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- CONTENT }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
"""

QWEN25 = (
    r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query." }}
    {{- "<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
"""
    + TOOL_TURN.replace("CONTENT", "message.content")
    + r"""
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
)

QWEN3_2507 = QWEN25.replace(
    r"""    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
""",
    "",
)

QWEN3_BODY = (
    r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
"""
    + TOOL_TURN.replace("CONTENT", "content")
    + r"""
    {%- endif %}
{%- endfor %}
"""
)

QWEN3 = (
    QWEN3_BODY
    + r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
)

QWEN3_THINKING_2507 = (
    QWEN3_BODY
    + r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}"""
)

QWEN35 = (
    r"""{%- macro render_content(content, do_vision_count, is_system_content=false) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is none or content is undefined %}
        {{- '' }}
    {%- else %}
        {{- raise_exception('Unexpected content type.') }}
    {%- endif %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}
    {%- set content = render_content(messages[0].content, false, true)|trim %}
    {{- '<|im_start|>system\n' + content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set content = render_content(message.content, false)|trim %}
        {%- if not(content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set ns.multi_step_tool = false %}
            {%- set ns.last_query_index = index %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.multi_step_tool %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = render_content(message.content, true)|trim %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}
            {{- raise_exception('System message must be at the beginning.') }}
        {%- endif %}
    {%- elif message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- set reasoning_content = reasoning_content|trim %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
"""
    + TOOL_TURN.replace("CONTENT", "content")
    + r"""
    {%- else %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}"""
)

# The small Qwen3.5 models think only when asked to.
QWEN35_SMALL = (
    QWEN35[: QWEN35.rindex("    {%- if enable_thinking")]
    + r"""
    {%- if enable_thinking is defined and enable_thinking is true %}
        {{- '<think>\n' }}
    {%- else %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

LLAMA32 = LLAMA31.replace(
    r"""    {%- set date_string = "26 Jul 2024" %}
""",
    r"""    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""",
)

TEMPLATES = {
    "smollm2": SMOLLM2,
    "plain_chatml": PLAIN_CHATML,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "qwen3-2507": QWEN3_2507,
    "qwen3-thinking-2507": QWEN3_THINKING_2507,
    "qwen3.5": QWEN35,
    "qwen3.5-small": QWEN35_SMALL,
    "llama3": LLAMA3,
    "llama3.1": LLAMA31,
    "llama3.2": LLAMA32,
}
WITH_TOOLS = [name for name in TEMPLATES if name.startswith("qwen")]
BOS = "<|begin_of_text|>"


def theirs(template, messages, generate, thinking):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template, bos_token=BOS)
    extra = {} if thinking is None else {"enable_thinking": thinking}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **extra)


def write_folder(folder, template, rng):
    """The ways in which checkpoints carry a template."""
    config = {"bos_token": rng.choice([BOS, {"content": BOS, "lstrip": False}])}
    way = rng.randrange(3)
    if way == 0:
        config["chat_template"] = template
    elif way == 1:
        config["chat_template"] = [
            {"name": "tool_use", "template": "{{ 1 }}"},
            {"name": "default", "template": template},
        ]
    else:
        config["chat_template"] = "{{ 'the file wins' }}"
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run(build_folder, folder, messages, *flags):
    (folder / "messages.json").write_text(json.dumps(messages))
    program = build_folder / "src" / "text" / "tokenize_tool"
    result = subprocess.run(
        [program, "chat", folder, folder / "messages.json", folder / "out", *flags], capture_output=True, text=True
    )
    return result, (folder / "out").read_bytes().decode() if result.returncode == 0 else None


def random_content(rng, role):
    pieces = [
        "Hello",
        " world",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "it's {{ 1 }} and {% x %}",
        "日本語",
        "\u00a0",
        "\x1c",
        "<|im_end|>",
        "é",
    ]
    if role == "assistant":
        pieces += ["<think>", "</think>", "<think>\nwell\n</think>\n\n", "<think>\n\n</think>\n\n"]
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 7)))
    if role == "user" and rng.random() < 0.25:
        text = rng.choice(["", " "]) + f"<tool_response>{text}</tool_response>"
    return text


def random_messages(rng, name):
    roles = ["user", "assistant", *["tool"] * (name in WITH_TOOLS)]
    messages = [{"role": rng.choice(roles)} for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system"})
    for message in messages:
        message["content"] = random_content(rng, message["role"])
    if name.startswith("qwen3.5"):
        messages.insert(rng.randint(1, len(messages)), {"role": "user", "content": "a question"})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_the_templates(name, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    for number in range(25):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_folder(folder, TEMPLATES[name], rng)
        messages = random_messages(rng, name)
        generate, thinking = rng.random() < 0.7, rng.choice([None, True, False])
        flags = ["generate"] * generate + [{None: "", True: "think", False: "no_think"}[thinking]]
        result, text = run(build_folder, folder, messages, *flags)
        assert result.returncode == 0, result.stderr
        assert text == theirs(TEMPLATES[name], messages, generate, thinking), (messages, flags)


def test_thinking_off_closes_the_block_at_once(build_folder, tmp_path):
    write_folder(tmp_path, QWEN3, random.Random(0))
    _, text = run(build_folder, tmp_path, [{"role": "user", "content": "Hi"}], "generate", "no_think")
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "template, messages, parts",
    [
        (None, [("user", "x")], ["no chat template", "base model"]),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", [("user", "x")], ["no known family"]),
        (SMOLLM2.replace("named", "{{ name }}"), [("user", "x")], ["no known family", "default system"]),
        (PLAIN_CHATML + "{# reasoning #}", [("user", "x")], ["no known family", "reasoning"]),
        (SMOLLM2, [], ["at least one message"]),
        (SMOLLM2, [("user", "x"), ("narrator", "y")], ["message 1", "narrator"]),
        (LLAMA31, [("user", "x"), ("tool", "y")], ["message 1", "tool"]),
        (QWEN35, [("user", "x"), ("system", "y")], ["message 1", "beginning"]),
        (QWEN35, [("system", "x"), ("assistant", "y")], ["message of the user"]),
    ],
)
def test_errors_are_clear(build_folder, tmp_path, template, messages, parts):
    if template is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    result, _ = run(build_folder, tmp_path, [{"role": role, "content": content} for role, content in messages])
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr, result.stderr
