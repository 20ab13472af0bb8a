"""Coverage-guided fuzzing of the row readers: any bytes are rows, or are refused in one line that names the file.

The fuzzed program is readers.py. Needs atheris, which is in no lock file: `pip install atheris`.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.trust.checkout import Check
from tests.trust.readers import SEPARATOR

FIELDS = '{"id": "%s%s1", "input": "a", "output": "b", "task": "Task%d", "split": "%s"}\n'


def rows(side: str) -> bytes:
    names = [(f"{side[0]}{task}", kind, task, side) for task in (1, 2, 3) for kind in ("sc", "qa")]
    return "".join(FIELDS % name for name in names).encode()


def seeds() -> list[bytes]:
    """Inputs to begin with; the first byte chooses what reads the rest."""
    documents = [b'{"id": "f3", "document": "one"}\n', b'{"id": "n1", "document": "two"}\n']
    general = b'{"id": "g1", "text": "three"}\n'
    columns = b'{"id": {"0": "asc1"}, "input": {"0": "x"}, "output": {"0": "y"}, "task": {"0": "Task1"}}'
    completion = b'{"id": "asc1", "task": "Task1", "split": "forget", "input": "", "expected_output": "", '
    scored = [
        completion + b'"model_output": "", "nll": 0.5}\n',
        b'{"id": "a", "set": "member", "nll": 1}\n',
        b'{"subject": "s", "index": 0, "answer": "A", "probs": [0.1, 0.2, 0.3, 0.4]}\n',
    ]
    tables = [b"\x00" + rows("forget"), b"\x00" + columns, *(bytes([n]) + text for n, text in enumerate(scored, 1))]
    raw = SEPARATOR.join([rows("forget"), rows("retain"), *documents, general])
    return [*tables, b"\x04" + raw, b"\x05" + parquet()]


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": ["asc1"], "input": ["x"], "task": ["Task1"]}), sink)
    return bytes(sink.getvalue())


def fuzz(work: Path, minutes: float) -> Check:
    """Fuzz for some minutes; good are the executions without a crash."""
    check = Check("fuzzed readers")
    if find_spec("atheris") is None:
        check.not_run = "pip install atheris"
        return check
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={round(minutes * 60)}", "-print_final_stats=1", "-max_len=4096"]
    options.append(f"-artifact_prefix={work}/crash-")
    command = [sys.executable, "-m", "tests.trust.readers", str(corpus), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    executed = re.search(r"^stat::number_of_executed_units: (\d+)$", done.stderr, re.MULTILINE)
    check.tried = int(executed[1]) if executed else 0
    reached = [0, *map(int, re.findall(r" cov: (\d+)", done.stderr))][-1]
    failed = done.returncode != 0 or not reached  # a crash, or nothing was instrumented
    check.good = check.tried - failed
    check.note = f"{minutes} min, corpus of {len(list(corpus.iterdir()))} files, {reached} places in the code reached"
    if failed:
        print(f"FAILED: {check.name}: input kept in {work}\n{done.stderr[-3000:]}", file=sys.stderr)
    return check
