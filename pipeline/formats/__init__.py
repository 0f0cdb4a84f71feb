"""What an engine format is: one folder each."""
