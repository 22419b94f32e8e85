"""Loads the running service: throughput and latency by the number of clients, overload, and memory over a soak.

    python benchmarks/load.py MODEL PHOTO [PHOTO ...] [--seconds 8] [--soak 20000]

MODEL is what FACE_MODEL takes. The service runs as its own process with its own SQLite store; clients are processes
that send prepared bytes over kept connections, so that they take little of the cores. The ceiling is a bare loop in
this process: the very model runs of a `/verify` (recorded once, replayed without decoding, checks, HTTP or search), in
as many threads as the service has model slots. Both are measured in turns, so that the machine's other load meets both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from bootstrap import load_engine
from engines.base import Engine
from engines.face_attributes import FaceAttributesModel
from errors import FaceError
from face_checks import check_photo
from photos import decode
from settings import Settings

Answer = tuple[int, float]


class Service:
    """`python app.py` on a free port."""

    def __init__(self, model: str, folder: Path, **settings: str) -> None:
        environment = {
            **os.environ,
            **{"FACE_MODEL": model, "MONGO_URI": "", "DATA_DIR": str(folder), "UPLOADS_DIR": str(folder / "uploads")},
            **{"PORT": "0", "HOST": "127.0.0.1", "LOG_LEVEL": "INFO", "VERIFY_THRESHOLD": "0.4", **settings},
        }
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen([sys.executable, "app.py"], cwd=PROJECT, env=environment, stderr=self.log)
        self.port = 0
        while not self.port:
            if self.process.poll() is not None:
                raise SystemExit((folder / "log.txt").read_text())
            time.sleep(0.05)
            for line in (folder / "log.txt").read_text().splitlines():
                if "Ready: listening" in line:
                    self.port = int(line.rsplit(":", 1)[1])

    def _processes(self) -> list[Path]:
        """The service's own process, and those of its decoders."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [Path("/proc", pid) for one in tasks for pid in one.read_text().split()] + [
            Path(f"/proc/{self.process.pid}")
        ]

    def memory_mib(self) -> float:
        lines = [line for one in self._processes() for line in (one / "status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    def cpu_seconds(self) -> float:
        fields = [(one / "stat").read_text().rpartition(")")[2].split() for one in self._processes()]
        return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def request(route: str, photo: bytes) -> bytes:
    """The bytes of one upload."""
    boundary = b"a-boundary-that-no-photo-has"
    head = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="p.jpg"\r\n\r\n' % boundary
    body = head + photo + b"\r\n--%b--\r\n" % boundary
    fields = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={boundary.decode()}\r\n"
    return fields.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def exchange(connection: socket.socket, sent: bytes) -> int:
    """Send one request over a kept connection and read the whole answer; returns its status."""
    connection.sendall(sent)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _some(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _some(connection)
    return int(answer[9:12])


def _some(connection: socket.socket) -> bytes:
    some = connection.recv(65536)
    if not some:
        raise ConnectionError
    return some


def client(port: int, bodies: list[bytes], seconds: float, pause: float, together: Any, answers: Any) -> None:  # noqa: PLR0917
    """Send one request after the other for so long; hand over all (status, seconds), 0 for a lost connection."""
    found: list[Answer] = []
    connection = socket.create_connection(("127.0.0.1", port), 60)
    number = together.wait(60)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        try:
            status = exchange(connection, bodies[(number + len(found)) % len(bodies)])
        except OSError:
            status = 0
            connection = socket.create_connection(("127.0.0.1", port), 60)
        found.append((status, time.perf_counter() - begun))
        if status == 503:
            time.sleep(pause)
    answers.put(found)


def crowd(port: int, bodies: list[bytes], clients: int, seconds: float, pause: float = 0.0) -> list[Answer]:
    """What `clients` clients got in `seconds`; who is turned away comes back after `pause` seconds."""
    return timed_crowd(port, bodies, clients, seconds, pause)[0]


def timed_crowd(
    port: int, bodies: list[bytes], clients: int, seconds: float, pause: float = 0.0
) -> tuple[list[Answer], float]:
    """The same, and the seconds from their first requests to the last answer."""
    context = multiprocessing.get_context("fork")
    answers, together = context.Queue(), context.Barrier(clients + 1)
    running = [
        context.Process(target=client, args=(port, bodies, seconds, pause, together, answers), daemon=True)
        for _ in range(clients)
    ]
    for one in running:
        one.start()
    together.wait(60)
    begun = time.perf_counter()
    found = [answer for _ in running for answer in answers.get()]
    taken = time.perf_counter() - begun
    for one in running:
        one.join()
    return found, taken


class Recorder:
    """Stands in for a model session, and keeps what it was run on."""

    def __init__(self, session: Any, runs: list[Callable[[], object]]) -> None:
        self._session, self._runs = session, runs

    def run(self, names: Any, feeds: Any, *rest: Any) -> Any:
        self._runs.append(lambda: self._session.run(names, feeds, *rest))
        return self._session.run(names, feeds, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def all_of(runs: list[Callable[[], object]]) -> None:
    for run in runs:
        run()


def recorded_session(session_for: Callable[[Any], Any], runs: list[Callable[[], object]], size: Any) -> Recorder:
    return Recorder(session_for(size), runs)


def model_runs(engine: Engine, photos: list[bytes], limits: Settings) -> list[Callable[[], object]]:
    """One callable for each photo that makes exactly the model runs of its verification."""
    reader = FaceAttributesModel(PROJECT / "models")
    recorded: list[Callable[[], object]] = []
    for data in photos:
        image = decode.decode(data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels).pixels
        runs: list[Callable[[], object]] = []
        detector, recogniser = engine._detector, engine._recogniser  # type: ignore[attr-defined]
        session_for, session = detector._session_for_input_size, recogniser.session
        detector._session_for_input_size = partial(recorded_session, session_for, runs)
        recogniser.session = Recorder(session, runs)
        reader_session, reader._session = reader._session, Recorder(reader._session, runs)
        found = check_photo(image, engine.detect(image), limits, reader)
        engine.embed(image, found.face)
        reader._session = reader_session
        detector._session_for_input_size, recogniser.session = session_for, session
        recorded.append(partial(all_of, runs))
    return recorded


def bare_loop(runs: list[Callable[[], object]], threads: int, seconds: float) -> tuple[float, float]:
    """Verifications a second, if they were nothing but their model runs, and CPU seconds for each."""
    done = Counter[int]()
    until = time.perf_counter() + seconds

    def loop(number: int) -> None:
        while time.perf_counter() < until:
            runs[(number + done[number]) % len(runs)]()
            done[number] += 1

    begun, cpu = time.perf_counter(), time.process_time()
    running = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    total = done.total()
    return total / (time.perf_counter() - begun), (time.process_time() - cpu) / total


def usable(engine: Engine, photos: list[bytes], limits: Settings) -> list[bytes]:
    """The photos that pass every check."""
    reader = FaceAttributesModel(PROJECT / "models")
    passed = []
    for data in photos:
        image = decode.decode(data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels).pixels
        try:
            check_photo(image, engine.detect(image), limits, reader)
        except FaceError:
            continue
        passed.append(data)
    return passed


def quantiles(answers: list[Answer], *statuses: int) -> str:
    """p50, p95 and p99 in milliseconds."""
    taken = sorted(1000 * seconds for got, seconds in answers if not statuses or got in statuses)
    if len(taken) < 2:
        return "-"
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    return f"{cuts[49]:.0f} / {cuts[94]:.0f} / {cuts[98]:.0f}"


def probe(port: int, over: Any, answers: Any) -> None:
    """Ask for the health check now and then; hand over all (status, seconds)."""
    found: list[Answer] = []
    connection = socket.create_connection(("127.0.0.1", port), 60)
    while not over.wait(0.05):
        begun = time.perf_counter()
        found.append((exchange(connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), time.perf_counter() - begun))
    answers.put(found)


def slow_and_broken(port: int, over: Any) -> None:
    """Clients that trickle their upload, and clients that go away in the middle of it."""
    sent = request("/verify", b"x" * 100_000)
    slow = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(40)]
    for one in slow:
        one.sendall(sent[:200])
    while not over.wait(0.2):
        for one in slow:
            one.sendall(b"x")
        with socket.create_connection(("127.0.0.1", port), 60) as broken:
            broken.sendall(sent[:50_000])
    for one in slow:
        one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slots", type=int, default=Settings().model_slots)
    parser.add_argument("--threads", type=int, default=Settings().model_threads)
    parser.add_argument("--soak", type=int, default=0)
    parsed = parser.parse_args()
    limits = Settings()
    engine = load_engine(
        parsed.model, models_dir=limits.models_dir, hub_timeout_s=1, threads=parsed.threads, may_fall_back=False
    )
    photos = usable(engine, [path.read_bytes() for path in parsed.photos], limits)
    runs = model_runs(engine, photos, limits)
    bodies = [request("/verify", photo) for photo in photos]
    with tempfile.TemporaryDirectory() as folder:
        service = Service(
            parsed.model, Path(folder), MODEL_SLOTS=str(parsed.slots), MODEL_THREADS=str(parsed.threads),
            REQUEST_THREADS="64",
        )  # fmt: skip
        crowd(service.port, [request("/signUp", photo) for photo in photos[:3]], 1, 1)
        print(f"{engine.name}, {len(photos)} photos, {parsed.slots} slots of {parsed.threads or 'all'} threads")
        bare_loop(runs, parsed.slots, 1)
        for clients in (1, 2, 8, 32):
            threads = min(parsed.slots, clients)
            ratios, cpu_ratios = [], []
            for _ in range(parsed.rounds):
                before = bare_loop(runs, threads, parsed.seconds / 2)
                used = service.cpu_seconds()
                answers, taken = timed_crowd(service.port, bodies, clients, parsed.seconds)
                rate = len(answers) / taken
                used = (service.cpu_seconds() - used) / len(answers)
                after = bare_loop(runs, threads, parsed.seconds / 2)
                ratios.append(rate / statistics.mean([before[0], after[0]]))
                cpu_ratios.append(statistics.mean([before[1], after[1]]) / used)
            print(
                f"  {clients:2} clients: {rate:6.1f} a second; of the bare loop's rate "
                f"{statistics.median(ratios):.2f}, by CPU seconds {statistics.median(cpu_ratios):.2f}; "
                f"p50 / p95 / p99 {quantiles(answers)} ms; {dict(Counter(status for status, _ in answers))}"
            )
        service.stop()
        overload(parsed, bodies, Path(folder))
        if parsed.soak:
            soak(parsed, bodies, Path(folder))


def overload(parsed: argparse.Namespace, bodies: list[bytes], folder: Path) -> None:
    """Three times as many clients as there are places, with slow and broken ones among them."""
    service = Service(parsed.model, folder, QUEUE_WAIT_S="0.5", MODEL_SLOTS=str(parsed.slots), REQUEST_THREADS="32")
    few = crowd(service.port, bodies, parsed.slots + 8, parsed.seconds)
    # Processes, as the crowd is: one that is forked beside a thread may inherit a lock that nobody will open.
    context = multiprocessing.get_context("fork")
    over, answers = context.Event(), context.Queue()
    beside = [
        context.Process(target=slow_and_broken, args=(service.port, over), daemon=True),
        context.Process(target=probe, args=(service.port, over, answers), daemon=True),
    ]
    for one in beside:
        one.start()
    crowds = {pause: crowd(service.port, bodies, 3 * (parsed.slots + 8), parsed.seconds, pause) for pause in (0.0, 0.5)}
    over.set()
    probes = answers.get()
    for one in beside:
        one.join()
    places = parsed.slots + 8
    print(
        f"  overload: {3 * places} clients for {places} places, slow and broken ones beside them; GET / in "
        f"{quantiles(probes)} ms; accepted in {quantiles(few, 200, 401)} ms with {places} clients alone"
    )
    for pause, many in crowds.items():
        refused = [one for one in many if one[0] == 503]
        print(
            f"    who is refused comes back after {pause:g} s: {len(refused)} refused in {quantiles(refused)} ms; "
            f"{sum(status in (200, 401) for status, _ in many)} accepted in {quantiles(many, 200, 401)} ms; "
            f"{sum(status == 0 for status, _ in many)} connections lost"
        )
    service.stop()


def soak(parsed: argparse.Namespace, bodies: list[bytes], folder: Path) -> None:
    """The process's own memory while it serves many requests."""
    service = Service(parsed.model, folder)
    done, sizes = 0, []
    while done < parsed.soak:
        done += len(crowd(service.port, bodies, 4, max(parsed.seconds, 5)))
        sizes.append(f"{done}: {service.memory_mib():.0f}")
    print("  memory of its own, MiB by requests served: " + ", ".join(sizes[:: max(1, len(sizes) // 10)] + sizes[-1:]))
    service.stop()


if __name__ == "__main__":
    main()
