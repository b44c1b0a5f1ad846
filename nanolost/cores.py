"""How many cores this process may use: fewer than the machine has, under taskset, a batch queue or in a
container."""
import os

def usable_cores(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Cores that the scheduler grants this process, at least 1: its CPU affinity, or the quota of its
    control groups where that is less. cgroups, own: where Linux shows them (man 7 cgroups)."""
    # macOS and Windows have neither affinity masks nor control groups
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for quota in _quotas(cgroups, own):
        # 1.5 counts as 1: threads beyond a quota are all stopped for the rest of each 100 ms
        cores = min(cores, int(quota))
    return max(1, cores)

def _quotas(cgroups: str, own: str):
    """The limits, in cores, of the control groups that this process is in and of those above them."""
    for line in _read(own).splitlines():
        # 0::/path in version 2, 4:cpu,cpuacct:/path in version 1
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            read_quota = _quota_v2
            folder = cgroups
        elif "cpu" in controllers.split(","):
            read_quota = _quota_v1
            folder = os.path.join(cgroups, "cpu")
        else:
            continue
        # inside a container the path may be the host's, where only the folder at the top is visible
        for part in ["", *path.split("/")]:
            folder = os.path.join(folder, part)
            quota = read_quota(folder)
            if quota is not None:
                yield quota

def _quota_v2(folder: str) -> float | None:
    words = _read(os.path.join(folder, "cpu.max")).split()
    if len(words) != 2:
        return None
    return _ratio(*words)

def _quota_v1(folder: str) -> float | None:
    quota = _read(os.path.join(folder, "cpu.cfs_quota_us"))
    period = _read(os.path.join(folder, "cpu.cfs_period_us"))
    return _ratio(quota.strip(), period.strip())

def _ratio(quota: str, period: str) -> float | None:
    # what stands there is the kernel's, but a container may show anything under the name
    # no limit is "max" in version 2, -1 in version 1
    if not quota.isdecimal() or not period.isdecimal():
        return None
    if int(period) == 0:
        return None
    return int(quota) / int(period)

def _read(path: str) -> str:
    # a system without control groups has no such files
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeError):
        return ""
