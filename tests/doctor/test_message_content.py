"""What the doctor's findings name of each broken file: new wording must name no less than was recorded.

To record: RECORD_FINDINGS=1 pytest -n 0 tests/doctor/test_message_content.py. Messages of errors: see messages.py.
"""

import json
import os
from pathlib import Path

import pytest
from messages import GOLDEN, names
from test_broken_inputs import FILES, LEFT_OUT, REFUSED, TRAIN, WARNED, drawn, root, run

from sapiens_accel.config.schema import Config
from sapiens_accel.doctor import report as doctor

__all__ = ["drawn", "root", "run"]
FILE = GOLDEN / "findings.json"
CASES = {**REFUSED, **LEFT_OUT, **WARNED}


def _findings(run: Config) -> list[str]:
    report, _, _ = doctor.check_data(run)
    folder = f"{run.data.root}/"
    return [f"{f.level}: {': '.join([f.text, *f.culprits])}".replace(folder, "") for f in report.findings]


@pytest.mark.parametrize("case", [*FILES, *CASES])
def test_findings_name_what_they_named(run: Config, root: Path, case: str) -> None:
    file = root / TRAIN
    if case in FILES:
        file.write_bytes(FILES[case][0])
    else:
        file.write_text(json.dumps(CASES[case][0](json.loads(file.read_text()))))
    found = _findings(run)
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if os.environ.get("RECORD_FINDINGS"):
        FILE.write_text(json.dumps(golden | {case: found}, indent=1) + "\n")
        return
    now = set().union(*map(names, found))
    levels = {line.split(":")[0] for line in found}
    for line in golden[case]:
        assert names(line) <= now, f"no longer named: {sorted(names(line) - now)} of {line!r}"
        assert line.split(":")[0] in levels, line
