"""The seccomp filter of the sandbox: what a confined program may not ask of the kernel."""

import errno
import functools
import importlib.util
import tempfile

# Refused by name. Where a number is given, libseccomp 2.5 does not know the name; from 424 on numbers are the same on
# every architecture. What only the sandbox without namespaces needs is refused in both: one filter to test.
_REFUSED = {
    "other processes": "ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd=438 process_madvise=440"
    " process_mrelease=448 kill tkill tgkill pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo setpriority ioprio_set"
    " sched_setaffinity sched_setscheduler sched_setparam sched_setattr migrate_pages move_pages get_robust_list",
    "more processes": "fork vfork",
    "memory that no limit of a process counts": "shmget shmat shmctl msgget msgsnd semget semtimedop memfd_create"
    " memfd_secret=447",
    "network": "socket socketpair connect bind listen accept accept4 sendto sendmmsg",
    "keys and the kernel's other doors": "keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup=425"
    " io_uring_enter=426 io_uring_register=427 personality modify_ldt syslog acct swapon swapoff reboot kexec_load"
    " kexec_file_load init_module finit_module delete_module quotactl lookup_dcookie fanotify_init inotify_init"
    " inotify_init1 mq_open",
    "other roots": "mount umount2 pivot_root chroot unshare setns open_tree=428 move_mount=429 fsopen=430 fsconfig=431"
    " fsmount=432 fspick=433 mount_setattr=442 open_by_handle_at name_to_handle_at",
    # Landlock says nothing of these, and truncate only from its third version on.
    "what belongs to files": "chmod fchmod fchmodat fchmodat2=452 chown fchown lchown fchownat utime utimes utimensat"
    " futimesat setxattr lsetxattr fsetxattr setxattrat=463 removexattr lremovexattr fremovexattr removexattrat=466"
    " truncate",
}
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1


@functools.cache
def seccomp_filter() -> bytes:
    """The filter as BPF: threads but no processes, no signals but to itself, and nothing of _REFUSED: EPERM.

    Raises OSError where pyseccomp or libseccomp is not there.
    """
    if importlib.util.find_spec("pyseccomp") is None:
        raise OSError("pyseccomp is not installed: pip install 'prism_mcore[rl]'")
    try:
        import pyseccomp
    except Exception as error:  # it looks for the library when it is imported
        raise OSError(f"libseccomp cannot be loaded ({error}): apt-get install libseccomp2") from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refuse = pyseccomp.ERRNO(errno.EPERM)
    for name, _, number in (word.partition("=") for words in _REFUSED.values() for word in words.split()):
        call = int(number) if number else _number(name)
        if call >= 0:
            rules.add_rule(refuse, call)
    # clone3 hides its flags in memory; told that there is none, the C library takes clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(refuse, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0))  # other processes' limits
    rules.add_rule(refuse, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, _PR_SET_PDEATHSIG))  # to outlive the one above
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _number(name: str) -> int:
    """A system call's number here; below 0 where this architecture has none of the name: aarch64 has no fork."""
    import pyseccomp

    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))
    except (OSError, ValueError):
        return -1
