"""The launchers' PY_SCRIPT_PATH in the original NEO: runs pretrain_gpt.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "pretrain_gpt.py"), run_name="__main__")
