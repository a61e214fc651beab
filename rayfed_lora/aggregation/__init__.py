"""Client updates to the next global state: one file a family of rules, one table of rules."""
