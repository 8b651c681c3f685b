"""Chat prompts of whole checkpoints equal what `transformers` renders."""

import json
import random

import pytest
from template_oracle import ours, random_variables
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
BOS = "<|begin_of_text|>"


def save_tokenizer(folder):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def write_folder(folder, template, rng):
    """The ways in which checkpoints carry a template."""
    save_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}
    config["bos_token"] = rng.choice([BOS, {"content": BOS, "lstrip": False, "__type": "AddedToken"}])
    way = rng.randrange(4)
    if way == 0:
        config["chat_template"] = template
    elif way == 1:
        config["chat_template"] = [{"name": "rag", "template": "{{ 1 }}"}, {"name": "default", "template": template}]
    elif way == 2:
        config["chat_template"] = "{{ 'the file wins' }}"
        (folder / "chat_template.jinja").write_text(template)
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "default.jinja").write_text(template)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools:" + template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def theirs(folder, prompt):
    extra = {key: value for key, value in prompt.items() if key not in ("folder", "messages", "variables")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer.apply_chat_template(prompt["messages"], tokenize=False, **extra, **prompt["variables"])
    except Exception:
        return None


def as_text(message):
    """Parts joined, as templates that know no lists are given them."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_transformers(name, build_folder, tmp_path, seed):
    rng = random.Random(f"{seed}-{name}")
    prompts = []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_folder(folder, TEMPLATES[name], rng)
        given = random_variables(rng)
        prompt = {key: given[key] for key in ("messages", "tools", "documents", "add_generation_prompt")}
        prompt["messages"] = [as_text(message) for message in prompt["messages"]]
        prompt["variables"] = {"enable_thinking": given["enable_thinking"]} if "enable_thinking" in given else {}
        prompts.append({"folder": str(folder), **prompt})
    for prompt, answer in zip(prompts, ours(build_folder, tmp_path, prompts)):
        assert answer.get("text") == theirs(prompt["folder"], prompt), (prompt, answer)


def answer_of(build_folder, folder, template, messages, **more):
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return ours(build_folder, folder, [{"folder": str(folder), "messages": messages, **more}])[0]


def test_thinking_off_closes_the_block_at_once(build_folder, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    answer = answer_of(build_folder, tmp_path, QWEN3, messages, variables={"enable_thinking": False})
    assert answer["text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_text_parts_reach_templates_that_know_no_lists(build_folder, tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = answer_of(build_folder, tmp_path, QWEN3, [{"role": "user", "content": parts}])
    assert answer["text"] == "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    template = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    assert answer_of(build_folder, tmp_path, template, [{"role": "user", "content": parts}])["text"] == "onetwo"


def test_own_template_file(build_folder, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    messages = [{"role": "user", "content": "Hi"}]
    answer = answer_of(build_folder, tmp_path, None, messages, file=str(tmp_path / "own.jinja"))
    assert answer == {"text": "<s>[Hi]"}


@pytest.mark.parametrize(
    "template, messages, parts",
    [
        (None, [("user", "x")], ["no chat template", "base model"]),
        (SMOLLM2, [], ["at least one message"]),
        (QWEN35, [("user", "x"), ("system", "y")], ["line", "System message must be at the beginning."]),
        (QWEN35, [("system", "x"), ("assistant", "y")], ["No user query found in messages."]),
        ("a\n{% include 'x' %}", [("user", "x")], ["line 2", "include"]),
        ("{{ messages|xmlattr }}", [("user", "x")], ["line 1", "xmlattr", "not supported"]),
        ("{{ messages[0].content.encode() }}", [("user", "x")], ["line 1", "encode", "not supported"]),
        ("\n\n{{ x.y }}", [("user", "x")], ["line 3", "'x' is undefined"]),
        ("{% for x in range(99999) %}{% for x in range(99999) %}{% endfor %}{% endfor %}", [("user", "x")], ["work"]),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", [("user", "x")], ["nested"]),
        ("{{ 'abcd' * 99999999 }}", [("user", "x")], ["MiB"]),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            [("user", "x")],
            ["MiB"],
        ),
        (QWEN3, [("user", [{"type": "image_url"}])], ["message 0", "image_url", "only text"]),
    ],
)
def test_errors_are_clear(build_folder, tmp_path, template, messages, parts):
    (tmp_path / "model").mkdir()
    folder = tmp_path / "model"
    answer = answer_of(
        build_folder, folder, template, [{"role": role, "content": content} for role, content in messages]
    )
    assert answer.keys() == {"error"} and "\n" not in answer["error"]
    for part in parts:
        assert part in answer["error"], answer
