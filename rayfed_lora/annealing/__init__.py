"""The schedule of the parameter budget: SA-FedLoRA's own part."""
