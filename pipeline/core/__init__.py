"""What every room may use: errors, digests, values handed on, atomic files, child processes."""
