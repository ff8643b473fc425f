"""Run a program as `python PROGRAM ARGS` does, from the compiled file that imports of it keep.

Python compiles a script at each start: for orchestrator.py that takes as long as all of its imports.
"""
import os
import sys
from importlib.machinery import SourceFileLoader

del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
__file__ = sys.argv[0]
exec(SourceFileLoader("__main__", __file__).get_code("__main__"))  # type: ignore[arg-type]
