"""What commands keep on disk while they look at a text (nanolost/calibration.py)."""
import os
import signal
import subprocess
import sys

import pytest

from nanolost.calibration import temporary_folder

HOLDER = """
import time
from nanolost.calibration import temporary_folder
with temporary_folder(0) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # tempfile asks once a process
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path

@pytest.fixture
def holder(home):
    """A process that has a temporary folder, and that folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    folder = process.stdout.readline().strip()
    yield process, folder
    process.kill()
    process.wait()
    process.stdout.close()

def test_a_temporary_folder_goes_in_the_end(home):
    with temporary_folder(0) as folder:
        assert os.path.dirname(folder) == str(home)
        assert os.path.isdir(folder)
    assert not os.listdir(home)

def test_what_a_killed_command_left_goes_with_the_next_one(holder, home):
    process, left = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.path.isdir(left)
    with temporary_folder(0) as folder:
        assert os.listdir(home) == [os.path.basename(folder)]

def test_a_folder_that_is_in_use_stays(holder, home):
    _, used = holder
    with temporary_folder(0) as folder:
        assert folder != used
        assert os.path.isdir(used)

def test_folders_of_others_stay(home):
    other = home / "nanolost_notes"
    other.mkdir()
    with temporary_folder(0):
        pass
    assert os.listdir(home) == ["nanolost_notes"]
