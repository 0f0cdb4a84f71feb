"""Work in a container: what this machine must have for it, and how a tool runs in one."""
