"""Answers in JSON: valid under random schemas by Python's jsonschema, beside requests that ask for none."""

import concurrent.futures
import json
import random
import sys
import time

import jsonschema
import openai
import pytest
from load import COMMON, check, run_load
from served import ROOT, Server

sys.path.insert(0, str(ROOT / "tests" / "grammar"))
from random_schemas import random_schema  # noqa: E402
from wide_vocabulary import write_tokenizer  # noqa: E402

MODEL = "tiny-qwen3"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
}


@pytest.fixture(scope="module", autouse=True)
def built_with_xgrammar(build_folder):
    if not (build_folder / "tests" / "grammar" / "schema_tool").is_file():
        pytest.skip("built without xgrammar")


@pytest.fixture(scope="module")
def closing(tiny_qwen3):
    """A bias towards what ends values: a small model would go on for long."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    return {str(tokenizer.convert_tokens_to_ids(c)): 4 for c in ['"', "}", "]", ",", "0"]}


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_answers_are_valid_and_others_are_as_alone(start, book, closing, chat_template, seed):
    crowded = start(
        *COMMON,
        "--cache-gib",
        "0.03",
        "--max-sequences",
        "12",
        "--max-step-tokens",
        "192",
        "--chat-template",
        chat_template,
    )
    client = crowded.client()
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(40)]

    def one(schema):
        try:
            return client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "JSON"}], n=2, max_tokens=200, temperature=1.0,
                seed=len(json.dumps(schema)), logit_bias=closing, response_format=response_format(schema),
                extra_body={"attention": "spot:k=640"},
            )  # fmt: skip
        except openai.BadRequestError as error:
            assert (
                error.body["param"] == "response_format"
                and "schema" in error.body["message"]
                or "#" in error.body["message"]
            )
            return None

    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        replies = [pool.submit(one, schema) for schema in schemas]
        plain = run_load(crowded, book, 4, rng, requests=5)
        replies = [reply.result() for reply in replies]
    stopped = 0
    for schema, reply in zip(schemas, replies):
        for choice in reply.choices if reply else []:
            if choice.finish_reason == "length":
                continue
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), schema, jsonschema.Draft202012Validator)
            stopped += 1
    assert stopped > 15, stopped
    crowded.wait_until_idle()
    reference = start(*COMMON, "--max-sequences", "1", "--no-prefix-cache")
    assert check(plain, reference) > 30
    for server in (crowded, reference):
        assert server.stop()[0] == 0


def test_every_way_to_ask(server, client, closing):
    request = {"model": MODEL, "prompt": "A person: ", "max_tokens": 200, "temperature": 0, "logit_bias": closing}
    text = client.completions.create(**request, extra_body={"response_format": response_format(PERSON)}).choices[0].text
    jsonschema.validate(json.loads(text), PERSON)
    for body in (
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"response_format": response_format(PERSON), "ignore_eos": True},  # what is complete ends nonetheless
        {"response_format": response_format(PERSON), "attention": "spot:p=0.9"},
    ):
        choice = client.completions.create(**request, extra_body=body).choices[0]
        assert choice.finish_reason == "stop"
        if "attention" not in body:
            assert choice.text == text
        else:
            jsonschema.validate(json.loads(choice.text), PERSON)
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(**request, stream=True, logprobs=1, extra_body={"guided_json": PERSON})
    ]
    assert "".join(pieces) == text
    for body in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        choice = client.completions.create(**{**request, "temperature": 1.0, "seed": 5}, extra_body=body).choices[0]
        assert choice.text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.text), dict)


def test_reasoning_comes_first(server, client, closing, tiny_qwen3):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    request = {
        "model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 300, "temperature": 0,
        "response_format": response_format(PERSON),
    }  # fmt: skip
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    if "</think>" not in tokenizer.get_vocab():
        with pytest.raises(openai.BadRequestError, match="reasoning"):
            client.chat.completions.create(**request, extra_body=thinking)
        return
    end = str(tokenizer.convert_tokens_to_ids("</think>"))
    # Nothing but the end of the block is likely at its beginning; behind it that token may not come again.
    reply = client.chat.completions.create(**request, logit_bias={**closing, end: 50}, extra_body=thinking)
    jsonschema.validate(json.loads(reply.choices[0].message.content), PERSON)


@pytest.mark.parametrize(
    "body, field, word",
    [
        ({"response_format": response_format({"not": {}})}, "response_format", "not"),
        ({"response_format": response_format({"type": "string", "pattern": "("})}, "response_format", "compiled"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema"),
        ({"response_format": {"type": "regex"}}, "response_format", "regex"),
        ({"guided_json": "{no json"}, "guided_json", "schema"),
        ({"guided_json": {"type": "object"}, "response_format": {"type": "json_object"}}, "guided_json", "one"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs", "enum"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar", "guided_grammar"),
    ],
)
def test_what_cannot_be_kept_is_a_400_with_the_reason(client, body, field, word):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", extra_body=body)
    assert caught.value.body["param"] == field and word in caught.value.body["message"], caught.value.body


@pytest.fixture(scope="module")
def wide(build_folder, tmp_path_factory, chat_template):
    """A server whose vocabulary is that of a large model, where schemas take long."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    config = transformers.Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=64,
        vocab_size=150_016, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder)
    server = Server(build_folder, folder, "--cache-gib", "0.1", "--chat-template", chat_template, "--max-queue", "64")
    yield server
    server.wait_until_idle()
    assert server.stop()[0] == 0


def largest_gap(server, until):
    """Seconds between an answer's tokens at most, while `until` is not done; answers follow each other."""
    client, gaps = server.client(), [0.0]
    while not until():
        last = time.monotonic()
        stream = client.completions.create(
            model=server.model, prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            gaps.append(time.monotonic() - last)
            last += gaps[-1]
    return max(gaps)


def test_a_schema_that_takes_long_holds_nobody_up(wide):
    wide.model = wide.client().models.list().data[0].id

    def ask(schema):
        begin = time.monotonic()
        try:
            wide.client(timeout=600).completions.create(
                model=wide.model, prompt="a", max_tokens=3, extra_body={"guided_json": schema}
            )
            return "", time.monotonic() - begin
        except openai.BadRequestError as error:
            assert error.body["param"] == "guided_json"
            return error.body["message"], time.monotonic() - begin

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(ask, {"type": "null"}).result()
        long = pool.submit(ask, {"type": "string", "pattern": "(.*){60}"})
        short = pool.submit(ask, {"type": "boolean"})  # behind it
        gap = largest_gap(wide, lambda: long.done() and short.done())
    message, seconds = long.result()
    assert "too much work" in message and "\n" not in message
    assert short.result()[0] == ""
    # An engine that waited for the compilation would have been silent for all of it.
    assert gap < seconds / 2, (gap, seconds)
    assert ask({"type": "string", "pattern": "(.*){60}"})[1] < seconds / 2


def test_alternatives_that_begin_alike_end_their_own_answer(wide):
    wide.model = wide.client().models.list().data[0].id
    schema = {"anyOf": [{"type": "array", "items": {"type": "string", "minLength": 1}} for _ in range(190)]}
    with pytest.raises(openai.InternalServerError, match="alike"):
        wide.client().completions.create(
            model=wide.model, prompt="a", max_tokens=200, extra_body={"guided_json": schema}
        )
    assert json.loads(wide.get("/health"))["status"] == "ok"
