"""``python watched.py train.py ...``: runs the script, then says on standard error if torch came along."""

import runpy
import sys

try:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch imported" if "torch" in sys.modules else "torch not imported", file=sys.stderr)
