"""Our downloader against ``huggingface_hub.snapshot_download`` with ``verify_repo_checksums``.

    python -m benchmarks.download

Both fetch the same repositories from a local Hub (``tests/hub_server.py``) in another process, each
in a fresh process of its own, and check every file against its announced hash. One connection gets
``RATE`` bytes a second and every answer takes ``STALL`` seconds, so that connections cost what they
cost on a network; without these, the two cores that serve and hash are the limit. Then each is
killed (SIGKILL) when about ``KILLED_AT`` of a repository has arrived, and started again: what
counts is the bytes that the second start asks for. ``hf_xet`` takes no part: it needs Xet's
storage, which the local Hub does not have.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.hub_server import Repo, safetensors_bytes, serve

RATE, STALL, KILLED_AT = 40e6, 0.05, 0.7
SHAPES = {"8 files of 50 MB": (8, 50_000_000), "200 files of 1 MB": (200, 1_000_000)}

OURS = """
import sys
from pathlib import Path
from stages.sources import hub
source = hub.HubData(kind="hub", repo="owner/data", revision="main", files=["*"])
hub.fetch_data(source, Path(sys.argv[1]))
"""
THEIRS = """
import sys
from huggingface_hub import HfApi, snapshot_download
snapshot_download("owner/data", repo_type="dataset", local_dir=sys.argv[1])
found = HfApi().verify_repo_checksums("owner/data", repo_type="dataset", local_dir=sys.argv[1])
assert not found.mismatches and not found.missing_paths
"""
CLIENTS = {"ours": OURS, "snapshot_download": THEIRS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    for limited in (False, True):
        for name, (count, size) in SHAPES.items():
            for client in CLIENTS:
                taken = sorted(timed(client, count, size, limited) for _ in range(repeats))
                each = f"{RATE / 1e6:.0f} MB/s a connection, {1000 * STALL:.0f} ms an answer"
                speed = count * size / taken[len(taken) // 2] / 1e6
                print(
                    f"{name}, {each if limited else 'no limit'}, {client}: median "
                    f"{taken[len(taken) // 2]:.1f} s ({speed:.0f} MB/s)",
                    flush=True,
                )
    for client in CLIENTS:
        print(f"2 files of 200 MB, killed at {KILLED_AT:.0%}, {client}: {resumed(client)}")


def timed(client: str, count: int, size: int, limited: bool) -> float:
    """Seconds from the start of the client's process to its end."""
    with Server(count, size, limited) as server, tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        assert server.start(client, Path(folder) / "out").wait() == 0
        return time.monotonic() - start


def resumed(client: str) -> str:
    """What a second start asks for after the first was killed."""
    count, size = 2, 200_000_000
    with Server(count, size, limited=True) as server, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        child = server.start(client, out)
        while bytes_in(out) < KILLED_AT * count * size:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        arrived, before = bytes_in(out), server.asked()
        assert server.start(client, out).wait() == 0
        again = server.asked() - before
        left = bytes_in(out) - count * size
    total = count * size
    return (
        f"{arrived / 1e6:.0f} of {total / 1e6:.0f} MB were here, then {again / 1e6:.0f} MB were "
        f"asked for ({(again - total + arrived) / 1e6:.0f} MB a second time); "
        f"{left / 1e6:.0f} MB of other files are left"
    )


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # moved into its place just now
            continue
    return total


class Server:
    """The local Hub, in another process."""

    def __init__(self, count: int, size: int, limited: bool) -> None:
        self.here, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, count, size, limited), daemon=True
        )

    def __enter__(self) -> "Server":
        self.process.start()
        self.url: str = self.here.recv()
        self.home = tempfile.mkdtemp()
        return self

    def __exit__(self, *_: object) -> None:
        self.here.send("end")
        self.process.join()
        shutil.rmtree(self.home)

    def start(self, client: str, out: Path) -> "subprocess.Popen[bytes]":
        environment = {"HF_ENDPOINT": self.url, "HF_HOME": self.home, "NO_PROXY": "127.0.0.1"}
        return subprocess.Popen(
            [sys.executable, "-c", CLIENTS[client], str(out)],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=None if "VERBOSE" in os.environ else subprocess.DEVNULL,
        )

    def asked(self) -> int:
        """Bytes of files that were asked for so far."""
        self.here.send("asked")
        return int(self.here.recv())


def _serve(pipe: Connection, count: int, size: int, limited: bool) -> None:
    files = {f"{i:03d}.parquet": safetensors_bytes(f"t{i}", size) for i in range(count)}
    repo = Repo("owner/data", files, "dataset")
    if limited:
        repo.rate, repo.stall = RATE, STALL
    repo.commit = "0" * 40  # else each answer would hash all files
    with serve([repo]) as url:
        pipe.send(url)
        while pipe.recv() != "end":
            asked = 0
            for request in repo.downloads():
                start = request.headers.get("range", "bytes=0-").removeprefix("bytes=")
                asked += len(files[str(request.file)]) - int(start.removesuffix("-"))
            pipe.send(asked)


if __name__ == "__main__":
    main()
