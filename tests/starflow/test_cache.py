"""The file cache: each file made once, bounded, evicted files stay readable to those who have them open."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from starflow.cache import UNFINISHED_SECONDS, FileCache
from starflow.errors import CorruptError, StoreError


def test_a_file_is_made_once_by_many_threads(tmp_path):
    cache, made, barrier = FileCache(tmp_path / "cache"), [], threading.Barrier(6)

    def make(path):
        made.append(path)
        path.write_bytes(b"content")

    def work():
        barrier.wait()
        with cache.open("name", make) as file:
            assert file.read() == b"content"

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_the_least_recently_used_go_first(tmp_path):
    cache = FileCache(tmp_path, limit=30)

    def open_file(name):
        return cache.open(name, lambda path: path.write_bytes(name.encode() * 10))

    held = open_file("a")
    now = time.time()
    os.utime(tmp_path / "a", (now - 20, now - 20))
    open_file("b").close()
    os.utime(tmp_path / "b", (now - 10, now - 10))
    open_file("a").close()  # used again: b is older now
    open_file("c").close()
    open_file("d").close()
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {"a", "c", "d"}
    assert held.read() == b"a" * 10
    held.close()


def test_a_crash_leaves_nothing_readable_and_is_swept(tmp_path):
    cache = FileCache(tmp_path)

    def crash(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.open("name", crash)
    old = time.time() - UNFINISHED_SECONDS - 1
    (tmp_path / "other~").write_bytes(b"half")
    os.utime(tmp_path / "other~", (old, old))
    with cache.open("name", lambda path: path.write_bytes(b"whole")) as file:
        assert file.read() == b"whole"
    assert not [path for path in tmp_path.iterdir() if "~" in path.name]


def test_a_file_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    FileCache(tmp_path).open("name", lambda path: path.write_bytes(b"whole")).close()
    assert synced == [str(tmp_path / "name~")]


def test_a_corrupt_file_is_made_anew_once(tmp_path):
    cache, made = FileCache(tmp_path), []

    def make(path):
        made.append(path)
        path.write_bytes(b"whole")

    def read(file):
        if (data := file.read()) != b"whole":
            raise CorruptError(f"{file.name} holds {data}")
        return data

    (tmp_path / "name").write_bytes(bytes(5))  # as a loss of power may leave it
    assert cache.read("name", make, read) == b"whole"
    assert cache.read("name", make, read) == b"whole"
    assert len(made) == 1
    with pytest.raises(CorruptError, match="other holds b'bad'"):
        cache.read("other", lambda path: path.write_bytes(b"bad"), read)


def test_another_process_killed_while_making_a_file_is_no_obstacle(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from starflow.cache import FileCache\n"
        "def make(path):\n"
        "    path.write_bytes(b'half'); print('making', flush=True); time.sleep(600)\n"
        f"FileCache(Path({str(tmp_path)!r})).open('name', make)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "making\n"
        found = []

        def wait_for_it():
            with FileCache(tmp_path).open("name", lambda path: path.write_bytes(b"whole")) as file:
                found.append(file.read())

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        waiting.join(0.2)
        assert not found  # the other process is making it
        child.kill()
        waiting.join(30)
    assert found == [b"whole"]


def test_a_full_disk_is_the_limit_from_then_on(tmp_path):
    """As long as there is something to evict."""
    cache, disk = FileCache(tmp_path), 100

    def write(path):
        if sum(file.stat().st_size for file in tmp_path.iterdir()) + 20 > disk:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(bytes(20))

    now = time.time()
    for number in range(5):
        cache.open(str(number), write).close()
        os.utime(tmp_path / str(number), (now - 10 + number, now - 10 + number))
    cache.open("5", write).close()
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"3", "4", "5"}
    assert cache.limit == 75
    disk = 0
    with pytest.raises(StoreError, match="cannot take 6: No space left"):
        cache.open("6", write)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        FileCache(tmp_path / "file").open("name", lambda path: path.write_bytes(b""))
