"""Files that one process owns, and files that several share."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stream.database import Unusable, open_database

ROOT = Path(__file__).parents[2]
SCHEMA = "CREATE TABLE numbers (n INTEGER) STRICT;"

OWNER = f"""
import sys
from pathlib import Path
from stream.database import open_database

database = open_database(Path(sys.argv[1]), "a file of numbers", version=1, schema="{SCHEMA}")
print("open", flush=True)
sys.stdin.read()
"""


def opened(path, **keys):
    return open_database(path, "a file of numbers", version=1, schema=SCHEMA, **keys)


def test_a_file_is_its_owners_until_that_is_killed(tmp_path):
    path = tmp_path / "numbers.db"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OWNER, str(path)], cwd=ROOT, **pipes) as owner:
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(Unusable, match=r"numbers\.db: is used by another process"):
            opened(path)
        owner.kill()
    opened(path).close()


def test_a_file_that_is_closed_is_free(tmp_path):
    path = tmp_path / "numbers.db"
    for _ in range(2):
        database = opened(path)
        with pytest.raises(Unusable):
            opened(path)
        database.close()


def test_a_file_that_cannot_be_used_is_not_held(tmp_path):
    path = tmp_path / "numbers.db"
    path.write_text("no database " * 100)
    for _ in range(2):
        with pytest.raises(Unusable, match="expected a file of numbers of version 1"):
            opened(path)


def test_a_shared_file_is_open_to_all(tmp_path):
    path = tmp_path / "numbers.db"
    one, other = opened(path, wal=False, shared=True), opened(path, wal=False, shared=True)
    one.close()
    other.close()
    assert list(tmp_path.iterdir()) == [path]


def test_what_lies_beside_it_is_as_private(tmp_path):
    path = tmp_path / "numbers.db"
    database = opened(path)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    database.close()
    assert modes == {0o600}
