"""What tools/fuzz.py is made of: changes of a network, cases made of them, and the child process that runs one."""
