"""What is done to a job without a cluster: one function per kind of fault, each for one job with at most `left` kills.

In: a Bench and how many kills are left. Out: nothing; the bench's log and findings hold it. Every random choice comes from
the bench's own generator, which is seeded by the seed, the kind and the number of the job.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from .bench import ANSWERED, FAILED, Bench
from .endpoint import Endpoint
from .faults import LATER
from .spec import DELIBERATE, DONE, NO_LEASE

ROWS = 120  # of a job: some 28 commits on its way from input to receipt
MOMENTS = ("kill:before", "kill:inside", "kill:after")


def small(bench: Bench, delay_us: int = 200, failing: float = 0.5) -> None:
    """A job of ROWS rows, such a share of such jobs with a row that always fails: its shard is then begun again by each run."""
    rows = bench.rows(ROWS)
    if bench.rng.random() < failing:
        rows[f"!fail {bench.name}"] = FAILED
    bench.make(rows, delay_us=delay_us)


def points(bench: Bench) -> list[tuple[int, str]]:
    """Every commit of a job without faults, with every moment of it, shuffled. Found once per store, by running one."""
    known = bench.lab.points
    if bench.s3 not in known:
        probe = Bench(bench.lab, f"probe.{bench.store}/0", s3=bench.s3)
        small(probe, failing=1.0)
        if probe.go() != DONE:
            raise RuntimeError(f"a job without faults does not end well: {probe.said}")
        known[bench.s3] = [(number + 1, moment) for number in range(len(probe.commits())) for moment in MOMENTS]
        random.Random(bench.lab.seed).shuffle(known[bench.s3])
        probe.remove()
    return known[bench.s3]


def commit(bench: Bench, left: int) -> None:
    """SIGKILL at a commit: job i dies first at point i, so that enough jobs meet every point; then at random ones."""
    every = points(bench)
    small(bench, failing=1.0)
    number, moment = every[bench.number] if bench.number < len(every) else bench.rng.choice(every)
    run = "run0000"
    code = bench.go({number: moment}, run)
    if code < 0:
        bench.lab.hit[bench.s3].add((number, moment))
    elif number <= len(bench.commits()):
        bench.fault(f"was to die at commit {number} ({moment}), ended with {code}")
    kills = int(code < 0)
    while code != DONE and kills < left and bench.rng.random() < 0.6:
        bench.look(str(bench.runs[-1]))
        run = run if bench.rng.random() < 0.5 else f"run{kills:04}"  # Ray brought the worker back, or another driver goes on
        code = bench.go({bench.rng.randint(1, len(every) // len(MOMENTS)): bench.rng.choice(MOMENTS)}, run)
        kills += code < 0
    bench.look(str(bench.runs[-1]))
    bench.resume()


def timed(bench: Bench, left: int) -> None:
    """SIGKILL at random times."""
    small(bench, delay_us=1500)
    for _ in range(bench.rng.randint(1, min(left, 5))):
        run = bench.begin()
        run.wait(bench.rng.uniform(0.02, 0.6))
        bench.kill(run, "at a random time")
        if bench.end(run) == DONE:
            break
        bench.look(str(bench.runs[-1]))
    bench.resume()


SHORT_FLUSH_S = 2.5  # twice that is 5 s: a write of 0.1 s, on a disk that others keep busy, is still far below 5 % of them
SURVIVE = 0.95  # of the rows that were finished, in each job that ran for longer than two flush_seconds


def short(bench: Bench, left: int) -> None:
    """SIGKILL at a random time of a job of a few seconds, some with a row on which the engine hangs: nearly all finished rows survive."""
    rng = bench.rng
    hangs = rng.random() < 0.3
    bench.make(bench.rows(2600) | ({f"!hang {bench.name}": ANSWERED} if hangs else {}), shards=rng.choice((1, 2, 8)), delay_us=3000)
    bench.fields |= {"flush_seconds": SHORT_FLUSH_S, "flush_rows": 10_000, "stall_seconds": 0}
    run = bench.begin()
    for _ in range(1000):
        run.wait(0.01)
        if not run.alive or (began := bench.log.first("d")):
            break
    else:
        began = time.time()
    run.wait(max(0.0, began + SHORT_FLUSH_S * rng.uniform(2.05, 3) - time.time()))
    bench.kill(run, "at a random time")
    bench.end(run)
    finished, safe = bench.log.count("d"), bench.safe()
    if run.code < 0 and finished:
        bench.survived.append(safe / finished)
        if safe < SURVIVE * finished:
            bench.fault(f"{safe} of {finished} finished rows survived a kill{', the engine hung' if hangs else ''}")
    bench.fields["model"] = {**bench.fields["model"], "model": "null"}
    bench.resume()


def again(bench: Bench, left: int) -> None:
    """Writes that are done and then fail once, so that whoever wrote may write again."""
    every = points(bench)
    small(bench)
    count = min(left, bench.rng.randint(1, 3))
    bench.go({bench.rng.randint(1, len(every) // len(MOMENTS)): "fail:after" for _ in range(count)})
    bench.look(str(bench.runs[-1]))
    bench.resume()


def later(bench: Bench, left: int) -> None:
    """Writes that S3 puts off: nothing is written until they are asked again, which the run does by itself."""
    every = points(bench)
    small(bench)
    count = min(left, bench.rng.randint(1, 3))
    code = bench.go({bench.rng.randint(1, len(every) // len(MOMENTS)): bench.rng.choice(LATER) for _ in range(count)})
    if code != DONE:
        bench.fault(f"writes that were put off ended the run with {code}: {bench.said[-400:]}")
    bench.look(str(bench.runs[-1]))
    bench.resume()


def full(bench: Bench, left: int) -> None:
    """No space left on the device while a chosen write goes on."""
    every = points(bench)
    small(bench)
    count = min(left, bench.rng.randint(1, 3))
    bench.go({bench.rng.randint(1, len(every) // len(MOMENTS)): "fail:inside" for _ in range(count)})
    bench.look(str(bench.runs[-1]))
    bench.resume()


def twin(bench: Bench, left: int) -> None:
    """Two drivers of one job, in half of the jobs without the lease that has one wait: no row may depend on it. One of them is
    killed, at a commit or at any time."""
    every = points(bench)
    more = {NO_LEASE: "1"} if bench.rng.random() < 0.5 else {}
    small(bench, delay_us=1000)
    rng = bench.rng
    at_commit = rng.random() < 0.5
    first = bench.begin({rng.randint(1, len(every) // len(MOMENTS)): rng.choice(MOMENTS)} if at_commit else None, "one", more)
    time.sleep(rng.uniform(0, 0.4))
    second = bench.begin(None, "two", more)
    if not at_commit:
        time.sleep(rng.uniform(0, 0.4))
        bench.kill(rng.choice((first, second)), "one of two")
    for run in (first, second):
        bench.end(run)  # one that finds its work swept by the other may end with an error of ours, but not with a stack trace
    bench.look("two runs at once")
    bench.resume()


def poison(bench: Bench, left: int) -> None:
    """A row that kills the engine's process each time it is asked; Ray brings the worker back each time."""
    bench.make({**bench.rows(ROWS), f"!exit {bench.name}": FAILED})
    _brought_back(bench, died=137, what="a row killed the engine")


def hang(bench: Bench, left: int) -> None:
    """A row on which the engine hangs each time it is asked: after stall_seconds the worker ends itself."""
    bench.make({**bench.rows(ROWS), f"!hang {bench.name}": FAILED})
    bench.fields |= {"stall_seconds": 0.5}
    _brought_back(bench, died=1, what="an engine hung")


def _brought_back(bench: Bench, died: int, what: str) -> None:
    """The same run again and again while its process ends with the code `died`; then it should have ended well."""
    for _ in range(20):
        run = bench.begin(None, "run0000")
        if bench.end(run, expected=(died,)) != died:
            break
        bench.note_kill(run.pid, what)
        bench.look(str(run))
    bench.resume()


def endpoint(bench: Bench, left: int) -> None:
    """An endpoint that answers 429 and 500 with JSON bodies, breaks connections and stalls; then one that refuses the key."""
    with Endpoint(bench.rng.random()) as server:
        bench.pace = {"BACKOFF_S": 0.02, "_PASS_BACKOFF_S": 0.05}
        model = {"engine": "openai", "model": "some/model", "base_url": server.url, "request_timeout_s": 0.5, "concurrency": 8}
        bench.make(bench.rows(ROWS), model=model)
        bench.fields |= {"attempts": 20}
        server.share = 0.3
        server.refuse_after = bench.rng.randint(10, 60)
        code = bench.go()
        if code != DELIBERATE or "401" not in bench.said:
            bench.fault(f"an endpoint that refuses the key ended the run with {code}: {bench.said}")
        server.refuse_after = -1
        run = bench.begin()
        run.wait(bench.rng.uniform(0.1, 1.0))
        bench.kill(run, "while the endpoint failed")
        bench.end(run)
        bench.look(str(bench.runs[-1]))
        bench.resume()
        bench.faults |= server.faults


def full_disk(bench: Bench, left: int) -> None:
    """A file system of 1 MB that is really full, at a random fill; space is made bit by bit until the job is done."""
    mount = bench.folder / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True)
    try:
        bench.root = str(mount / "store")
        small(bench)
        more = {"TMPDIR": str(mount)} if bench.rng.random() < 0.5 else {}
        room, code = bench.rng.randint(0, 60) * 1024, DELIBERATE
        for _ in range(12):
            _fill(mount, room)
            code = bench.go(more=more)
            if code == DONE:
                break
            bench.note_kill(0, "the disk is full", "f")
            if "No space left" not in bench.said:
                bench.fault(f"a full disk ended the run with {code}: {bench.said[-400:]}")
            bench.look(str(bench.runs[-1]))
            room += bench.rng.randint(10, 60) * 1024
        (mount / "filler").unlink()
        bench.resume()
        bench.check()  # while the disk is there
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def _fill(mount: Path, room: int) -> None:
    """Leave `room` bytes free."""
    filler = mount / "filler"
    filler.unlink(missing_ok=True)
    space = os.statvfs(mount)
    with filler.open("wb") as file:
        file.write(bytes(max(0, space.f_bavail * space.f_bsize - room)))
