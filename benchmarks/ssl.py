"""python benchmarks/ssl.py: what unlabeled people are worth; all of it is in gain.py.

In a script's own folder this name would hide the standard library's `ssl` from the script and its neighbors. So as a
script it puts the folder behind the library, and imported it is the library's module.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))
    import gain

    from sapiens_accel.errors import run_main

    run_main(gain.main)
else:
    spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / "ssl.py")
    assert spec and spec.loader
    sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
