"""sglang.Engine in a process of its own: standalone.py ARGUMENTS, a JSON object. For each line of JSON [prompts, tokens] on stdin, it generates and
prints `rate: TOKENS-A-SECOND`; the first line is `ready`."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    import sglang
    server = sglang.Engine(**json.loads(sys.argv[1]), log_level="warning")
    print("ready", flush=True)
    for line in sys.stdin:
        prompts, tokens = json.loads(line)
        begun = time.perf_counter()
        answers = server.generate(input_ids=prompts, sampling_params={"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
                                  return_logprob=True)
        print("rate:", sum(a["meta_info"]["completion_tokens"] for a in answers) / (time.perf_counter() - begun), flush=True)
    server.shutdown()


if __name__ == "__main__":      # its processes are spawned: they import this file again
    main()
