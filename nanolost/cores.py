"""How many cores this process may use: fewer than the machine has, under taskset, a batch queue or a container."""
import os

def usable_cores(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Cores that the scheduler grants this process, at least 1: its CPU affinity, or the quota of its
    control groups where that is less. cgroups, own: where Linux shows them (man 7 cgroups)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        # macOS and Windows have neither affinity masks nor control groups
        cores = os.cpu_count() or 1
    # a quota of 1.5 counts as 1: more threads than it covers are all stopped for the rest of each 100 ms
    quotas = [int(quota) for quota in _quotas(cgroups, own)]
    return max(1, min([cores, *quotas]))

def _quotas(cgroups: str, own: str):
    """The limits, in cores, of the control groups that this process is in and of those above them."""
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder, read_quota = cgroups, _quota_v2
        elif "cpu" in controllers.split(","):
            folder, read_quota = os.path.join(cgroups, "cpu"), _quota_v1
        else:
            continue
        # inside a container the path may be the host's, where only the folder at the top is visible
        names = [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):
            quota = read_quota(os.path.join(folder, *names[:depth]))
            if quota is not None:
                yield quota

def _quota_v2(folder: str) -> float | None:
    return _ratio(*_read(os.path.join(folder, "cpu.max")).split())

def _quota_v1(folder: str) -> float | None:
    quota = _read(os.path.join(folder, "cpu.cfs_quota_us"))
    period = _read(os.path.join(folder, "cpu.cfs_period_us"))
    return _ratio(quota.strip(), period.strip())

def _ratio(quota: str = "", period: str = "") -> float | None:
    # no limit is "max" in version 2, -1 in version 1
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)

def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeError):
        return ""
