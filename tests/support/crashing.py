"""Kills and disturbs the service under load, and checks afterwards that the log is whole.

Every function here asserts what it promises, so that one that returns has found nothing lost, doubled or half-written.
`test_crashes.py` runs them a few times, `benchmarks/crashes.py` a hundred.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bson
import numpy as np
import numpy.typing as npt
import requests

from bootstrap import make_store
from engines.base import Template
from settings import PROJECT
from store.records import EnrolmentLog, Entry
from tests.service.test_races import a_person
from tests.support.databases import MongoServer
from tests.support.fakes import NO_GATES, write_tiny_pack
from tests.support.running import Service

# Equal pictures have equal templates, and the tiny pack's strangers are rather alike.
SAME = 0.999
CLIENTS = 4
PATIENCE_S = 30.0
UNAVAILABLE = "503 database_unavailable"
NO_ROOM = "503 overloaded"
NO_ANSWER = "no answer"
ENROLLED = "200 enrolled"


@dataclass
class Figures:
    """What a number of kills met.

    Attributes:
        kills: how many.
        enrolled: enrolments that were acknowledged.
        answers: what clients were told, and how often.
        untold: enrolments that were stored although the kill came before their client was told.
    """

    kills: int = 0
    enrolled: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    untold: int = 0


def a_service(folder: Path, mongo_uri: str = "", **settings: str) -> Service:
    """The service on the tiny pack: on a collection of its own, or on SQLite."""
    write_tiny_pack(folder / "pack")
    ours = {
        "FACE_MODEL": str(folder / "pack"),
        "MODEL_THREADS": "1",
        "MONGO_URI": mongo_uri,
        "MONGO_COLLECTION": f"crashes_{uuid.uuid4().hex}",
        "DUPLICATE_THRESHOLD": str(SAME),
        "VERIFY_THRESHOLD": str(SAME),
    }
    return Service(folder, **NO_GATES | ours | settings)


def photo(number: int) -> bytes:
    """A photo of person `number`, padded to what the web server keeps in `uploads/` while it arrives."""
    return a_person(number) + bytes(600_000)


def a_template(number: int) -> Template:
    """The template of person `number`, as `WRITER` makes it: float32[512]."""
    template = np.random.default_rng(number).standard_normal(512, np.float32)
    return np.asarray(template / np.linalg.norm(template), np.float32)


@contextlib.contextmanager
def records_of(service: Service, mongo_uri: str | None = None) -> Iterator[EnrolmentLog]:
    """The service's store, opened beside it."""
    environment = service.environment
    store = make_store(
        environment["MONGO_URI"] if mongo_uri is None else mongo_uri,
        mongo_db="face_recognition",
        mongo_collection=environment["MONGO_COLLECTION"],
        data_dir=Path(environment["DATA_DIR"]),
    )
    with contextlib.closing(store):
        store.prepare()
        yield store


class Crowd:
    """People who sign up one after the other, several at a time, each asking again until told to be enrolled.

    One in three of them then adds a photo, and asks again in the same way.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.user_ids: dict[int, str] = {}
        # Whose added photo was acknowledged.
        self.with_photo: set[int] = set()
        self.answers: list[str] = []
        self._without_photo: deque[int] = deque()
        self._numbers = itertools.count()
        self._unsettled: deque[int] = deque()
        self._recognised = 0

    @contextlib.contextmanager
    def signing_up(self) -> Iterator[None]:
        """Sign people up as fast as the service can, until the block is left."""
        stopped = threading.Event()

        def client() -> None:
            while not stopped.is_set():
                if not self._step():
                    time.sleep(0.02)

        with ThreadPoolExecutor(CLIENTS) as clients:
            working = [clients.submit(client) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                stopped.set()
        for one in working:
            one.result()

    def _step(self) -> bool:
        """Let one person add a photo or sign up; True when told to have succeeded."""
        with contextlib.suppress(IndexError):
            return self.add_photo(self._without_photo.popleft())
        with contextlib.suppress(IndexError):
            return self.sign_up(self._unsettled.popleft())
        return self.sign_up(next(self._numbers))

    def add_photo(self, number: int) -> bool:
        """Let one person add a photo, always with the same Idempotency-Key; True when told that it is added."""
        body = self._send(f"/users/{self.user_ids[number]}/photos", number)
        if body is None:
            self._without_photo.append(number)
            return False
        assert body["photos"] == 2
        self.with_photo.add(number)
        return True

    def sign_up(self, number: int) -> bool:
        """Let one person sign up, always with the same Idempotency-Key; True when told to be enrolled."""
        body = self._send("/signUp", number)
        if body is None:
            self._unsettled.append(number)
            return False
        self.user_ids[number] = body["user_id"]
        if number % 3 == 0:
            self._without_photo.append(number)
        return True

    def _send(self, route: str, number: int) -> dict[str, Any] | None:
        """Send a person's photo; return the body of a `200`, None without one."""
        try:
            answer = self.service.post(route, photo(number), headers={"Idempotency-Key": f"person-{number}"})
            body = dict(answer.json())
        except requests.RequestException:
            self.answers.append(NO_ANSWER)
            return None
        told = f"{answer.status_code} {body.get('code', 'enrolled')}"
        if answer.status_code == 503 and not answer.headers.get("Retry-After", "").isdigit():
            told += " without Retry-After"
        self.answers.append(told)
        return body if answer.status_code == 200 else None

    def wait_for_more(self) -> None:
        """Return when somebody more has been enrolled, as the service does again after every trouble."""
        before, deadline = len(self.user_ids), time.monotonic() + PATIENCE_S
        while len(self.user_ids) == before:
            assert time.monotonic() < deadline, f"nobody could sign up any more: {Counter(self.answers[-20:])}"
            time.sleep(0.01)

    def settle(self) -> None:
        """Let everybody ask again who was not told the outcome."""
        deadline = time.monotonic() + PATIENCE_S
        while self._unsettled or self._without_photo:
            assert time.monotonic() < deadline, f"the service did not recover: {Counter(self.answers[-20:])}"
            self._step()

    def check(self, store: EnrolmentLog) -> int:
        """Assert that the log is whole, and that everybody who was told to be enrolled is in it and recognised.

        Returns how many are enrolled although they were not told so: at most those who asked.
        """
        assert set(self.answers) <= {ENROLLED, UNAVAILABLE, NO_ROOM, NO_ANSWER}
        entries = assert_whole(store)
        assert all(entry.template is not None for entry in entries)
        firsts = [entry.template for entry in entries if entry.template is not None and not entry.is_added]
        assert_nobody_twice(np.stack(firsts))
        photos = Counter(entry.user_id for entry in entries)
        assert set(photos.values()) <= {1, 2}
        assert {user_id for user_id, count in photos.items() if count == 2} >= {
            self.user_ids[number] for number in self.with_photo
        }
        enrolled = {entry.user_id for entry in entries}
        assert enrolled >= set(self.user_ids.values())
        assert len(set(self.user_ids.values())) == len(self.user_ids)
        people = list(self.user_ids.items())
        # Everybody once; who was recognised at an earlier check is only sampled.
        earlier = random.sample(people[: self._recognised], min(self._recognised, 3))
        for number, user_id in [*earlier, *people[self._recognised :]]:
            answer = self.service.post("/verify", a_person(number))
            assert (answer.status_code, answer.json().get("user_id")) == (200, user_id)
        self._recognised = len(people)
        untold = len(enrolled) - len(people)
        assert untold <= len(self._unsettled)
        return untold


def assert_whole(store: EnrolmentLog) -> list[Entry]:
    """Return the log's entries, which are all readable and in places 1 to n."""
    entries = list(store.entries(0))
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    assert not any(entry.unreadable for entry in entries)
    return entries


def assert_nobody_twice(templates: npt.NDArray[np.float32]) -> None:
    cosines = templates @ templates.T
    np.fill_diagonal(cosines, -1)
    assert cosines.max(initial=-1) < SAME


# --- kill -9 of the service ---


def kill_the_service(service: Service, kills: int) -> Figures:
    """Kill the service at random moments of its work and of its start, and start it at once each time."""
    crowd, figures = Crowd(service), Figures()
    service.start()
    for _ in range(kills):
        with crowd.signing_up():
            crowd.wait_for_more()
            time.sleep(random.uniform(0, 0.4))
            service.kill()
        if random.random() < 0.25:
            _kill_while_starting(service)
        service.start()
        assert not [line for line in service.lines if "WARNING" in line or "ERROR" in line]
        assert list(service.uploads.iterdir()) == []
        with records_of(service) as store:
            figures.untold += crowd.check(store)
        crowd.settle()
    with records_of(service) as store:
        assert crowd.check(store) == 0
    return Figures(kills, len(crowd.user_ids), Counter(crowd.answers), figures.untold)


def _kill_while_starting(service: Service) -> None:
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=PROJECT, env=service.environment, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(random.uniform(0, 1))
        process.kill()


# --- kill -9 of the process that writes the embedded store ---

# Each step can be taken again without harm, and is one entry of the log. Of six steps three enrol somebody, the third
# adds a photo to the person of the second, the fourth removes that person's first photo, and the last one erases the
# person of the fifth.
WRITER = """
import sys
from itertools import count
from pathlib import Path
import numpy as np
from gallery import in_memory, snapshot, templates
from gallery.decisions import Gallery
from bootstrap import make_store

# So small that kills meet the snapshot's writing as well.
templates.BLOCK_ROWS = snapshot.BLOCK_ROWS = in_memory.BLOCK_ROWS = 16
in_memory.SAVED_AT_ONCE = 3
store = make_store(None, mongo_db="", mongo_collection="", data_dir=Path(sys.argv[1]))
store.prepare()
gallery = Gallery(store, "m", 512, snapshot=snapshot.SnapshotFolder(Path(sys.argv[1]) / "gallery", "", 512))
gallery.load()
for step in count(int(sys.argv[2])):
    kind = step % 6
    template = np.random.default_rng(step - {2: 1, 3: 2, 5: 1}.get(kind, 0)).standard_normal(512, np.float32)
    template /= np.linalg.norm(template)
    found = gallery.search(template)
    known = found.user_id if found is not None and found.cosine > 0.999 else None
    outcome = {2: "added", 3: "removed", 5: "erased"}.get(kind)
    if kind == 2:
        gallery.add_photo(
            known, template, match_cosine=0.999, duplicate_cosine=0.999, max_photos=5, request_key=f"step {step}"
        )
    elif kind == 3:
        if len(store.find_person(known).photos) == 2:
            gallery.remove_photo(known, 1)
    elif kind == 5:
        if known is not None:
            gallery.erase(known)
    else:
        outcome = gallery.enrol(template, duplicate_cosine=0.999, request_key=f"step {step}")
    print(step, outcome, flush=True)
"""


def kill_the_writer(folder: Path, kills: int) -> Figures:
    """Kill a process that changes the embedded store without a pause, at random moments of that."""
    done: list[str] = []
    untold = 0
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, folder, str(len(done))], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]
            timer = threading.Timer(random.uniform(0, 0.3), writer.kill)
            timer.start()
            lines += writer.stdout
        for line in lines:
            if line.endswith("\n"):  # the last one may have been cut off
                step, outcome = line.split()
                assert int(step) == len(done)
                done.append(outcome)
        untold += _check_steps(folder, done)
    return Figures(kills, sum(step % 6 in (0, 1, 4) for step in range(len(done))), untold=untold)


def _check_steps(folder: Path, done: list[str]) -> int:
    """Assert that the log holds what was done, and no more than one step beyond, which is returned."""
    store = make_store(None, mongo_db="", mongo_collection="", data_dir=folder)
    store.prepare()
    entries = assert_whole(store)
    store.close()
    untold = len(entries) - len(done)
    assert untold in (0, 1)
    gone = {entry.removes for entry in entries} | {entry.erases for entry in entries}
    for step, (entry, outcome) in enumerate(zip(entries, done, strict=False)):
        kind = step % 6
        if kind == 5:
            assert entry.erases == done[step - 1]
        elif kind == 3:
            assert entry.removes == entries[step - 2].seq
        else:
            user_id = done[step - 1] if kind == 2 else outcome
            assert entry.is_added == (kind == 2 and entry.template is not None)
            assert (entry.template is None) == bool({entry.seq, user_id} & gone)
            if entry.template is not None:
                assert entry.user_id == user_id
                assert np.vecdot(entry.template, a_template(step - (kind == 2))) > SAME
    return untold


# --- kill -9 of the database server ---


def kill_the_server(service: Service, server: MongoServer, kills: int) -> Figures:
    """Kill the database server at random moments under one service process, which recovers each time."""

    def outage(least_s: float) -> None:
        server.kill()
        time.sleep(least_s + random.uniform(0, 0.5))
        server.start()

    # Every second one is longer than requests wait for a log that is not read.
    return trouble_the_service(service, [functools.partial(outage, 1.2 * (number % 2)) for number in range(kills)])


def trouble_the_service(service: Service, outages: list[Callable[[], None]], mongo_uri: str | None = None) -> Figures:
    """Let each outage happen under load at a random moment; the same service process recovers from each.

    Args:
        service: not yet started.
        outages: each begins a trouble, and ends it before it returns.
        mongo_uri: a way to the records that has none of these troubles; by default the service's own.
    """
    crowd, untold = Crowd(service), 0
    service.start()
    for outage in outages:
        with crowd.signing_up():
            crowd.wait_for_more()
            time.sleep(random.uniform(0, 0.2))
            outage()
            crowd.wait_for_more()
        with records_of(service, mongo_uri) as store:
            untold += crowd.check(store)
        crowd.settle()
    assert service.process.poll() is None
    with records_of(service, mongo_uri) as store:
        assert crowd.check(store) == 0
    return Figures(len(outages), len(crowd.user_ids), Counter(crowd.answers), untold)


# --- a line to the database, and a primary, that fail ---

LINE_TROUBLES = ("cut", "answer lost", "not primary", "stepped down", "unconfirmed")


class Line:
    """A TCP proxy before a MongoDB server, which fails as long as `trouble` names one of `LINE_TROUBLES`.

    - cut: nothing gets through in either direction, and every connection ends.
    - answer lost: inserts reach the server; the connection ends before their answer.
    - not primary: the server has stepped down and refuses to read and to write.
    - stepped down: the server steps down after it has written the next insert, and says only that.
    - unconfirmed: the same, said as a write concern that was not satisfied.

    With `replica_set` the server behind looks like the only member of one, so that PyMongo sends inserts again by
    itself; like a real member, the line then answers a repeated insert as it was answered first.
    """

    def __init__(self, server: MongoServer, *, replica_set: bool = False) -> None:
        self.trouble: str | None = None
        self._behind = ("127.0.0.1", server.port)
        self._copy_set = replica_set
        self._insert_lock = threading.Lock()
        self._inserted: dict[bytes, bytes] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = "{}:{}".format(*self._listener.getsockname())
        self.uri = f"mongodb://{self._address}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._behind) as server:
            while message := _receive(client):
                answer = self._answer(message, server)
                if answer is None:
                    return
                client.sendall(answer)

    def _answer(self, message: bytes, server: socket.socket) -> bytes | None:
        command = _document(message)
        name = next(iter(command))
        if name == "insert":
            # One at a time, so that a server steps down once.
            with self._insert_lock:
                return self._insert(message, command, server)
        trouble = self.trouble
        if trouble == "cut":
            return None
        if name in ("hello", "ismaster", "isMaster"):
            return self._hello(_forwarded(message, server), primary=trouble != "not primary")
        if trouble == "not primary" and name == "find":
            return _reply(message, _NOT_PRIMARY)
        return _forwarded(message, server)

    def _insert(self, message: bytes, command: dict[str, Any], server: socket.socket) -> bytes | None:
        trouble = self.trouble
        if trouble == "cut":
            return None
        # What a member of a replica set says so that the driver tries again by itself.
        label: dict[str, Any] = {"errorLabels": ["RetryableWriteError"]} if self._copy_set else {}
        if trouble == "not primary":
            return _reply(message, _NOT_PRIMARY | label)
        attempt = bson.encode({name: command.get(name) for name in ("lsid", "txnNumber")})
        if "txnNumber" not in command or attempt not in self._inserted:
            self._inserted[attempt] = _forwarded(message, server)
        answer = _document(self._inserted[attempt])
        if trouble == "answer lost":
            return None
        if trouble is None:
            return _reply(message, answer)
        self.trouble = "not primary"
        return _reply(message, (_STEPPED_DOWN if trouble == "stepped down" else answer | _UNCONFIRMED) | label)

    def _hello(self, answer: bytes, *, primary: bool) -> bytes:
        if not self._copy_set:
            return answer
        # `ismaster` is what the first, older kind of greeting asks for.
        role = {"isWritablePrimary": primary, "ismaster": primary, "secondary": not primary}
        member = {"setName": "rs", "hosts": [self._address], "me": self._address, **role}
        return _with_document(answer, _document(answer) | member)

    def outage(self, trouble: str) -> None:
        """Have `trouble` for a random time."""
        self.trouble = trouble
        time.sleep(random.uniform(0.05, 0.8))
        self.recover()

    def recover(self) -> None:
        """Have no trouble any more."""
        with self._insert_lock:
            self.trouble = None


_NOT_PRIMARY = {"ok": 0.0, "errmsg": "not primary", "code": 10107, "codeName": "NotWritablePrimary"}
_STEPPED_DOWN = {"ok": 0.0, "errmsg": "stepping down", "code": 189, "codeName": "PrimarySteppedDown"}
_UNCONFIRMED = {"writeConcernError": {"code": 189, "codeName": "PrimarySteppedDown", "errmsg": "stepping down"}}
_OP_MSG, _OP_REPLY = 2013, 1


def _receive(connection: socket.socket) -> bytes:
    """Return one whole message, nothing when the connection has ended."""
    head = connection.recv(4, socket.MSG_WAITALL)
    return head + connection.recv(struct.unpack("<i", head)[0] - 4, socket.MSG_WAITALL) if len(head) == 4 else b""


def _forwarded(message: bytes, server: socket.socket) -> bytes:
    server.sendall(message)
    answer = _receive(server)
    if not answer:
        raise ConnectionResetError
    return answer


def _document_at(message: bytes) -> int:
    (kind,) = struct.unpack_from("<i", message, 12)
    if kind == _OP_MSG:
        return 21
    # The older kind of greeting: its document follows 20 bytes in the answer, a name and two numbers in the question.
    return 36 if kind == _OP_REPLY else message.index(b"\0", 20) + 9


def _document(message: bytes) -> dict[str, Any]:
    at = _document_at(message)
    return bson.decode(message[at : at + struct.unpack_from("<i", message, at)[0]])


def _with_document(message: bytes, document: dict[str, Any]) -> bytes:
    body = message[4 : _document_at(message)] + bson.encode(document)
    return struct.pack("<i", 4 + len(body)) + body


def _reply(question: bytes, document: dict[str, Any]) -> bytes:
    (asked,) = struct.unpack_from("<i", question, 4)
    body = struct.pack("<iiiIB", asked, asked, _OP_MSG, 0, 0) + bson.encode(document)
    return struct.pack("<i", 4 + len(body)) + body


def line_outages(line: Line, count: int) -> list[Callable[[], None]]:
    """Each of the line's troubles in turn."""
    troubles = itertools.islice(itertools.cycle(LINE_TROUBLES), count)
    return [functools.partial(line.outage, trouble) for trouble in troubles]


# --- a disk that fails ---

# SQLite refuses writes with its own error as long as the file that this names is there: nothing else makes a file
# read-only under a process that has it open, short of remounting its file system.
MAY_BE_READ_ONLY = """
import os, sqlite3

class Connection(sqlite3.Connection):
    def execute(self, sql, *values):
        if sql.startswith("BEGIN"):
            super().execute(f"PRAGMA query_only = {os.path.exists(os.environ['READ_ONLY'])}")
        return super().execute(sql, *values)

connect = sqlite3.connect
sqlite3.connect = lambda *positional, **named: connect(*positional, factory=Connection, **named)
"""


@dataclass(frozen=True)
class Disk:
    """What can happen to the disk of one service on SQLite, each until the block is left."""

    service: Service
    folder: Path

    @classmethod
    def of_a_service(cls, folder: Path) -> Disk:
        """Make a service whose disk can fail."""
        (folder / "site").mkdir(parents=True)
        (folder / "site" / "sitecustomize.py").write_text(MAY_BE_READ_ONLY)
        environment = {"PYTHONPATH": str(folder / "site"), "READ_ONLY": str(folder / "read-only")}
        return cls(a_service(folder, **environment), folder)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """No file can grow beyond what SQLite's log has now."""
        process, size = self.service.process.pid, (self.folder / "data" / "faces.sqlite3-wal").stat().st_size
        limit = resource.prlimit(process, resource.RLIMIT_FSIZE)
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, limit[1]))
        yield
        resource.prlimit(process, resource.RLIMIT_FSIZE, limit)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """The file can be read and not written."""
        (self.folder / "read-only").touch()
        yield
        (self.folder / "read-only").unlink()

    def outages(self, count: int) -> list[Callable[[], None]]:
        """Both troubles in turn, each for a random time."""

        def outage(trouble: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
            with trouble():
                time.sleep(random.uniform(0.05, 0.5))

        troubles = itertools.islice(itertools.cycle((self.full, self.read_only)), count)
        return [functools.partial(outage, trouble) for trouble in troubles]
