"""Sixteen clients at once, some of whom go away; tests/server/load.py is also the long form."""

import random

import pytest
from load import COMMON, check, kill_in_the_middle, long_answer, run_load


# Some forty requests, each by two servers, one of them by itself: about half a minute on a core.
@pytest.mark.timeout(600)
def test_answers_are_those_of_requests_alone(start, book, seed):
    # About 98 pages for twelve answers of up to 70 each: some give way to others.
    crowded = start(*COMMON, "--cache-gib", "0.018", "--max-sequences", "12", "--max-step-tokens", "192")
    results = run_load(crowded, book, 16, random.Random(seed), requests=2)
    ended = crowded.wait_until_idle()["vllm:request_success_total"]
    assert ended <= sum(body["n"] for body, _, _ in results)
    # Some of the nonsense is a request after all.
    results += run_load(crowded, book, 12, random.Random(seed + 1), requests=1, make=long_answer, vandals=2)
    metrics = crowded.wait_until_idle()
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    reference = start(*COMMON, "--max-sequences", "1", "--no-prefix-cache")
    assert check(results, reference) > 100
    for server in (crowded, reference):
        assert server.stop()[0] == 0


def test_kill_in_the_middle_of_many_answers(start, book, seed):
    killed = start(*COMMON, "--cache-gib", "0.03", "--max-sequences", "8")
    assert kill_in_the_middle(killed, book, 12, random.Random(seed)) >= 4
