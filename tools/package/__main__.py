"""`python -m orchestrator`, and the installed command `orchestrator`: what `python orchestrator.py` does."""
import os
import sys
import threading

import orchestrator


def run() -> None:
    exit_code = orchestrator.main()
    impatience = threading.Timer(0.5, os._exit, [exit_code])
    impatience.daemon = True   # threads that a handler left behind must not keep the process
    impatience.start()
    sys.exit(exit_code)


if __name__ == "__main__":
    run()
