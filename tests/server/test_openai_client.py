"""The server through the official client, against transformers where text and numbers are concerned."""

import concurrent.futures

import openai
import pytest
import torch
import transformers

MODEL = "tiny-qwen3"


@pytest.fixture(scope="module")
def reference(tiny_qwen3):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompt, count):
        """Greedy token ids, and the log-probabilities of every step [count, vocabulary]."""
        ids = tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else torch.tensor([prompt])
        logprobs = []
        for _ in range(count):
            logprobs.append(torch.log_softmax(model(ids).logits[0, -1].double(), -1))
            ids = torch.cat([ids, logprobs[-1].argmax().view(1, 1)], 1)
        return ids[0, -count:].tolist(), torch.stack(logprobs)

    return tokenizer, generate


def test_greedy_text_and_logprobs_are_transformers(client, reference, book, seed):
    tokenizer, generate = reference
    start = seed % (len(book) - 4000)
    prompt = book[start : start + 900]
    expected, logprobs = generate(prompt, 12)
    reply = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=0, logprobs=5, extra_body={"ignore_eos": True}
    )
    choice = reply.choices[0]
    steps = len(expected)
    for i, row in enumerate(logprobs):  # up to the first near tie, where rounding may choose
        best = row.topk(2).values
        if best[0] - best[1] < 1e-3:
            steps = i
            break
    assert choice.logprobs.tokens[:steps] == [tokenizer.decode([t]) for t in expected[:steps]]
    if steps == len(expected):
        assert choice.text == tokenizer.decode(expected)
    assert choice.finish_reason == "length"
    assert reply.usage.prompt_tokens == len(tokenizer(prompt).input_ids)
    assert reply.usage.completion_tokens == 12 and reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    for i in range(steps):
        assert choice.logprobs.token_logprobs[i] == pytest.approx(logprobs[i, expected[i]].item(), abs=2e-3)
        top = sorted(choice.logprobs.top_logprobs[i].values(), reverse=True)
        assert top[:5] == pytest.approx(logprobs[i].topk(5).values.tolist(), abs=2e-3)


def test_streams_say_the_same(client, book, seed):
    request = {"model": MODEL, "temperature": 0.9, "seed": seed, "max_tokens": 20, "n": 2}
    prompt = book[seed % 3000 :][:400]
    whole = client.completions.create(prompt=prompt, **request)
    texts, finishes, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(
        prompt=prompt, stream=True, stream_options={"include_usage": True}, **request
    ):
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert chunk.usage is None and chunk.id.startswith("cmpl-")
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        finishes[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices] and finishes == [c.finish_reason for c in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    # The second answer is that of the next seed.
    request.update(seed=seed + 1, n=1)
    assert client.completions.create(prompt=prompt, **request).choices[0].text == texts[1]


def test_token_prompts_lists_and_caching(client, reference, book):
    tokenizer, _ = reference
    ids = tokenizer(book[:600]).input_ids
    request = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    alone = [client.completions.create(prompt=p, **request).choices[0].text for p in (ids, ids[:50])]
    both = client.completions.create(prompt=[ids, ids[:50]], **request)
    assert [c.text for c in both.choices] == alone and [c.index for c in both.choices] == [0, 1]
    assert both.usage.prompt_tokens_details.cached_tokens == (len(ids) - 1) // 16 * 16 + 49 // 16 * 16


def test_stop_and_bias(client, book):
    request = {"model": MODEL, "prompt": book[:300], "temperature": 0, "max_tokens": 24}
    free = client.completions.create(extra_body={"ignore_eos": True}, **request).choices[0].text
    stop = free[len(free) // 2 :][:3]
    cut = client.completions.create(stop=[stop, "\0never"], extra_body={"ignore_eos": True}, **request).choices[0]
    assert cut.text == free[: free.index(stop)] and cut.finish_reason == "stop"
    forced = client.completions.create(logit_bias={"77": 100}, logprobs=0, **request)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1


def test_attention_of_a_request(client, book, server):
    prompt = (book * 2)[:7000]
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    dense = client.completions.create(**request).choices[0].text
    before = server.metrics()
    everything = client.completions.create(extra_body={"attention": "spot:k=8192"}, **request)
    assert everything.choices[0].text == dense
    # The prompt was read densely by both.
    assert everything.usage.prompt_tokens_details.cached_tokens > everything.usage.prompt_tokens - 17
    for attention in ("spot:p=0.5", "spot:k=640", "spot:k=640,prefill=sparse", "spot:k=25%,floor=64,recency=32"):
        client.completions.create(extra_body={"attention": attention}, **request)
    after = server.metrics()
    assert after["spot:sparse_queries_total"] >= before["spot:sparse_queries_total"] + 4 * 7 * 8
    assert after["spot:captured_mass_count"] > before["spot:captured_mass_count"]
    share = after["spot:captured_mass_sum"] / after["spot:captured_mass_count"]
    assert 0.3 < share <= 1
    assert after["spot:attended_tokens_total"] < after["spot:visible_tokens_total"]


def test_chat_and_its_template(client, server, reference):
    tokenizer, _ = reference
    messages = [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}]
    request = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6}
    body = {"ignore_eos": True}
    reply = client.chat.completions.create(logprobs=True, top_logprobs=2, extra_body=body, **request)
    prompt = "<|im_start|>user\nOne\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert reply.usage.prompt_tokens == len(tokenizer(prompt).input_ids)
    plain = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6, extra_body=body)
    message = reply.choices[0].message
    assert message.role == "assistant" and message.content == plain.choices[0].text
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 6 and all(len(e.top_logprobs) == 2 for e in entries)
    assert b"".join(bytes(e.bytes) for e in entries).decode() == message.content
    text, roles = "", []
    for chunk in client.chat.completions.create(stream=True, extra_body=body, **request):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        roles.append(delta.role)
    assert text == message.content and roles[0] == "assistant" and not any(roles[1:])
    # Without max_tokens an answer may fill what is left; a template that opens <think> makes it reasoning.
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, **body}
    reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, extra_body=thinking)
    assert reply.choices[0].message.content == "" and reply.choices[0].message.reasoning_content
    reasoning = "".join(
        getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        for chunk in client.chat.completions.create(stream=True, extra_body=thinking, **request)
    )
    assert reasoning


def test_tokenize(server, reference):
    import json
    import urllib.request

    tokenizer, _ = reference

    def post(path, body):
        request = urllib.request.Request(
            server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request))

    text = "Grüße, 世界 <|im_end|> 123"
    reply = post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert reply["tokens"] == tokenizer(text).input_ids and reply["count"] == len(reply["tokens"])
    assert len(reply["token_strs"]) == reply["count"] and reply["max_model_len"] == 4096
    assert post("/detokenize", {"tokens": reply["tokens"]})["prompt"] == text
    chat = post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert tokenizer.decode(chat["tokens"]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_refusals_are_the_clients_errors(client, server):
    def refused(kind, field=None, **request):
        with pytest.raises(kind) as caught:
            client.completions.create(**{"model": MODEL, "prompt": "a", **request})
        assert caught.value.body["param"] == field
        return caught.value.body["message"]

    assert "hot" in refused(openai.BadRequestError, "temperature", temperature="hot")
    refused(openai.BadRequestError, "suffix", suffix="x")
    refused(openai.NotFoundError, "model", model="other")
    assert "4096" in refused(openai.BadRequestError, "prompt", max_tokens=5000)
    refused(openai.BadRequestError, "attention", extra_body={"attention": "quest:k=10%"})
    refused(openai.BadRequestError, "attention", extra_body={"attention": "spot:nonsense=1"})
    refused(openai.BadRequestError, "prompt", prompt=[1, 5000])
    refused(openai.BadRequestError, "prompt", prompt=[])
    refused(openai.BadRequestError, "logit_bias", logit_bias={"99999": 1})
    assert "above 0 to 1" in refused(openai.BadRequestError, "top_p", top_p=0)
    assert refused(openai.BadRequestError, "max_tokens", max_tokens=0).endswith("1 is the least")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], extra_body={"guided_grammar": "root"}
        )
    assert caught.value.body["param"] == "guided_grammar"
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    server.wait_until_idle()


def test_api_key(start):
    guarded = start("--api-key", "secret", "--cache-gib", "0.05", "--max-tokens", "256")
    for key in ("wrong", "secre", "secret2", ""):
        with pytest.raises(openai.AuthenticationError):
            guarded.client(api_key=key or "x").models.list()
    assert guarded.client(api_key="secret").models.list().data[0].id == MODEL
    assert guarded.get("/health") and "vllm:num_requests_running" in guarded.get("/metrics")
    with pytest.raises(openai.BadRequestError, match="chat template"):
        guarded.client(api_key="secret").chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}]
        )
    status, errors = guarded.stop()
    assert status == 0 and "error" not in errors


def test_an_fp8_cache_holds_four_times_the_tokens_of_float32(start, book):
    """Of one prompt alone and among others, and from the prefix cache, the same answer."""
    numbers, codes = (
        start("--cache-gib", "0.02", "--max-tokens", "2048", "--kv-cache-dtype", word) for word in ("auto", "fp8")
    )
    pages = []
    for server, word in ((numbers, "auto"), (codes, "fp8")):
        info = next(line for line in server.get("/metrics").splitlines() if line.startswith("vllm:cache_config_info"))
        assert f'cache_dtype="{word}"' in info
        pages.append(int(info.split('num_gpu_blocks="')[1].split('"')[0]))
    assert 3.9 * pages[0] < pages[1] < 4.1 * pages[0]
    asked = dict(model=MODEL, prompt=book[:900], max_tokens=24, temperature=0, logprobs=1)
    alone = codes.client().completions.create(**asked).choices[0]
    exact = numbers.client().completions.create(**asked).choices[0]
    assert alone.logprobs.token_logprobs != exact.logprobs.token_logprobs
    assert abs(alone.logprobs.token_logprobs[0] - exact.logprobs.token_logprobs[0]) < 0.5
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        others = [
            pool.submit(codes.client().completions.create, **asked | {"prompt": book[i:900]}) for i in (0, 30, 60)
        ]
        assert others[0].result().choices[0].text == alone.text
        assert all(other.result().choices[0].text for other in others)
    with pytest.raises(openai.BadRequestError, match="quest"):
        codes.client().completions.create(**asked, extra_body={"attention": "quest"})
