"""Try to lose, leak or change something, and count. Prints a table; exit code 1 if a check failed or tried nothing.

Writes  --work DIR: checkouts that are made, harmed and made again, of about 40 MB each. The first, made-1, is taken as
        it is if it is there already, if it is of the same source files.
Run     python -m tests.trust                       all of it: an hour on 2 cores; the mounts need root
        python -m tests.trust kills --kills 6 --work work
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tabulate import tabulate

from tests.trust.checkout import ZIP, Check, clean_copy, planned_jobs
from tests.trust.edit_matrix import matrix
from tests.trust.faults import faults
from tests.trust.fuzz import fuzz
from tests.trust.kills import kills
from tests.trust.same_bytes import run_from_clean, same_bytes
from tests.trust.study_edits import study_matrix

GROUPS = ("kills", "faults", "bytes", "edits", "fuzz")


def undisturbed(work: Path) -> Path:
    """A checkout in which tiny has been made, from the source files as they are now."""
    made = work / "made-1"
    if not (made / ZIP).is_file():
        return run_from_clean(made)
    clean_copy(made)
    if planned_jobs(made):
        shutil.rmtree(made)
        return run_from_clean(made)
    return made


def checks(args: argparse.Namespace, work: Path) -> list[Check]:
    found: list[Check] = []
    if {"kills", "faults", "bytes"} & set(args.groups):
        made = undisturbed(work)
    if "kills" in args.groups:
        found += kills(made, work, args.kills, args.seed)
    if "faults" in args.groups:
        found += faults(made, work)
    if "bytes" in args.groups:
        found += same_bytes(made, work, args.runs)
    if "edits" in args.groups:
        with ThreadPoolExecutor() as pool:  # planning uses one core
            found += [check for part in pool.map(lambda one: one(work), (matrix, study_matrix)) for check in part]
    if "fuzz" in args.groups:
        found.append(fuzz(work / "fuzz", args.minutes))
    return found


def verdict(check: Check) -> str:
    return f"NOT RUN: {check.not_run}" if check.not_run else "passed" if check.passed else "FAILED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--work", type=Path, help="default: a new folder, removed at the end if all is well")
    parser.add_argument("--kills", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="from clean (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="of fuzzing (default: %(default)s)")
    args = parser.parse_args()
    args.groups = args.groups or list(GROUPS)
    for group in args.groups:
        if group not in GROUPS:
            parser.error(f"{group}: no such group, there are {', '.join(GROUPS)}")
    for name in ("kills", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if begun in the background
    started = time.monotonic()
    work = args.work or Path(tempfile.mkdtemp(prefix="trust-"))
    work.mkdir(parents=True, exist_ok=True)
    found = checks(args, work.resolve())
    rows = [(one.name, one.tried, one.good, verdict(one), one.note) for one in found]
    print(tabulate(rows, ["check", "tried", "good", "", "of what"], tablefmt="github"))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {args.seed}")
    well = any(one.passed for one in found) and all(one.passed or one.not_run for one in found)
    if well and not args.work:
        shutil.rmtree(work)
    elif not well:
        print(f"what was left: {work}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
