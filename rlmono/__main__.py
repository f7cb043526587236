"""`python -m rlmono VERB …`

    train     train a model; started by torchrun or srun on every rank (launch/run.sh does it), or with --dry-run by hand
    convert   turn a checkpoint into one of another format: HF, torch_dist, bf16, fp8
    report    make the report of a run directory
    view      print samples of a run, with their rewards and masks in colour
    ranks     check a configuration, and print how many ranks a node starts (for launch/run.sh)
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    verb, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if verb == "view" or {"-h", "--help"} & set(argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` has read enough
    if verb == "train":
        from rlmono.loop.start import train
        return train(argv)
    if verb == "ranks":
        from rlmono.loop.start import ranks
        return ranks(argv)
    if verb == "convert":
        from rlmono.convert.main import main as convert
        return convert(argv)
    if verb == "report":
        from rlmono.observe.report import main as report
        return report(argv)
    if verb == "view":
        from rlmono.observe.view import main as view
        return view(argv)
    print(__doc__, file=sys.stderr)
    if verb not in ("", "-h", "--help"):
        print(f"rlmono: unknown verb {verb!r}; known: train, convert, report, view, ranks", file=sys.stderr)
    return 0 if verb in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
