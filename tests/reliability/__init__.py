"""What must not go wrong, tried: ./dev reliability runs it and prints a table (docs/reliability.md)."""
