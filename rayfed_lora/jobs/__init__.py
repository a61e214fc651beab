"""Ray jobs that run recipes."""
