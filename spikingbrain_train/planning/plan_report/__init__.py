"""What people and programs are shown of a plan, one section a file. Pure Python: no torch."""
