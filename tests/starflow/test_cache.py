"""The file cache: each file made once, bounded, evicted files stay readable to those who have them open."""

import contextlib
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


class Disk:
    """What is left of a disk for the files of a cache, those included that are deleted but held open."""

    def __init__(self, folder, size):
        self.folder, self.size, self.held = folder, size, {}

    def hold(self, file):
        self.held[file] = os.fstat(file.fileno())

    def release_deleted(self):
        """As a reader does whose cache may have evicted what it maps."""
        for file in list(self.held):
            if not os.path.exists(file.name):
                del self.held[file]
                file.close()

    def used(self):
        sizes = {status.st_ino: status.st_size for status in self.held.values()}
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread renames or removes it
                sizes[path.stat().st_ino] = path.stat().st_size
        return sum(sizes.values())

    def write(self, path):
        path.write_bytes(b"part")
        if self.used() + 16 > self.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(bytes(20))

    def fill(self, cache, count):
        """With files of 20 bytes, the first the oldest."""
        now = time.time() - 60
        for number in range(count):
            cache.open(str(number), self.write).close()
            os.utime(self.folder / str(number), (now + number, now + number))
        settle(self.folder)


def settle(folder):
    """As when the last shrinking was long ago."""
    os.utime(folder / "evict.lock", (0, 0))


def names(folder):
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def short_pauses(monkeypatch):
    """And the last shrinking was long ago only when the test says so."""
    monkeypatch.setattr("starflow.cache.SETTLED_SECONDS", 1000.0)
    monkeypatch.setattr("starflow.cache.PAUSES", (0.0, 0.01, 0.02))


def test_a_full_disk_is_the_limit_from_then_on(tmp_path, short_pauses):
    """As long as there is something to evict."""
    cache, disk = FileCache(tmp_path), Disk(tmp_path, 100)
    disk.fill(cache, 5)
    cache.open("5", disk.write).close()
    assert names(tmp_path) == {"3", "4", "5"}
    assert cache.limit == 75
    disk.size = 0
    settle(tmp_path)
    with pytest.raises(StoreError, match="cannot take 6: No space left"):
        cache.open("6", disk.write)
    assert names(tmp_path) == {"4", "5"}  # one shrink, and nothing unfinished in the way
    for name in names(tmp_path):
        (tmp_path / name).unlink()
    (tmp_path / "another~").write_bytes(b"part")
    settle(tmp_path)
    with pytest.raises(StoreError, match="cannot take 7: No space left"):
        cache.open("7", disk.write)
    assert cache.limit == 45  # the cache is not what fills the disk


def test_threads_and_processes_that_find_the_disk_full_at_once_shrink_the_cache_once(tmp_path, short_pauses):
    caches, disk = [FileCache(tmp_path), FileCache(tmp_path)], Disk(tmp_path, 800)
    disk.fill(caches[0], 40)
    tried, together = set(), threading.Barrier(8)

    def make(path):
        if path not in tried:
            tried.add(path)
            path.write_bytes(b"part")
            together.wait(30)
            raise OSError(errno.ENOSPC, "No space left on device")
        disk.write(path)

    def work(number):
        caches[number % 2].open(f"new-{number}", make).close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine, theirs = sorted(cache.limit for cache in caches)
    assert 600 <= mine <= 0.75 * (800 + 8 * 4)
    assert theirs == 64 * 2**30
    assert names(tmp_path) >= {f"new-{number}" for number in range(8)} | {str(number) for number in range(20, 40)}


def test_a_full_disk_waits_for_what_other_processes_hold(tmp_path, short_pauses):
    """A file that is evicted frees its room only when they close it, which they do when they next open one."""
    cache, other, disk = FileCache(tmp_path), FileCache(tmp_path), Disk(tmp_path, 100)
    disk.fill(cache, 5)
    for number in range(5):
        disk.hold((tmp_path / str(number)).open("rb"))
    other.on_evict.append(disk.release_deleted)
    attempts = []

    def make(path):
        attempts.append(len(disk.held))
        if len(attempts) == 3:
            other.open("4", disk.write).close()
        disk.write(path)

    cache.open("5", make).close()
    assert attempts == [5, 5, 5]
    assert cache.limit == 75
    assert names(tmp_path) == {"3", "4", "5"}
    for file in disk.held:
        file.close()


def test_room_is_made_for_what_else_needs_the_disk(tmp_path):
    cache, disk = FileCache(tmp_path / "cache"), Disk(tmp_path / "cache", 100)
    cache.make_room(1)
    disk.fill(cache, 5)
    cache.make_room(21)
    assert names(disk.folder) == {"2", "3", "4"}
    assert cache.limit == 64 * 2**30
    cache.make_room(1000)
    cache.make_room(1000)
    assert not names(disk.folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        FileCache(tmp_path / "file").open("name", lambda path: path.write_bytes(b""))
