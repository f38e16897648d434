"""What tools/tables.py is made of: rows, the footage they need, what is kept of them, and how it is shown."""
