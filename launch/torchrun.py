"""torchrun, with one line about the rank that failed first in place of a traceback: a rank tells its own error."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> int:
    """The exit status: that of the first rank that failed; 128 + n where signal n ended it or this process."""
    logging.disable(logging.ERROR)      # the agent's own account of it
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"launch: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; the others were stopped", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as e:
        print(f"launch: {e.sigval.name}: all ranks of this node were stopped", file=sys.stderr)
        return 128 + e.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
