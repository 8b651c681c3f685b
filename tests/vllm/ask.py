"""Starts vLLM in a process of its own, asks it, and writes what it answered. ask.py REQUEST.json ANSWER.json

The request: {"engine": keyword arguments of LLM, "prompts": texts or lists of token ids, "passes": N, "sampling": keyword
arguments of SamplingParams}. The answer: {"passes": [[{"text", "tokens", "logprobs", "prompt_tokens", "cached"}]],
"statistics": of the plug-in's self-check, one a worker}.
"""

import json
import pathlib
import sys


def main() -> None:
    request = json.loads(pathlib.Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=True, **request["engine"])
    sampling = SamplingParams(temperature=0, **request["sampling"])
    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in request["prompts"]]
    passes = []
    for _ in range(request["passes"]):
        answered = []
        for result in llm.generate(prompts, sampling, use_tqdm=False):
            output = result.outputs[0]
            answered.append(
                {
                    "text": output.text,
                    "tokens": list(output.token_ids),
                    "logprobs": [
                        {str(token): entry.logprob for token, entry in step.items()} for step in output.logprobs or []
                    ],
                    "prompt_tokens": len(result.prompt_token_ids),
                    "cached": result.num_cached_tokens,
                }
            )
        passes.append(answered)
    from spotattention.vllm import statistics

    pathlib.Path(sys.argv[2]).write_text(json.dumps({"passes": passes, "statistics": llm.collective_rpc(statistics)}))


if __name__ == "__main__":
    main()
