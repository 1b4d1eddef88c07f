"""Where programs that a model wrote are run: nothing that they do is seen outside but what they return or print."""

from prism_mcore.rewards.sandbox.host import Outcome, Returned, Sandbox, SandboxError, confine_self

__all__ = ["Outcome", "Returned", "Sandbox", "SandboxError", "confine_self"]
