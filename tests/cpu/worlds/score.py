"""transformers' logprobs of what engines have sampled, from the same weights: `score.py FOLDER`, after engine_layouts.py.

A process of its own, as make_families.py is. Prints the largest difference of each layout as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


@torch.no_grad()
def difference(folder: Path) -> float:
    """The largest |Δlogprob| of the answers in a folder of weights."""
    import transformers
    model, worst = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 0.0
    for prompt, ids, log_probs in json.loads((folder / "answers.json").read_text()):
        log_p = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
        worst = max(worst, float((log_p.gather(1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(log_probs)).abs().max()))
    return worst


if __name__ == "__main__":
    from rlmono.engine.compat import prepare_cpu
    prepare_cpu()
    folders = [f.parent for f in sorted(Path(sys.argv[1]).glob("*/answers/*/answers.json"))]
    print(json.dumps({f"{f.parent.parent.name} {f.name}": difference(f) for f in folders}))
