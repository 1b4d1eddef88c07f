"""The process that verifies responses: one JSON object per line in, one out. Started and killed by verifier.py."""

import importlib
import json
import os
import resource
import sys

from prism_mcore import program

MEMORY_BYTES = 4 << 30  # an expression that explodes ends this process, not the machine


def main() -> None:
    """Answer {"ticket", "reward", "record", "response"} with {"ticket", "status", "parts", "error"} until stdin ends.

    A task with an "extractor" is graded by what that takes from the response, and answered with the "extraction".
    Arguments: packages to import first, and `--programs LIMITS` for rewards that run programs. The first line out is
    empty: ready. By then the process is confined, where the machine can: what a response makes of a library has no
    network, no process beside it, no file to write, and none to read but Python's.
    """
    program.end_with_parent()  # a response that hangs must not outlive a killed run
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from prism_mcore.rewards import REWARDS, code
    from prism_mcore.rewards.extraction import extract
    from prism_mcore.rewards.sandbox import SandboxError, confine_self

    packages, _, programs = " ".join(sys.argv[1:]).partition("--programs")
    for package in packages.split():
        importlib.import_module(package)
    if programs:
        code.configure(code.Limits(**json.loads(programs)))
    confine_self()
    out.write("\n")
    out.flush()
    for line in sys.stdin:
        task = json.loads(line)
        answer = {"ticket": task["ticket"], "status": "ok", "parts": {}, "error": ""}
        try:
            if extractor := task.get("extractor"):
                answer["extraction"], task["response"] = extract(task["reward"], task["response"], extractor)
            answer["parts"] = REWARDS[task["reward"]].function(task["record"], task["response"])
        except SandboxError:
            raise  # its pool is told by the end of this process, which cannot start another sandbox any more
        except Exception as error:  # whatever a response makes a library do costs that response alone
            answer |= {"status": "crash", "error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
