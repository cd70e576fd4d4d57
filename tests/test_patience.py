"""A store that is away: it is waited for, that is said, and what waiting cannot mend is an error at once."""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cloudpickle
import pytest
from pyarrow import fs

from raydiff.errors import ConfigError, DataError, StorageError
from raydiff.patience import PATIENCE, PatientFiles, patience_s, patient, patiently
from raydiff.storage import Storage
from tests.object_store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("store"))
    yield store
    store.kill()


@contextmanager
def away(store: Store, seconds: float, *, killed: bool) -> Iterator[None]:
    """The store answers nothing, or is not there, for so long."""

    def come_back() -> None:
        time.sleep(seconds)
        (store.start if killed else store.resume)()

    (store.kill if killed else store.pause)()
    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_what_is_asked_of_a_store_that_was_killed_is_done_when_it_is_back(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage.of(store.uri(f"store/{tmp_path.name}"))
    storage.write("kept", b"before")
    storage.write("gone", b"before")
    (tmp_path / "large").write_bytes(bytes(12 * 2**20))
    with storage.open("kept") as half_read:
        assert half_read.read(3) == b"bef"
        for work, found in (
            (lambda: storage.put("large", tmp_path / "large"), None), (lambda: half_read.read(), b"ore"),
            (lambda: storage.delete("gone"), None),
        ):  # fmt: skip
            with away(store, 0.3, killed=True):
                assert work() == found
    assert storage.files() == {"kept": 6, "large": 12 * 2**20}
    messages = [record.getMessage() for record in caplog.records if record.name == "raydiff.patience"]
    assert messages[0].startswith(f"s3://store/{tmp_path.name}/")
    assert "the store is away (" in messages[0]
    assert "trying again for 1" in messages[0]
    assert "the store is back after" in messages[-1]
    assert "secret" not in str(messages)


def test_a_store_that_takes_connections_and_answers_nothing_is_away(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage.of(store.uri(f"store/{tmp_path.name}"))
    storage.write("new", b"now")
    with away(store, 4.5, killed=False):
        assert storage.exists("new")
    messages = [record.getMessage() for record in caplog.records if record.name == "raydiff.patience"]
    assert "Timeout was reached" in messages[0]
    assert "the store is back after" in messages[-1]


def test_patience_ends(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.of(store.uri(f"store/{tmp_path.name}"), field="--out")
    monkeypatch.setenv(PATIENCE, "0.2")
    store.kill()
    try:
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"^s3://store/.*/x: cannot be written .*change --out"):
            storage.write("x", b"")
        with pytest.raises(DataError, match=r"/x: cannot be read"):
            storage.read("x")
        assert time.monotonic() - started < 30
    finally:
        store.start()


@pytest.mark.parametrize("place", ["nowhere/x", "store/gone"])
def test_what_waiting_cannot_mend_is_an_error_at_once(
    store: Store, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="cannot be read"):
        Storage.of(store.uri(place)).read("x")
    assert time.monotonic() - started < 30
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_disk_that_is_full_is_not_waited_for() -> None:
    tries = []

    def write() -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        patiently("there", write)
    assert len(tries) == 1


def test_what_pyarrow_does_with_it(object_store: Callable[[str], str], tmp_path: Path) -> None:
    """As Ray does: sent to another process, files copied in both directions, moved and removed."""
    storage = Storage.of(object_store(f"store/{tmp_path.name}"))
    files = cloudpickle.loads(cloudpickle.dumps(storage.filesystem))
    assert files == storage.filesystem
    (tmp_path / "here" / "a").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "here" / "a" / f"{i}").write_bytes(bytes([i]) * 100_000)
    root = storage.path("there")
    files.create_dir(root)
    fs.copy_files(str(tmp_path / "here"), root, destination_filesystem=files)
    fs.copy_files(root, str(tmp_path / "back"), source_filesystem=files)
    assert [(tmp_path / "back" / "a" / f"{i}").read_bytes()[:1] for i in range(20)] == [bytes([i]) for i in range(20)]
    files.copy_file(f"{root}/a/1", f"{root}/b")
    files.move(f"{root}/b", f"{root}/c")
    assert files.get_file_info(f"{root}/b").type == fs.FileType.NotFound
    with files.open_input_file(f"{root}/c") as file:
        assert (file.size(), file.seek(99_999), file.read(5), file.tell()) == (100_000, 99_999, b"\x01", 100_000)
    files.delete_dir_contents(f"{root}/a")
    files.delete_dir(root)
    assert files.get_file_info(root).type == fs.FileType.NotFound
    with pytest.raises(FileNotFoundError):
        files.delete_file(f"{root}/c")


def test_a_local_file_system_stays_as_it_is() -> None:
    local = fs.LocalFileSystem()
    assert patient(local) is local
    assert isinstance(patient(fs._MockFileSystem()).handler, PatientFiles)


@pytest.mark.parametrize("said", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(PATIENCE, said)
    with pytest.raises(ConfigError, match=rf"^{PATIENCE} is '{said}'; give a number of seconds"):
        patience_s()


def test_google_is_asked_once_too() -> None:
    handler = patient(fs.GcsFileSystem(anonymous=True, default_bucket_location="EU")).handler
    options = handler.inner.__reduce__()[1][0]
    assert options["retry_time_limit"].total_seconds() == 1
    assert (options["anonymous"], options["default_bucket_location"]) == (True, "EU")
    assert cloudpickle.loads(cloudpickle.dumps(handler)) == handler


def test_half_a_file_is_not_sent_where_there_is_no_room_to_keep_it(
    object_store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of its own would need root; the limit on a file's size ends a write in the same way."""
    storage = Storage.of(object_store(f"store/{tmp_path.name}"))
    monkeypatch.setattr("raydiff.patience._IN_MEMORY", 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = storage.filesystem.open_output_stream(storage.path("whole"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="too large"):
            file.write(b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.close()
    assert storage.files() == {}
