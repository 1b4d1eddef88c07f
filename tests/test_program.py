"""What programs do first happens in programs alone."""

import os
import signal
import subprocess
import sys

CODE = """
import warnings
before = list(warnings.filters)
import prism_mcore
assert warnings.filters == before, warnings.filters
from prism_mcore import program
{first}
import torch.distributed.c10d_logger as there
said = "`torch.distributed.all_gather_into_tensor` is deprecated", "`torch.distributed.send` is deprecated"
for message in said:
    warnings.warn_explicit(message, FutureWarning, "file", 1, module="torch.distributed.c10d_logger")
"""


def warnings_of(first: str, **environment: str) -> str:
    command = [sys.executable, "-c", CODE.format(first=first)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stderr


def test_importing_the_package_silences_nothing():
    assert "all_gather" in warnings_of("") and "send" in warnings_of("")


def test_programs_leave_out_what_is_expected_and_nothing_else():
    assert "all_gather" not in (shown := warnings_of("program.begin()")) and "send" in shown
    assert "all_gather" in warnings_of("program.begin()", PYTHONWARNINGS="always")


def run_under(parent: str, child: str) -> str:
    """Run code in a process whose parent runs other code, which gets the child's as argument."""
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


LEAVES = """
import os, subprocess, sys
from prism_mcore import program
{environment}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
"""
STAYS = "import time; time.sleep(1); from prism_mcore import program; {begin}; print('goes on')"


def test_a_child_whose_parent_was_gone_before_it_could_ask_ends():
    ours = LEAVES.format(environment="environment = program.environment()")
    assert run_under(ours, STAYS.format(begin="program.end_with_parent()")) == ""


def test_a_program_started_by_hand_outlives_its_shell():
    by_hand = LEAVES.format(environment="environment = {k: v for k, v in os.environ.items() if 'ELASTIC' not in k}")
    assert run_under(by_hand, STAYS.format(begin="program.begin()")) == "goes on\n"
    assert run_under(by_hand, STAYS.format(begin="program.end_with_parent()")) == "goes on\n"


STARTING = """
import os, signal, sys, threading
from prism_mcore import program
program.begin({resumes})
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
import megatron.core.optimizer
"""


def test_a_signal_during_start_up_means_start_again(tmp_path):
    """Of a job whose time is over before its ranks have imported: nothing is lost, and nothing has failed."""
    file = tmp_path / "exit_code"
    for resumes, code, recorded in ((True, 75, "75\n"), (False, -signal.SIGUSR1, "")):
        file.write_text("")
        environment = os.environ | {"EXIT_CODE_FILE": str(file)}
        done = subprocess.run([sys.executable, "-c", STARTING.format(resumes=resumes)], env=environment, timeout=120)
        assert (done.returncode, file.read_text()) == (code, recorded)


COMPILER = """
from prism_mcore import program
program.begin()
import sys, torch, megatron.core.fusions.fused_bias_swiglu as there
print(torch.cuda.is_available() or "torch._inductor.compile_fx" not in sys.modules, torch.jit.ScriptModule.__name__)
print(there.swiglu(torch.ones(2, 4)).tolist())
"""


def test_programs_do_not_import_a_compiler_that_a_cpu_never_uses():
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("True ")
