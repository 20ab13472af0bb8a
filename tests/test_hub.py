"""Fetching through the real client from a hub on loopback: what goes wrong, what is said, and what the next run does.

Stages run as their own processes, each test with its own HF_HOME: the client reads its environment as it is imported.
Waits between attempts are cut short as a server may ask for it (Retry-After, RateLimit).
"""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import httpx2
import pytest
from hub_server import Fault, Hub, git_blob, serve
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tenacity import RetryCallState, Retrying

import pipeline.lib.hub

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
FILES = {  # path on the hub -> name in the stage's output
    **{
        f"data/{side}_{fold}-00000-of-00001.parquet": f"{side}_{fold}.parquet"
        for side in ("forget", "retain")
        for fold in ("train", "validation")
    },
    **{f"mia_data/{name}.jsonl": f"mia/{name}.jsonl" for name in ("member", "nonmember")},
}
LARGE, SMALL = "data/forget_train-00000-of-00001.parquet", "mia_data/member.jsonl"
PIECE = 10 * 2**20  # bytes that the client writes at once; what is lost with a connection is less than that
BYTES = random.Random(0).randbytes(PIECE + 2**20)
SHA256 = hashlib.sha256(BYTES).hexdigest()
AT_ONCE = {429: {"RateLimit": '"api";r=0;t=0'}, 503: {"Retry-After": "0"}}  # how the hub says when to come back
slow = pytest.mark.slow


def contents(mark: bytes = b"") -> dict[str, bytes]:
    """Files of the competition's dataset: one of a piece and more, one small, the others between."""
    return {**{path: path.encode() * 30 + mark for path in FILES}, SMALL: b"small" + mark, LARGE: BYTES + mark}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        hub.commit(f"datasets/{REPOSITORY}", contents())
        hub.tokens = {"hf_right": True, "hf_other": False}
        yield hub


class Machine:
    """One user's machine: a cache and an output folder."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.output, self.cache = folder / "out", folder / "home" / "hub"

    def command(self, *arguments: str) -> list[str]:
        stage, *options = arguments or ("fetch_data", "--source", "semeval25")
        return [sys.executable, "-m", f"pipeline.{stage}", *options, "--output", str(self.output)]

    def environment(self, token: str = "", **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **kept,
            "HF_ENDPOINT": self.hub.address,
            "HF_HOME": str(self.folder / "home"),
            "HF_TOKEN": token,
            **more,
        }

    def run(self, *arguments: str, largest: int = -1, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a stage; no file that it writes may have more than `largest` bytes (-1: any)."""
        self.hub.asked.clear()
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
        options = {"cwd": ROOT, "env": self.environment(**environment), "capture_output": True, "text": True}
        return subprocess.run(self.command(*arguments), preexec_fn=limit, timeout=60, **options)

    def succeeds(self, *arguments: str, expected: Mapping[str, bytes] | None = None, **environment: str) -> str:
        """Run a stage, check what it wrote byte by byte, and return what it said."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        found = {str(p.relative_to(self.output)): p.read_bytes() for p in self.output.rglob("*") if p.is_file()}
        assert found == {FILES[path]: content for path, content in (expected or contents()).items()}
        return done.stdout + done.stderr

    def fails(self, *arguments: str, largest: int = -1, **environment: str) -> str:
        """Run a stage, check that it fails in one clear line and leaves nothing, and return the line."""
        done = self.run(*arguments, largest=largest, **environment)
        assert done.returncode == 2, done.stderr
        *before, line = done.stderr.splitlines()
        assert line.startswith("error: ") and done.stderr.endswith("\n")
        assert not any(other.startswith(("error: ", "Traceback")) for other in before)
        assert not self.output.exists() and list(self.folder.glob(".out.partial")) == []
        return line


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path)


def traces(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# ---- tokens ----


def test_gated_repository(hub, machine):
    """No token, an unknown one, one without access; then the right one. Information is open, as on the real hub."""
    hub.gated.add(f"datasets/{REPOSITORY}")
    for token, said in {
        "": "gated, and there is no token with access",
        "hf_wrong": "the hub does not accept the token (HF_TOKEN, or the login on this machine)",
        "hf_other": "gated, and there is no token with access",
    }.items():
        line = machine.fails(token=token)
        assert line.startswith(f"error: {REPOSITORY}: {said}")
        assert "https://llmunlearningsemeval2025.github.io" in line and "hf auth login" in line and "HF_TOKEN" in line
        assert not token or token not in line
    machine.succeeds(token="hf_right")


def test_token_goes_to_the_hub_alone_and_into_no_file_or_log(hub, machine, tmp_path):
    """Redirects: of HEAD to the store (a large file), and of GET (a small one, against the client's expectation)."""
    hub.gated.add(f"datasets/{REPOSITORY}")
    hub.faults = [Fault("GET", SMALL, status=302, headers={"Location": f"{hub.store}/{SHA256}"})]
    line = machine.fails(token="hf_right")
    assert f"file should be of size {len(contents()[SMALL])} but has size {len(BYTES)}" in line  # it did follow
    assert "hf_right" not in line and traces(tmp_path, "hf_right") == []
    assert {asked.token for asked in hub.asked if asked.server == "store"} == {None}
    said = machine.succeeds(token="hf_right", HF_DEBUG="1")  # the client's own log of every request
    assert "authorization: <TOKEN>" in said
    assert "hf_right" not in said and traces(tmp_path, "hf_right") == []
    assert {asked.token for asked in hub.asked if asked.server == "store"} <= {None}
    asked = [one for one in hub.asked if one.server == "hub" and one.path != "/api/agent-harnesses"]
    assert {one.token for one in asked} == {"Bearer hf_right"}


@slow
def test_token_with_xet(hub, machine, tmp_path):
    """The hub's other store is asked with a token of its own, and fails in one line (it is not imitated further)."""
    headers = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.address}/api/xet", "X-Repo-Commit": "c" * 40}
    headers |= {"X-Linked-Etag": SHA256, "X-Linked-Size": str(len(BYTES)), "Location": f"{hub.store}/{SHA256}"}
    store = {"X-Xet-Cas-Url": hub.store, "X-Xet-Access-Token": "its_own", "X-Xet-Token-Expiration": "9999999999"}
    hub.faults = [
        Fault("HEAD", LARGE, status=302, headers=headers),
        Fault("GET", "/api/xet", status=200, headers=store, times=9),
        Fault("GET", "/reconstructions/", status=404, times=9),
    ]
    assert "cannot be downloaded" in machine.fails(token="hf_right")
    asked = [one for one in hub.asked if "/reconstructions/" in one.path]
    assert asked and {one.token for one in asked} == {"Bearer its_own"}
    assert traces(tmp_path, "hf_right") == []
    machine.succeeds(token="hf_right")


@pytest.mark.parametrize("token", ["hf_\x7fright", "hf_\N{LEFT DOUBLE QUOTATION MARK}right"])
def test_token_that_no_request_can_carry(hub, machine, token):
    """The connection's own error would show it."""
    line = machine.fails(token=token)
    assert "the token (HF_TOKEN, or the login on this machine) has a character that no request can carry" in line
    assert "right" not in line and hub.asked == []


# ---- connections ----


def test_connection_that_drops_goes_on_where_it_stopped(hub, machine):
    hub.faults = [Fault("GET", SHA256, after=PIECE + 2**19)]
    said = machine.succeeds()
    ranges = [asked.headers["Range"] for asked in hub.asked if asked.path == f"/{SHA256}"]
    assert ranges == [None, f"bytes={PIECE}-"]
    assert "/ 11.5MB" in said  # progress in bytes of all files, though stderr is a pipe


@slow
def test_connection_that_is_reset(hub, machine):
    """The client does not go on within the file; what else it has got, it does not ask for again."""
    hub.faults = [Fault("GET", SHA256, after=PIECE, reset=True)]
    said = machine.succeeds()
    assert f"{REPOSITORY}: [Errno 104] Connection reset by peer: attempt 2 of 4 follows" in said
    files = hub.requests("store") + [path for path in hub.requests("hub", "GET") if "resolve" in path]
    assert sorted(files.count(path) for path in set(files)) == [1, 1, 1, 1, 1, 2]


@slow
@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub(hub, machine, status):
    """Each endpoint is busy once: revision, tree, HEAD, GET of a small file, GET of a large one in the store."""
    busy = [("GET", "/revision/"), ("GET", "/tree/"), ("HEAD", SMALL), ("GET", SMALL), ("GET", SHA256)]
    hub.faults = [Fault(method, path, status=status, headers=AT_ONCE[status]) for method, path in busy]
    machine.succeeds()
    assert [asked.status for asked in hub.asked].count(status) == len(busy)


PAUSES = [  # status, headers, seconds until the attempts 2, 3 and 4
    (429, {"RateLimit": '"api";r=0;t=7'}, (8, 8, 8)),  # a second more than the hub says
    (429, {"RateLimit": '"api";r=0;t=900'}, (300, 300, 300)),
    (429, {"RateLimit": '"api";r=5;t=7'}, (1, 2, 4)),  # requests are left: it was not they
    (503, {"Retry-After": "5"}, (5, 5, 5)),
    (503, {"Retry-After": "86400"}, (300, 300, 300)),
    (503, {"Retry-After": "Tue, 24 Nov 2026 14:00:00 GMT"}, (1, 2, 4)),  # a date is not waited for
    (500, {}, (1, 2, 4)),
]


def failed(error: Exception, attempt: int) -> RetryCallState:
    """A download's state after an attempt that ended in an error."""
    state = RetryCallState(Retrying(), None, (REPOSITORY,), {})
    state.attempt_number = attempt
    state.set_exception((type(error), error, None))
    return state


def answer(status: int, headers: dict[str, str]) -> HfHubHTTPError:
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub/x"))
    return HfHubHTTPError(f"\n{status} of the hub\nmore", response=response)


@pytest.mark.parametrize(("status", "headers", "seconds"), PAUSES)
def test_the_next_attempt_comes_when_the_hub_asks_for_it(status, headers, seconds):
    error = answer(status, headers)
    assert tuple(pipeline.lib.hub._pause(failed(error, attempt)) for attempt in (1, 2, 3)) == seconds
    wrapped = LocalEntryNotFoundError("not in the cache")  # what the client makes of it
    wrapped.__cause__ = error
    assert pipeline.lib.hub._pause(failed(wrapped, 1)) == seconds[0]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        *((answer(status, {}), True) for status in (408, 429, 500, 502, 503, 504)),
        *((answer(status, {}), False) for status in (400, 401, 403, 404, 501)),
        (httpx2.ReadTimeout("no answer"), True),
        (httpx2.ConnectError("refused"), True),
        (LocalEntryNotFoundError("offline, and not in the cache"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_another_attempt_is_made_where_it_may_help(error, again):
    assert pipeline.lib.hub._may_pass(error) == again


def test_the_log_says_what_failed_and_which_attempt_follows(capsys):
    pipeline.lib.hub._tell(failed(answer(503, {}), 2))
    assert capsys.readouterr().err == f"{REPOSITORY}: 503 of the hub: attempt 3 of 4 follows\n"


@slow
def test_hub_that_stays_busy(hub, machine):
    hub.faults = [Fault("GET", "/revision/", status=503, headers=AT_ONCE[503], times=4)]
    assert "the hub is out of reach (Server error '503 Service Unavailable'" in machine.fails()
    assert len([path for path in hub.requests("hub") if "/revision/" in path]) == 4
    machine.succeeds()


@slow
@pytest.mark.parametrize("place", ["/revision/", SHA256])
def test_server_that_never_answers(hub, machine, place):
    """Without an end to each wait the first would hang for ever; the second is asked again by the client."""
    release = threading.Event()
    hub.faults = [Fault("GET", place, meanwhile=lambda: release.wait(30))]
    try:
        if place == SHA256:
            machine.succeeds(HF_HUB_DOWNLOAD_TIMEOUT="1")
        else:
            assert "the hub is out of reach (timed out)" in machine.fails(HF_HUB_DOWNLOAD_TIMEOUT="1")
    finally:
        release.set()
    machine.succeeds()


@slow
def test_killed_in_the_middle(hub, machine, tmp_path):
    """By SIGKILL, most of the large file received: nothing of it is taken for the file."""
    reached, release = threading.Event(), threading.Event()
    hub.faults = [Fault("GET", SHA256, after=PIECE, meanwhile=lambda: (reached.set(), release.wait(30)))]
    with subprocess.Popen(machine.command(), cwd=ROOT, env=machine.environment(), stderr=subprocess.DEVNULL) as process:
        assert reached.wait(30)
        process.send_signal(signal.SIGKILL)
    release.set()
    assert not machine.output.exists()
    assert list(machine.cache.rglob(f"blobs/{SHA256}.*incomplete")) != []
    machine.succeeds()


# ---- what arrives ----


def test_file_that_is_not_what_the_hub_says(hub, machine):
    wrong = BYTES[:-1] + bytes([BYTES[-1] ^ 1])
    hub.faults = [Fault("GET", SHA256, content=wrong)]
    found = hashlib.sha256(wrong).hexdigest()
    said = (
        f"error: {REPOSITORY}: {LARGE}: its hash is {found}, the hub says {SHA256}: removed from the cache, run again"
    )
    assert machine.fails() == said
    machine.succeeds()


@slow
def test_file_that_is_shorter_than_the_hub_says(hub, machine):
    hub.faults = [Fault("GET", SHA256, content=b"not the file, whole as it is")]
    assert f"file should be of size {len(BYTES)} but has size 28" in machine.fails()
    machine.succeeds()


@slow
def test_small_file_damaged_in_the_cache(hub, machine, tmp_path):
    """Small files are named by git's sha1 of them."""
    machine.succeeds()
    machine.output.rename(tmp_path / "before")
    next(machine.cache.rglob(f"snapshots/*/{SMALL}")).write_bytes(b"smalL")
    said = f"{SMALL}: its hash is {git_blob(b'smalL')}, the hub says {git_blob(b'small')}: removed from the cache"
    assert said in machine.fails(HF_HUB_OFFLINE="1")
    machine.succeeds()


@slow
def test_file_that_is_not_what_the_table_says(hub, machine):
    """MMLU's archive is pinned by commit and by sha256 (data/sources.yaml): here is the commit with another archive."""
    assert "no such dataset on the hub" in machine.fails("fetch_data", "--source", "mmlu")
    hub.commit("datasets/cais/mmlu", {"data.tar": b"another"})
    commit = "c30699e8356da336a370243923dbaf21066bb9fe"
    assert f"cais/mmlu: no revision '{commit}'" in machine.fails("fetch_data", "--source", "mmlu")
    hub.commits[commit] = {"data.tar": b"another"}
    line = machine.fails("fetch_data", "--source", "mmlu")
    assert f"cais/mmlu at {commit}: data.tar: sha256 {hashlib.sha256(b'another').hexdigest()}, expected bec563" in line


@slow
def test_disk_full(hub, machine, tmp_path):
    """First for the cache, then for the output: the cache is whole then, and is not asked for again."""
    line = machine.fails(largest=2**20)
    assert "cannot be written to the cache ([Errno 27] File too large): make room, or set HF_HOME" in line
    assert [path for path in machine.cache.rglob("*") if path.is_file() and path.stat().st_size >= 2**20] == []
    machine.succeeds()
    machine.output.rename(tmp_path / "before")
    assert "out: cannot be made: [Errno 27] File too large" in machine.fails(largest=2**20)
    machine.succeeds()
    assert hub.requests("store") == []


# ---- revisions, and no network ----


@slow
def test_branch_that_moves(hub, machine):
    """Within a run all files are of one commit; the next run gets the new one, and asks only for what changed."""
    repository, old = f"datasets/{REPOSITORY}", next(iter(hub.commits))
    moved = contents() | {SMALL: b"moved"}
    hub.faults = [Fault("HEAD", "/resolve/", meanwhile=lambda: hub.commit(repository, moved))]
    assert f"{REPOSITORY}: commit {old}" in machine.succeeds()
    new = hub.branches[repository]["main"]
    assert new != old
    assert f"{REPOSITORY}: commit {new}" in machine.succeeds(expected=moved)
    assert hub.requests("store") == [] and len([path for path in hub.requests("hub", "GET") if SMALL in path]) == 1


@slow
def test_offline(hub, machine):
    line = machine.fails(HF_HUB_OFFLINE="1")
    assert "not in the cache, and the hub is out of reach (Cannot reach " in line
    assert "--local" in line and hub.asked == []
    machine.succeeds()
    machine.succeeds(HF_HUB_OFFLINE="1")
    assert hub.asked == []


@slow
def test_offline_with_a_part(hub, machine, tmp_path):
    machine.succeeds()
    machine.output.rename(tmp_path / "before")
    next(machine.cache.rglob(f"snapshots/*/{LARGE}")).unlink()
    assert "only a part is in the cache" in machine.fails(HF_HUB_OFFLINE="1")
    machine.succeeds()


def test_pinned_revision_in_the_cache_asks_nothing(hub, machine):
    """Nothing at all, not even what the client asks about itself; nor does a part of it pass as the whole."""
    files = {"config.json": b"{}", "model.safetensors": BYTES, "checkpoint-5/model.safetensors": BYTES + b"5"}
    commit = hub.commit("models/a/b", files)
    program = (
        f"from pipeline.lib.hub import snapshot; snapshot('a/b', 'model', '{commit}', ['*.json', '*.safetensors'])"
    )

    def fetch() -> set[str]:
        hub.asked.clear()
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=machine.environment(), check=True)
        folder = machine.cache / "models--a--b" / "snapshots" / commit
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    wanted = {"config.json", "model.safetensors"}  # and no weights of a folder below
    assert fetch() == wanted and hub.requests("store") == [f"/{SHA256}"]
    assert fetch() == wanted and hub.asked == []
    next(machine.cache.rglob(f"blobs/{SHA256}")).unlink()
    assert fetch() == wanted and hub.requests("store") == [f"/{SHA256}"]
    next(machine.cache.rglob("trees/*.json")).unlink()  # a cache made by an older client has no list of what is whole
    next(machine.cache.rglob(f"blobs/{SHA256}")).unlink()
    assert fetch() == wanted and hub.requests("store") == [f"/{SHA256}"]
