"""Leases of run folders: the files, their content, and how a process keeps or judges one."""
