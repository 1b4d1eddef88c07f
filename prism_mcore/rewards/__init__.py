"""Verifiable rewards: functions of (prompt record, response) that return named parts, by name in REWARDS."""

from prism_mcore.rewards.registry import REWARDS, Reward, check_record

__all__ = ["REWARDS", "Reward", "check_record"]
