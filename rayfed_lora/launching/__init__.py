"""Runs recipes, one or several, in this process or on Ray; plans and exports them."""
