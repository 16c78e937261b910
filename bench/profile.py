"""Where the time of a step goes: the offline engine under torch's profiler.

    python bench/profile.py --n 64 --inp 1024 --decode-steps 32 --model_dir /models/x [--trace FILE]

The work is done by ``bench/breakdown.py``. This file has the name of a module of the standard
library, and scripts of this folder have the folder on their path before it.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "profile":  # somebody, such as cProfile, wants the standard library's
    _path = Path(sysconfig.get_path("stdlib")) / "profile.py"
    _spec = importlib.util.spec_from_file_location(__name__, _path)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
elif __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    from bench.breakdown import main

    sys.exit(main())
