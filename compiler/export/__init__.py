"""Engines that leave Python behind: one module a format, one contract of their state."""
