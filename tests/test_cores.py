"""nanolost/cores.py: affinity and the quotas of both versions of control groups."""
import os

import pytest

from nanolost import cores
from nanolost.cores import usable_cores

@pytest.fixture
def granted(monkeypatch):
    """A process that may run on eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

def groups(tmp_path, own: str, **files) -> tuple[str, str]:
    """Folders of control groups. files: path → content; own: the process's list of groups."""
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "self").write_text(own)
    return str(tmp_path / "cgroup"), str(tmp_path / "self")

def v2(tmp_path, folders: dict[str, str], own: str = "/a/b"):
    files = {os.path.join(folder, "cpu.max").lstrip("/"): quota for folder, quota in folders.items()}
    return groups(tmp_path, f"0::{own}\n", **files)

@pytest.mark.parametrize("quota, expected", [
    ("max 100000", 8), ("200000 100000", 2), ("150000 100000", 1), ("10000 100000", 1), ("9900000 100000", 8),
    ("", 8), ("x y", 8), ("100000 0", 8), ("100000", 8)])
def test_a_quota_limits_the_cores_and_is_at_least_one(tmp_path, granted, quota, expected):
    assert usable_cores(*v2(tmp_path, {"/a/b": quota + "\n"})) == expected

@pytest.mark.parametrize("folder", ["/", "/a", "/a/b"])
def test_the_quota_of_a_group_above_counts(tmp_path, granted, folder):
    assert usable_cores(*v2(tmp_path, {folder: "300000 100000\n"})) == 3

def test_inside_a_container_the_group_at_the_top_counts(tmp_path, granted):
    assert usable_cores(*v2(tmp_path, {"/": "300000 100000\n"}, own="/docker/0123")) == 3

@pytest.mark.parametrize("quota, expected", [("-1", 8), ("250000", 2)])
def test_a_quota_of_version_1_counts(tmp_path, granted, quota, expected):
    files = {"cpu/a/cpu.cfs_quota_us": quota + "\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(*groups(tmp_path, "5:memory:/a\n4:cpuacct,cpu:/a\n0::/\n", **files)) == expected

def test_affinity_counts_where_there_is_no_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert usable_cores(str(tmp_path), str(tmp_path / "none")) == 3

def test_without_affinity_the_machine_s_cores_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(str(tmp_path), str(tmp_path / "none")) == 1

@pytest.mark.parametrize("content", ["", "odd\n", "0::\n", ":\n", "a:b\n"])
def test_an_odd_list_of_groups_is_passed_over(tmp_path, granted, content):
    assert usable_cores(*groups(tmp_path, content)) == 8

def test_what_this_machine_says_is_a_number_of_its_cores():
    assert 1 <= cores.usable_cores() <= os.cpu_count()
